"""Adapters of some experts: their arrays with a place for each expert, and with places for those alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.lora import LORA_TARGETS, LoraConfig, adapts_experts

Arrays = Mapping[str, np.ndarray]


def with_all_experts(
    config: Qwen3MoeConfig, lora: LoraConfig, adapters: Arrays
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """The same adapter with a place for each expert, zeros for those without one: the form of PEFT's layouts."""
    if not lora.adapted_experts:
        return lora, dict(adapters)
    out = dict(adapters)
    for name in _names(lora):
        layers, _, *shape = adapters[name].shape
        out[name] = np.zeros((layers, config.num_experts, *shape), adapters[name].dtype)
        for slot, experts in enumerate(lora.adapted_experts):
            out[name][slot, list(experts)] = adapters[name][slot, : len(experts)]
    return replace(lora, adapted_experts=()), out


def without_void_experts(lora: LoraConfig, adapters: Mapping[str, Any]) -> tuple[LoraConfig, dict[str, Any]]:
    """The same adapter without places for experts that have none: those whose A and B are zero in all weights.

    Arrays are NumPy's or JAX's; those that change become NumPy's.
    Such experts stay without effect however long the adapter is trained, since their gradients are zero. An adapter in
    which some layer's experts all have one is returned as it is.
    """
    names = [*_names(lora)]
    if lora.adapted_experts or not names:
        return lora, dict(adapters)
    host = {name: np.asarray(adapters[name]) for name in names}
    used = np.any([np.any(array, axis=(-2, -1)) for array in host.values()], axis=0)  # [Ls, E]
    places = int(used.sum(axis=1).max())
    if not 0 < places < used.shape[1]:
        return lora, dict(adapters)
    experts = tuple(tuple(np.flatnonzero(layer).tolist()) for layer in used)
    out = dict(adapters)
    for name, array in host.items():
        out[name] = np.zeros((len(experts), places, *array.shape[2:]), array.dtype)
        for slot, each in enumerate(experts):
            out[name][slot, : len(each)] = array[slot, list(each)]
    return replace(lora, adapted_experts=experts), out


def _names(lora: LoraConfig) -> Iterator[str]:
    """The arrays of the adapters of experts."""
    for target in filter(adapts_experts, lora.targets):
        yield from (f"{LORA_TARGETS[target].path}.lora_{x}" for x in "AB")
