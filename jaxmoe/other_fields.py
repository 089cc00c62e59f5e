"""What happens to a field of config.json that Qwen3-MoE does not have; standard library only.

Such a field is one of three things:

- Bookkeeping of transformers (`BOOKKEEPING`): accepted.
- A field of a sister architecture that changes what the model computes (`RULES`): refused, unless its value changes
  nothing for Qwen3-MoE. Source: the configurations and models of transformers 5.23 (qwen2_moe, qwen3_next, deepseek_v3,
  glm4_moe, granitemoe, gemma3, gpt_oss, minimax, llama4, ...), and names that earlier versions and remote code use.
- Anything else, such as a stamp of the tool that saved the model: accepted, and listed once (`unknown_fields`).

All three stay in the folder's config.json and come back when the checkpoint is written.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxmoe.errors import ConfigError, check_integer

# Bookkeeping, generation defaults of transformers 4, and the form of the weights.
BOOKKEEPING = frozenset(
    (
        "_attn_implementation_autoset _name_or_path add_cross_attention architectures bad_words_ids"
        " begin_suppress_tokens bos_token_id chunk_size_feed_forward classifier_dropout cross_attention_hidden_size"
        " decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size eos_token_id"
        " exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label is_decoder"
        " is_encoder_decoder keys_to_ignore_at_inference label2id length_penalty max_length min_length"
        " no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states"
        " output_router_logits output_scores pad_token_id prefix problem_type quantization"
        " quantization_config"
        " remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens"
        " task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torchscript"
        " transformers.js_config transformers_version typical_p use_bfloat16 use_cache"
    ).split()
)

Config = Any  # a Qwen3MoeConfig; its module imports this one
Values = tuple[Any, ...]
OFF: Values = (0, "", [], {})  # 0 equals 0.0 and false
ON: Values = (True,)
ONE: Values = (1,)
OFF_OR_ONE: Values = (0, 1)


@dataclass(frozen=True)
class Rule:
    """Fields of sister architectures: their names (`*` stands for any text), why they matter, and which values, beside
    null, leave Qwen3-MoE as it is; some of these depend on the config."""

    names: str
    why: str
    neutral: Values | Callable[[Config], Values] = OFF

    def values(self, config: Config) -> Values:
        """The neutral values for the model `config`."""
        return self.neutral(config) if callable(self.neutral) else self.neutral


def _like(field: str) -> Callable[[Config], Values]:
    return lambda config: (getattr(config, field),)


def _score_scale(config: Config) -> Values:
    return (config.head_dim**-0.5,)


def _layer_kinds(config: Config) -> Values:
    return (["sparse" if i in config.sparse_layers else "dense" for i in range(config.num_hidden_layers)],)


_SAME = "another name of {}, which has another value"

RULES = (
    # Experts
    Rule(
        "shared_expert_intermediate_size shared_experts_intermediate_size moe_shared_expert_intermediate_size"
        " shared_intermediate_size n_shared_experts num_shared_experts num_shared_expert moe_num_shared_experts"
        " num_experts_shared share_expert_dim shared_expert_sink use_shared_expert has_shared_expert use_mixed_mlp_moe",
        "Qwen3-MoE has no shared expert",
    ),
    Rule("zero_expert_num n_zero_experts", "Qwen3-MoE has no experts without weights"),
    Rule("moe_latent_size", "experts of Qwen3-MoE read the residual stream in its full width"),
    Rule(
        "expert_capacity capacity_factor *_capacity_factor moe_token_dropout drop_tokens moe_drop_tokens"
        " batch_prioritized_routing normalize_router_prob_before_dropping",
        "Qwen3-MoE drops no tokens",
    ),
    Rule(
        "first_k_dense_replace *_first_k_dense_replace num_dense_layers n_dense_layers num_dense_layer"
        " moe_layer_start_index expert_layer_offset",
        "Qwen3-MoE lists its dense layers in mlp_only_layers",
    ),
    Rule("moe_layer_end_index", "every layer may be sparse", lambda config: (-1, config.num_hidden_layers - 1)),
    Rule("moe_layer_freq expert_layer_period", "Qwen3-MoE has decoder_sparse_step instead", ONE),
    Rule(
        "interleave_moe_layer_step moe_layer_interval",
        _SAME.format("decoder_sparse_step"),
        _like("decoder_sparse_step"),
    ),
    Rule("mlp_layer_types", "the config's other fields say which layers are sparse", _layer_kinds),
    Rule("moe_layers", "the config's other fields say which layers are sparse", lambda c: (list(c.sparse_layers),)),
    Rule(
        "enable_moe_block is_moe use_moe", "num_experts decides about the experts", lambda c: (bool(c.sparse_layers),)
    ),
    # Routing
    Rule(
        "scoring_func score_func scoring_function score_function *_scoring_func *_score_function *_score_func"
        " expert_selection_fn router_activation router_activation_func moe_router_activation_func gating_function",
        "Qwen3-MoE scores experts with a softmax",
        ("softmax",),
    ),
    Rule("topk_method moe_topk_method", "Qwen3-MoE takes the k experts with the highest scores", ("greedy",)),
    Rule(
        "n_group topk_group n_groups topk_groups n_expert_groups num_expert_group num_expert_groups moe_n_group"
        " moe_topk_group n_limited_groups moe_router_num_groups moe_router_group_topk",
        "Qwen3-MoE chooses among all experts, not within groups",
        OFF_OR_ONE,
    ),
    Rule(
        "use_expert_bias use_routing_bias router_bias moe_router_enable_expert_bias moe_router_use_bias"
        " e_score_correction_bias moe_use_aux_free use_aux_free",
        "the router of Qwen3-MoE has no bias",
    ),
    Rule(
        "routed_scaling_factor *_routed_scaling_factor route_scale router_scale router_scaling_factor"
        " moe_router_scaling_factor moe_router_topk_scaling_factor",
        "Qwen3-MoE does not scale the experts' sum",
        ONE,
    ),
    Rule(
        "add_router_probs moe_apply_router_weight_on_input use_fine_route num_hash_layers",
        "Qwen3-MoE routes by its router alone and weights the experts' outputs",
    ),
    # Attention
    Rule("qkv_bias use_qkv_bias add_qkv_bias qkv_proj_bias", "Qwen3-MoE has biases only with attention_bias"),
    Rule(
        "use_bias bias add_bias_linear mlp_bias attention_out_bias attention_output_bias o_proj_bias lm_head_bias"
        " expert_bias moe_bias norm_bias value_bias key_bias query_bias",
        "Qwen3-MoE has no such bias",
    ),
    Rule(
        "use_qk_norm qk_norm has_qk_norm qk_layernorm use_qk_layernorm",
        "Qwen3-MoE always normalises queries and keys",
        ON,
    ),
    Rule("qk_norm_type", "Qwen3-MoE normalises queries and keys per head", ("per_head",)),
    Rule("use_qk_l2_norm qk_l2_norm", "Qwen3-MoE normalises queries and keys with RMSNorm"),
    Rule("*softcap* *soft_cap* *_logit_cap", "Qwen3-MoE does not cap logits"),
    Rule("clip_qkv", "Qwen3-MoE does not clip queries, keys and values"),
    Rule(
        "*attention_sink* *attn_sink* attn_sinks use_sinks sinks learnable_sink* sink_bias",
        "attention in Qwen3-MoE has no sinks",
    ),
    Rule("query_pre_attn_scalar", "Qwen3-MoE scales scores by the inverse square root of head_dim", _like("head_dim")),
    Rule(
        "attention_multiplier attention_scale softmax_scale",
        "Qwen3-MoE scales scores by the inverse square root of head_dim",
        _score_scale,
    ),
    Rule("scale_attn_weights", "Qwen3-MoE scales scores by the inverse square root of head_dim", ON),
    Rule("is_causal causal", "attention in Qwen3-MoE is causal", ON),
    Rule(
        "scale_attn_by_inverse_layer_idx attn_temperature_tuning use_logn_attn log_scaling_*"
        " use_bidirectional_attention attention_chunk_size attention_window_size",
        "attention in Qwen3-MoE is causal, and the same in every layer",
    ),
    Rule(
        "full_attention_interval global_attn_every_n_layers sliding_window_pattern _sliding_window_pattern",
        "in Qwen3-MoE all layers attend alike",
        OFF_OR_ONE,
    ),
    Rule(
        "attn_output_gate use_attention_gate attention_gate gated_attn use_gated_attention",
        "attention in Qwen3-MoE has no gate",
    ),
    Rule(
        "q_lora_rank kv_lora_rank o_lora_rank qk_nope_head_dim qk_rope_head_dim index_head_dim index_n_heads"
        " index_topk",
        "Qwen3-MoE has grouped-query attention",
    ),
    Rule("attention_k_eq_v use_cla num_kv_shared_layers", "every layer of Qwen3-MoE has its own keys and values"),
    Rule(
        "linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads"
        " linear_attention mamba_* ssm_* conv_L_cache conv_kernel time_step_* attn_layer_* attn_type_list"
        " layers_block_type hybrid_override_pattern hybrid_layer_ids",
        "every layer of Qwen3-MoE has attention",
    ),
    # Positions
    Rule("partial_rotary_factor rotary_pct rotary_percent rope_percent", "Qwen3-MoE rotates whole heads", ONE),
    Rule("rotary_dim rotary_ndims", "Qwen3-MoE rotates whole heads", _like("head_dim")),
    Rule(
        "rope_interleave rope_interleaved interleaved_rope use_interleaved_rope rotary_interleaved rope_traditional",
        "Qwen3-MoE rotates the halves of a head",
    ),
    Rule("no_rope_layer_interval nope_layer_interval", "Qwen3-MoE rotates in every layer"),
    # a list with 1 for each layer that rotates
    Rule("no_rope_layers", "Qwen3-MoE rotates in every layer", lambda c: ([1] * c.num_hidden_layers, [])),
    Rule("use_rope use_rotary_embedding", "Qwen3-MoE has rotary position embeddings", ON),
    Rule("position_embedding_type", "Qwen3-MoE has rotary position embeddings", ("rope", "rotary")),
    Rule("alibi use_alibi use_mrope mrope_*", "Qwen3-MoE has rotary position embeddings of one axis"),
    Rule("use_dynamic_ntk", "Qwen3-MoE says so in rope_parameters"),
    Rule(
        "rotary_base rotary_emb_base rotary_embedding_base rope_local_base_freq swa_rope_theta local_rope_theta"
        " global_rope_theta compress_rope_theta",
        "Qwen3-MoE has one base for all layers, rope_theta",
        lambda config: (config.rope_parameters.rope_theta,),
    ),
    # Norms, activations, residual stream
    Rule(
        "norm_type normalization_type layernorm_type",
        "Qwen3-MoE has RMSNorm",
        ("rmsnorm", "rms_norm", "RMSNorm", "rms"),
    ),
    Rule("pre_norm", "Qwen3-MoE normalises before attention and before the MLP, and nowhere else", ON),
    Rule(
        "norm_after post_norm use_post_norm sandwich_norm use_sandwich_norm use_post_layernorm parallel_attn"
        " use_parallel_residual apply_residual_connection_post_layernorm gated_norm_rank _remove_final_layer_norm",
        "Qwen3-MoE normalises before attention and before the MLP, and nowhere else",
    ),
    Rule("zero_centered_* add_unit_offset", "RMSNorm in Qwen3-MoE multiplies by its weight"),
    Rule(
        "hidden_activation activation_function mlp_hidden_act activation ffn_activation",
        "Qwen3-MoE has SwiGLU",
        ("silu", "swish", "swiglu"),
    ),
    Rule("swiglu_limit swiglu_limits swiglu_alpha use_double_wide_mlp", "Qwen3-MoE has plain SwiGLU"),
    Rule(
        "embedding_multiplier embedding_scale scale_emb residual_multiplier residual_scale output_multiplier"
        " logits_scaling logits_scale logit_scale lm_head_multiplier key_multiplier attention_in_multiplier"
        " attention_out_multiplier attention_value_scale qk_scale_factor *_alpha_factor *_beta_factor",
        "Qwen3-MoE does not scale embeddings, the residual stream or logits",
        ONE,
    ),
    Rule("mlp_multipliers", "Qwen3-MoE does not scale its MLPs", ([1, 1],)),
    Rule(
        "scale_embedding normalize_embedding normalize_embeddings rescale_embeddings mup_enabled use_mup",
        "Qwen3-MoE does not scale embeddings",
    ),
    Rule("scale_depth", "Qwen3-MoE does not scale the residual stream", lambda c: (c.num_hidden_layers**0.5,)),
    Rule("dim_model_base", "Qwen3-MoE does not scale logits", _like("hidden_size")),
    Rule(
        "hidden_size_per_layer_input vocab_size_per_layer_input per_layer_config altup_* laurel_*",
        "all layers of Qwen3-MoE are alike",
    ),
    Rule("hc_mult num_residual_streams loop_num num_loops", "Qwen3-MoE runs each layer once", OFF_OR_ONE),
    Rule("pruned_heads", "Qwen3-MoE keeps all heads"),
    # Training
    Rule(
        "*_dropout *_dropout_prob *_pdrop dropout layerdrop *_layerdrop *_jitter_noise *_jitter_eps",
        "Qwen3-MoE has no dropout but attention_dropout, and no noise",
    ),
    Rule("*z_loss_coef* *z_loss_weight", "Qwen3-MoE has no loss on the size of router logits"),
    Rule("aux_loss_coef", _SAME.format("router_aux_loss_coef"), _like("router_aux_loss_coef")),
    Rule("num_nextn_predict_layers num_mtp_* mtp_* use_mtp", "Qwen3-MoE predicts only the next token"),
    # Other models' parts, and other models' names
    Rule(
        "vision_config audio_config text_config thinker_config talker_config",
        "Qwen3-MoE is a text model with one config",
    ),
    *(
        Rule(names, _SAME.format(field), _like(field))
        for field, names in {
            "num_experts": "n_routed_experts num_routed_experts moe_num_experts num_moe_experts n_experts",
            "num_experts_per_tok": "num_experts_per_token experts_per_token experts_per_tok num_selected_experts"
            " moe_topk moe_k moe_top_k top_k_experts moe_router_topk",
            "norm_topk_prob": "moe_renormalize route_norm moe_normalize_expert_weights normalize_expert_weights",
            "moe_intermediate_size": "expert_ffn_hidden_size moe_ffn_hidden_size expert_intermediate_size"
            " moe_hidden_size",
            "intermediate_size": "ffn_hidden_size ffn_dim n_inner intermediate_size_mlp dense_intermediate_size"
            " prefix_dense_intermediate_size",
            "hidden_size": "d_model n_embd",
            "num_hidden_layers": "n_layers n_layer num_layers",
            "num_attention_heads": "n_heads n_head num_heads",
            "num_key_value_heads": "n_kv_heads num_kv_heads num_query_groups multi_query_group_num",
            "head_dim": "v_head_dim qk_head_dim attention_head_dim attention_head_size head_size kv_channels",
            "rms_norm_eps": "layer_norm_eps layer_norm_epsilon layernorm_epsilon norm_eps norm_epsilon",
        }.items()
    ),
)


def check_other_fields(config: Config, others: Mapping[str, Any]) -> None:
    """Checks the fields of a config.json that `config` does not have.

    Raises:
        ConfigError: one of them changes what the model computes, or a special token is none. The message says its name,
            its value and why.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if (ids := others.get(name)) is not None:
            for each in ids if isinstance(ids, list) and name == "eos_token_id" else [ids]:
                check_integer(name, each, at_least=-1)  # older files say -1 for "no such token"
    for name, value in sorted(others.items()):
        rule = _rule_of(name)
        if rule is None or value is None:
            continue
        neutral = rule.values(config)
        if not any(_same(value, one) for one in neutral):
            expected = "0, false or null" if neutral == OFF else _listed([*neutral, None])
            raise ConfigError(f"{name}: expected {expected} ({rule.why}), found {_shown(value)}")


def unknown_fields(others: Mapping[str, Any]) -> tuple[str, ...]:
    """The names among `others` that are neither bookkeeping nor a field of a sister architecture, sorted."""
    return tuple(sorted(name for name in others if name not in BOOKKEEPING and _rule_of(name) is None))


def other_names(field: str) -> list[str]:
    """The names that other architectures give to `field`; a config.json may have them if the values agree."""
    return [name for name, rule in _NAMED if rule.why == _SAME.format(field)]


def _rule_of(name: str) -> Rule | None:
    """The rule that `name` falls under; a name that is spelt out wins over a pattern."""
    if name in BOOKKEEPING:
        return None
    return _BY_NAME.get(name) or next(
        (rule for pattern, rule in _BY_PATTERN if fnmatch.fnmatchcase(name, pattern)), None
    )


def _same(value: Any, neutral: Any) -> bool:
    if isinstance(value, float) and isinstance(neutral, (int, float)):
        return math.isclose(value, neutral, rel_tol=1e-6)  # a file may hold fewer digits
    return bool(value == neutral)


def _listed(values: Sequence[Any]) -> str:
    *head, last = map(_shown, values)
    return f"{', '.join(head)} or {last}"


def _shown(value: Any) -> str:
    """A value as JSON spells it, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_NAMED = [(name, rule) for rule in RULES for name in rule.names.split()]
_BY_NAME = {name: rule for name, rule in _NAMED if "*" not in name}
_BY_PATTERN = [(name, rule) for name, rule in _NAMED if "*" in name]
