"""Which implementations a model's attention and experts select on the default device."""

from __future__ import annotations

from typing import Any

import jax

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.distributed.mesh import ONE_DEVICE, MeshShape
from jaxmoe.ops import attention, experts, implementations
from jaxmoe.ops.implementations import Choice

_FALLBACKS = ("blocks", "tiles", "tiled")  # of attention, of attention on a `context` axis, of the experts' products


def selected_implementations(config: Qwen3MoeConfig, dtype: str) -> dict[str, Any]:
    """The names of the implementations of "attention", of the "experts"' products and of those with experts in NF4 and
    FP8, for `jaxmoe.memory`."""
    return {what: choice.name for what, choice in _choices(config, dtype).items()}


def fallbacks(config: Qwen3MoeConfig, dtype: str, mesh: MeshShape = ONE_DEVICE) -> list[str]:
    """If the default device is a GPU, a line for each of the two that uses the slow fallback, with the reason."""
    if implementations.default_device().platform != "gpu":
        return []
    subjects = {"attention": "attention uses"} | ({"experts": "the experts use"} if config.sparse_layers else {})
    return [
        f"{subjects[what]} the slow fallback: {choice.reason}"
        for what, choice in _choices(config, dtype, mesh).items()
        if what in subjects and choice.name in _FALLBACKS
    ]


def jax_without_kernels() -> list[str]:
    """If the default device is a GPU that has kernels with a newer version of jax only, a line that says so."""
    capability = implementations.default_device().compute_capability
    if capability is None or capability < (8, 0) or jax.__version_info__ >= (0, 11):
        return []
    return [f"jax {jax.__version__} lacks the GPU kernels; jax 0.11 or newer has them, and needs Python 3.12 or newer"]


def _choices(config: Qwen3MoeConfig, dtype: str, mesh: MeshShape = ONE_DEVICE) -> dict[str, Choice]:
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return {
        "attention": attention.implementation(dtype, *heads, config.sliding_window, mesh),
        "experts": experts.implementation(dtype, config.hidden_size, config.moe_intermediate_size),
        "nf4_products": implementations.choose("nf4_products"),
        "fp8_products": implementations.choose("fp8_products"),
    }
