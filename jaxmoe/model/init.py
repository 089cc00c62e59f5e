"""Fresh weights and adapters, as transformers and PEFT draw them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmoe.config import LoraConfig, Qwen3MoeConfig
from jaxmoe.lora import LORA_TARGETS
from jaxmoe.model.interface import Params
from jaxmoe.parameters import ParameterSpec, lora_specs, parameter_specs


def init_parameters(config: Qwen3MoeConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Fresh weights: normal with `initializer_range`, norms one, biases zero, as transformers initialises."""
    return _draw_all(parameter_specs(config), key, dtype, config.initializer_range)


def init_adapters(
    config: Qwen3MoeConfig,
    lora: LoraConfig,
    key: Array,
    dtype: Any = jnp.float32,
    base: Mapping[str, Array] | None = None,
) -> Params:
    """Fresh adapters: A uniform, B zero, so that the adapted model starts equal to the base.

    Rows of A beyond a layer's rank are zero, as `LoraConfig.layer_ranks` says, and so are the places of experts that a
    layer does not use. `base` holds the model's parameters; needed for weights that the adapters hold in full, which
    start as copies.
    """
    specs = lora_specs(config, lora)
    drawn = _draw_all({path: spec for path, spec in specs.items() if spec.init != "base"}, key, dtype, 0.0)
    for target, ranks in lora.layer_ranks:
        path = f"{LORA_TARGETS[target].path}.lora_A"
        used = jnp.arange(lora.rank(target)) < jnp.asarray(ranks)[:, None]  # [layers, r]
        drawn[path] *= used.reshape(len(ranks), *[1] * (drawn[path].ndim - 3), -1, 1)
    for target in filter(lora.expert_places, lora.targets):
        path = f"{LORA_TARGETS[target].path}.lora_A"
        used = np.arange(drawn[path].shape[1]) < np.asarray([*map(len, lora.adapted_experts)])[:, None]  # [Ls, places]
        drawn[path] *= used[..., None, None]
    return drawn | {path: _copy_of_base(base or {}, path, dtype) for path in lora.saved_paths}


def _copy_of_base(base: Mapping[str, Array], path: str, dtype: Any) -> Array:
    """The base's weight, in `dtype`; a tied head is the embedding."""
    return base[path if path in base else "embed_tokens"].astype(dtype)


def _draw(spec: ParameterSpec, key: Array, dtype: Any, std: float) -> Array:
    if spec.init == "ones":
        return jnp.ones(spec.shape, dtype)
    if spec.init == "zeros":
        return jnp.zeros(spec.shape, dtype)
    if spec.axes[0] == "layers":
        # Layer by layer: the random bits of a whole stack would take twice the memory of the stack itself.
        layer = ParameterSpec(spec.shape[1:], spec.axes[1:], spec.init)
        return jax.lax.map(lambda k: _draw(layer, k, dtype, std), jax.random.split(key, spec.shape[0]))
    if spec.init == "uniform":  # Kaiming with a = sqrt(5): bound 1 / sqrt(fan in), as PEFT draws lora_A
        bound = 1 / math.sqrt(spec.shape[-1])
        return jax.random.uniform(key, spec.shape, dtype, -bound, bound)
    return (std * jax.random.normal(key, spec.shape, dtype)).astype(dtype)


def _draw_all(specs: Mapping[str, ParameterSpec], key: Array, dtype: Any, std: float) -> Params:
    keys = jax.random.split(key, len(specs))
    return {path: _draw(spec, k, dtype, std) for (path, spec), k in zip(specs.items(), keys, strict=True)}
