"""The published Qwen3-MoE architectures, for forecasts and benchmarks, which need shapes but no weights."""

from __future__ import annotations

from jaxmoe.config import Qwen3MoeConfig, RopeParameters

_QWEN3_30B_A3B = Qwen3MoeConfig(
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    max_position_embeddings=40960,
    rope_parameters=RopeParameters(rope_theta=1_000_000.0),
    moe_intermediate_size=768,
    num_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
    dtype="bfloat16",
)

# Source: config.json of Qwen/Qwen3-30B-A3B, Qwen/Qwen3-Coder-30B-A3B-Instruct and Qwen/Qwen3-235B-A22B.
PRESETS = {
    "qwen3-30b-a3b": _QWEN3_30B_A3B,
    "qwen3-coder-30b-a3b": _QWEN3_30B_A3B.replace(
        intermediate_size=5472,
        max_position_embeddings=262144,
        rope_parameters=RopeParameters(rope_theta=10_000_000.0),
    ),
    "qwen3-235b-a22b": _QWEN3_30B_A3B.replace(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=94,
        num_attention_heads=64,
        moe_intermediate_size=1536,
    ),
}
