"""Tiny configurations that together cover every branch of the architecture, and random weights for them.

Each is the dictionary in a config.json, as transformers 4 or transformers 5 writes it.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from jaxmoe.config import LoraConfig, Qwen3MoeConfig
from jaxmoe.parameters import lora_specs, parameter_specs

_BASE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.001,
    "mlp_only_layers": [],
    "use_sliding_window": False,
    "sliding_window": None,
}


def _v4(**changes: Any) -> dict[str, Any]:
    """As written by transformers 4: num_experts, rope_theta + rope_scaling, torch_dtype."""
    return {
        **_BASE,
        "num_experts": 8,
        "rope_theta": 1_000_000.0,
        "rope_scaling": None,
        "max_window_layers": 2,
        "torch_dtype": "float32",
        "transformers_version": "4.51.0",
        **changes,
    }


def _v5(**changes: Any) -> dict[str, Any]:
    """As written by transformers 5: num_local_experts, rope_parameters, dtype."""
    return {
        **_BASE,
        "num_local_experts": 8,
        "rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"},
        "dtype": "float32",
        "transformers_version": "5.23.0",
        **changes,
    }


_YARN = {"rope_theta": 10_000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": _v5(),
    "plain_v4": _v4(rope_theta=10_000_000.0),
    "top_8_of_32": _v5(num_local_experts=32, num_experts_per_tok=8, hidden_size=64, head_dim=16),
    "top_8_of_32_unnormalised": _v4(num_experts=32, num_experts_per_tok=8, norm_topk_prob=False),
    "mlp_only_layers": _v5(mlp_only_layers=[0, 2], num_hidden_layers=4),
    "sparse_step_2": _v4(decoder_sparse_step=2, num_hidden_layers=4, mlp_only_layers=[3]),
    "wide_heads": _v5(head_dim=32, num_attention_heads=4, num_key_value_heads=1),
    "no_head_dim_v4": {k: v for k, v in _v4(num_key_value_heads=4).items() if k != "head_dim"},
    "tied": _v5(tie_word_embeddings=True),
    "attention_bias": _v5(attention_bias=True),
    "rope_linear_v4": _v4(rope_theta=10_000.0, rope_scaling={"type": "linear", "factor": 3.0}),
    "rope_yarn": _v5(rope_parameters=dict(_YARN), head_dim=16),
    "rope_yarn_v4": _v4(
        rope_theta=10_000.0,
        rope_scaling={k: v for k, v in _YARN.items() if k != "rope_theta"} | {"attention_factor": 1.25},
        head_dim=16,
    ),
    "rope_yarn_tuned": _v5(
        rope_parameters={**_YARN, "beta_fast": 24.0, "beta_slow": 2.0, "mscale": 1.2, "mscale_all_dim": 0.7}
        | {"truncate": False},
        head_dim=16,
    ),
    "sliding_window": _v5(use_sliding_window=True, sliding_window=9),
    "every_expert": _v5(num_experts_per_tok=8, norm_topk_prob=False),
    "one_expert": _v5(num_local_experts=1, num_experts_per_tok=1),
    "odd_sizes": _v5(num_local_experts=5, num_experts_per_tok=3, num_attention_heads=6, num_key_value_heads=3)
    | {"vocab_size": 101, "head_dim": 10, "moe_intermediate_size": 7, "rms_norm_eps": 1e-5},
    "all_dense": _v5(mlp_only_layers=[0, 1, 2]),
}


def config_of(name: str) -> Qwen3MoeConfig:
    """The configuration `name`, as `Qwen3MoeConfig` reads it."""
    return Qwen3MoeConfig.from_hf(CONFIGS[name])


def random_parameters(config: Qwen3MoeConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights [stacked, by path] for which no part of the model is degenerate.

    Logits and router logits have a standard deviation of about 2, so that softmaxes are neither flat nor one-hot. Norm
    weights and biases are random. Each residual branch adds about as much as the stream holds.
    """
    out: dict[str, np.ndarray] = {}
    for path, spec in parameter_specs(config).items():
        rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
        name = path.split(".")[-1]
        x = rng.standard_normal(spec.shape)
        if name.endswith("norm"):
            x = 1 + 0.3 * x
        elif name.endswith("bias"):
            x = 0.5 * x
        elif name == "embed_tokens":
            x = x * (2 / np.sqrt(config.hidden_size) if config.tie_word_embeddings else 1)
        else:
            gain = {"lm_head": 2.0, "gate": 2.0, "down_proj": 3.0}.get(name, 1.0)
            x = x * gain / np.sqrt(spec.shape[-1])
        out[path] = x.astype(np.float32)
    return out


def random_adapters(config: Qwen3MoeConfig, lora: LoraConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 adapters with random A and B; each delta is about a third of its weight in size."""
    out: dict[str, np.ndarray] = {}
    for path, spec in lora_specs(config, lora).items():
        rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
        rank = spec.shape[-2] if path.endswith("lora_A") else spec.shape[-1]
        std = 1 / np.sqrt(spec.shape[-1]) if path.endswith("lora_A") else 0.3 / np.sqrt(rank)
        out[path] = (std * rng.standard_normal(spec.shape)).astype(np.float32)
    return out


def random_tokens(config: Qwen3MoeConfig, batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Int32 token ids [B, T]."""
    return np.random.default_rng([seed, 1]).integers(0, config.vocab_size, (batch, length)).astype(np.int32)
