"""Weights that an adapter holds in full: PEFT's files are read, merged and written, and their gradients are PEFT's."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.__main__ import main
from convert.adapters import load_adapter, write_peft
from convert.hf2jax import hf2jax, read_hf
from convert.jax2hf import jax2hf
from convert.safetensors_io import read_header
from jaxmoe import memory
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.data.packing import Batch
from jaxmoe.errors import UserError
from jaxmoe.generate.engine import Generator
from jaxmoe.lora import LoraConfig, modules_to_save
from jaxmoe.model.adapted import weights_of
from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM
from jaxmoe.model.decoder import head_weight
from jaxmoe.store.adapter import read_adapter, write_adapter
from jaxmoe.store.loading import load_stacks
from jaxmoe.train.loss import next_token_objective
from jaxmoe.train.step import Model, loss_and_gradients
from peers.make_checkpoint import TINY, make_checkpoint
from tests.test_adapters import edit_settings, edit_tensors, peft_model
from tests.tolerances import bound

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = np.arange(3, 19, dtype=np.int32)[None] * 7 % TINY.vocab_size
HEAD_KEY, EMBEDDING_KEY = "base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"
EMBEDDINGS = ("embed_tokens", "lm_head")
# name -> (tied, options of PEFT's config, what is loaded as modules to save, whether the head follows the embedding)
CASES: dict[str, tuple[bool, dict[str, Any], tuple[str, ...], bool]] = {
    "both": (False, {"modules_to_save": ["lm_head", "embed_tokens"]}, EMBEDDINGS, False),
    "the head": (False, {"modules_to_save": ["lm_head"]}, ("lm_head",), False),
    "the embedding": (False, {"modules_to_save": ["model.embed_tokens"]}, ("embed_tokens",), False),
    "tied": (True, {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, ("embed_tokens",), True),
    "tied, both untied": (True, {"modules_to_save": ["lm_head", "embed_tokens"]}, EMBEDDINGS, False),
    "tied, the head untied": (True, {"modules_to_save": ["lm_head"]}, ("lm_head",), False),
    "the router": (False, {"modules_to_save": ["mlp.gate"]}, (), False),
    "tied, the embedding untied": (True, {"modules_to_save": ["embed_tokens"]}, ("embed_tokens",), False),
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return checkpoint(request.param, tmp_path_factory)


_made: dict[bool, pathlib.Path] = {}


def checkpoint(tied: bool, factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model of one layer, in HF form, and converted in `jax` beside it."""
    if tied not in _made:
        folder = factory.mktemp("base") / "hf"
        make_checkpoint(folder, TINY.replace(num_hidden_layers=1, tie_word_embeddings=tied, initializer_range=0.2))
        hf2jax(folder, folder.parent / "jax")
        _made[tied] = folder
    return _made[tied]


def torch_base(folder: pathlib.Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )


def by_peft(folder: pathlib.Path, **options: Any) -> Any:
    """A model with an adapter made by PEFT, all of whose trained weights are random."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(torch_base(folder), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def logits_of_torch(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS, dtype=torch.long)).logits.numpy()


def check_close(found: Any, expected: np.ndarray) -> None:
    error = np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)
    assert error <= bound("parity_fp32")


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saves_is_read_merged_and_written(
    case: str, tmp_path: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tied, options, expected_modules, follows = CASES[case]
    folder = checkpoint(tied, tmp_path_factory)
    model = by_peft(folder, **options)
    model.save_pretrained(tmp_path / "peft")
    expected = logits_of_torch(model)

    source = read_hf(folder)
    lora, arrays = load_adapter(tmp_path / "peft", source.config, source)
    assert (lora.modules_to_save, lora.ensure_weight_tying) == (expected_modules, follows)
    params = {name: jnp.asarray(array) for name, array in source.block(None).arrays.items()}
    weights = weights_of(params, {name: jnp.asarray(array) for name, array in arrays.items()}, lora)
    state = model.state_dict()
    for name, found in (("lm_head", head_weight(weights)), ("model.embed_tokens", weights["embed_tokens"])):
        key = f"base_model.model.{name}.modules_to_save.default.weight"
        np.testing.assert_array_equal(found, state.get(key, state.get(f"base_model.model.{name}.weight")))
    assert lora.full_router == (case == "the router") == ("sparse.gate" in arrays)

    jax2hf(folder.parent / "jax", tmp_path / "merged", tmp_path / "peft")
    check_close(logits_of_torch(torch_base(tmp_path / "merged")), expected)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] == (tied and follows)

    write_adapter(tmp_path / "jax", source.config, lora, arrays)
    write_peft(tmp_path / "again", *read_adapter(tmp_path / "jax"))
    check_close(logits_of_torch(peft_model(folder, tmp_path / "again")), expected)


def test_the_model_generates_with_them(tmp_path: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = checkpoint(False, tmp_path_factory)
    adapted = by_peft(folder, modules_to_save=["lm_head", "embed_tokens"])
    adapted.save_pretrained(tmp_path)
    model = Qwen3MoeForCausalLM.from_pretrained(folder, adapter=tmp_path)
    check_close(model(IDS).logits, logits_of_torch(adapted))
    (tokens,) = Generator(model).generate([IDS[0].tolist()], 4)
    prompt = torch.tensor(IDS, dtype=torch.long)
    expected = adapted.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert tokens == expected[0, IDS.shape[1] :].tolist()


def test_embeddings_beside_an_adapter(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Those of the base are dropped; others replace the base's, as PEFT does when it loads them."""
    model = by_peft(base)
    model.save_pretrained(tmp_path / "equal", save_embedding_layers=True)
    source = read_hf(base)
    assert load_adapter(tmp_path / "equal", source.config, source)[0].modules_to_save == ()
    # Without the base's weights nothing can be compared; what is kept gives the same logits.
    assert load_adapter(tmp_path / "equal", source.config)[0].modules_to_save
    main(["peft2jax", str(tmp_path / "equal"), str(tmp_path / "jax"), "--model", str(base)])
    assert set(read_adapter(tmp_path / "jax")[2]) == {"attention.q_proj.lora_A", "attention.q_proj.lora_B"}

    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    model.save_pretrained(tmp_path / "changed", save_embedding_layers=True)
    tied = source.config.tie_word_embeddings
    lora, _ = load_adapter(tmp_path / "changed", source.config, source)
    assert (lora.modules_to_save, lora.ensure_weight_tying) == (("embed_tokens",), tied)
    jax2hf(base.parent / "jax", tmp_path / "merged", tmp_path / "changed")
    theirs = peft.PeftModel.from_pretrained(torch_base(base), tmp_path / "changed")
    check_close(logits_of_torch(torch_base(tmp_path / "merged")), logits_of_torch(theirs))


def test_modules_to_save_may_be_stored_as_embeddings_too(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """As PEFT does after a change of the vocabulary: the file then holds the trained weight twice, and the replaced."""
    model = by_peft(base, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    stored = {name: t.read() for name, t in read_header(tmp_path / "adapter_model.safetensors").items()}
    assert {name for name in stored if "modules_to_save" in name or "original_module" in name}
    source = read_hf(base)
    lora, arrays = load_adapter(tmp_path, source.config, source)
    assert lora.modules_to_save == ("lm_head",)
    trained = model.state_dict()["base_model.model.lm_head.modules_to_save.default.weight"].numpy()
    assert not np.array_equal(trained, stored["base_model.model.lm_head.original_module.weight"])
    np.testing.assert_array_equal(arrays["lm_head"], trained)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edit_settings(modules_to_save=["lm_head", "norm"]), "expected some of embed_tokens, lm_head .*'norm'"),
        (edit_settings(modules_to_save="lm_head"), "expected a list of names"),
        (edit_tensors(lambda t: t.pop(HEAD_KEY)), "modules_to_save: expected the weight of lm_head, found none"),
        (
            edit_tensors(lambda t: t.update({EMBEDDING_KEY: np.zeros((TINY.vocab_size + 8, TINY.hidden_size), "f4")})),
            r"embed_tokens: expected shape .* resize_token_embeddings\(",
        ),
        (edit_settings(lora_dropout=1.0), "lora_dropout: expected a probability below 1"),
    ],
    ids=["another module", "no list", "a missing head", "a resized vocabulary", "dropout of everything"],
)
def test_what_does_not_fit_is_refused(change: Any, says: str, tmp_path: pathlib.Path) -> None:
    lora = LoraConfig(r=2, targets=("q_proj",), modules_to_save=("lm_head",))
    rng = np.random.default_rng(0)
    config = TINY.replace(num_hidden_layers=1)
    shapes: dict[str, tuple[int, ...]] = {"lm_head": (config.vocab_size, config.hidden_size)}
    shapes["attention.q_proj.lora_A"] = (1, 2, config.hidden_size)
    shapes["attention.q_proj.lora_B"] = (1, config.num_attention_heads * config.head_dim, 2)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    write_peft(tmp_path / "adapter", config, lora, arrays)
    assert load_adapter(tmp_path / "adapter", config)[0] == lora
    change(tmp_path / "adapter")
    with pytest.raises(UserError, match=says) as caught:
        load_adapter(tmp_path / "adapter", config)
    assert "\n" not in str(caught.value)


def test_a_tied_embedding_has_one_value(tmp_path: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = checkpoint(True, tmp_path_factory)
    by_peft(folder).save_pretrained(tmp_path, save_embedding_layers=True)
    edit_tensors(lambda tensors: tensors.update({HEAD_KEY: tensors[HEAD_KEY] + 1}))(tmp_path)
    with pytest.raises(UserError, match="lm_head: expected the values of embed_tokens, to which it is tied"):
        load_adapter(tmp_path, read_hf(folder).config)


def run_product(folder: pathlib.Path, adapter: pathlib.Path) -> dict[str, Any]:
    """The gradients of the mean next-token loss of `IDS` for each array of the adapter."""
    source = read_hf(folder)
    lora, arrays = load_adapter(adapter, source.config, source)
    ones = np.ones_like(IDS)
    rows = Batch(
        input_ids=IDS,
        labels=np.roll(IDS, -1, 1),
        weights=np.where(np.arange(IDS.shape[1]) < IDS.shape[1] - 1, 1, 0)[None].astype(np.float32),
        segment_ids=ones,
        position_ids=np.arange(IDS.shape[1], dtype=np.int32)[None],
    )
    batch = jax.tree.map(lambda array: array[None], rows)
    trained = {name: jnp.asarray(array) for name, array in arrays.items()}
    frozen = load_stacks(source.config, source)
    model = Model(source.config, lora)
    run = jax.jit(lambda f, a, b: loss_and_gradients(model, f, a, b, next_token_objective()))
    return {name: np.asarray(array) for name, array in run(frozen, trained, batch).gradients.items()}


@pytest.mark.parametrize("case", ["both", "tied", "the router"])
def test_gradients_are_those_of_peft(
    case: str, tmp_path: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tied, options, modules, _ = CASES[case]
    folder = checkpoint(tied, tmp_path_factory)
    model = by_peft(folder, **options)
    model.save_pretrained(tmp_path)
    found = run_product(folder, tmp_path)
    ids = torch.tensor(IDS, dtype=torch.long)
    model(ids, labels=ids).loss.backward()
    inner = model.base_model.model
    query = inner.model.layers[0].self_attn.q_proj
    theirs = {
        "attention.q_proj.lora_A": query.lora_A["default"].weight,
        "attention.q_proj.lora_B": query.lora_B["default"].weight,
    }
    if "embed_tokens" in modules:
        theirs["embed_tokens"] = inner.model.embed_tokens.modules_to_save["default"].weight
    if case == "the router":
        theirs["sparse.gate"] = inner.model.layers[0].mlp.gate.modules_to_save["default"].weight
    if "lm_head" in modules:
        theirs["lm_head"] = inner.lm_head.modules_to_save["default"].weight
    assert found.keys() == theirs.keys()
    for name, parameter in theirs.items():
        expected = parameter.grad.numpy()
        error = np.linalg.norm(found[name].reshape(expected.shape) - expected) / np.linalg.norm(expected)
        assert error <= bound("parity_gradients"), name


def test_either_name_of_a_tied_head_is_the_embedding() -> None:
    tied = TINY.replace(tie_word_embeddings=True)
    for names in (("lm_head",), ("embed_tokens",), ("model.embed_tokens", "lm_head")):
        fields = modules_to_save(names, tied)
        assert fields == {"modules_to_save": ("embed_tokens",), "ensure_weight_tying": True}
    assert modules_to_save(("lm_head", "embed_tokens"), TINY) == {"modules_to_save": EMBEDDINGS}
    with pytest.raises(UserError, match="the model's head is not tied"):
        LoraConfig(**modules_to_save(("lm_head",), tied)).check_against(TINY)


def test_the_forecast_counts_them() -> None:
    def training(lora: LoraConfig, config: Qwen3MoeConfig = TINY) -> dict[str, int]:
        forecast = memory.training_forecast(memory.Workload(config, lora, 1, 16, "bfloat16"))
        return {part.name: part.bytes for part in forecast.parts}

    before, after = training(LoraConfig()), training(LoraConfig(modules_to_save=EMBEDDINGS))
    size = 2 * TINY.vocab_size * TINY.hidden_size
    assert after["adapters"] - before["adapters"] == 4 * size
    assert after["optimizer state"] - before["optimizer state"] == 8 * size
    assert after["bfloat16 copy of modules to save"] == 2 * size
