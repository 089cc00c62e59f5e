"""Loads a checkpoint's layers into stacks on the device.

Several threads read layers: they copy (a layer's experts fill hundreds of tensors), decompress and compare
checksums, all in NumPy and C code that releases Python's lock. One thread sends each layer to the device when it is
ready. The host holds at most `READERS` + 1 layers, whatever the size of the model. What is quantised on the device is
sent there by the readers, piece by piece, so that reading and quantising overlap and no layer is held in 16 bits.

Where several processes share a model, each reads of a layer what its devices hold (`jaxmoe.store.shares`).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.distributed.mesh import ONE_DEVICE
from jaxmoe.distributed.placement import Placement
from jaxmoe.parameters import layer_paths, stored_specs, top_level_paths
from jaxmoe.store.checkpoint import Block, Checkpoint, MadeOnDevice, ReadInParts
from jaxmoe.store.digest import WeightsDigest
from jaxmoe.store.shares import Portion, Portions, Processes, Share, share

READERS = 4
# Of a checkpoint whose arrays are made on a GPU: two keep the transfers busy, and more would take memory of the GPU.
_GPU_READERS = 2
# Of several processes: on a CPU what they read ahead lies beside their shares, in memory that they may have to divide.
_SHARED_READERS = 2
_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD: an allocation above it is a mapping of its own
OnLayer = Callable[[int, int], None]  # layers on the device, layers in all


@contextlib.contextmanager
def _freed_at_once() -> Iterator[None]:
    """Where several processes load a model, glibc gives the memory of a large array back to the system when it is
    freed. By default it keeps some of what the reading threads have freed: beside a share of 326 MiB in 12 layers 160,
    of which 35 were left with this.
    """
    choose = getattr(ctypes.CDLL(None), "mallopt", None) if Processes.running().count > 1 else None
    if choose is None:  # a process alone, or another C library
        yield
        return
    choose(_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        choose(_MMAP_THRESHOLD, 2**25)  # the largest that glibc would choose by itself


@partial(jax.jit, donate_argnums=0)
def _fill(stack: Array, value: Array, slot: Int[Array, ""] | int) -> Array:
    return jax.lax.dynamic_update_index_in_dim(stack, value, slot, 0)


@partial(jax.jit, donate_argnums=0)
def _fill_piece(stack: Array, piece: Array, slot: Int[Array, ""] | int, start: Int[Array, ""] | int) -> Array:
    """`stack` [layers, ..., x] with `piece` [m, x] in a layer, from index `start` of its joined leading axes on."""
    joined = stack.reshape(stack.shape[0], -1, *piece.shape[1:])
    indices = (slot, start, *(0 for _ in piece.shape[1:]))
    return jax.lax.dynamic_update_slice(joined, piece[None], indices).reshape(stack.shape)


def stack_shapes(config: Qwen3MoeConfig, source: Checkpoint) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array that `load_stacks` returns."""
    return {
        path: jax.ShapeDtypeStruct(spec.shape, spec.dtype or source.dtypes[path])
        for path, spec in stored_specs(config, source.quantization).items()
    }


@_freed_at_once()
def load_stacks(
    config: Qwen3MoeConfig,
    source: Checkpoint,
    readers: int | None = None,
    on_layer: OnLayer = lambda *_: None,
    digest: WeightsDigest | None = None,
    on_host: Collection[str] = (),
    placement: Placement | None = None,
) -> dict[str, Any]:
    """Path -> array on the default device, for every array of the checkpoint; layers are stacked.

    Arrays of the top level that `on_host` names stay NumPy arrays. `readers` is the number of threads that read; None
    picks it. `on_layer` is called after each layer. `digest` collects what the weights are, in threads of its own. With
    a `placement` each device of its mesh receives its share of the arrays and nothing else.

    Of several processes each reads what its devices hold, and forms some pieces of the digest.

    Raises:
        UserError: as `source.block`. Reads that are already running finish; no new one starts.
    """
    placement = placement or Placement(ONE_DEVICE, config, None)
    shapes = placement.place(stack_shapes(config, source)).items()
    params: dict[str, Any] = {
        path: jnp.zeros(stack.shape, stack.dtype, device=stack.sharding) for path, stack in shapes if "." in path
    }
    if (quantization := source.quantization) is not None:
        for path, _ in quantization.unquantized:
            layers = params[f"{path}.places"].shape[0]
            places = np.asarray(quantization.places(path, layers), np.int32)
            params |= jax.tree.map(jnp.asarray, placement.place({f"{path}.places": places}))
    # The top level first: it holds NF4's table, which a checkpoint that is recoded needs for its layers.
    made_on_device = isinstance(source, MadeOnDevice) and placement.mesh.size == 1  # several devices share no piece
    processes = Processes.running()
    if processes.count == 1:
        read: Callable[[int | None], Block | Portions] = partial(_read, source, made_on_device, digest)
    else:
        read = partial(read_share, source, placement, processes, digest)
    top = read(None)
    params |= {
        path: value if path in on_host else jnp.asarray(value) for path, value in placement.place(top.arrays).items()
    }
    if readers is None and processes.count > 1:
        readers = _SHARED_READERS
    if readers is None:
        readers = _GPU_READERS if made_on_device and jax.default_backend() != "cpu" else READERS
    pool = ThreadPoolExecutor(readers, thread_name_prefix="read-layer")
    try:
        todo = iter(range(config.num_hidden_layers))
        reading: deque[Future[Block | Portions]] = deque(pool.submit(read, layer) for layer in islice(todo, readers))
        while reading:
            block = reading.popleft().result()
            assert block.layer is not None
            slots = list(layer_paths(config, block.layer, source.quantization))
            layer = placement.place_layer(block.arrays)
            for path, slot in slots:
                params[path] = _filled(params[path], layer, block, path, slot)
            # The transfers read the host's arrays until they end. Without the wait, layers would pile up on the host.
            jax.block_until_ready([params[path] for path, _ in slots])
            if digest is not None:
                digest.wait(block)
            on_layer(block.layer + 1, config.num_hidden_layers)
            del block
            reading.extend(pool.submit(read, layer) for layer in islice(todo, 1))
    finally:
        pool.shutdown(cancel_futures=True)
    if digest is not None:
        digest.wait(top)
    return params


def _filled(stack: Array, arrays: Mapping[str, Any], block: Block | Portions, path: str, slot: int) -> Array:
    """The stack with the array `path` of a block in place; `arrays` are the block's, where they lie on the mesh."""
    if path in arrays:
        return _fill(stack, arrays[path], slot)
    start = 0
    for piece in block.on_device[path].pieces:
        stack = _fill_piece(stack, piece, slot, start)
        start += len(piece)
    return stack


def _read(source: Any, made_on_device: bool, digest: WeightsDigest | None, layer: int | None) -> Block:
    block = source.device_block(layer) if made_on_device else source.block(layer)
    if digest is not None:
        digest.add(block)
    return block


def shares_of(
    source: Checkpoint, placement: Placement, processes: Processes, layer: int | None, *, digested: bool = True
) -> dict[str, tuple[jax.ShapeDtypeStruct, Share]]:
    """Path -> the shape and dtype of an array of a layer, or of the top level (None), and what this process reads of
    it."""
    stacks = stack_shapes(source.config, source)
    if layer is None:
        arrays = {path: stacks[path] for path in top_level_paths(source.config, source.quantization)}
        specs = placement.specs(arrays)
    else:
        paths = [path for path, _ in layer_paths(source.config, layer, source.quantization)]
        arrays = {path: jax.ShapeDtypeStruct(stacks[path].shape[1:], stacks[path].dtype) for path in paths}
        specs = placement.layer_specs(arrays)
    turn = -1 if layer is None else layer
    return {
        path: (array, share(placement.sharding(specs[path]), array, processes, turn, digested=digested))
        for path, array in arrays.items()
    }


def read_share(
    source: Checkpoint, placement: Placement, processes: Processes, digest: WeightsDigest | None, layer: int | None
) -> Portions:
    """What the devices of this process hold of a layer, or of the top level (None). The checkpoint can be read in
    parts. `digest` collects the pieces that this process forms.

    Raises:
        UserError: as `source.parts`.
    """
    assert isinstance(source, ReadInParts)
    shares = shares_of(source, placement, processes, layer, digested=digest is not None)
    found = source.parts(layer, {path: share.boxes for path, (_, share) in shares.items()})
    portions = {path: Portion(array.shape, share.held, found.arrays[path]) for path, (array, share) in shares.items()}
    if digest is not None:
        for path, (array, share) in shares.items():
            pieces = {number: [portions[path].box(box) for box in piece] for number, piece in share.pieces.items()}
            place = path, -1 if layer is None else layer
            digest.add_pieces(place, array, pieces, f"{found.where}: {path}", found.digests.get(path))
    return Portions(layer, portions, {})
