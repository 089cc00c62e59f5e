"""Which implementations a model's attention and experts select on the default device."""

from __future__ import annotations

from typing import Any

import jax

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.ops import attention, experts, implementations
from jaxmoe.ops.implementations import Choice


def selected_implementations(config: Qwen3MoeConfig, dtype: str) -> dict[str, Any]:
    """The names of the implementations of "attention", of the "experts"' products and of those with experts in NF4 and
    FP8, for `jaxmoe.memory`."""
    return {what: choice.name for what, choice in _choices(config, dtype).items()}


def fallbacks(config: Qwen3MoeConfig, dtype: str) -> list[str]:
    """If the default device is a GPU, a line for each of the two that uses the slow fallback, with the reason."""
    if implementations.default_device().platform != "gpu":
        return []
    choices = _choices(config, dtype)
    slow = {"attention": ("blocks", "attention uses")}
    if config.sparse_layers:
        slow["experts"] = "tiled", "the experts use"
    return [
        f"{subject} the slow fallback: {choices[what].reason}"
        for what, (fallback, subject) in slow.items()
        if choices[what].name == fallback
    ]


def jax_without_kernels() -> list[str]:
    """If the default device is a GPU that has kernels with a newer version of jax only, a line that says so."""
    capability = implementations.default_device().compute_capability
    if capability is None or capability < (8, 0) or jax.__version_info__ >= (0, 11):
        return []
    return [f"jax {jax.__version__} lacks the GPU kernels; jax 0.11 or newer has them, and needs Python 3.12 or newer"]


def _choices(config: Qwen3MoeConfig, dtype: str) -> dict[str, Choice]:
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return {
        "attention": attention.implementation(dtype, *heads),
        "experts": experts.implementation(dtype, config.hidden_size, config.moe_intermediate_size),
        "nf4_products": implementations.choose("nf4_products"),
        "fp8_products": implementations.choose("fp8_products"),
    }
