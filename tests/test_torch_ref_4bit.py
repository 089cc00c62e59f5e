"""torch_ref's 4-bit models against stock transformers on weights that bitsandbytes itself has encoded and decoded."""

from __future__ import annotations

import json
import logging
import pathlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import torch_ref.checkpoint
import torch_ref.experts
import torch_ref.quantize
from jaxmoe.config import Qwen3MoeConfig
from peers.make_checkpoint import TINY, make_checkpoint
from tests.test_torch_ref import distance
from tests.tolerances import bound
from torch_ref import FastQwen3MoeModel as Fast
from torch_ref.model import set_experts_implementation

MIXED = TINY.replace(mlp_only_layers=(1,), attention_bias=True)
UNEVEN = TINY.replace(moe_intermediate_size=7, num_hidden_layers=2)  # blocks of 64 straddle the experts
IDS = torch.arange(60).view(2, 30) * 4 % 320


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """Stock transformers before and after each test."""
    yield
    Fast.unpatch()


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
    return bnb.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")


def round_trip(weight: torch.Tensor) -> torch.Tensor:
    """A weight after 4-bit quantisation; flattened, since bitsandbytes on CPUs decodes no rows of half a block."""
    return bnb.dequantize_4bit(*encode(weight.flatten())).view(weight.shape)


def is_packed(key: str, router: bool = False) -> bool:
    """Whether torch_ref stores `key` in 4 bit; with `router`, the router too, as transformers 4 did."""
    return (".layers." in key and key.endswith("_proj.weight")) or (router and key.endswith("mlp.gate.weight"))


def rewritten(
    source: pathlib.Path, target: pathlib.Path, change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]
) -> pathlib.Path:
    """A copy of a checkpoint with every tensor replaced by the result of `change`."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in load_file(source / "model.safetensors").items():
        tensors |= change(key, tensor)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def decoded(source: pathlib.Path, target: pathlib.Path, router: bool = False) -> Any:
    """Stock transformers with the weights of `source` after 4-bit quantisation."""
    folder = rewritten(source, target, lambda k, t: {k: round_trip(t) if is_packed(k, router) else t})
    return AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        experts_implementation="eager",
        use_safetensors=True,
        trust_remote_code=False,
    )


def prequantized(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """The layout of transformers 4, written by bitsandbytes: every linear map of the layers, the router included."""

    def change(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not is_packed(key, router=True):
            return {key: tensor}
        codes, state = encode(tensor)
        return {key: codes} | {f"{key}.{name}": value for name, value in state.as_dict(packed=True).items()}

    rewritten(source, target, change)
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    raw = json.loads((target / "config.json").read_text()) | {"quantization_config": settings}
    (target / "config.json").write_text(json.dumps(raw))
    return target


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "mixed": make_checkpoint(root / "mixed", MIXED),
        "fused": make_checkpoint(root / "fused", MIXED, layout="fused"),
        "sharded": make_checkpoint(root / "sharded", MIXED, shards=3),
        "uneven": make_checkpoint(root / "uneven", UNEVEN),
    }


def load(folder: pathlib.Path, **options: Any) -> Any:
    """On the CPU in float32, even if there is a GPU: the expected numbers come from the CPU."""
    settings: dict[str, Any] = {"attn_implementation": "eager", "device_map": "cpu", "dtype": "float32"}
    return Fast.from_pretrained(str(folder), **(settings | options))[0]


def check(model: Any, expected: torch.Tensor) -> None:
    """The parity that every test here asserts, negative controls included."""
    assert distance(logits(model), expected) <= bound("torch_ref_fp32")


@pytest.mark.parametrize("name", ["mixed", "fused", "sharded", "uneven"])
def test_logits_equal_those_of_the_decoded_weights(
    name: str, folders: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    expected = logits(decoded(folders["uneven" if name == "uneven" else "mixed"], tmp_path / "decoded"))
    model = load(folders[name])
    for implementation in ("loop", "grouped") if name != "uneven" else ("loop",):
        set_experts_implementation(model, implementation)
        check(model, expected)
        one = logits(model, IDS[:1, :2])  # fewer routed rows than experts
        assert distance(one, expected[:1, :2]) <= bound("torch_ref_fp32")
    Fast.unpatch()  # transformers' own block calls the packed experts as well
    check(model, expected)


def swap_nibbles(patch: pytest.MonkeyPatch) -> None:
    real = torch_ref.quantize.dequantize_4bit
    patch.setattr(torch_ref.quantize, "dequantize_4bit", lambda codes, state: real(codes << 4 | codes >> 4, state))


def forget_the_mean_of_the_maxima(patch: pytest.MonkeyPatch) -> None:
    real = torch_ref.quantize.PackedStack.maxima
    patch.setattr(torch_ref.quantize.PackedStack, "maxima", lambda self: real(self) - self.offset[..., None])


def share_the_first_experts_statistics(patch: pytest.MonkeyPatch) -> None:
    real = torch_ref.quantize.PackedStack.maxima
    patch.setattr(torch_ref.quantize.PackedStack, "maxima", lambda self: real(self)[:1].expand_as(self.absmax).clone())


@pytest.mark.parametrize("fault", [swap_nibbles, forget_the_mean_of_the_maxima, share_the_first_experts_statistics])
def test_a_planted_fault_is_found(
    fault: Callable[[pytest.MonkeyPatch], None],
    folders: dict[str, pathlib.Path],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = logits(decoded(folders["mixed"], tmp_path / "decoded"))
    model = load(folders["mixed"], experts_implementation="grouped")
    check(model, expected)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check(model, expected)


def test_what_is_in_4_bit(folders: dict[str, pathlib.Path]) -> None:
    model: Any = load(folders["mixed"], dtype="bfloat16")
    for name, parameter in model.named_parameters():
        packed = name.endswith(("_proj.weight", "_proj")) and ".layers." in name
        assert parameter.dtype == (torch.uint8 if packed else torch.bfloat16), name
    experts: Any = model.model.layers[0].mlp.experts
    stack = experts.stack("gate_up_proj")
    assert experts.gate_up_proj.numel() == 8 * 48 * 32 // 2 and stack.absmax.dtype == torch.uint8
    assert experts.gate_up_proj.data_ptr() == stack.codes.data_ptr()
    assert (
        experts(torch.ones(1, 32).bfloat16(), torch.tensor([[0, 1]]), torch.ones(1, 2).bfloat16()).dtype
        == torch.bfloat16
    )
    before = stack.dequantized(torch.float32)
    model.half()
    assert stack.nested_absmax.dtype == torch.float32 and torch.equal(stack.dequantized(torch.float32), before)


def test_each_expert_has_the_bytes_that_bitsandbytes_gives_it(
    folders: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    for name in ("mixed", "uneven"):
        model = load(folders[name])
        model.save_pretrained(tmp_path / name)
        written = load_file(tmp_path / name / "model.safetensors")
        for key, tensor in load_file(folders[name] / "model.safetensors").items():
            if not is_packed(key):
                assert torch.equal(written.pop(key), tensor), key
                continue
            codes, state = encode(tensor)
            assert torch.equal(written.pop(key), codes), key
            for suffix, value in state.as_dict(packed=True).items():
                assert torch.equal(written.pop(f"{key}.{suffix}"), value), (key, suffix)
        assert not written
        again = load(tmp_path / name, fix_tokenizer=False)
        assert torch.equal(logits(again), logits(model))
        raw = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert raw["bnb_4bit_use_double_quant"] and "model.layers.0.mlp.gate" in raw["llm_int8_skip_modules"]


def test_a_checkpoint_of_transformers_4_keeps_its_bytes(
    folders: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    folder = prequantized(folders["mixed"], tmp_path / "prequantized")
    expected = logits(decoded(folders["mixed"], tmp_path / "decoded", router=True))
    for load_in_4bit in (True, False):
        model = load(folder, load_in_4bit=load_in_4bit)
        check(model, expected)
    model.save_pretrained(tmp_path / "written")
    written, source = (load_file(path / "model.safetensors") for path in (tmp_path / "written", folder))
    routers = {key for key in source if ".mlp.gate.weight" in key}
    assert written.keys() - routers == source.keys() - routers
    assert all(torch.equal(written[key], source[key]) for key in written.keys() - routers)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.int8])
def test_the_dtype_in_which_codes_are_stored_changes_nothing(
    storage: torch.dtype, folders: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    plain = prequantized(folders["mixed"], tmp_path / "plain")
    stored = lambda k, t: {k: t.flatten().view(storage)[:, None] if is_packed(k, router=True) else t}
    assert torch.equal(logits(load(rewritten(plain, tmp_path / "stored", stored))), logits(load(plain)))


EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"


def with_settings(**changes: Any) -> Callable[[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Changes to the settings of one expert's statistics; None removes one."""

    def change(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if key != f"{EXPERT}.quant_state.bitsandbytes__nf4":
            return {key: tensor}
        raw = json.loads(bytes(tensor.tolist())) | changes
        text = json.dumps({name: value for name, value in raw.items() if value is not None})
        return {key: torch.tensor(list(text.encode()), dtype=torch.uint8)}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_settings(blocksize=128), r"absmax: expected the shape \[\d+\], found"),
        (with_settings(blocksize=0), "expected statistics of"),
        (with_settings(nested_offset=None), "expected statistics of"),
        (with_settings(quant_type="nf5"), "expected statistics of"),
        (lambda k, t: {k: t[:-1] if k == EXPERT else t}, r"expected the shape \[\d+, 1\], found"),
        (lambda k, t: {k: t[:1] if k == f"{EXPERT}.absmax" else t}, "absmax: expected the shape"),
        (lambda k, t: {k: t / 2 if k == f"{EXPERT}.nested_quant_map" else t}, "quantisation of the first expert"),
    ],
)
def test_bad_statistics_are_named(
    change: Any, message: str, folders: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    plain = prequantized(folders["mixed"], tmp_path / "plain")
    with pytest.raises(ValueError, match=message) as caught:
        load(rewritten(plain, tmp_path / "bad", change))
    assert str(caught.value).startswith(f"{tmp_path / 'bad'}: ") and EXPERT in str(caught.value)


def test_a_checkpoint_of_transformers_5_keeps_16_bit_experts(
    folders: dict[str, pathlib.Path], tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    source = AutoModelForCausalLM.from_pretrained(
        folders["mixed"],
        quantization_config=settings,
        attn_implementation="eager",
        device_map="cpu",
        use_safetensors=True,
        trust_remote_code=False,
    )
    source.save_pretrained(tmp_path / "five")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "five" / file).write_bytes((folders["mixed"] / file).read_bytes())
    names = [name for name, _ in source.named_modules() if name.endswith(("q_proj", "layers.1.mlp.up_proj"))]
    with caplog.at_level(logging.WARNING):
        model = load(tmp_path / "five")
    assert "the experts are stored in 16 bit and stay in 16 bit" in caplog.text
    assert len(names) == 4
    for name in names:
        found, stored = model.get_parameter(f"{name}.weight"), source.get_parameter(f"{name}.weight")
        assert torch.equal(found.data.flatten(), stored.data.flatten()), name
    found = model.model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(found, source.model.layers[0].mlp.experts.gate_up_proj)
    packed = [(n, m) for n, m in model.named_modules() if isinstance(m, torch_ref.quantize.Linear4bit)]
    plain: Any = AutoModelForCausalLM.from_pretrained(
        folders["mixed"], attn_implementation="eager", use_safetensors=True, trust_remote_code=False
    )
    with torch.no_grad():
        for name, module in packed:
            plain.get_submodule(name).weight.copy_(module.dequantized(torch.float32))
    check(model, logits(plain))


def adapt(model: Any, seed: int = 0) -> Any:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate"]
    adapted = Fast.get_peft_model(model, r=3, lora_alpha=5, target_modules=targets)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted((n, p) for n, p in adapted.named_parameters() if "lora_" in n):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapted


def gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=IDS, labels=IDS, output_router_logits=True).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("implementation", ["loop", "grouped"])
def test_adapters_on_4_bit_train_as_on_the_decoded_weights(
    implementation: str, folders: dict[str, pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected_loss, expected = gradients(adapt(decoded(folders["mixed"], tmp_path / "decoded")))

    def check_gradients(model: Any) -> None:
        loss, found = gradients(model)
        assert loss == pytest.approx(expected_loss, rel=bound("parity_loss"))
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.any() and distance(found[name], gradient) <= bound("torch_ref_gradients"), name

    model = adapt(load(folders["mixed"], experts_implementation=implementation))
    check_gradients(model)
    check_gradients(model)  # a second forward adds nothing
    wrong = staticmethod(lambda ctx, grad: (1.01 * grad @ ctx.weight(grad.dtype), None))
    monkeypatch.setattr(torch_ref.quantize._FrozenLinear, "backward", wrong)
    with pytest.raises(AssertionError):
        check_gradients(model)


def test_adapters_of_a_4_bit_model_merge_into_16_bit(folders: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    model = adapt(load(folders["mixed"])).eval()
    expected = logits(model)
    with pytest.raises(ValueError, match="model: expected one without adapters"):
        Fast.save_pretrained_4bit(model, tmp_path / "four")
    Fast.save_pretrained_merged(model, tmp_path / "merged")
    Fast.unpatch()
    check(
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "merged", attn_implementation="eager", use_safetensors=True, trust_remote_code=False
        ),
        expected,
    )
    with pytest.raises(ValueError, match="model: expected one that was loaded in 4 bit"):
        Fast.save_pretrained_4bit(load(folders["mixed"], load_in_4bit=False), tmp_path / "four")


def test_peft_loads_adapters_of_a_4_bit_model(folders: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    model = adapt(load(folders["mixed"])).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(folders["mixed"]), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_the_backward_pass_holds_no_16_bit_stack(folders: dict[str, pathlib.Path]) -> None:
    model = Fast.get_peft_model(load(folders["mixed"]), r=2, use_gradient_checkpointing=False)
    for implementation in torch_ref.experts.IMPLEMENTATIONS:
        set_experts_implementation(model, implementation)
        shapes: list[torch.Size] = []

        def note(tensor: torch.Tensor, shapes: list[torch.Size] = shapes) -> torch.Tensor:
            shapes.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(input_ids=IDS, labels=IDS)
        assert shapes and not any(shape[-2:] in ((48, 32), (24, 32), (32, 24)) for shape in shapes)


def test_loading_holds_one_16_bit_weight_at_a_time(
    folders: dict[str, pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    for method in ("read_dense", "rows"):
        real = getattr(torch_ref.checkpoint.Reader, method)

        def watched(self: Any, key: str, *args: Any, real: Callable[..., torch.Tensor] = real) -> torch.Tensor:
            nonlocal most
            tensor = real(self, key, *args)
            if "_proj" in key and not key.endswith("bias"):
                alive.append(weakref.ref(tensor))
                most = max(most, sum(reference() is not None for reference in alive))
            return tensor

        monkeypatch.setattr(torch_ref.checkpoint.Reader, method, watched)
    for name in ("mixed", "fused"):
        load(folders[name])
    assert len(alive) > 100 and most <= 2


def without(key: str) -> Callable[[str, torch.Tensor], dict[str, torch.Tensor]]:
    return lambda k, t: {} if k == key else {k: t}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("model.layers.2.mlp.experts.5.up_proj.weight"),
            "expected model.layers.2.mlp.experts.5.up_proj.weight",
        ),
        (without("model.norm.weight"), "expected model.norm.weight, found none"),
        (lambda k, t: {k: t, "model.extra": torch.zeros(1)}, "unexpected tensor model.extra"),
        (lambda k, t: {k: t[:-1] if k.endswith("layers.0.mlp.experts.0.up_proj.weight") else t}, "expected the shape"),
        (lambda k, t: {k: t[:-1] if k.endswith("k_proj.weight") else t}, "k_proj.weight: expected the shape"),
    ],
)
def test_bad_checkpoints_are_named(
    change: Any, message: str, folders: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load(rewritten(folders["mixed"], tmp_path / "bad", change))


def test_other_quantisations_are_named(folders: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    folder = rewritten(folders["mixed"], tmp_path / "gptq", lambda k, t: {k: t})
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ValueError, match="quantization_config: expected bitsandbytes in 4 bit, found gptq"):
        load(folder)


@pytest.mark.parametrize("device_map", ["sequential", "auto", "cpu", None, {"": "cpu"}, torch.device("cpu")])
def test_device_maps(device_map: Any, folders: dict[str, pathlib.Path]) -> None:
    if torch.cuda.is_available():
        pytest.skip("the automatic maps choose the GPU")
    assert load(folders["mixed"], device_map=device_map).device.type == "cpu"


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("somewhere", "device_map: expected sequential, auto, balanced"),
        ("cuda:99", "device_map: expected a CPU or one of"),
        ({"model": "cpu"}, "device_map: expected a device for every module, found none for lm_head.weight"),
        ({"": "disk"}, "device_map: expected sequential, auto, balanced"),
    ],
)
def test_bad_device_maps_are_named(device_map: Any, message: str, folders: dict[str, pathlib.Path]) -> None:
    with pytest.raises(ValueError, match=message):
        load(folders["mixed"], device_map=device_map)


@pytest.mark.gpu
def test_4_bit_on_a_gpu(folders: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    on_cpu = load(folders["mixed"])
    on_cpu.save_pretrained(tmp_path / "packed")
    expected = logits(on_cpu)
    model = load(tmp_path / "packed", device_map="cuda:0", fix_tokenizer=False)
    for implementation in torch_ref.experts.IMPLEMENTATIONS:
        set_experts_implementation(model, implementation)
        assert distance(logits(model, IDS.cuda()).cpu(), expected) <= bound("torch_ref_fp32")


def shape_of(config: Qwen3MoeConfig) -> tuple[int, int, int]:
    """(E, 2F, D)."""
    return config.num_experts, 2 * config.moe_intermediate_size, config.hidden_size


@pytest.mark.parametrize("config", [TINY, UNEVEN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [True, False])
def test_a_stack_decodes_to_what_bitsandbytes_decodes_each_expert_to(
    config: Qwen3MoeConfig, dtype: torch.dtype, nested: bool
) -> None:
    E, two_f, D = shape_of(config)
    weights = torch.randn(E, 2, two_f // 2, D)
    parts = [
        (e, p, *bnb.quantize_4bit(weights[e, p], compress_statistics=nested, quant_type="nf4"))
        for e in range(E)
        for p in range(2)
    ]
    stack = torch_ref.quantize.PackedStack.from_parts(iter(parts), torch.Size((E, two_f, D)))
    found = stack.dequantized(dtype).unflatten(1, (2, -1))
    for e, p, codes, state in parts:
        state.dtype, state.shape = dtype, torch.Size((two_f // 2 * D,))
        assert torch.equal(found[e, p].flatten(), bnb.dequantize_4bit(codes, state).flatten())
