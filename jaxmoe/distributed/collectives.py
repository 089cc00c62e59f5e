"""What devices exchange inside a function that runs on all of them; on a mesh of one device, nothing."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from jaxmoe.distributed.mesh import SEQUENCE_AXES, MeshShape

T = TypeVar("T")
PIECES = 512  # of the rows that a device sends to another one


def sum_over_devices(tree: T, mesh: MeshShape, but: Collection[str] = ()) -> T:
    """The sum of each array over the devices, of all axes of the mesh `but` these; every device has the result."""
    axes = tuple(axis for axis in mesh.used if axis not in but)
    return jax.lax.psum(tree, axes) if axes else tree


def on_any_device(flags: Bool[Array, "..."], mesh: MeshShape) -> Bool[Array, ""]:
    """Whether a flag is set on some device."""
    found = jnp.any(flags)
    return found if mesh.size == 1 else sum_over_devices(found.astype(jnp.int32), mesh) > 0


def first_of_share(share: int, mesh: MeshShape) -> Int[Array, ""] | int:
    """The index in the whole batch of the first of this device's `share` sequences."""
    axes = tuple(axis for axis in SEQUENCE_AXES if mesh[axis] > 1)
    return jax.lax.axis_index(axes) * share if axes else 0


def gather(share: Shaped[Array, "..."], axis: int, over: str = "fsdp") -> Shaped[Array, "..."]:
    """The whole of an array whose `axis` the devices of a mesh axis share, the first device's share first; the gradient
    of a share is the sum over the devices."""
    trainable = jnp.issubdtype(share.dtype, jnp.floating)
    collect = _gather_over_gloo if trainable and _over_gloo() else _gather
    return collect(share, axis, over)


def shares_of_sum(parts: Shaped[Array, "all ..."], over: str) -> Shaped[Array, "share ..."]:
    """The sum over the devices of a mesh axis; of its first axis, each has a share, the first device the first."""
    if _over_gloo():
        return _own_share_of_sum(parts, 0, over)
    return jax.lax.psum_scatter(parts, over, scatter_dimension=0, tiled=True)


def _over_gloo() -> bool:
    """Whether gloo exchanges: between CPU processes.

    Its reduce-scatter sends from a buffer that it already overwrites, so a busy machine gets wrong sums
    (https://github.com/jax-ml/jax/issues/40830). Each device takes its share of the whole sum instead.
    """
    return jax.default_backend() == "cpu" and jax.distributed.is_initialized()


def _gather(share: Shaped[Array, "..."], axis: int, over: str) -> Shaped[Array, "..."]:
    return jax.lax.all_gather(share, over, axis=axis, tiled=True)


def _own_share_of_sum(parts: Shaped[Array, "..."], axis: int, over: str) -> Shaped[Array, "..."]:
    size = parts.shape[axis] // jax.lax.axis_size(over)
    return jax.lax.dynamic_slice_in_dim(jax.lax.psum(parts, over), jax.lax.axis_index(over) * size, size, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_over_gloo(share: Shaped[Array, "..."], axis: int, over: str) -> Shaped[Array, "..."]:
    """`_gather`, of which JAX's own gradient is a reduce-scatter."""
    return _gather(share, axis, over)


_gather_over_gloo.defvjp(
    lambda share, axis, over: (_gather(share, axis, over), None),
    lambda axis, over, _, gradient: (_own_share_of_sum(gradient, axis, over),),
)


def sizes_between(going: Int[Array, " n"], axis: str) -> Int[Array, "n n"]:
    """How many rows go from each device to each, given how many this one sends; every device has the result."""
    return jax.lax.all_gather(going, axis)


def rows_can_travel(devices: int) -> bool:
    """Whether `travel` works between so many devices that are neighbours on the mesh.

    GPUs of one process only: XLA's ragged exchange copies between them, and between processes it is an error.
    """
    return jax.default_backend() == "cpu" or jax.process_count() == 1 or jax.local_device_count() % devices == 0


def travel(
    rows: Shaped[Array, "here ..."], most: int, sizes: Int[Array, "n n"], axis: str
) -> Shaped[Array, "most ..."]:
    """Sends each device of a mesh axis its rows: `sizes[i, j]` from device i to device j.

    Rows for one device follow those for the devices before it, and arrive after those from the devices before; what
    lies after the last one of `most` is undefined. JAX has no ragged exchange for CPUs, so there every pair of devices
    exchanges as many rows as there can be.
    """
    me = jax.lax.axis_index(axis)
    before = lambda counts: jnp.cumsum(counts, axis=0) - counts
    sends, starts = sizes[me], before(sizes[me])
    receives, ends = sizes[:, me], jnp.cumsum(sizes[:, me])
    if jax.default_backend() != "cpu":
        arrived = jax.lax.empty((most, *rows.shape[1:]), rows.dtype)
        ours, sent = in_pieces(starts, sends)
        theirs, _ = in_pieces(before(sizes)[me], sends)
        _, received = in_pieces(starts, receives)
        return jax.lax.ragged_all_to_all(rows, arrived, ours, sent, theirs, received, axis_name=axis)
    room = min(rows.shape[0], most)
    index = starts[:, None] + jnp.arange(room)
    padded = jax.lax.all_to_all(rows.at[index].get(mode="clip"), axis, 0, 0)
    place = jnp.arange(most)
    source = jnp.minimum(jnp.searchsorted(ends, place, side="right", method="compare_all"), len(ends) - 1)
    return padded.at[source, place - (ends - receives)[source]].get(mode="clip")


def in_pieces(starts: Int[Array, " n"], sizes: Int[Array, " n"]) -> tuple[Int[Array, " all"], Int[Array, " all"]]:
    """(where each piece begins, its size) of ranges of rows, each cut into `PIECES` of nearly equal size.

    XLA copies each range of a ragged exchange with one block of 128 threads: undivided, 134 MB took 49 ms on an H200.
    """
    part, more = jnp.divmod(sizes[:, None], PIECES)
    piece = jnp.arange(PIECES)
    return (starts[:, None] + piece * part + jnp.minimum(piece, more)).reshape(-1), (part + (piece < more)).reshape(-1)
