"""Where the arrays of a run lie on the mesh: one table from logical axes to mesh axes, and what follows from it.

`jaxmoe.parameters` names the logical axes of every parameter. An axis that `RULES` does not list, or that the devices
cannot share evenly, lies whole on every device. A mesh of one device changes nothing: its arrays carry no sharding, and
functions run as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.distributed.mesh import AXES, MeshShape
from jaxmoe.lora import LoraConfig
from jaxmoe.parameters import ParameterSpec, Quantization, lora_specs, nf4_paths, stored_specs

T = TypeVar("T")

# logical axis -> the mesh axes that may split it, the outermost first
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "experts": ("expert", "fsdp"),
    "heads": ("fsdp",),
    "kv_heads": ("fsdp",),
    "mlp": ("fsdp",),
    "expert_mlp": ("fsdp",),
    "codes": ("fsdp",),
    "blocks": ("fsdp",),
}


def partition(axes: Sequence[str | None], shape: Sequence[int], mesh: MeshShape) -> PartitionSpec:
    """How an array of these logical axes and this shape is split; no mesh axis splits two axes of it.

    Vectors (norms, biases), of a layer or of the model, lie whole: putting them together would take longer than it
    saves memory.
    """
    free = set(mesh.used) if sum(axis != "layers" for axis in axes) > 1 else set()
    split: list[tuple[str, ...] | None] = []
    for axis, length in zip(axes, shape, strict=True):
        over = tuple(each for each in RULES.get(axis or "", ()) if each in free)
        while length % mesh.product(over):
            over = over[:-1]
        free -= set(over)
        split.append(over or None)
    return PartitionSpec(*split)


def mesh_axes(spec: PartitionSpec) -> frozenset[str]:
    """The mesh axes that split an array."""
    return frozenset(axis for over in spec for axis in ((over,) if isinstance(over, str) else over or ()))


def _specs(config: Qwen3MoeConfig, lora: LoraConfig | None, names: Sequence[str]) -> dict[str, ParameterSpec]:
    """The spec of every array of a model, which has the arrays `names`, and of its adapters.

    In NF4's mixed stacks the number of layers is not the stack's own: the names do not tell it.
    """
    mixed = {name.rpartition(".")[0] for name in names if name.endswith((".weight", ".places"))}
    quantized = tuple(mixed.union(nf4_paths(names)))
    quantization = Quantization(quantized, True, tuple((path, (0,)) for path in mixed))
    return stored_specs(config, quantization) | (lora_specs(config, lora) if lora else {})


def gathered_axes(
    config: Qwen3MoeConfig, lora: LoraConfig | None, names: Sequence[str], mesh: MeshShape
) -> dict[str, int]:
    """Path -> the axis of one layer's array that devices share with `fsdp`, of the stacks that they share."""
    if mesh.fsdp == 1:
        return {}
    specs = _specs(config, lora, names).items()
    return {
        path: axis - 1
        for path, spec in specs
        for axis, over in enumerate(partition(spec.axes, spec.shape, mesh))
        if "fsdp" in mesh_axes(PartitionSpec(over))
    }


@functools.cache
def devices_of(mesh: MeshShape) -> Mesh:
    """JAX's mesh, of the first devices that JAX finds."""
    mesh.check_devices(jax.device_count())
    shape = [mesh[axis] for axis in AXES]
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=jax.devices()[: mesh.size])


@dataclass(frozen=True)
class Placement:
    """Where the parameters, the adapters and the batches of a model lie on a mesh."""

    mesh: MeshShape
    config: Qwen3MoeConfig
    lora: LoraConfig | None

    def __post_init__(self) -> None:
        self.mesh.check_experts(self.config.num_experts if self.config.sparse_layers else 0)

    def specs(self, arrays: Mapping[str, Any]) -> dict[str, PartitionSpec]:
        """Path -> how the array of that path is split, for parameters or adapters of the whole model."""
        specs = _specs(self.config, self.lora, list(arrays))
        return {path: partition(specs[path].axes, array.shape, self.mesh) for path, array in arrays.items()}

    def batch_specs(self, batch: T, tokens: int) -> T:
        """How the arrays of a batch are split. They begin with the `tokens` axes [..., B, T], or with some of these."""
        axes = [*[None] * (tokens - 2), "batch", "sequence"]
        self.mesh.check_batch(jax.tree.leaves(batch)[0].shape[tokens - 2])

        def spec(array: Any) -> PartitionSpec:
            return partition(axes[: array.ndim], array.shape[:tokens], self.mesh)

        return jax.tree.map(spec, batch)

    def place(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters or adapters by path, or their shapes, where they lie on the mesh."""
        specs = self.specs(arrays)
        return {path: self._placed(array, specs[path]) for path, array in arrays.items()}

    def place_layer(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The arrays of one layer, without the axis of layers, as `place` does."""
        axes = {path: spec.axes for path, spec in _specs(self.config, self.lora, list(arrays)).items()}
        split = {path: partition(axes[path], (1, *array.shape), self.mesh) for path, array in arrays.items()}
        return {path: self._placed(array, PartitionSpec(*split[path][1:])) for path, array in arrays.items()}

    def place_batch(self, batch: T, tokens: int) -> T:
        """A batch of NumPy arrays where it lies on the mesh; of an array, a process sends what its devices hold."""
        return jax.tree.map(self._placed, batch, self.batch_specs(batch, tokens))

    def place_state(self, state: T, trainable: Mapping[str, Any]) -> T:
        """A tree of arrays or shapes that belongs to `trainable` where it lies: what stands under an array's path lies
        like the array, everything else whole on every device."""
        specs = self.specs(trainable)

        def placed(where: tuple[Any, ...], leaf: Any) -> Any:
            paths = [key.key for key in where if isinstance(key, jax.tree_util.DictKey) and key.key in specs]
            return self._placed(leaf, specs[paths[-1]] if paths else PartitionSpec())

        return jax.tree_util.tree_map_with_path(placed, state)

    def run(self, function: Callable[..., T], in_specs: Any, out_specs: Any) -> Callable[..., T]:
        """`function` on every device at once, each with its share of the arguments; `out_specs` put the shares of the
        results together again, of those that are the same on every device, one."""
        if self.mesh.size == 1:
            return function
        # Not checked: which results are the same on every device is the function's business, and its own gradient
        # rules know nothing of it.
        return jax.shard_map(
            function, mesh=devices_of(self.mesh), in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def _placed(self, array: Any, spec: PartitionSpec) -> Any:
        if self.mesh.size == 1:
            return array
        sharding = NamedSharding(devices_of(self.mesh), spec)
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        if isinstance(array, np.ndarray):
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
        return jax.device_put(array, sharding)
