"""Where the arrays of a run lie on the mesh, as `jaxmoe.distributed.sharding` says.

A mesh of one device changes nothing: its arrays carry no sharding, and functions run as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.distributed import chunks
from jaxmoe.distributed.mesh import AXES, MeshShape
from jaxmoe.distributed.sharding import RULES, split_axes, stored_arrays
from jaxmoe.lora import LoraConfig

T = TypeVar("T")


def partition(axes: Sequence[str | None], shape: Sequence[int], mesh: MeshShape) -> PartitionSpec:
    """`split_axes` in JAX's form."""
    return PartitionSpec(*(over or None for over in split_axes(axes, shape, mesh)))


def mesh_axes(spec: PartitionSpec) -> frozenset[str]:
    """The mesh axes that split an array."""
    return frozenset(axis for over in spec for axis in ((over,) if isinstance(over, str) else over or ()))


@functools.cache
def devices_of(mesh: MeshShape) -> Mesh:
    """JAX's mesh, of the first devices that JAX finds."""
    mesh.check_devices(jax.device_count())
    shape = [mesh[axis] for axis in AXES]
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=jax.devices()[: mesh.size])


def whole(array: Any) -> np.ndarray:
    """An array of a run on the host; every process calls this for the same array, of which it may hold a share."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())  # pyright: ignore[reportAttributeAccessIssue]
    if array.ndim < 2:
        return np.asarray(jax.jit(lambda a: a, out_shardings=everywhere)(array))
    # A layer at a time: no device could hold all of a large stack.
    layer = jax.jit(lambda stack, index: stack[index], out_shardings=everywhere)
    host = np.empty(array.shape, array.dtype)
    for index in range(len(array)):
        host[index] = np.asarray(layer(array, index))
    return host


def devices_per_node() -> int:
    """How many of the run's devices this machine has, whichever process they belong to."""
    mine = jax.local_devices()[0]
    # GPUs know which of them share a machine; the devices of a CPU belong to one process.
    node = lambda device: getattr(device, "slice_index", None) if device.platform == "gpu" else device.process_index
    return sum(node(device) == node(mine) for device in jax.devices())


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
        specs = stored_arrays(self.config, self.lora, list(arrays))
        return {path: partition(specs[path].axes, array.shape, self.mesh) for path, array in arrays.items()}

    def batch_specs(self, batch: T, tokens: int) -> T:
        """How the arrays of a batch are split. They begin with the `tokens` axes [..., B, T], or with some of these."""
        axes = [*[None] * (tokens - 2), "batch", "sequence"]
        sequences, length = jax.tree.leaves(batch)[0].shape[tokens - 2 : tokens]
        self.mesh.check_batch(sequences)
        self.mesh.check_length(length)

        def spec(array: Any) -> PartitionSpec:
            return partition(axes[: array.ndim], array.shape[:tokens], self.mesh)

        return jax.tree.map(spec, batch)

    @property
    def everywhere(self) -> NamedSharding | None:
        """The sharding of what lies whole on every device; None on one device."""
        return NamedSharding(devices_of(self.mesh), PartitionSpec()) if self.mesh.size > 1 else None

    def place(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters or adapters by path, or their shapes, where they lie on the mesh; of arrays of the host, a process
        sends what its devices hold."""
        specs = self.specs(arrays)
        return {path: self._placed(array, specs[path]) for path, array in arrays.items()}

    def layer_specs(self, arrays: Mapping[str, Any]) -> dict[str, PartitionSpec]:
        """As `specs`, for the arrays of one layer, without the axis of layers."""
        axes = {path: spec.axes for path, spec in stored_arrays(self.config, self.lora, list(arrays)).items()}
        split = {path: partition(axes[path], (1, *array.shape), self.mesh) for path, array in arrays.items()}
        return {path: PartitionSpec(*spec[1:]) for path, spec in split.items()}

    def place_layer(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays of one layer, without the axis of layers, as `place` does."""
        specs = self.layer_specs(arrays)
        return {path: self._placed(array, specs[path]) for path, array in arrays.items()}

    def lines_of_process(self, shape: tuple[int, ...]) -> frozenset[int] | None:
        """Which sequences of a batch with the leading axes `shape` [..., B] this process's devices hold, numbered from
        0 on in all axes taken together; None if there is only one process."""
        if self.mesh.size == 1 or jax.process_count() == 1:
            return None
        axes = [*[None] * (len(shape) - 1), "batch", None]
        spec = partition(axes, (*shape, 1), self.mesh)
        numbers = np.arange(np.prod(shape)).reshape(*shape, 1)
        held = self.sharding(spec).addressable_devices_indices_map(numbers.shape).values()
        return frozenset(int(number) for index in held for number in numbers[index].flat)

    def place_batch(self, batch: T, tokens: int) -> T:
        """A batch of NumPy arrays where it lies on the mesh; of an array, a process sends what its devices hold.

        With a `context` axis the tokens of a sequence are in the order of `jaxmoe.distributed.chunks`, on the mesh and
        in the whole array.
        """
        specs = self.batch_specs(batch, tokens)
        if self.mesh.context > 1:
            length = jax.tree.leaves(batch)[0].shape[tokens - 1]
            dealt = chunks.order(length, self.mesh.context)
            batch = jax.tree.map(lambda a: np.take(a, dealt, axis=tokens - 1) if a.ndim >= tokens else a, batch)
        return jax.tree.map(self._placed, batch, specs)

    def place_state(self, state: T, trainable: Mapping[str, Any]) -> T:
        """A tree of arrays or shapes that belongs to `trainable` where it lies: what stands under an array's path and
        has its shape lies like the array, everything else whole on every device."""
        specs = self.specs(trainable)

        def placed(where: tuple[Any, ...], leaf: Any) -> Any:
            paths = [key.key for key in where if isinstance(key, jax.tree_util.DictKey) and key.key in specs]
            alike = paths and leaf.shape == trainable[paths[-1]].shape
            return self._placed(leaf, specs[paths[-1]] if alike else PartitionSpec())

        return jax.tree_util.tree_map_with_path(placed, state)

    def spec(self, *axes: str | None) -> PartitionSpec:
        """How an array is split whose first axes are these: "batch", "sequence", or None for one that stays whole."""
        over = (tuple(each for each in RULES.get(axis or "", ()) if each in self.mesh.used) for axis in axes)
        return PartitionSpec(*(each or None for each in over))

    def readable(self, results: T) -> T:
        """Within a compiled function: its results, where several processes share them whole on every device, so that
        each can read them."""
        if self.mesh.size == 1 or jax.process_count() == 1:
            return results
        return jax.lax.with_sharding_constraint(results, self.everywhere)

    def zeros(self, make: Callable[[], T], spec: PartitionSpec) -> T:
        """The arrays of zeros that `make` returns, each split like `spec` from the start."""
        if self.mesh.size == 1:
            return make()
        lie = NamedSharding(devices_of(self.mesh), spec)
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=lie), jax.eval_shape(make))

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

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """How the devices of the mesh share an array."""
        return NamedSharding(devices_of(self.mesh), spec)

    def run_in_order(self, function: Callable[..., T], in_specs: Any, out_specs: Any) -> Callable[..., T]:
        """As `run`, for arguments and results whose tokens are in the order of the sequence."""
        run = self.run(function, in_specs, out_specs)
        if self.mesh.context == 1:
            return run

        def arranged(specs: Any, tree: Any, *, back: bool) -> Any:
            def of(spec: PartitionSpec, array: Any) -> Any:
                if "context" not in mesh_axes(spec):
                    return array
                axis = next(i for i, over in enumerate(spec) if over and "context" in over)
                order = chunks.order(array.shape[axis], self.mesh.context)
                return jnp.take(array, np.argsort(order) if back else order, axis=axis)

            return jax.tree.map(lambda spec, part: jax.tree.map(partial(of, spec), part), specs, tree)

        return lambda *arguments: arranged(out_specs, run(*arranged(in_specs, arguments, back=False)), back=True)

    def _placed(self, array: Any, spec: PartitionSpec) -> Any:
        if self.mesh.size == 1:
            return array
        sharding = self.sharding(spec)
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        if not isinstance(array, jax.Array):
            # An array of the host, or the parts that this process has of one (`jaxmoe.store.shares.Portion`).
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
        if sharding.is_fully_addressable:
            return jax.device_put(array, sharding)
        if array.is_fully_addressable:  # each process has all of it, and sends what its devices hold
            host = np.asarray(array)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
        return array if array.sharding == sharding else jax.jit(lambda a: a, out_shardings=sharding)(array)
