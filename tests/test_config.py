"""Reading config.json: the forms that transformers 4 and 5 write, and a clear error for everything else."""

from __future__ import annotations

import json
import math
import pathlib
import re
from typing import Any

import numpy as np
import pytest
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeRotaryEmbedding

from jaxmoe.config import LoraConfig, Qwen3MoeConfig, expand_targets
from jaxmoe.errors import ConfigError
from jaxmoe.lora import LORA_GROUPS, LORA_TARGETS
from jaxmoe.ops.rotary import rotary_frequencies
from jaxmoe.parameters import parameter_specs
from peers.configs import CONFIGS, config_of
from peers.reference import hf_config
from tests import oracle
from tests.tolerances import bound

SHARED_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings rms_norm_eps tie_word_embeddings attention_bias sliding_window attention_dropout "
    "decoder_sparse_step moe_intermediate_size num_experts_per_tok num_experts norm_topk_prob router_aux_loss_coef"
).split()


@pytest.mark.parametrize("name", CONFIGS)
def test_fields_mean_what_they_mean_to_transformers(name: str) -> None:
    ours, theirs = config_of(name), hf_config(CONFIGS[name])
    for field in SHARED_FIELDS:
        assert getattr(ours, field) == getattr(theirs, field), field
    layers = [Qwen3MoeDecoderLayer(theirs, i) for i in range(theirs.num_hidden_layers)]
    assert ours.sparse_layers == tuple(i for i, layer in enumerate(layers) if hasattr(layer.mlp, "gate"))
    assert sorted(ours.sparse_layers + ours.dense_layers) == list(range(theirs.num_hidden_layers))
    assert {ours.head_dim} == {layer.self_attn.head_dim for layer in layers}
    assert ours.dtype == "float32"


def frequencies_agree(name: str) -> bool:
    theirs = Qwen3MoeRotaryEmbedding(hf_config(CONFIGS[name]))
    found, factor = rotary_frequencies(config_of(name).rope_parameters, config_of(name).head_dim)
    rope = config_of(name).rope_parameters
    exact = oracle.inverse_frequencies(rope, config_of(name).head_dim)
    tolerance = bound("rotary_frequencies")
    return (
        np.allclose(found, theirs.inv_freq.numpy(), rtol=tolerance, atol=0)
        and np.allclose(found, exact, rtol=tolerance, atol=0)
        and math.isclose(factor, theirs.attention_scaling, rel_tol=tolerance)
        and math.isclose(factor, oracle.attention_factor(rope), rel_tol=tolerance)
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_rotary_frequencies_are_those_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert frequencies_agree(name)
    # Negative control: another rotary base in the config that jaxmoe has read.
    read = Qwen3MoeConfig.from_hf.__func__

    def misread(cls: type[Qwen3MoeConfig], raw: dict[str, Any]) -> Qwen3MoeConfig:
        config = read(cls, raw)
        rope = config.rope_parameters
        return config.replace(rope_parameters=type(rope)(**{**vars(rope), "rope_theta": rope.rope_theta * 1.001}))

    monkeypatch.setattr(Qwen3MoeConfig, "from_hf", classmethod(misread))
    assert not frequencies_agree(name)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_through_the_form_of_transformers_5(name: str) -> None:
    config = config_of(name)
    written = json.loads(json.dumps(config.to_hf()))
    assert Qwen3MoeConfig.from_hf(written) == config
    theirs = hf_config(written)
    for field in SHARED_FIELDS:
        assert getattr(theirs, field) == getattr(config, field), field
    assert theirs.head_dim == config.head_dim


@pytest.mark.parametrize("name", ["plain_v4", "rope_yarn_v4", "sliding_window", "no_head_dim_v4", "odd_sizes"])
def test_reads_what_transformers_writes(name: str, tmp_path: pathlib.Path) -> None:
    hf_config(CONFIGS[name]).save_pretrained(tmp_path)
    assert Qwen3MoeConfig.from_pretrained(tmp_path) == config_of(name)


def test_absent_fields_take_the_defaults_of_transformers() -> None:
    ours, theirs = Qwen3MoeConfig.from_hf({"model_type": "qwen3_moe"}), hf_config({"model_type": "qwen3_moe"})
    for field in SHARED_FIELDS:
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.rope_parameters.rope_theta == dict(theirs.rope_parameters or {})["rope_theta"]
    assert ours.head_dim == theirs.hidden_size // theirs.num_attention_heads


def test_sliding_window_counts_only_with_use_sliding_window() -> None:
    raw = {**CONFIGS["plain"], "sliding_window": 7}
    assert Qwen3MoeConfig.from_hf(raw).sliding_window is None is hf_config(raw).sliding_window
    raw["use_sliding_window"] = True
    assert Qwen3MoeConfig.from_hf(raw).sliding_window == 7 == hf_config(raw).sliding_window
    del raw["sliding_window"]
    assert Qwen3MoeConfig.from_hf(raw).sliding_window == 4096 == hf_config(raw).sliding_window


ROPE_YARN = CONFIGS["rope_yarn"]["rope_parameters"]
REJECTED = {
    "another model type": ({"model_type": "qwen3"}, "model_type"),
    "no model type": ({"model_type": None}, "model_type"),
    "a sister's field": ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
    "two numbers of experts": ({"num_experts": 4, "num_local_experts": 8}, "num_local_experts"),
    "more chosen than there are": ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
    "none chosen": ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
    "negative experts": ({"num_local_experts": -1}, "num_experts"),
    "heads no multiple": ({"num_key_value_heads": 3}, "num_attention_heads"),
    "no key heads": ({"num_key_value_heads": 0}, "num_key_value_heads"),
    "odd head width": ({"head_dim": 13}, "head_dim"),
    "head width to guess": ({"head_dim": None, "num_attention_heads": 5, "num_key_value_heads": 5}, "head_dim"),
    "width as text": ({"hidden_size": "48"}, "hidden_size"),
    "width as fraction": ({"hidden_size": 48.0}, "hidden_size"),
    "layers as truth": ({"num_hidden_layers": True}, "num_hidden_layers"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "sparse step zero": ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
    "layer list as number": ({"mlp_only_layers": 1}, "mlp_only_layers"),
    "negative layer": ({"mlp_only_layers": [-1]}, "mlp_only_layers"),
    "layer beyond the last": ({"mlp_only_layers": [3]}, "mlp_only_layers"),
    "layer as text": ({"mlp_only_layers": ["0"]}, "mlp_only_layers"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "activation as list": ({"hidden_act": ["silu"]}, "hidden_act"),
    "flag as number": ({"norm_topk_prob": 1}, "norm_topk_prob"),
    "flag as null": ({"tie_word_embeddings": None}, "tie_word_embeddings"),
    "window flag as text": ({"use_sliding_window": "yes"}, "use_sliding_window"),
    "window of nothing": ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window"),
    "window as text": ({"use_sliding_window": True, "sliding_window": "4"}, "sliding_window"),
    "layer types that differ": (
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "layer_types",
    ),
    "layer types as number": ({"layer_types": 3}, "layer_types"),
    "layer types of another depth": ({"layer_types": ["full_attention"]}, "layer_types"),
    "epsilon": ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
    "epsilon as text": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    "epsilon not a number": ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
    "loss coefficient": ({"router_aux_loss_coef": "0.1"}, "router_aux_loss_coef"),
    "attention dropout": ({"attention_dropout": 1.5}, "attention_dropout"),
    "initial range": ({"initializer_range": -0.1}, "initializer_range"),
    "unknown dtype": ({"dtype": "int8"}, "dtype"),
    "dtype as number": ({"dtype": 16}, "dtype"),
    "two dtypes": ({"dtype": "float32", "torch_dtype": "bfloat16"}, "torch_dtype"),
    "rope kind": ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type"),
    "rope as list": ({"rope_parameters": ["default"]}, "rope_parameters"),
    "rope scaling as text": ({"rope_parameters": None, "rope_scaling": "linear"}, "rope_scaling"),
    "rope per layer type": ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters"),
    "rope two forms": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    "rope two forms and one base": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_parameters": {**ROPE_YARN, "factor": 2.0}},
        "rope_scaling",
    ),
    "rope two bases": ({"rope_theta": 5.0}, "rope_theta"),
    "rope two kinds": ({"rope_parameters": {**ROPE_YARN, "type": "linear"}}, "rope_type"),
    "rope base": ({"rope_parameters": {"rope_theta": 0}}, "rope_theta"),
    "rope base of one": ({"rope_parameters": {**ROPE_YARN, "rope_theta": 1.0}}, "rope_theta"),
    "rope base as text": ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta"),
    "rope no factor": ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
    "rope factor below one": ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor"),
    "rope foreign key": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 1.0}}, "beta_fast"),
    "rope default with factor": ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "factor"),
    "rope default with another context": (
        {"rope_parameters": {"rope_type": "default", "original_max_position_embeddings": 7}},
        "original_max_position_embeddings",
    ),
    "rope partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "rope partial inside": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "yarn no factor": ({"rope_parameters": {k: v for k, v in ROPE_YARN.items() if k != "factor"}}, "factor"),
    "yarn context": (
        {"rope_parameters": {**ROPE_YARN, "original_max_position_embeddings": 0}},
        "original_max_position_embeddings",
    ),
    "yarn attention factor": ({"rope_parameters": {**ROPE_YARN, "attention_factor": -1.0}}, "attention_factor"),
    "yarn beta as text": ({"rope_parameters": {**ROPE_YARN, "beta_fast": "32"}}, "beta_fast"),
    "yarn betas exchanged": ({"rope_parameters": {**ROPE_YARN, "beta_fast": 1.0, "beta_slow": 32.0}}, "beta_fast"),
    "yarn mscale": ({"rope_parameters": {**ROPE_YARN, "mscale": "1"}}, "mscale"),
    "yarn truncate as text": ({"rope_parameters": {**ROPE_YARN, "truncate": "no"}}, "truncate"),
}


# forms of the rotary settings beside those in CONFIGS; transformers reads each as given here
ROPE_FORMS: dict[str, dict[str, Any]] = {
    "context at the top level": {
        "original_max_position_embeddings": 8,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0},
    },
    "two contexts": {
        "original_max_position_embeddings": 8,
        "rope_parameters": {**ROPE_YARN, "original_max_position_embeddings": 16},
    },
    "context without scaling": {"original_max_position_embeddings": 8},
    "both forms": {
        "rope_theta": 1e6,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0},
    },
    "an empty old form": {"rope_scaling": {}, "rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}},
    "the text part of Qwen3-VL": {
        "rope_theta": 5e6,
        "rope_parameters": None,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [2, 2, 2], "rope_type": "default"},
    },
    "yarn with a note": {"rope_parameters": {**ROPE_YARN, "finetuned": True}},
}


@pytest.mark.parametrize("form", ROPE_FORMS)
def test_forms_of_the_rotary_settings_mean_what_they_mean_to_transformers(form: str) -> None:
    raw = {**CONFIGS["plain"], **ROPE_FORMS[form]}
    theirs, ours = Qwen3MoeRotaryEmbedding(hf_config(raw)), Qwen3MoeConfig.from_hf(raw)
    found, factor = rotary_frequencies(ours.rope_parameters, ours.head_dim)
    np.testing.assert_allclose(found, theirs.inv_freq.numpy(), rtol=bound("rotary_frequencies"))
    assert math.isclose(factor, theirs.attention_scaling, rel_tol=bound("rotary_frequencies"))
    assert "original_max_position_embeddings" not in Qwen3MoeConfig.unknown_fields(raw)


def test_neutral_scaling_of_the_default_type_is_accepted() -> None:
    context = CONFIGS["plain"]["max_position_embeddings"]
    scaling = {"rope_type": "default", "factor": 1.0, "original_max_position_embeddings": context, "beta_fast": None}
    assert Qwen3MoeConfig.from_hf({**CONFIGS["plain"], "rope_parameters": scaling}).rope_parameters.to_hf() == {
        "rope_theta": 10_000.0,
        "rope_type": "default",
    }


@pytest.mark.parametrize("case", REJECTED)
def test_unknown_and_inconsistent_fields_are_named(case: str) -> None:
    changes, field = REJECTED[case]
    Qwen3MoeConfig.from_hf(CONFIGS["plain"])
    with pytest.raises(ConfigError, match=re.escape(field)) as error:
        Qwen3MoeConfig.from_hf({**CONFIGS["plain"], **changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [None, "x", -1, 0.5, math.inf, True, [], [1, "x"], {}, {"a": {}}], ids=repr)
def test_no_value_of_any_field_escapes_as_another_error(value: Any) -> None:
    for raw in (CONFIGS["rope_yarn"], CONFIGS["rope_yarn_v4"]):
        for name in raw:
            for changed in ({**raw, name: value}, *_inside(raw, name, value)):
                assert "\n" not in refusal(changed)


def refusal(raw: dict[str, Any]) -> str:
    """The error message for a config; empty if it is accepted, and then `to_hf` must read back as the same."""
    try:
        config = Qwen3MoeConfig.from_hf(raw)
    except ConfigError as error:
        return str(error)
    assert Qwen3MoeConfig.from_hf(config.to_hf()) == config
    return ""


def _inside(raw: dict[str, Any], name: str, value: Any) -> list[dict[str, Any]]:
    inner = raw[name]
    return [{**raw, name: {**inner, key: value}} for key in inner] if isinstance(inner, dict) else []


@pytest.mark.parametrize("text", ["", "{", "[]", '"qwen3_moe"', '{"a": \udc80}'])
def test_a_broken_file_is_named(text: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "config.json"))):
        Qwen3MoeConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="elsewhere"):
        Qwen3MoeConfig.from_pretrained(tmp_path / "elsewhere")


@pytest.mark.parametrize("field", [{"hidden_act": "gelu"}, {"num_experts": "many"}, {"attn_logit_softcapping": 30.0}])
def test_a_refused_field_names_the_file_too(field: dict[str, object], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_of("plain").to_hf() | field))
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: {next(iter(field))}: expected "):
        Qwen3MoeConfig.from_pretrained(tmp_path)


def test_lora_scale_and_patterns() -> None:
    lora = LoraConfig(r=8, alpha=4.0, rank_pattern=(("v_proj", 2),), alpha_pattern=(("k_proj", 16.0),))
    assert [lora.rank(t) for t in ("q_proj", "v_proj")] == [8, 2]
    assert [lora.scale(t) for t in ("q_proj", "k_proj", "v_proj")] == [0.5, 2.0, 2.0]
    assert LoraConfig(r=16, alpha=4.0, use_rslora=True).scale("q_proj") == 1.0


def test_target_groups_expand_to_single_targets() -> None:
    assert expand_targets(["attention"]) == LORA_GROUPS["attention"]
    assert expand_targets(["experts", "q_proj", "gate"]) == (
        "q_proj",
        "gate",
        "experts.gate_up_proj",
        "experts.down_proj",
    )
    assert set(expand_targets(list(LORA_GROUPS))) == set(LORA_TARGETS)
    with pytest.raises(ConfigError, match="q_porj"):
        expand_targets(["q_porj"])


# A model whose dimensions all differ, so that no letter of the dimension key can stand for another.
LETTERS = {"D": 48, "N": 6, "K": 3, "H": 10, "I": 56, "E": 5, "F": 14}
IN_LETTERS = Qwen3MoeConfig(
    vocab_size=8,
    hidden_size=LETTERS["D"],
    num_attention_heads=LETTERS["N"],
    num_key_value_heads=LETTERS["K"],
    head_dim=LETTERS["H"],
    intermediate_size=LETTERS["I"],
    num_experts=LETTERS["E"],
    num_experts_per_tok=2,
    moe_intermediate_size=LETTERS["F"],
    num_hidden_layers=2,
    mlp_only_layers=(1,),
)


def in_letters(shape: str) -> tuple[int, ...]:
    """A shape of the table, for instance "E 2*F D", in numbers."""
    return tuple(eval(size, {"__builtins__": {}}, LETTERS) for size in shape.split())


def test_the_table_of_adapter_targets_agrees_with_the_parameters() -> None:
    specs = parameter_specs(IN_LETTERS)
    assert {target.path: in_letters(target.shape) for target in LORA_TARGETS.values()} == {
        path: spec.shape[1:] for path, spec in specs.items() if spec.axes[0] == "layers" and spec.init == "normal"
    }
    assert in_letters("E F*2 D") == specs["sparse.gate_up_proj"].shape[1:] != in_letters("E F D")
    assert sorted(name for group in LORA_GROUPS.values() for name in group) == sorted(LORA_TARGETS)


def test_the_table_of_adapter_targets_names_what_transformers_has() -> None:
    """PEFT's names are those of a real layer's modules and parameters, with the shapes that the table says."""
    import torch
    from transformers import Qwen3MoeConfig as HfConfig
    from transformers import Qwen3MoeForCausalLM

    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(HfConfig.from_dict(IN_LETTERS.to_hf()))
    layers = {"attention": 0, "sparse": 0, "dense": 1}
    for name, target in LORA_TARGETS.items():
        layer = model.model.layers[layers[target.stack]]
        modules, parameters = dict(layer.named_modules()), dict(layer.named_parameters())
        weight = parameters[target.peft_parameter or f"{target.peft_module}.weight"]
        assert tuple(weight.shape) == in_letters(target.shape), name
        assert target.peft_module in modules, name
        assert target.peft_parameter or isinstance(modules[target.peft_module], torch.nn.Linear), name


def test_torch_ref_adapts_the_targets_of_the_table() -> None:
    """torch_ref has its own list, because it does not import jaxmoe."""
    from torch_ref import lora as reference

    parameters = {*reference._EXPERTS, *reference._DENSE, reference._ROUTER}
    assert parameters == {target.peft_parameter for target in LORA_TARGETS.values() if target.peft_parameter}
    assert LORA_GROUPS["attention"] == reference.ATTENTION
    for name, group in (("experts", "experts"), ("router", "router")):
        assert set(reference._PARAMETERS[name]) == {
            LORA_TARGETS[target].peft_parameter for target in LORA_GROUPS[group]
        }


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"r": 0}, "rank"),
        ({"r": 2.0}, "rank"),
        ({"alpha": math.nan}, "alpha"),
        ({"targets": ()}, "targets"),
        ({"targets": ("q_proj", "q_proj")}, "targets"),
        ({"targets": ("experts",)}, "experts"),
        ({"rank_pattern": (("gate", 4),)}, "gate"),
    ],
)
def test_a_wrong_lora_configuration_is_named(arguments: dict[str, Any], field: str) -> None:
    LoraConfig()
    with pytest.raises(ConfigError, match=field):
        LoraConfig(**arguments)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("/nowhere/at all", "^/nowhere/at all: expected a model folder, found none$"),
        ("Qwen/Qwen3-30B-A3B", "found none; a model of the hub is first converted: python -m convert hf2jax Qwen/Qwen"),
        ("file", "file: expected a model folder, found none$"),
        ("run", r"config\.json \(the folder holds an adapter: give the folder of its base model"),
        ("empty", "file not found: .*config.json$"),
    ],
)
def test_what_is_no_model_folder_is_named(
    name: str, found: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("run", "empty"):
        pathlib.Path(folder).mkdir()
    pathlib.Path("file").touch()
    pathlib.Path("run/adapter_config.json").touch()
    with pytest.raises(ConfigError, match=found):
        Qwen3MoeConfig.from_pretrained(name)


def test_targets_that_the_model_lacks_are_named() -> None:
    for name, target in (("plain", "gate_proj"), ("all_dense", "gate"), ("all_dense", "experts.down_proj")):
        with pytest.raises(ConfigError, match=re.escape(target)):
            LoraConfig(targets=(target,)).check_against(config_of(name))
