"""The meaning of each option of torch_ref's `from_pretrained`; a value that is not supported is an error."""

from __future__ import annotations

import inspect
import json
import pathlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig
from transformers.models.qwen3_moe import modeling_qwen3_moe

import torch_ref.experts
import torch_ref.model
from peers.make_checkpoint import TINY, make_checkpoint
from tests.conftest import BITSANDBYTES
from tests.test_torch_ref import distance
from tests.tolerances import bound
from torch_ref import FastQwen3Model, FastQwen3MoeModel
from torch_ref.patch import CausalLM_fast_forward

IDS = torch.arange(80).view(2, 40) * 3 % 320


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """Stock transformers before and after each test."""
    yield
    FastQwen3MoeModel.unpatch()
    FastQwen3Model.unpatch()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_checkpoint(tmp_path_factory.mktemp("options") / "tiny", TINY)


def load(folder: pathlib.Path, **options: Any) -> tuple[Any, Any]:
    return FastQwen3MoeModel.from_pretrained(str(folder), **({"load_in_4bit": False, "dtype": torch.float32} | options))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS.to(model.device)).logits.cpu()


def stock(folder: pathlib.Path, **rope: Any) -> torch.Tensor:
    """The logits of transformers, its rotary parameters changed by `rope`."""
    config = Qwen3MoeConfig.from_pretrained(folder)
    config.rope_parameters = dict(config.rope_parameters or {}) | rope
    return logits(
        AutoModelForCausalLM.from_pretrained(folder, config=config, use_safetensors=True, trust_remote_code=False)
    )


FROM_PRETRAINED = {
    "model_name": "Qwen/Qwen3-30B-A3B",
    "max_seq_length": 4096,
    "dtype": None,
    "load_in_4bit": True,
    "token": None,
    "device_map": "sequential",
    "rope_scaling": None,
    "fix_tokenizer": True,
    "trust_remote_code": False,
    # not Unsloth's
    "experts_implementation": None,
    "attn_implementation": None,
}
GET_PEFT_MODEL = {
    "model": inspect.Parameter.empty,
    "r": 16,
    "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "lora_alpha": 16,
    "lora_dropout": 0,
    "bias": "none",
    "layers_to_transform": None,
    "use_gradient_checkpointing": True,
    "random_state": 3407,
    "use_rslora": False,
    "modules_to_save": None,
    "options": inspect.Parameter.empty,  # **options: the other fields of PEFT's LoraConfig
}


def signature(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    """The parameters of `function` in order, each with its default."""
    parameters = inspect.signature(function).parameters
    positional = [p for p in parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in positional)
    return [(name, p.default) for name, p in parameters.items()]


def test_the_signatures() -> None:
    assert issubclass(FastQwen3MoeModel, FastQwen3Model)
    assert signature(FastQwen3MoeModel.from_pretrained) == list(FROM_PRETRAINED.items())
    assert signature(FastQwen3Model.from_pretrained)[1:] == list(FROM_PRETRAINED.items())[1:]
    for model in (FastQwen3MoeModel, FastQwen3Model):
        assert signature(model.get_peft_model) == list(GET_PEFT_MODEL.items())
    last = inspect.signature(FastQwen3MoeModel.get_peft_model).parameters["options"]
    assert last.kind is inspect.Parameter.VAR_KEYWORD


def test_loading_patches(folder: pathlib.Path) -> None:
    assert modeling_qwen3_moe.Qwen3MoeForCausalLM.forward is not CausalLM_fast_forward
    expected = stock(folder)
    model, _ = load(folder)
    assert modeling_qwen3_moe.Qwen3MoeForCausalLM.forward is CausalLM_fast_forward
    assert not model.training and model.config.use_cache and model.device.type in ("cpu", "cuda")
    assert distance(logits(model), expected) <= bound("torch_ref_fp32")


@pytest.mark.parametrize("load_in_4bit", [True, False] if BITSANDBYTES else [False])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, torch.float32])
def test_dtype(dtype: Any, load_in_4bit: bool, folder: pathlib.Path) -> None:
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model, _ = load(folder, dtype=dtype, load_in_4bit=load_in_4bit)
    assert model.dtype == model.lm_head.weight.dtype == model.model.layers[0].mlp.gate.weight.dtype == expected
    assert logits(model).dtype == expected


@pytest.mark.parametrize(
    ("cuda", "bf16", "expected"),
    [(False, False, torch.float32), (True, True, torch.bfloat16), (True, False, torch.float16)],
)
def test_dtype_none(cuda: bool, bf16: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert torch_ref.model.choose_dtype(None) == expected
    if cuda and not bf16:
        with pytest.raises(ValueError, match="dtype: expected float16 or float32 on Tesla T4, found bfloat16"):
            torch_ref.model.choose_dtype("bfloat16")


@pytest.mark.parametrize("load_in_4bit", [True, False] if BITSANDBYTES else [False])
def test_rope_scaling(load_in_4bit: bool, folder: pathlib.Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0}
    for rope in (yarn, {"type": "linear", "factor": 2.0}, yarn | {"original_max_position_embeddings": 256}):
        model, _ = load(folder, rope_scaling=rope, max_seq_length=1024, load_in_4bit=load_in_4bit)
        kind = {"rope_type": rope.get("rope_type", "linear"), "factor": rope["factor"]}
        original = rope.get("original_max_position_embeddings", 1024)
        extra = {"original_max_position_embeddings": original} if kind["rope_type"] == "yarn" else {}
        config = Qwen3MoeConfig.from_pretrained(folder)
        config.rope_parameters = dict(config.rope_parameters or {}) | kind | extra
        expected = modeling_qwen3_moe.Qwen3MoeRotaryEmbedding(config)
        assert torch.equal(model.model.rotary_emb.inv_freq.cpu(), expected.inv_freq)
        assert model.model.rotary_emb.attention_scaling == expected.attention_scaling
        if not load_in_4bit:
            FastQwen3MoeModel.unpatch()
            found = logits(model)
            assert distance(found, stock(folder, **kind, **extra)) <= bound("torch_ref_fp32")
            assert distance(found, stock(folder)) > 1e-3


def test_a_longer_sequence_compresses_positions(folder: pathlib.Path) -> None:
    with pytest.warns(UserWarning, match="4096 positions exceed the model's 1024: they are compressed linearly by 4.0"):
        model, tokenizer = load(folder, max_seq_length=4096)
    assert model.max_seq_length == model.config.max_position_embeddings == tokenizer.model_max_length == 4096
    assert distance(logits(model), stock(folder, rope_type="linear", factor=4.0)) <= bound("torch_ref_fp32")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*positions exceed")
        model, tokenizer = load(folder)  # the default changes nothing
        assert model.max_seq_length == tokenizer.model_max_length == 1024
        assert distance(logits(model), stock(folder)) <= bound("torch_ref_fp32")
        model, _ = load(folder, max_seq_length=2048, rope_scaling={"rope_type": "yarn", "factor": 2.0})
        assert model.max_seq_length == 2048
        assert load(folder, max_seq_length=None)[0].max_seq_length == 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_length": 0}, "max_seq_length: expected a positive number, found 0"),
        (
            {"max_seq_length": 9000, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "max_seq_length: expected at most 4096, which yarn scaling reaches, found 9000",
        ),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling: expected rope_type among"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope_scaling: expected rope_type among"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: .*factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_scaling: expected a factor of at least 1"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "rope_scaling: expected a factor of at least 1"),
        ({"dtype": "int8"}, "dtype: expected bfloat16, float16 or float32, found 'int8'"),
        ({"experts_implementation": "fast"}, "experts_implementation: expected one of loop, grouped, found 'fast'"),
    ],
)
def test_what_cannot_be_honoured_is_named(options: dict[str, Any], message: str, folder: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(folder, **options)


def without(name: str) -> Callable[[pathlib.Path], None]:
    def change(folder: pathlib.Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, folder / "model.safetensors")

    return change


def stored_as(dtype: torch.dtype, name: str) -> Callable[[pathlib.Path], None]:
    def change(folder: pathlib.Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {name: tensors[name].to(dtype)}, folder / "model.safetensors")

    return change


def with_config(**fields: Any) -> Callable[[pathlib.Path], None]:
    def change(folder: pathlib.Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def written(name: str, text: str) -> Callable[[pathlib.Path], None]:
    def change(folder: pathlib.Path) -> None:
        (folder / name).write_text(text)

    return change


def in_shards(weight_map: Any) -> Callable[[pathlib.Path], None]:
    def change(folder: pathlib.Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


# what is done to a folder -> what the error says
BROKEN: dict[str, tuple[Callable[[pathlib.Path], None], str]] = {
    "a weight is missing": (without("model.norm.weight"), r"expected model\.norm\.weight, found none"),
    "a matrix of an expert is missing": (
        without("model.layers.1.mlp.experts.2.up_proj.weight"),
        r"expected model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight, found none",
    ),
    "the embedding is missing": (without("model.embed_tokens.weight"), r"expected model\.embed_tokens\.weight, found"),
    "more layers": (with_config(num_hidden_layers=5), r"expected model\.layers\.3\..*, found none"),
    "another width": (with_config(num_key_value_heads=1), r"k_proj\.weight: expected the shape \[\d+, \d+\], found"),
    "no object": (with_config(quantization_config="fp8"), r"config\.json: quantization_config: expected an object"),
    "a text": (with_config(rms_norm_eps="x"), r"expected a config\.json that transformers can load, .*rms_norm_eps"),
    "no heads": (with_config(num_attention_heads=0), r"num_attention_heads: expected a whole number of at least 1"),
    "no width of heads": (with_config(head_dim=None), r"head_dim: expected a whole number of at least 1, found None"),
    "no activation": (with_config(hidden_act="x"), r"hidden_act: expected an activation of transformers, found 'x'"),
    "codes": (
        stored_as(torch.float8_e4m3fn, "model.layers.0.self_attn.q_proj.weight"),
        r"q_proj\.weight: expected one of F32, .*no quantization_config, found F8_E4M3",
    ),
    "no JSON": (written("config.json", "{"), r"config\.json: expected JSON, found"),
    "no tokenizer": (written("tokenizer.json", "{"), "expected a tokenizer that transformers can load, found none"),
    "a page": (
        written("model.safetensors", "<html>"),
        r"model\.safetensors: expected a safetensors file, found a broken",
    ),
    "an index of nothing": (in_shards(None), r"index\.json: weight_map: expected names of files by key, found None"),
    "a shard that is missing": (in_shards({"x": "c.safetensors"}), r"expected the shard c\.safetensors"),
    "a tensor in two shards": (in_shards({"x": "a.safetensors", "y": "b.safetensors"}), "expected it in one file"),
}


@pytest.mark.parametrize("four_bit", [True, False] if BITSANDBYTES else [False])
@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named(case: str, four_bit: bool, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    change, says = BROKEN[case]
    change(pathlib.Path(shutil.copytree(folder, tmp_path / "tiny")))
    with pytest.raises(ValueError, match=says) as caught:
        load(tmp_path / "tiny", load_in_4bit=four_bit)
    assert str(caught.value).startswith(str(tmp_path / "tiny"))
    assert "\n" not in str(caught.value)


def test_what_is_no_model_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a model, found an adapter: load its base"):
        load(tmp_path)
    for path, found in ((tmp_path / "none", "neither"), (tmp_path / "adapter_config.json", "a file")):
        with pytest.raises(ValueError, match=f"model_name: expected a folder or a hub id, found {found}"):
            load(path)


def test_another_architecture_is_named(folder: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="model_name: expected a qwen3 checkpoint, found qwen3_moe"):
        FastQwen3Model.from_pretrained(str(folder))


@pytest.mark.parametrize("name", ["loop", "grouped"])
def test_experts_implementation(name: str, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load(folder, experts_implementation=name)
    used: list[str] = []

    def noted(key: str, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *arguments: used.append(key) or function(*arguments)

    functions = {key: noted(key, function) for key, function in torch_ref.experts.IMPLEMENTATIONS.items()}
    monkeypatch.setattr(torch_ref.experts, "IMPLEMENTATIONS", functions)
    logits(model)
    assert set(used) == {name}


def test_fix_tokenizer(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    broken = make_checkpoint(tmp_path / "broken", TINY)
    settings = json.loads((broken / "tokenizer_config.json").read_text())
    settings |= {"pad_token": "<|im_end|>", "padding_side": "left"}
    (broken / "tokenizer_config.json").write_text(json.dumps(settings))
    model, tokenizer = load(broken)
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side) == (
        "<|endoftext|>",
        "<|im_end|>",
        "right",
    )
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == 256
    model, tokenizer = load(broken, fix_tokenizer=False)
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<|im_end|>", "left")
    small = make_checkpoint(tmp_path / "small", TINY.replace(vocab_size=200))
    with pytest.raises(ValueError, match="fix_tokenizer: expected at most 200 tokens, the embedding's size, found 259"):
        load(small)
    tokenizer = AutoTokenizer.from_pretrained(broken, trust_remote_code=False)
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    with pytest.raises(ValueError, match="fix_tokenizer: expected a token for padding other than"):
        torch_ref.model.repair_tokenizer(tokenizer, TINY, 10)


def test_token_and_remote_code_reach_the_hub(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[Any, tuple[Any, Any]] = {}
    for loader in (torch_ref.model.AutoConfig, torch_ref.model.AutoTokenizer):

        def noted(*args: Any, real: Any = loader.from_pretrained, key: Any = loader, **kwargs: Any) -> Any:
            seen.setdefault(key, (kwargs.get("token"), kwargs.get("trust_remote_code")))
            return real(*args, **kwargs)

        monkeypatch.setattr(loader, "from_pretrained", noted)
    load(folder, token="hf_x", trust_remote_code=True)
    assert list(seen.values()) == [("hf_x", True)] * 2


def test_a_single_device_in_device_map(folder: pathlib.Path) -> None:
    model, _ = load(folder, device_map={"": "cpu"})
    assert model.device.type == "cpu"
    with pytest.raises(ValueError, match=r"(?i)device"):
        load(folder, device_map="somewhere")
