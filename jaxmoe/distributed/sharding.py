"""How devices share the arrays of a run: one table from logical axes to mesh axes, and what follows from it.

`jaxmoe.parameters` names the logical axes of every parameter. An axis that `RULES` does not list, or that the devices
cannot share evenly, lies whole on every device. Standard library only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.distributed.mesh import MeshShape
from jaxmoe.lora import LoraConfig
from jaxmoe.parameters import (
    CHOICE_BIAS,
    ParameterSpec,
    Quantization,
    choice_bias_spec,
    lora_specs,
    quantized_paths,
    stored_specs,
)

# logical axis -> the mesh axes that may split it, the outermost first
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("context",),
    "experts": ("expert", "fsdp"),
    "heads": ("fsdp",),
    "kv_heads": ("fsdp",),
    "mlp": ("fsdp",),
    "expert_mlp": ("fsdp",),
    "codes": ("fsdp",),
    "blocks": ("fsdp",),
}


def split_axes(axes: Sequence[str | None], shape: Sequence[int], mesh: MeshShape) -> list[tuple[str, ...]]:
    """The mesh axes that split each axis of an array of these logical axes; no mesh axis splits two of them.

    Vectors (norms, biases), of a layer or of the model, lie whole: putting them together would take longer than it
    saves memory.
    """
    free = set(mesh.used) if sum(axis != "layers" for axis in axes) > 1 else set()
    split = []
    for axis, length in zip(axes, shape, strict=True):
        over = tuple(each for each in RULES.get(axis or "", ()) if each in free)
        while length % mesh.product(over):
            over = over[:-1]
        free -= set(over)
        split.append(over)
    return split


@functools.lru_cache(4096)
def held_elements(spec: ParameterSpec, mesh: MeshShape) -> int:
    """How many elements of an array lie on a device."""
    devices = (mesh.product(over) for over in split_axes(spec.axes, spec.shape, mesh))
    return math.prod(spec.shape) // math.prod(devices)


def stored_arrays(config: Qwen3MoeConfig, lora: LoraConfig | None, names: Sequence[str]) -> dict[str, ParameterSpec]:
    """The spec of every array of a model, which has the arrays `names`, and of its adapters.

    In mixed stacks the number of layers is not the stack's own: the names do not tell it.
    """
    mixed = {name.rpartition(".")[0] for name in names if name.endswith((".weight", ".places"))}
    quantized, unquantized = tuple(mixed.union(quantized_paths(names))), tuple((path, (0,)) for path in mixed)
    if any(name.endswith(".scales") for name in names):
        quantization = Quantization.in_fp8(quantized, unquantized=unquantized)
    else:
        quantization = Quantization(quantized, True, unquantized)
    beside = {CHOICE_BIAS: choice_bias_spec(config)} if CHOICE_BIAS in names else {}
    return stored_specs(config, quantization) | (lora_specs(config, lora) if lora else {}) | beside


def gathered_axes(
    config: Qwen3MoeConfig, lora: LoraConfig | None, names: Sequence[str], mesh: MeshShape
) -> dict[str, int]:
    """Path -> the axis of one layer's array that devices share with `fsdp`, of the stacks that they share."""
    if mesh.fsdp == 1:
        return {}
    return {
        path: axis - 1
        for path, spec in stored_arrays(config, lora, names).items()
        for axis, over in enumerate(split_axes(spec.axes, spec.shape, mesh))
        if "fsdp" in over
    }
