"""Fields of config.json that Qwen3-MoE does not have: refused where they change the model, else accepted and kept."""

from __future__ import annotations

import json
import logging
import pathlib
import re
from typing import Any

import pytest
import transformers
from transformers import CONFIG_MAPPING

import jaxmoe.other_fields
from convert.__main__ import main
from jaxmoe.config import Qwen3MoeConfig, read_config
from jaxmoe.errors import ConfigError, UserError
from jaxmoe.other_fields import RULES, unknown_fields
from peers.configs import CONFIGS
from peers.make_checkpoint import TINY, make_checkpoint

PLAIN = CONFIGS["plain"]  # head_dim 12, 3 sparse layers, 8 experts of which 2 are chosen
STAMPS = {
    "unsloth_fixed": True,
    "unsloth_version": "2025.8.1",
    "mergekit_version": "0.1.4",
    "_attn_implementation": "sdpa",
    "experts_implementation": "eager",
    "model_name": "mine",
    "auto_map": {"AutoConfig": "configuration.Config"},
    "dual_chunk_attention_config": None,
}

# field -> a value that changes the model
REFUSED: dict[str, Any] = {
    "shared_expert_intermediate_size": 5632,
    "n_shared_experts": 1,
    "num_shared_experts": 2,
    "moe_num_shared_experts": 2,
    "shared_intermediate_size": 1024,
    "qkv_bias": True,
    "mlp_bias": True,
    "use_bias": True,
    "lm_head_bias": True,
    "attention_out_bias": True,
    "use_qk_norm": False,
    "qk_layernorm": False,
    "qk_norm_type": "per_layer",
    "scoring_func": "sigmoid",
    "score_function": "sigmoid",
    "moe_router_score_function": "sigmoid",
    "topk_method": "noaux_tc",
    "use_expert_bias": True,
    "use_routing_bias": True,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "route_scale": 2.0,
    "first_k_dense_replace": 3,
    "num_dense_layers": 1,
    "moe_layer_freq": 2,
    "interleave_moe_layer_step": 2,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "moe_layers": [1, 2],
    "partial_rotary_factor": 0.25,
    "rotary_dim": 4,
    "rope_interleave": True,
    "no_rope_layers": [1, 1, 0],
    "rope_local_base_freq": 10.0,
    "use_mrope": True,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "moe_router_logit_softcapping": 30.0,
    "clip_qkv": 8.0,
    "swiglu_limit": 7.0,
    "add_swa_attention_sink_bias": True,
    "attention_sinks": 4,
    "sliding_window_pattern": 6,
    "attention_chunk_size": 8192,
    "full_attention_interval": 4,
    "attn_output_gate": True,
    "query_pre_attn_scalar": 256,
    "attention_multiplier": 1.0,
    "is_causal": False,
    "use_bidirectional_attention": True,
    "attn_temperature_tuning": 4,
    "kv_lora_rank": 512,
    "v_head_dim": 128,
    "index_topk": 2048,
    "linear_num_key_heads": 16,
    "mamba_d_state": 16,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "logit_scale": 0.0625,
    "mup_enabled": True,
    "norm_type": "layernorm",
    "layer_norm_eps": 1e-5,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_nextn_predict_layers": 1,
    "mtp_num_hidden_layers": 1,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 256,
    "router_jitter_noise": 0.01,
    "hidden_dropout": 0.1,
    "router_z_loss_coef": 0.001,
    "expert_capacity": 64,
    "zero_expert_num": 256,
    "n_routed_experts": 64,
    "moe_topk": 6,
    "route_norm": False,
    "num_layers": 12,
    "vision_config": {"depth": 2},
    "pruned_heads": {"1": [0]},
}

# field -> values that leave the model as it is
NEUTRAL: dict[str, list[Any]] = {
    "shared_expert_intermediate_size": [0, None],
    "n_shared_experts": [0, None],
    "qkv_bias": [False],
    "use_qk_norm": [True],
    "scoring_func": ["softmax"],
    "topk_method": ["greedy"],
    "n_group": [None, 0, 1],
    "topk_group": [1],
    "routed_scaling_factor": [1, 1.0],
    "first_k_dense_replace": [0],
    "interleave_moe_layer_step": [1],
    "mlp_layer_types": [["sparse"] * 3],
    "moe_layers": [[0, 1, 2]],
    "moe_layer_end_index": [-1, 2],
    "partial_rotary_factor": [1.0],
    "rotary_dim": [12],
    "no_rope_layers": [[1, 1, 1], []],
    "final_logit_softcapping": [None],
    "attention_multiplier": [0.28867513],
    "query_pre_attn_scalar": [12],
    "is_causal": [True],
    "sliding_window_pattern": [1],
    "mamba_d_state": [None],
    "residual_multiplier": [1.0],
    "layer_norm_eps": [1e-6],
    "hidden_activation": ["silu"],
    "num_nextn_predict_layers": [0],
    "hidden_dropout": [0.0],
    "n_routed_experts": [8],
    "moe_topk": [2],
    "route_norm": [PLAIN["norm_topk_prob"]],
    "vision_config": [None, {}],
    "pruned_heads": [{}],
    "is_decoder": [False, True],  # transformers' Qwen3-MoE reads neither
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_changes_the_model_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: expected .+ \(.+\), found ") as error:
        Qwen3MoeConfig.from_hf({**PLAIN, name: REFUSED[name]})
    assert str(error.value).endswith(json.dumps(REFUSED[name]))


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_value_is_accepted(name: str) -> None:
    for value in NEUTRAL[name]:
        raw = {**PLAIN, name: value}
        assert Qwen3MoeConfig.from_hf(raw) == Qwen3MoeConfig.from_hf(PLAIN)
        assert Qwen3MoeConfig.unknown_fields(raw) == ()


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_special_tokens_are_numbers(name: str) -> None:
    several = [[1, 2], []] if name == "eos_token_id" else []
    for value in (None, 3, -1, *several):
        assert Qwen3MoeConfig.from_hf({**PLAIN, name: value}) == Qwen3MoeConfig.from_hf(PLAIN)
    for value in ("<|im_end|>", 3.0, True, [[1]], {"id": 1}):
        with pytest.raises(ConfigError, match=f"^{name}: expected a whole number"):
            Qwen3MoeConfig.from_hf({**PLAIN, name: value})


def test_a_stamp_is_accepted_and_listed_once(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PLAIN | STAMPS))
    with caplog.at_level(logging.WARNING, "jaxmoe"):
        assert read_config(path)[0] == Qwen3MoeConfig.from_hf(PLAIN)
        Qwen3MoeConfig.from_pretrained(tmp_path)
    assert caplog.messages == [f"{path}: unknown fields, kept but not used: {', '.join(sorted(STAMPS))}"]


def test_the_checkpoint_keeps_them_and_strict_refuses_them(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = make_checkpoint(tmp_path / "hf", TINY)
    stamped = (
        json.loads((src / "config.json").read_text()) | STAMPS | {"qkv_bias": False, "torch_dtype": "torch.float32"}
    )
    (src / "config.json").write_text(json.dumps(stamped))
    with pytest.raises(UserError, match=f"--strict.*{', '.join(sorted(STAMPS))}$"):
        main(["hf2jax", "--strict", str(src), str(tmp_path / "strict")])
    assert not (tmp_path / "strict").exists()
    main(["hf2jax", str(src), str(tmp_path / "jax")])
    main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "back")])
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == stamped
    capsys.readouterr()
    # A neutral field of a sister architecture passes.
    known = {name: value for name, value in stamped.items() if name not in STAMPS}
    (src / "config.json").write_text(json.dumps(known))
    main(["hf2jax", "--strict", str(src), str(tmp_path / "strict")])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_may_bear_the_name_of_its_library(dtype: str) -> None:
    raw = {name: value for name, value in PLAIN.items() if name not in ("dtype", "torch_dtype")}
    assert Qwen3MoeConfig.from_hf(raw | {"torch_dtype": f"torch.{dtype}"}).dtype == dtype
    assert Qwen3MoeConfig.from_hf(raw | {"dtype": dtype, "torch_dtype": f"torch.{dtype}"}).dtype == dtype


@pytest.mark.parametrize(("alias", "dtype"), [("half", "float16"), ("float", "float32"), ("torch.half", "float16")])
def test_a_dtype_may_bear_the_other_name_that_torch_has_for_it(alias: str, dtype: str) -> None:
    raw = {name: value for name, value in PLAIN.items() if name not in ("dtype", "torch_dtype")}
    assert Qwen3MoeConfig.from_hf(raw | {"dtype": alias}).dtype == dtype


SISTERS = (
    "afmoe cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe gemma gemma2 gemma3_text"
    " gemma4_text glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss granitemoe granitemoehybrid granitemoeshared"
    " hunyuan_v1_moe lfm2_moe llama4_text longcat_flash minimax minimax_m2 mistral4 mixtral olmoe flex_olmo phimoe"
    " qwen2_moe qwen3 qwen3_5_moe_text qwen3_next seed_oss smollm3"
).split()
# Fields of these that change nothing in Qwen3-MoE: read here already, or only used together with a field of the table,
# or names of contexts and implementations, or thresholds that guard a division.
HARMLESS = set(
    "head_dim layer_types max_window_layers num_experts rope_scaling rope_theta"
    " attn_scale block_size conv_bias floor_scale indexer_types prefix_dense_sliding_window_pattern"
    " shared_expert_combination_strategy eod_token_id moe_norm_min pretraining_tp".split()
)


def test_every_field_of_a_sister_architecture_is_known() -> None:
    """A field that a new version of transformers brings must be looked at: does it change what the model computes?"""
    ours = set(transformers.Qwen3MoeConfig().to_dict())
    fields: dict[str, str] = {}
    for sister in (name for name in SISTERS if name in CONFIG_MAPPING):
        fields |= dict.fromkeys(CONFIG_MAPPING[sister]().to_dict(), sister)
    assert len(fields) > 150
    unknown = set(unknown_fields(dict.fromkeys(set(fields) - ours))) - HARMLESS
    assert {name: fields[name] for name in unknown} == {}


def test_the_table_names_each_field_once() -> None:
    names = [name for rule in RULES for name in rule.names.split()]
    assert sorted(names) == sorted(set(names))
    own = set(Qwen3MoeConfig.from_hf(PLAIN).to_hf())
    patterns = [re.compile(name.replace("*", ".*")) for name in names]
    assert [name for name in own - {"attention_dropout"} if any(p.fullmatch(name) for p in patterns)] == []
    assert not set(names) & jaxmoe.other_fields.BOOKKEEPING
