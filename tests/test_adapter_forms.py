"""Adapters as other programs write and read them: PEFT 0.18, patterns by layer, layouts of experts, other names."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.__main__ import main
from convert.adapters import merge, read_peft, write_peft
from convert.hf2jax import read_hf
from convert.safetensors_io import read_header, write_file
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.errors import ConfigError, UserError
from jaxmoe.lora import LORA_TARGETS, LoraConfig, layers_of
from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM
from jaxmoe.model.decoder import forward
from jaxmoe.model.init import init_adapters
from jaxmoe.model.interface import Options, Tokens
from jaxmoe.parameters import lora_specs
from jaxmoe.store.adapter import read_adapter, write_adapter
from peers.make_checkpoint import TINY, make_checkpoint
from tests.peft_0_18.make import CONFIG as OLD_CONFIG
from tests.peft_0_18.make import FOLDER as OLD_FOLDER
from tests.peft_0_18.make import INPUT_IDS
from tests.test_adapters import largest_merge_error, old_form, peft_model, same, written_by_peft
from tests.tolerances import bound

SMALL = TINY.replace(num_hidden_layers=2, num_experts=4)
PREFIX = "base_model.model.model.layers."
Arrays = dict[str, np.ndarray]


def tensors_in(folder: pathlib.Path) -> Arrays:
    return {name: t.read().copy() for name, t in read_header(folder / "adapter_model.safetensors").items()}


def settings_in(folder: pathlib.Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def rewritten(
    folder: pathlib.Path, target: pathlib.Path, rename: Any = lambda key: key, **changes: Any
) -> pathlib.Path:
    """A copy with renamed tensors (None drops one) and changed settings (... drops one)."""
    target.mkdir()
    renamed = {new: array for key, array in tensors_in(folder).items() if (new := rename(key)) is not None}
    write_file(target / "adapter_model.safetensors", renamed, {})
    settings = {key: value for key, value in (settings_in(folder) | changes).items() if value is not ...}
    (target / "adapter_config.json").write_text(json.dumps(settings))
    return target


def random_adapters(config: Qwen3MoeConfig, lora: LoraConfig) -> Arrays:
    """Random A and B, zero where `lora` says that a layer has none."""
    rng = np.random.default_rng(0)
    arrays = {
        name: (0.3 * rng.standard_normal(spec.shape)).astype(np.float32)
        for name, spec in lora_specs(config, lora).items()
    }
    for target in lora.targets:
        a, b = (arrays[f"{LORA_TARGETS[target].path}.lora_{x}"] for x in "AB")
        for slot in range(len(layers_of(config, target))):
            a[slot][..., lora.layer_rank(target, slot) :, :] = 0
            b[slot][..., lora.layer_rank(target, slot) :] = 0
            half, part = b.shape[-2] // 2, lora.layer_part(target, slot)
            if part != "both":
                b[slot][..., slice(half, None) if part == "gate" else slice(half), :] = 0
    return arrays


def deltas(config: Qwen3MoeConfig, lora: LoraConfig, arrays: Arrays) -> Arrays:
    """(target, layer) as a word -> what is added to the weight, in float64."""
    out = {}
    for target in lora.targets:
        a, b = (arrays[f"{LORA_TARGETS[target].path}.lora_{x}"].astype(np.float64) for x in "AB")
        for slot, layer in enumerate(layers_of(config, target)):
            out[f"{target} {layer}"] = lora.scale(target, slot) * b[slot] @ a[slot]
    return out


def largest_difference(found: Arrays, expected: Arrays) -> float:
    """The largest relative L2 difference; a delta that is missing on one side counts as zero."""
    zero = np.zeros(())
    pairs = [(found.get(key, zero), expected.get(key, zero)) for key in found.keys() | expected.keys()]
    return max(float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-12) for a, b in pairs)


# PEFT 0.18


def test_what_peft_0_18_wrote_gives_its_logits(tmp_path: pathlib.Path) -> None:
    make_checkpoint(tmp_path / "base", OLD_CONFIG)
    model = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "base", dtype="float32", adapter=OLD_FOLDER / "adapter")
    logits, expected = np.asarray(model(jnp.asarray(INPUT_IDS)).logits), np.load(OLD_FOLDER / "logits.npy")
    assert np.linalg.norm(logits - expected) / np.linalg.norm(expected) <= bound("parity_fp32")


def only_gate_up(key: str) -> str | None:
    return key.replace(".base_layer", "") if ".base_layer." in key else None


def test_shapes_that_fit_two_layouts_need_the_version(tmp_path: pathlib.Path) -> None:
    exact = read_peft(OLD_FOLDER / "adapter", OLD_CONFIG)[1]["sparse.gate_up_proj.lora_A"]
    silent = rewritten(OLD_FOLDER / "adapter", tmp_path / "silent", only_gate_up, peft_version=...)
    for version in (..., None, "unknown", "0.18.2.dev0@main"):
        unclear = rewritten(silent, tmp_path / f"{version}", peft_version=version)
        with pytest.raises(UserError, match=r"--layout peft-0\.18") as caught:
            read_peft(unclear, OLD_CONFIG)
        assert "\n" not in str(caught.value)
        shutil.rmtree(unclear)
    assert (read_peft(silent, OLD_CONFIG, "peft-0.18")[1]["sparse.gate_up_proj.lora_A"] == exact).all()
    newer = rewritten(silent, tmp_path / "newer", peft_version="0.19.0")
    for other in (read_peft(newer, OLD_CONFIG)[1], read_peft(silent, OLD_CONFIG, "peft")[1]):  # the control
        assert (other["sparse.gate_up_proj.lora_A"] != exact).any()


def test_shapes_that_fit_one_layout_need_no_version(tmp_path: pathlib.Path) -> None:
    """E, r, in and out as the layout of PEFT 0.18 has them; the arrays are the transposes of ours."""
    lora = LoraConfig(r=3, alpha=6.0, targets=("experts.gate_up_proj", "experts.down_proj"))
    arrays = random_adapters(SMALL, lora)
    write_peft(tmp_path / "new", SMALL, lora, arrays)
    tensors = {}
    for key in (key.removesuffix("lora_A.weight") for key in tensors_in(tmp_path / "new") if "lora_A" in key):
        path = "sparse.gate_up_proj" if "base_layer" in key else "sparse.down_proj"
        layer = int(key.split("layers.")[1].split(".")[0])
        a, b = arrays[f"{path}.lora_A"][layer], arrays[f"{path}.lora_B"][layer]
        tensors[f"{key}lora_A.weight"] = b.transpose(0, 2, 1).reshape(-1, b.shape[1])
        tensors[f"{key}lora_B.weight"] = a.transpose(2, 1, 0).reshape(a.shape[2], -1)
    rewritten(tmp_path / "new", tmp_path / "old", peft_version=...)
    write_file(tmp_path / "old" / "adapter_model.safetensors", tensors, {})
    assert same(read_peft(tmp_path / "old", SMALL)[1], arrays)


# Patterns by layer, adapters on some layers

PEFT_SETTINGS: dict[str, dict[str, Any]] = {
    "ranks and alphas of a layer": {
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "rank_pattern": {r".*\.layers\.1\..*(q_proj|v_proj|down_proj)": 5, "layers.0.self_attn.v_proj": 2},
        "alpha_pattern": {r"layers\.[01]\.mlp\.experts\.gate_up_proj": 7, r"layers\.(1|2)\.self_attn\.q_proj": 1},
    },
    "a list of layers": {
        "target_modules": ["q_proj", "o_proj"],
        "layers_to_transform": [0, 2],
        "use_rslora": True,
        "layers_pattern": "layers",
    },
    "names with layers": {
        "target_modules": ["layers.1.self_attn.k_proj", "q_proj"],
        "target_parameters": [
            "layers.2.mlp.experts.down_proj",
            "layers.0.mlp.gate.weight",
            "1.mlp.experts.gate_up_proj",
        ],
    },
}


@pytest.mark.parametrize("case", PEFT_SETTINGS)
def test_layers_that_differ_are_read_merged_and_written(case: str, tmp_path: pathlib.Path) -> None:
    base = make_checkpoint(tmp_path / "base", TINY)
    model = written_by_peft(base, tmp_path / "adapter", PEFT_SETTINGS[case])
    lora, adapters = read_peft(tmp_path / "adapter", TINY)
    assert lora.layer_ranks or lora.layer_alphas
    assert largest_merge_error(base, model, lora, adapters) <= bound("merge_fp32")

    write_adapter(tmp_path / "jax", TINY, lora, adapters)
    assert read_adapter(tmp_path / "jax")[1] == lora
    write_peft(tmp_path / "again", TINY, lora, adapters)
    assert tensors_in(tmp_path / "again").keys() == tensors_in(tmp_path / "adapter").keys()
    again, arrays = read_peft(tmp_path / "again", TINY)
    assert dataclasses.replace(again, base_model_name_or_path=lora.base_model_name_or_path) == lora
    assert same(arrays, adapters)
    reloaded = peft_model(base, tmp_path / "again")  # PEFT makes adapters for exactly the stored tensors
    assert largest_merge_error(base, reloaded, lora, adapters) <= bound("merge_fp32")


UNEVEN = LoraConfig(
    r=3,
    alpha=6.0,
    targets=("q_proj", "v_proj", "gate", "experts.gate_up_proj", "experts.down_proj"),
    layer_ranks=(("q_proj", (1, 3)), ("v_proj", (0, 3)), ("gate", (3, 0)), ("experts.down_proj", (2, 3))),
    layer_alphas=(("q_proj", (1.0, 9.0)), ("experts.gate_up_proj", (6.0, 2.0))),
    gate_up_parts=("gate", "up"),
)


def test_layers_that_differ_compute_and_train_as_they_should(tmp_path: pathlib.Path) -> None:
    """The logits are those of the merged weights, and what has no adapter has no gradient, so it stays zero."""
    base, adapters = make_checkpoint(tmp_path / "base", SMALL), random_adapters(SMALL, UNEVEN)
    params = Qwen3MoeForCausalLM.from_pretrained(base, dtype="float32").params
    merged = dict(params)
    for block in read_hf(base).blocks():
        if block.layer is not None:
            merge(SMALL, block, UNEVEN, adapters)
            for path, array in block.arrays.items():
                merged[path] = merged[path].at[block.layer].set(array)
    ids = jnp.asarray(INPUT_IDS)
    tokens = Tokens(ids, jnp.arange(ids.shape[1])[None], jnp.ones_like(ids))
    options = Options(lora=UNEVEN, trainable="adapters", packed=False)

    def hidden(adapters: Any) -> tuple[Any, Any]:
        out = forward(params, adapters, tokens, config=SMALL, options=options).hidden
        return jnp.sum(jnp.sin(out)), out

    gradients, found = jax.jit(jax.grad(hidden, has_aux=True))({name: jnp.asarray(a) for name, a in adapters.items()})
    expected = jax.jit(lambda: forward(merged, {}, tokens, config=SMALL, options=Options(packed=False)).hidden)()
    assert jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected) <= bound("parity_fp32")
    for name, gradient in gradients.items():
        assert ((np.asarray(gradient) != 0) <= (adapters[name] != 0)).all(), name
        assert (np.asarray(gradient) != 0).any(), name


def test_fresh_adapters_leave_out_what_has_none() -> None:
    ranks = (1, 3)
    fresh = init_adapters(
        SMALL, LoraConfig(r=3, targets=("q_proj",), layer_ranks=(("q_proj", ranks),)), jax.random.key(0)
    )
    for a, rank in zip(np.asarray(fresh["attention.q_proj.lora_A"]), ranks, strict=True):
        assert a[:rank].all()
        assert not a[rank:].any()


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_ranks": (("q_proj", (4, 1)),)},
        {"layer_ranks": (("q_proj", (2, 1)),)},
        {"layer_ranks": (("k_proj", (3, 3)),)},
        {"layer_alphas": (("q_proj", (float("nan"), 1.0)),)},
        {"layer_ranks": (("q_proj", (3, 1, 1)),)},
        {"layer_alphas": (("q_proj", (3.0,)),)},
        {"gate_up_parts": ("gate", "left")},
        {"gate_up_parts": ("gate",)},
        {"targets": ("q_proj",), "gate_up_parts": ("gate", "up")},
    ],
)
def test_wrong_settings_by_layer_are_refused(changes: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"r": 3, "targets": ("q_proj", "experts.gate_up_proj")}
    with pytest.raises(ConfigError):
        LoraConfig(**(settings | changes)).check_against(SMALL)


def test_numbers_beyond_a_layers_rank_are_refused(tmp_path: pathlib.Path) -> None:
    adapters = random_adapters(SMALL, UNEVEN)
    adapters["attention.q_proj.lora_A"][0, 2] = 1
    with pytest.raises(UserError, match="beyond the rank 1"):
        write_adapter(tmp_path / "jax", SMALL, UNEVEN, adapters)


def test_a_pattern_cannot_take_forever(tmp_path: pathlib.Path) -> None:
    write_peft(tmp_path / "peft", SMALL, LoraConfig(r=2), random_adapters(SMALL, LoraConfig(r=2)))
    slow = rewritten(tmp_path / "peft", tmp_path / "slow", alpha_pattern={r"([a-z._\d]+)+!": 3})
    start = time.monotonic()
    with pytest.raises(UserError, match="alpha_pattern: needs too much time or memory"):
        read_peft(slow, SMALL)
    assert time.monotonic() - start < 15


# Adapters of single projections, expert by expert


@pytest.mark.parametrize(
    ("kept", "patterns"),
    [
        (("gate_proj",), {}),
        (("up_proj",), {}),
        (("down_proj",), {}),
        (("up_proj", "down_proj"), {}),
        (("gate_proj", "up_proj"), {"rank_pattern": {"gate_proj": 1}, "alpha_pattern": {"up_proj": 3}}),
        (("gate_proj", "up_proj", "down_proj"), {"alpha_pattern": {r"experts\.1\.\w+": 3}, "use_rslora": True}),
    ],
    ids=["gate", "up", "down", "up, down", "ranks and alphas", "alpha of an expert"],
)
def test_projections_alone_and_of_several_ranks(kept: Any, patterns: Any, tmp_path: pathlib.Path) -> None:
    old_form(tmp_path / "all", SMALL)
    rewritten(tmp_path / "all", tmp_path / "some", lambda key: key if key.split(".")[-3] in kept else None, **patterns)
    tensors = tensors_in(tmp_path / "some")
    if "rank_pattern" in patterns:
        cut = {"lora_A": np.s_[:1], "lora_B": np.s_[:, :1]}
        tensors = {k: v[cut[k.split(".")[-2]]] if "gate_proj" in k else v for k, v in tensors.items()}
        write_file(tmp_path / "some" / "adapter_model.safetensors", tensors, {})
    expected = {}
    for layer in range(SMALL.num_hidden_layers):
        for expert in range(SMALL.num_experts):
            for name in kept:
                key = f"{PREFIX}{layer}.mlp.experts.{expert}.{name}"
                a, b = tensors[f"{key}.lora_A.weight"].astype(np.float64), tensors[f"{key}.lora_B.weight"]
                rslora = patterns.get("use_rslora")
                alpha = 3 if patterns and (expert == 1 if rslora else name == "up_proj") else 5
                scale = alpha / (np.sqrt(2) if rslora else a.shape[0])
                expected[f"{layer} {expert} {name}"] = scale * b @ a
    lora, arrays = read_peft(tmp_path / "some", SMALL)
    assert largest_difference(by_projection(SMALL, lora, arrays), expected) <= bound("merge_fp32")
    parts = {("gate_proj",): ("gate", "gate"), ("up_proj",): ("up", "up"), ("up_proj", "down_proj"): ("up", "up")}
    assert lora.gate_up_parts == parts.get(kept, ())


def by_projection(config: Qwen3MoeConfig, lora: LoraConfig, arrays: Arrays) -> Arrays:
    """The deltas of each expert's gate_proj, up_proj and down_proj."""
    out = {}
    for key, delta in deltas(config, lora, arrays).items():
        target, layer = key.split()
        if not target.startswith("experts."):
            continue
        parts = {"down_proj": delta}
        if target == "experts.gate_up_proj":
            parts = dict(zip(("gate_proj", "up_proj"), np.split(delta, 2, axis=1), strict=True))
        out |= {f"{layer} {e} {name}": part[e] for name, part in parts.items() for e in range(len(part)) if part.any()}
    return out


# What vLLM and SGLang load


# Adapters of some experts only


def without(tensors: Arrays, dropped: set[tuple[int, int, str]]) -> Arrays:
    """The tensors but those of (layer, expert, projection)."""
    keys = tuple(f"{PREFIX}{layer}.mlp.experts.{expert}.{name}." for layer, expert, name in dropped)
    return {key: array for key, array in tensors.items() if not key.startswith(keys)}


# what target_modules says -> (layer, expert, projection) without an adapter
EVERY = {(layer, e, name) for layer in range(2) for e in range(4) for name in ("gate_proj", "up_proj", "down_proj")}
SOME_EXPERTS: dict[str, tuple[dict[str, Any], set[tuple[int, int, str]]]] = {
    "a regular expression": (
        {"target_modules": r".*\.mlp\.experts\.[13]\.(gate|up|down)_proj"},
        {one for one in EVERY if one[1] in (0, 2)},
    ),
    "single modules": (
        {
            "target_modules": [
                "0.mlp.experts.2.up_proj",
                "model.layers.1.mlp.experts.0.down_proj",
                "experts.3.gate_proj",
            ]
        },
        EVERY - {(0, 2, "up_proj"), (1, 0, "down_proj"), (0, 3, "gate_proj"), (1, 3, "gate_proj")},
    ),
    "excluded": (
        {"target_modules": ["gate_proj", "up_proj", "down_proj"], "exclude_modules": r".*experts\.1\..*"},
        {one for one in EVERY if one[1] == 1},
    ),
}


@pytest.mark.parametrize("case", SOME_EXPERTS)
def test_adapters_of_some_experts(case: str, tmp_path: pathlib.Path) -> None:
    """What has no adapter has A and B zero, so it stays zero in training; both written layouts hold the same deltas."""
    changes, dropped = SOME_EXPERTS[case]
    tensors = without(old_form(tmp_path / "all", SMALL), dropped)
    some = rewritten(tmp_path / "all", tmp_path / "some", **changes)
    write_file(some / "adapter_model.safetensors", tensors, {})
    expected = {}
    for layer, expert, name in EVERY - dropped:
        a, b = (tensors[f"{PREFIX}{layer}.mlp.experts.{expert}.{name}.lora_{x}.weight"] for x in "AB")
        expected[f"{layer} {expert} {name}"] = 2.5 * b.astype(np.float64) @ a
    lora, arrays = read_peft(some, SMALL)
    found = by_projection(SMALL, lora, arrays)
    assert largest_difference({key: delta for key, delta in found.items() if delta.any()}, expected) <= bound(
        "merge_fp32"
    )
    for layout in ("peft", "per-expert"):
        write_peft(tmp_path / layout, SMALL, lora, arrays, layout)
        again = by_projection(SMALL, *read_peft(tmp_path / layout, SMALL))
        assert largest_difference(again, found) <= bound("merge_fp32")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_modules": r".*_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["experts.2.up_proj", "down_proj"], "exclude_modules": ["experts.1.up_proj"]},
    ],
    ids=["list", "regular expression", "all-linear", "another is excluded"],
)
def test_an_expert_that_should_have_an_adapter(changes: dict[str, Any], tmp_path: pathlib.Path) -> None:
    tensors = without(old_form(tmp_path / "all", SMALL), {(1, 2, "up_proj")})
    some = rewritten(tmp_path / "all", tmp_path / "some", **changes)
    write_file(some / "adapter_model.safetensors", tensors, {})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts: expected an adapter for 2\.up_proj \(1 missing"):
        read_peft(some, SMALL)


# Stacked tensors: gate and up apart, outer matrices shared


def random_arrays(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(2)
    return [(0.3 * rng.standard_normal(shape)).astype(np.float32) for shape in shapes]


E, D, F = SMALL.num_experts, SMALL.hidden_size, SMALL.moe_intermediate_size
# form -> names of gate, up (None: in one tensor with gate) and down; experts in A of gate and up, and in B of down
STACKED: dict[str, tuple[tuple[str, str | None, str], int]] = {
    "Tinker": (("w1", "w3", "w2"), 1),
    "Tinker, nothing shared": (("w1", "w3", "w2"), E),
    "Megatron-Bridge for SGLang": (("gate_up_proj", None, "down_proj"), 1),
    "projections": (("gate_proj", "up_proj", "down_proj"), 1),
}


@pytest.mark.parametrize("case", STACKED)
def test_stacked_and_shared_tensors(case: str, tmp_path: pathlib.Path) -> None:
    (gate, up, down), shared = STACKED[case]
    out = F if up else 2 * F
    a, b, up_a, up_b, down_a, down_b = random_arrays(
        (shared, 2, D), (E, out, 2), (shared, 2, D), (E, F, 2), (E, 2, F), (shared, D, 2)
    )
    named = {gate: (a, b), down: (down_a, down_b)} | ({up: (up_a, up_b)} if up else {})
    old_form(tmp_path / "old", SMALL)
    adapter = rewritten(tmp_path / "old", tmp_path / "adapter", target_modules="all-linear", lora_alpha=8)
    tensors = {
        f"{PREFIX}{layer}.mlp.experts.{name}.lora_{x}.weight": array
        for layer in range(2)
        for name, pair in named.items()
        for x, array in zip("AB", pair, strict=True)
    }
    write_file(adapter / "adapter_model.safetensors", tensors, {})
    expected = {}
    for layer in range(2):
        for e in range(E):
            both = [b[e] @ a[e % shared], up_b[e] @ up_a[e % shared]] if up else np.split(b[e] @ a[e % shared], 2)
            for name, delta in zip(
                ("gate_proj", "up_proj", "down_proj"), [*both, down_b[e % shared] @ down_a[e]], strict=True
            ):
                expected[f"{layer} {e} {name}"] = 4 * delta
    found = by_projection(SMALL, *read_peft(adapter, SMALL))
    assert largest_difference(found, expected) <= bound("merge_fp32")
    # negative control: gate and up exchanged
    swapped = {key.replace("gate", "#").replace("up", "gate").replace("#", "up"): d for key, d in found.items()}
    assert largest_difference(swapped, expected) > 100 * bound("merge_fp32")
    write_file(adapter / "adapter_model.safetensors", {k: t[: E - 1] for k, t in tensors.items()}, {})
    with pytest.raises(UserError, match=rf"expected \[{E}, 2, .*\] and .*, found \["):
        read_peft(adapter, SMALL)


def test_the_packed_layout_in_three_dimensions(tmp_path: pathlib.Path) -> None:
    """As Megatron-Bridge writes it for vLLM: A [E, r, in], B [out, r, E]."""
    lora = SERVED["even"]
    write_peft(tmp_path / "peft", SMALL, lora, random_adapters(SMALL, lora))
    tensors = tensors_in(tmp_path / "peft")
    for key in [key for key in tensors if ".experts." in key]:
        array = tensors[key]
        tensors[key] = array.reshape(E, -1, array.shape[1]) if "lora_A" in key else array.reshape(len(array), -1, E)
    write_file(tmp_path / "peft" / "adapter_model.safetensors", tensors, {})
    assert same(read_peft(tmp_path / "peft", SMALL)[1], random_adapters(SMALL, lora))
    exchanged = {key: array.swapaxes(1, 2) if ".experts.lora_B" in key else array for key, array in tensors.items()}
    write_file(tmp_path / "peft" / "adapter_model.safetensors", exchanged, {})
    with pytest.raises(UserError, match="adapters of other weights are not read"):
        read_peft(tmp_path / "peft", SMALL)


def test_one_projection_in_two_forms(tmp_path: pathlib.Path) -> None:
    tensors = old_form(tmp_path / "old", SMALL)
    a, b = random_arrays((E, 2, D), (E, F, 2))
    key = f"{PREFIX}0.mlp.experts.w1"
    both = tensors | {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    write_file(tmp_path / "old" / "adapter_model.safetensors", both, {})
    with pytest.raises(UserError, match="expected one adapter of gate_proj, found two"):
        read_peft(tmp_path / "old", SMALL)


def as_vllm(config: Qwen3MoeConfig, folder: pathlib.Path) -> Arrays:
    """Each expert's deltas by vLLM's rules for per-expert adapters.

    `PackedLoRALayerWeights.pack_moe` (vllm/lora/lora_weights.py) takes `experts.N.gate_proj`, `down_proj` and `up_proj`
    of every expert, stacks them, so all have one shape, and multiplies B by the one factor of `PEFTHelper`
    (vllm/lora/peft_helper.py): lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
    """
    settings, tensors = settings_in(folder), tensors_in(folder)
    scale = settings["lora_alpha"] / (np.sqrt(settings["r"]) if settings["use_rslora"] else settings["r"])
    out = {}
    for layer in sorted({key.split(".")[4] for key in tensors if ".experts." in key}):
        for name in ("gate_proj", "down_proj", "up_proj"):
            keys = [f"{PREFIX}{layer}.mlp.experts.{e}.{name}" for e in range(config.num_experts)]
            a, b = (np.stack([tensors[f"{key}.lora_{x}.weight"] for key in keys]).astype(np.float64) for x in "AB")
            assert a.shape[1] == b.shape[2] == settings["r"]
            out |= {f"{layer} {e} {name}": scale * b[e] @ a[e] for e in range(config.num_experts)}
    return out


def as_sglang(config: Qwen3MoeConfig, folder: pathlib.Path) -> Arrays:
    """Each expert's deltas by SGLang's rules for 3-D adapters.

    `LoRAAdapter.normalize_gate_up_proj` (python/sglang/srt/lora/lora.py) repeats the A of `gate_up_proj` along the
    rank, once for each half of B; `LoRAMemoryPool.load_lora_weight_to_buffer` (mem_pool.py) takes A[e] and B[e] times
    lora_alpha / r, whatever use_rslora says, and the rank must be r.
    """
    settings, tensors = settings_in(folder), tensors_in(folder)
    rank, out = settings["r"], {}
    for key in (key.removesuffix(".lora_A.weight") for key in tensors if ".experts." in key and "lora_A" in key):
        a, b = (tensors[f"{key}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        names = ("gate_proj", "up_proj") if key.endswith("gate_up_proj") else ("down_proj",)
        a = np.concatenate([a] * len(names), axis=1)
        assert a.shape[1] == rank * len(names)
        for i, half in enumerate(np.split(b, len(names), axis=1)):
            for e in range(config.num_experts):
                delta = settings["lora_alpha"] / rank * half[e] @ a[e, i * rank : (i + 1) * rank]
                out[f"{key.split('.')[4]} {e} {names[i]}"] = delta
    return out


SERVED = {
    "even": LoraConfig(r=2, alpha=4.0, targets=("q_proj", "v_proj", "experts.gate_up_proj", "experts.down_proj")),
    "one target, rsLoRA": LoraConfig(r=3, alpha=5.0, use_rslora=True, targets=("k_proj", "experts.down_proj")),
    "uneven": UNEVEN,
}


@pytest.mark.parametrize("layout", ["per-expert", "stacked"])
@pytest.mark.parametrize("case", SERVED)
def test_servers_rebuild_each_experts_delta(case: str, layout: Any, tmp_path: pathlib.Path) -> None:
    lora = SERVED[case]
    adapters = random_adapters(SMALL, lora)
    write_adapter(tmp_path / "jax", SMALL, lora, adapters)
    main(["jax2peft", "--layout", layout, str(tmp_path / "jax"), str(tmp_path / "peft")])
    rebuilt = (as_vllm if layout == "per-expert" else as_sglang)(SMALL, tmp_path / "peft")
    expected = by_projection(SMALL, lora, adapters)
    assert largest_difference({k: d for k, d in rebuilt.items() if d.any()}, expected) <= bound("merge_fp32")
    settings, tensors = settings_in(tmp_path / "peft"), tensors_in(tmp_path / "peft")
    assert not settings["rank_pattern"]
    assert not settings["alpha_pattern"]
    assert {key.split(".")[-3] for key in tensors} == set(settings["target_modules"])
    for key, array in tensors.items():  # both servers pack q, k and v together
        if "self_attn" in key:
            assert key.replace(key.split(".")[-3], "v_proj") in tensors
            assert array.shape[0 if "lora_A" in key else 1] == settings["r"]

    for choice in (None, layout):
        lora_2, arrays = read_peft(tmp_path / "peft", SMALL, choice)
        assert largest_difference(deltas(SMALL, lora_2, arrays), deltas(SMALL, lora, adapters)) <= bound("merge_fp32")
        assert lora_2.targets == lora.targets
        assert lora_2.gate_up_parts == (lora.gate_up_parts if layout == "per-expert" else ())
    with pytest.raises(UserError, match="layout"):
        read_peft(tmp_path / "peft", SMALL, "stacked" if layout == "per-expert" else "per-expert")
    make_checkpoint(tmp_path / "base", SMALL)
    flags = ["--packing", layout, "--model", str(tmp_path / "base")]
    main(["peft2jax", *flags, str(tmp_path / "peft"), str(tmp_path / "back")])
    assert same(read_adapter(tmp_path / "back")[2], arrays)


def test_a_wrong_half_would_be_noticed(tmp_path: pathlib.Path) -> None:
    """Negative control: gate and up exchanged in the file."""
    lora = SERVED["even"]
    write_peft(tmp_path / "peft", SMALL, lora, random_adapters(SMALL, lora), "per-expert")
    rename = lambda key: key.replace("gate_proj", "#").replace("up_proj", "gate_proj").replace("#", "up_proj")
    rewritten(tmp_path / "peft", tmp_path / "swapped", rename)
    expected = by_projection(SMALL, lora, random_adapters(SMALL, lora))
    assert largest_difference(as_vllm(SMALL, tmp_path / "swapped"), expected) > 100 * bound("merge_fp32")


def test_separate_gate_and_up_keep_their_rank(tmp_path: pathlib.Path) -> None:
    """What was one adapter per expert and projection is written back with the same tensors, not with twice the rank."""
    tensors = old_form(tmp_path / "old", SMALL)
    write_peft(tmp_path / "again", SMALL, *read_peft(tmp_path / "old", SMALL), "per-expert")
    assert same(tensors_in(tmp_path / "again"), tensors)


def test_the_packed_layout_is_that_of_vllms_3d_adapters(tmp_path: pathlib.Path) -> None:
    """`LoRAModelManager._stack_moe_lora_weights` (vllm/lora/model_manager.py): `experts.base_layer` is gate_up_proj,
    `experts` is down_proj; A.reshape(E, -1, in) and B.reshape(out, -1, E).permute(2, 0, 1)."""
    lora = SERVED["even"]
    adapters = random_adapters(SMALL, lora)
    write_peft(tmp_path / "peft", SMALL, lora, adapters)
    tensors, found = tensors_in(tmp_path / "peft"), {}
    for layer in range(2):
        for module, target in (("experts.base_layer", "experts.gate_up_proj"), ("experts", "experts.down_proj")):
            a, b = (tensors[f"{PREFIX}{layer}.mlp.{module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
            E = SMALL.num_experts
            found[f"{target} {layer}"] = 2 * b.reshape(len(b), -1, E).transpose(2, 0, 1) @ a.reshape(E, -1, a.shape[1])
    expected = {key: delta for key, delta in deltas(SMALL, lora, adapters).items() if "experts" in key}
    assert largest_difference(found, expected) <= bound("merge_fp32")


# Names of tensors

RENAMES = {
    "without base_model.model": lambda key: key.removeprefix("base_model.model."),
    "of the decoder alone": lambda key: key.removeprefix("base_model.model.model."),
    "with the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "of FSDP": lambda key: key.replace("self_attn", "_fsdp_wrapped_module._checkpoint_wrapped_module.self_attn"),
    "of a compiled model": lambda key: "_orig_mod." + key.replace("self_attn", "_orig_mod.self_attn"),
}


@pytest.mark.parametrize("case", RENAMES)
def test_other_names_of_the_same_tensors_are_read(case: str, tmp_path: pathlib.Path) -> None:
    lora = SERVED["even"]
    write_peft(tmp_path / "peft", SMALL, lora, random_adapters(SMALL, lora))
    renamed = rewritten(tmp_path / "peft", tmp_path / "renamed", RENAMES[case])
    assert same(read_peft(renamed, SMALL)[1], random_adapters(SMALL, lora))


# settings without effect, as PEFT reads them; ... takes a field out
NEUTRAL: dict[str, tuple[LoraConfig, dict[str, Any]]] = {
    "stamps": (LoraConfig(r=2), {"unsloth_fixed": True, "axolotl_version": "0.9", "lora_mlp_kernel": True}),
    "biases of a model without": (LoraConfig(r=2), {"bias": "all"}),
    "a start from singular vectors": (LoraConfig(r=2), {"init_lora_weights": "mica"}),
    "every layer": (LoraConfig(r=2), {"layers_to_transform": [0, 1], "layers_pattern": "layers"}),
    "layers beside a regular expression": (  # PEFT reads them beside a list alone
        LoraConfig(r=2, targets=("q_proj",)),
        {"layers_to_transform": [0], "target_modules": ".*q_proj"},
    ),
    "PEFT's rank and alpha": (LoraConfig(r=8, alpha=8.0), {"r": ..., "lora_alpha": ...}),
}


@pytest.mark.parametrize("case", NEUTRAL)
def test_settings_without_effect_are_accepted(
    case: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    lora, changes = NEUTRAL[case]
    write_peft(tmp_path / "peft", SMALL, lora, random_adapters(SMALL, lora))
    found, adapters = read_peft(rewritten(tmp_path / "peft", tmp_path / "changed", **changes), SMALL)
    assert (found.r, found.alpha) == (lora.r, lora.alpha)
    assert same(adapters, random_adapters(SMALL, lora))
    listed = [record.message for record in caplog.records]
    assert ["axolotl_version, lora_mlp_kernel, unsloth_fixed" in one for one in listed] == [True] * (case == "stamps")


def test_every_setting_of_peft_is_known() -> None:
    """A field of a new PEFT belongs into one of the tables, and its version into `_KNOWN_VERSION`."""
    from convert import peft_settings as tables

    peft = pytest.importorskip("peft")
    known = tables._HARMLESS | tables._USED | tables._OTHER_FEATURES | set(tables._UNSUPPORTED)
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= known
    assert {name: getattr(peft.LoraConfig(), name) for name in tables._DEFAULTS} == tables._DEFAULTS


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "IA3": (None, {"peft_type": "IA3"}, "merge_and_unload"),
    "LoKr": (None, {"peft_type": "LOKR"}, "merge_and_unload"),
    "MLX": (None, {"peft_type": ..., "fine_tune_type": "lora", "lora_parameters": {"rank": 8}}, "mlx_lm.fuse"),
    "X-LoRA": (None, {"peft_type": "XLORA"}, "one of its LoRA adapters"),
    "prompt tuning": (None, {"peft_type": "PROMPT_TUNING"}, "train a LoRA adapter"),
    "aLoRA": (None, {"alora_invocation_tokens": [1, 2]}, "use it with PEFT"),
    "DoRA": (None, {"use_dora": True}, "merge_and_unload"),
    "PiSSA": (None, {"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    "OLoRA": (None, {"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
    "LoftQ": (None, {"init_lora_weights": "loftq"}, "merge_and_unload"),
    "biases of no known kind": (None, {"bias": "some"}, "merge_and_unload"),
    "a feature of PEFT": (None, {"kasa_config": {"a": 1}}, "merge_and_unload"),
    "an unknown feature": (None, {"use_new": True}, "merge_and_unload"),
    "a field of a newer PEFT": (None, {"peft_version": "0.99.0", "scaled": 2.0}, "merge_and_unload"),
    "a module that is no target": (None, {"target_modules": ["q_proj", "v_proj"]}, "target_modules"),
    "an excluded module": (None, {"exclude_modules": "model.layers.1.self_attn.q_proj"}, "target_modules"),
    "a layer that is not transformed": (None, {"layers_to_transform": [0]}, "layers_to_transform: PEFT would ignore"),
    "a layer alone": (None, {"layers_to_transform": 1}, "layers.0.self_attn"),
    "layers as texts": (None, {"layers_to_transform": ["0"]}, "layers_to_transform: expected a whole number"),
    "targets as an object": (None, {"target_modules": {"q_proj": 8}}, "target_modules: expected a list of names"),
    "exclusions as numbers": (None, {"exclude_modules": [1]}, "exclude_modules: expected a list of names"),
    "a text for true or false": (None, {"use_rslora": "false"}, "use_rslora: expected true or false"),
    "a dropout below 0": (None, {"lora_dropout": -0.5}, "lora_dropout: expected a number of at least 0"),
    "token embeddings": (
        lambda key: "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
        {},
        "single trained token embeddings",
    ),
    "norms": (lambda key: "base_model.model.model.layers.0.input_layernorm.weight", {}, "trained norms"),
    "a head with LoRA, stored": (lambda key: "base_model.model.lm_head.base_layer.weight", {}, "output head"),
    "a bias in lora_B": (lambda key: key.replace("lora_B.weight", "lora_B.bias"), {}, "merge_and_unload"),
    "embeddings": (
        lambda key: f"base_model.model.model.embed_tokens.lora_embedding_{key.split('lora_')[1][0]}",
        {},
        "LoRA on embeddings",
    ),
    "the head": (lambda key: f"base_model.model.lm_head.lora_{key.split('lora_')[1]}", {}, "output head"),
    "the head, by Tinker": (
        lambda key: f"base_model.model.model.unembed_tokens.lora_{key.split('lora_')[1]}",
        {},
        "build_hf_model",
    ),
    "another class": (
        lambda key: key.replace("model.model.layers", "model.model.language_model.layers"),
        {},
        "another model class",
    ),
    "two adapters": (
        lambda key: key.replace(".weight", ".a.weight" if "q_proj" in key else ".b.weight"),
        {},
        "a and b",
    ),
    "ranks": (None, {"rank_pattern": {"q_proj": "8"}}, "rank_pattern"),
    "alphas": (None, {"alpha_pattern": {"q_proj": None}}, "alpha_pattern"),
    "fraction": (None, {"r": 2.5}, "whole number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_the_way_out(case: str, tmp_path: pathlib.Path) -> None:
    rename, changes, says = REFUSED[case]
    write_peft(tmp_path / "peft", SMALL, LoraConfig(r=2), random_adapters(SMALL, LoraConfig(r=2)))
    bad = rewritten(tmp_path / "peft", tmp_path / "bad", rename or (lambda key: key), **changes)
    with pytest.raises(UserError) as caught:
        read_peft(bad, SMALL)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["checkpoint-8", "default"])
def test_an_adapter_in_a_folder_inside_is_named(name: str, tmp_path: pathlib.Path) -> None:
    lora = LoraConfig(r=2)
    write_peft(tmp_path / "run" / name, SMALL, lora, random_adapters(SMALL, lora))
    with pytest.raises(UserError, match=rf"run: expected a PEFT adapter, .*; its folder {name} has one$"):
        read_peft(tmp_path / "run", SMALL)


@pytest.mark.parametrize("config", [SMALL.replace(hidden_size=48), SMALL.replace(num_attention_heads=8)])
def test_an_adapter_of_another_model_is_named(config: Qwen3MoeConfig, tmp_path: pathlib.Path) -> None:
    lora = LoraConfig(r=2, targets=("q_proj",))
    write_peft(tmp_path / "peft", SMALL, lora, random_adapters(SMALL, lora))
    shapes = r"\[\d+, \d+\], as the base's config.json says, found one of \[64, 32\]; was it made for another model"
    with pytest.raises(UserError, match=rf"safetensors: layer 0: q_proj: expected an adapter of .*{shapes}"):
        read_peft(tmp_path / "peft", config)


def test_a_mixed_stack_takes_the_wider_dtype(tmp_path: pathlib.Path) -> None:
    lora = LoraConfig(r=2)
    write_peft(tmp_path / "peft", SMALL, lora, random_adapters(SMALL, lora))
    tensors = tensors_in(tmp_path / "peft")
    name = f"{PREFIX}1.self_attn.q_proj.lora_A.weight"
    tensors[name] = tensors[name].astype(np.float16)
    write_file(tmp_path / "peft" / "adapter_model.safetensors", tensors, {})
    stack = read_peft(tmp_path / "peft", SMALL)[1]["attention.q_proj.lora_A"]
    assert stack.dtype == np.float32
    assert (stack[1] == tensors[name].astype(np.float32)).all()
