"""Adapters in PEFT's format: round trips, merging, and reading of the written files by PEFT itself."""

from __future__ import annotations

import json
import pathlib
import warnings
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import convert.adapters
from convert.adapters import load_adapter, merge, read_peft, write_peft
from convert.hf2jax import read_hf
from convert.safetensors_io import read_header, write_file
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.errors import UserError
from jaxmoe.lora import LORA_TARGETS, LoraConfig
from jaxmoe.parameters import lora_specs
from jaxmoe.store.adapter import read_adapter, write_adapter
from peers.make_checkpoint import TINY, make_checkpoint
from tests.tolerances import bound

MIXED = TINY.replace(num_hidden_layers=4, mlp_only_layers=(1,), num_experts=5, attention_bias=True)
ALL = tuple(LORA_TARGETS)
SPARSE = tuple(t for t in ALL if LORA_TARGETS[t].stack != "dense")


def random_adapters(
    config: Qwen3MoeConfig, lora: LoraConfig, seed: int = 0, dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    specs = lora_specs(config, lora).items()
    return {name: (0.3 * rng.standard_normal(spec.shape)).astype(dtype) for name, spec in specs}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes() for k in a
    )


CASES = {
    "all targets": (MIXED, LoraConfig(r=3, alpha=6.0, targets=ALL)),
    "attention": (TINY, LoraConfig(r=4, alpha=8.0)),
    "router": (TINY, LoraConfig(r=2, alpha=3.5, targets=("gate",))),
    "gate_up only": (TINY, LoraConfig(r=2, alpha=4.0, targets=("experts.gate_up_proj",))),
    "down only": (TINY, LoraConfig(r=2, alpha=4.0, targets=("v_proj", "experts.down_proj"))),
    "patterns": (
        MIXED,
        LoraConfig(
            r=3,
            alpha=6.0,
            targets=ALL,
            rank_pattern=(("gate", 2), ("experts.gate_up_proj", 6), ("down_proj", 1)),
            alpha_pattern=(("q_proj", 2.5), ("experts.gate_up_proj", 12.0), ("experts.down_proj", 7.0)),
        ),
    ),
    "rsLoRA": (MIXED, LoraConfig(r=3, alpha=6.0, use_rslora=True, targets=SPARSE, rank_pattern=(("gate", 2),))),
    "dense only": (
        TINY.replace(num_experts=0),
        LoraConfig(r=2, alpha=4.0, targets=("gate_proj", "up_proj", "down_proj")),
    ),
}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_round_trips_are_exact(case: str, dtype: Any, tmp_path: pathlib.Path) -> None:
    config, lora = CASES[case]
    adapters = random_adapters(config, lora, dtype=dtype)
    write_peft(tmp_path / "peft", config, lora, adapters)
    lora_2, adapters_2 = read_peft(tmp_path / "peft", config)
    assert lora_2 == lora
    assert same(adapters, adapters_2)
    write_adapter(tmp_path / "jax", config, lora, adapters)
    config_3, lora_3, adapters_3 = read_adapter(tmp_path / "jax")
    assert (config_3, lora_3) == (config, lora)
    assert same(adapters, adapters_3)
    assert same(load_adapter(tmp_path / "jax", config)[1], load_adapter(tmp_path / "peft", config)[1])
    write_peft(tmp_path / "again", config, lora_3, adapters_3)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()


def peft_model(base: pathlib.Path, adapter: pathlib.Path) -> Any:
    """The adapter on the base model, loaded by PEFT, which must use every key and miss none."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, use_safetensors=True, trust_remote_code=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(model, adapter)
    complaints = [str(w.message) for w in caught if "missing" in str(w.message) or "unexpected" in str(w.message)]
    assert not complaints, complaints
    stored = {name: tensor.read() for name, tensor in read_header(adapter / "adapter_model.safetensors").items()}
    held = peft.get_peft_model_state_dict(model)
    assert stored.keys() == held.keys()
    for name, array in stored.items():
        np.testing.assert_array_equal(held[name].numpy(), array, err_msg=name)
    return model


def written_by_peft(base: pathlib.Path, adapter: pathlib.Path, settings: dict[str, Any]) -> Any:
    """The base model with a random adapter of PEFT's, which PEFT has also written to the folder `adapter`."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, use_safetensors=True, trust_remote_code=False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(adapter)
    return model


def merged_state(base: pathlib.Path, lora: LoraConfig, adapters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our merge, under the names that transformers uses in memory."""
    source = read_hf(base)
    state = {}
    for block in source.blocks():
        merge(source.config, block, lora, adapters)
        if block.layer is None:
            continue
        for path, array in block.arrays.items():
            stack, name = path.split(".")
            if stack == "attention" and name.endswith("_proj"):
                state[f"model.layers.{block.layer}.self_attn.{name}.weight"] = array
            elif path == "sparse.gate":
                state[f"model.layers.{block.layer}.mlp.gate.weight"] = array
            elif stack == "sparse":
                state[f"model.layers.{block.layer}.mlp.experts.{name}"] = array
            elif stack == "dense":
                state[f"model.layers.{block.layer}.mlp.{name}.weight"] = array
    return state


def largest_merge_error(base: pathlib.Path, model: Any, lora: LoraConfig, adapters: dict[str, np.ndarray]) -> float:
    """Largest relative L2 error of a merged weight against PEFT's own merge, over all weights in the layers."""
    theirs = {name: tensor.numpy() for name, tensor in model.merge_and_unload().state_dict().items()}
    ours = merged_state(base, lora, adapters)
    return max(float(np.linalg.norm(ours[n] - theirs[n]) / np.linalg.norm(theirs[n])) for n in ours)


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_and_merges_what_is_written(case: str, tmp_path: pathlib.Path) -> None:
    config, lora = CASES[case]
    base = make_checkpoint(tmp_path / "base", config)
    adapters = random_adapters(config, lora)
    write_peft(tmp_path / "adapter", config, lora, adapters)
    model = peft_model(base, tmp_path / "adapter")
    assert largest_merge_error(base, model, lora, adapters) <= bound("merge_fp32")


def test_a_wrong_packing_would_be_noticed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: gate and up swapped in the merge, and expert and rank swapped in lora_B, both fail the test."""
    config, lora = CASES["all targets"]
    base = make_checkpoint(tmp_path / "base", config)
    adapters = random_adapters(config, lora)
    write_peft(tmp_path / "adapter", config, lora, adapters)
    model = peft_model(base, tmp_path / "adapter")
    swapped = {
        name: np.roll(array, array.shape[2] // 2, axis=2) if name == "sparse.gate_up_proj.lora_B" else array
        for name, array in adapters.items()
    }
    wrong_order, _ = read_peft(tmp_path / "adapter", config, "unsloth")
    assert wrong_order == lora
    unsloth = read_peft(tmp_path / "adapter", config, "unsloth")[1]
    reference = {name: tensor.numpy() for name, tensor in model.merge_and_unload().state_dict().items()}
    for faulty in (swapped, unsloth):
        ours = merged_state(base, lora, faulty)
        worst = max(float(np.linalg.norm(ours[n] - reference[n]) / np.linalg.norm(reference[n])) for n in ours)
        assert worst > 100 * bound("merge_fp32")


def test_the_old_packing_of_unsloth_is_an_option(tmp_path: pathlib.Path) -> None:
    config, lora = CASES["all targets"]
    adapters = random_adapters(config, lora)
    write_peft(tmp_path / "peft", config, lora, adapters)
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = {name: tensor.read().copy() for name, tensor in read_header(file).items()}
    for name, array in tensors.items():
        if "experts" in name and "lora_B" in name:
            unpacked = array.reshape(array.shape[0], -1, config.num_experts)
            tensors[name] = unpacked.transpose(0, 2, 1).reshape(array.shape)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter_config.json").write_bytes((tmp_path / "peft" / "adapter_config.json").read_bytes())
    write_file(tmp_path / "old" / "adapter_model.safetensors", tensors, {})
    assert same(read_peft(tmp_path / "old", config, "unsloth")[1], adapters)
    assert not same(read_peft(tmp_path / "old", config)[1], adapters)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "o_proj"], "target_parameters": ["mlp.experts.down_proj"]},
        {"target_modules": ["k_proj"], "layers_to_transform": [1]},
        {"target_modules": ["gate_proj", "up_proj", "down_proj", "gate"]},
        {"target_modules": ["v_proj"], "target_parameters": ["mlp.gate.weight"], "use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 5}},
        {
            "target_modules": ["v_proj"],
            "target_parameters": ["mlp.gate.weight", "q_proj.weight"],
            "rank_pattern": {"mlp.gate": 2, "v_proj.weight": 3},
            "alpha_pattern": {"gate": 30, "q_proj.weight": 7},
        },
    ],
    ids=["experts", "one layer", "names of transformers 4", "router, rsLoRA", "patterns", "patterns of parameters"],
)
def test_adapters_that_peft_made_are_read(settings: dict[str, Any], tmp_path: pathlib.Path) -> None:
    base = make_checkpoint(tmp_path / "base", TINY)
    model = written_by_peft(base, tmp_path / "adapter", settings)
    lora, adapters = read_peft(tmp_path / "adapter", TINY)
    assert largest_merge_error(base, model, lora, adapters) <= bound("merge_fp32")


def old_form(folder: pathlib.Path, config: Qwen3MoeConfig, rank: int = 2, **settings: Any) -> dict[str, np.ndarray]:
    """An adapter as PEFT wrote it with transformers 4: every expert projection is a separate module."""
    rng = np.random.default_rng(3)
    D, F = config.hidden_size, config.moe_intermediate_size
    tensors = {}
    for layer in config.sparse_layers:
        at = f"base_model.model.model.layers.{layer}.mlp"
        for expert in range(config.num_experts):
            for name, (out, inner) in {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}.items():
                key = f"{at}.experts.{expert}.{name}"
                tensors[f"{key}.lora_A.weight"] = rng.standard_normal((rank, inner)).astype(np.float32) * 0.3
                tensors[f"{key}.lora_B.weight"] = rng.standard_normal((out, rank)).astype(np.float32) * 0.3
    folder.mkdir()
    raw = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 5, "bias": "none"}
    raw |= {"target_modules": ["gate_proj", "up_proj", "down_proj"]} | settings
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    write_file(folder / "adapter_model.safetensors", tensors, {})
    return tensors


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_form_of_transformers_4_has_the_same_delta(use_rslora: bool, tmp_path: pathlib.Path) -> None:
    base = make_checkpoint(tmp_path / "base", TINY)
    tensors = old_form(tmp_path / "old", TINY, use_rslora=use_rslora)
    lora, adapters = read_peft(tmp_path / "old", TINY)
    assert lora.rank("experts.gate_up_proj") == 4
    assert lora.rank("experts.down_proj") == 2
    ours, plain = (
        merged_state(base, lora, adapters),
        merged_state(base, LoraConfig(), random_adapters(TINY, LoraConfig())),
    )
    scale, F = 5 / (np.sqrt(2) if use_rslora else 2), TINY.moe_intermediate_size
    for layer in TINY.sparse_layers:
        for expert in range(TINY.num_experts):
            for name, path, rows in (
                ("gate_proj", "gate_up_proj", slice(0, F)),
                ("up_proj", "gate_up_proj", slice(F, None)),
                ("down_proj", "down_proj", slice(None)),
            ):
                key = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                delta = scale * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
                weight = f"model.layers.{layer}.mlp.experts.{path}"
                expected = plain[weight][expert, rows] + delta
                error = np.linalg.norm(ours[weight][expert, rows] - expected) / np.linalg.norm(expected)
                assert error <= bound("merge_fp32")
    if not use_rslora:  # PEFT doubles the alpha for rsLoRA too, where the square root would keep the delta
        model = pytest.importorskip("peft").PeftModel.from_pretrained(
            pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(
                base, use_safetensors=True, trust_remote_code=False
            ),
            tmp_path / "old",
        )
        assert largest_merge_error(base, model, lora, adapters) <= bound("merge_fp32")
    # and it is written in the form of transformers 5
    write_peft(tmp_path / "new", TINY, lora, adapters)
    assert same(read_peft(tmp_path / "new", TINY)[1], adapters)


def test_a_merge_rounds_once(tmp_path: pathlib.Path) -> None:
    """A bfloat16 weight with an adapter: the float32 sum, cast; adding a rounded delta would differ."""
    base = make_checkpoint(tmp_path / "base", TINY, dtype="bfloat16")
    lora = LoraConfig(r=4, alpha=8.0, targets=("q_proj",))
    adapters = random_adapters(TINY, lora, dtype=ml_dtypes.bfloat16)
    source = read_hf(base)
    for block in source.blocks():
        if block.layer is None:
            continue
        weight = block.arrays["attention.q_proj"].astype(np.float32)
        a, b = (adapters[f"attention.q_proj.lora_{x}"][block.layer].astype(np.float32) for x in "AB")
        merged = merge(TINY, block, lora, adapters).arrays["attention.q_proj"]
        delta = 2 * (b @ a)
        np.testing.assert_array_equal(merged, (weight + delta).astype(ml_dtypes.bfloat16))
        rounded_twice = weight + delta.astype(ml_dtypes.bfloat16).astype(np.float32)
        assert (merged != rounded_twice.astype(ml_dtypes.bfloat16)).any()


def edit_settings(**changes: Any) -> Any:
    def change(folder: pathlib.Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def edit_tensors(change: Any) -> Any:
    def apply(folder: pathlib.Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = {name: tensor.read().copy() for name, tensor in read_header(file).items()}
        change(tensors)
        write_file(file, tensors, {})

    return apply


PREFIX = "base_model.model.model.layers"
DAMAGE = {
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "expected a PEFT adapter"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    "a pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        "is not read",
    ),
    "another method": (edit_settings(peft_type="IA3"), "peft_type"),
    "another task": (edit_settings(task_type="SEQ_CLS"), "task_type"),
    "DoRA": (edit_settings(use_dora=True), "use_dora"),
    "trained biases": (edit_settings(bias="all"), "bias"),
    "lora_bias": (edit_settings(lora_bias=True), "lora_bias"),
    "modules_to_save": (edit_settings(modules_to_save=["lm_head"]), "modules_to_save"),
    "PiSSA": (edit_settings(init_lora_weights="pissa"), "init_lora_weights"),
    "an unknown feature": (edit_settings(quantum_lora={"on": 1}), "quantum_lora"),
    "rank": (edit_settings(r=4), "expected rank 4"),
    "rank of no number": (edit_settings(r="8"), "r: expected"),
    "a broken pattern": (edit_settings(alpha_pattern={"q_proj(": 3}), "regular expression"),
    "unexpected tensor": (
        edit_tensors(lambda t: t.update({"base_model.model.lm_head.lora_A.weight": np.zeros((3, 32), np.float32)})),
        "unexpected tensor",
    ),
    "unknown module": (
        edit_tensors(
            lambda t: t.update({f"{PREFIX}.0.mlp.x.lora_{h}.weight": np.zeros((3, 3), np.float32) for h in "AB"})
        ),
        "mlp.x",
    ),
    "half a pair": (edit_tensors(lambda t: t.pop(f"{PREFIX}.1.self_attn.q_proj.lora_B.weight")), "lora_A and lora_B"),
    "a layer too many": (
        edit_tensors(
            lambda t: t.update(
                {f"{PREFIX}.9.self_attn.q_proj.lora_{h}.weight": np.zeros((3, 3), np.float32) for h in "AB"}
            )
        ),
        "layers",
    ),
    "wrong width": (
        edit_tensors(
            lambda t: t.update(
                {f"{PREFIX}.{i}.self_attn.q_proj.lora_A.weight": np.zeros((3, 31), np.float32) for i in range(4)}
            )
        ),
        "shape",
    ),
    "one wrong width": (
        edit_tensors(lambda t: t.update({f"{PREFIX}.2.self_attn.q_proj.lora_A.weight": np.zeros((3, 31), np.float32)})),
        "layer 2: q_proj: expected an adapter of a weight of shape [64, 32], as the base's config.json says, found one "
        "of [64, 31]",
    ),
    "wrong expert shape": (
        edit_tensors(lambda t: t.update({f"{PREFIX}.0.mlp.experts.lora_A.weight": np.zeros((14, 24), np.float32)})),
        "experts",
    ),
    "an adapter on experts of a dense layer": (
        edit_tensors(
            lambda t: t.update(
                {f"{PREFIX}.1.mlp.experts.lora_{h}.weight": t[f"{PREFIX}.0.mlp.experts.lora_{h}.weight"] for h in "AB"}
            )
        ),
        "no experts in this layer",
    ),
    "integers": (
        edit_tensors(
            lambda t: t.update({k: v.view(np.float16) for k, v in t.items() if ".2.self_attn.k_proj.lora_A" in k})
        ),
        "expected",
    ),
    "truncated": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(
            (folder / "adapter_model.safetensors").read_bytes()[:-4]
        ),
        "truncated",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_supported_is_refused(damage: str, tmp_path: pathlib.Path) -> None:
    config, lora = CASES["all targets"]
    write_peft(tmp_path / "peft", config, lora, random_adapters(config, lora))
    apply, says = DAMAGE[damage]
    apply(tmp_path / "peft")
    with pytest.raises(UserError) as caught:
        read_peft(tmp_path / "peft", config)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(next(k for k in tensors if ".experts.3.up_proj" in k)),
        lambda tensors: [tensors.pop(k) for k in list(tensors) if ".1.mlp.experts.3.up_proj" in k],
        lambda tensors: tensors.update(
            {k.replace("experts.0", "experts.8"): v for k, v in tensors.items() if "s.0." in k}
        ),
    ],
    ids=["half a pair", "an expert missing", "an expert too many"],
)
def test_an_incomplete_old_form_is_refused(change: Any, tmp_path: pathlib.Path) -> None:
    old_form(tmp_path / "old", TINY)
    edit_tensors(change)(tmp_path / "old")
    with pytest.raises(UserError, match="expected"):
        read_peft(tmp_path / "old", TINY)


def test_dropout_is_accepted(tmp_path: pathlib.Path) -> None:
    config, lora = CASES["attention"]
    adapters = random_adapters(config, lora)
    write_peft(tmp_path / "peft", config, lora, adapters)
    edit_settings(lora_dropout=0.1)(tmp_path / "peft")
    read, arrays = read_peft(tmp_path / "peft", config)
    assert read == replace(lora, dropout=0.1)
    assert same(arrays, adapters)


def test_a_failing_write_leaves_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    config, lora = CASES["attention"]
    monkeypatch.setattr(convert.adapters, "write_file", fail)
    with pytest.raises(OSError, match="No space"):
        write_peft(tmp_path / "new" / "peft", config, lora, random_adapters(config, lora))
    assert not list(tmp_path.iterdir())
