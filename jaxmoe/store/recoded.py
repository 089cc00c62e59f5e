"""A checkpoint whose weights are brought into another form, one layer at a time, while it is read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from jaxmoe.parameters import Quantization, layer_paths, matrix_shape, stored_specs
from jaxmoe.store.boxes import Box
from jaxmoe.store.checkpoint import Block, Checkpoint, Divisible, Layout, Parts, Pieces, ReadInParts

_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# (path, first matrix, last matrix + 1) -> matrices of a weight of one layer
_Matrices = Callable[[str, int, int], list[np.ndarray]]


def group_size(matrices: int, elements: int) -> int:
    """How many matrices of a weight are encoded at a time, a divisor of `matrices`.

    On a CPU intermediate results then stay in its cache, on a GPU transfers are large enough to be fast.
    """
    import jax

    most = max(1, (2**21 if jax.default_backend() == "cpu" else 2**25) // elements)
    return next(size for size in range(min(most, matrices), 0, -1) if matrices % size == 0)


class Recoded:
    """A checkpoint whose blocks are changed while they are read, one at a time."""

    def __init__(self, source: Checkpoint, layout: Layout, quantization: Quantization | None) -> None:
        self.source, self.quantization = source, quantization
        self.layout: Layout = layout
        self.path, self.config, self.dtypes = source.path, source.config, source.dtypes
        self.stored_tied_head = source.stored_tied_head

    def block(self, layer: int | None) -> Block:
        """The source's block, changed. Read the top level first: it holds the table of NF4's second quantisation."""
        raise NotImplementedError

    def blocks(self) -> Iterator[Block]:
        """The source's blocks, each changed."""
        return map(self.block, (None, *range(self.config.num_hidden_layers)))

    def parts(self, layer: int | None, wanted: Mapping[str, Collection[Box]]) -> Parts:
        """Parts of what `block` gives. Of a weight that is changed, whole matrices are read."""
        raise NotImplementedError

    def _kept(self, layer: int | None, wanted: Mapping[str, Collection[Box]]) -> Parts:
        """Parts of arrays that stay as they are."""
        assert isinstance(self.source, ReadInParts)
        return self.source.parts(layer, wanted)


class Encoded(Recoded):
    """The weights `todo` encoded, beside those that are in the form already."""

    def __init__(self, source: Checkpoint, layout: Layout, quantization: Quantization, todo: tuple[str, ...]) -> None:
        super().__init__(source, layout, quantization)
        self._todo = todo
        self._specs = stored_specs(self.config, quantization)

    def block(self, layer: int | None) -> Block:
        """The source's block, encoded by as many threads as there are cores."""
        if layer is None:
            return self._top()
        rest, paths, matrices = self._divided(layer)
        made = {name: np.empty(self._specs[name].shape[1:], self._specs[name].dtype) for name in self._names(paths)}

        def place(path: str, start: int, stop: int) -> None:
            for name, piece in self._encoded(path, matrices(path, start, stop)).items():
                made[name].reshape(-1, *piece.shape[1:])[start:stop] = np.asarray(piece)

        with ThreadPoolExecutor(_CORES, thread_name_prefix="encode") as pool:
            for done in [pool.submit(place, *group) for group in self._groups(paths)]:
                done.result()
        return Block(layer, rest.arrays | made, rest.digests)

    def device_block(self, layer: int | None) -> Block:
        """The source's block, encoded on the default device, where the encoded arrays stay."""
        if layer is None:
            return self._top()
        rest, paths, matrices = self._divided(layer)
        pieces: dict[str, list[Any]] = {}
        for path, start, stop in self._groups(paths):
            for name, piece in self._encoded(path, matrices(path, start, stop)).items():
                pieces.setdefault(name, []).append(piece)
        specs = {name: self._specs[name] for name in pieces}
        made = {name: Pieces(spec.shape[1:], np.dtype(spec.dtype), tuple(pieces[name])) for name, spec in specs.items()}
        return Block(layer, rest.arrays, rest.digests, made)

    def blocks(self) -> Iterator[Block]:
        """The top level, then every layer; the next one is encoded while the caller uses a layer."""
        yield self.block(None)
        with ThreadPoolExecutor(1, thread_name_prefix="next-layer") as pool:
            ahead = pool.submit(self.block, 0)
            for layer in range(1, self.config.num_hidden_layers + 1):
                block = ahead.result()
                if layer < self.config.num_hidden_layers:
                    ahead = pool.submit(self.block, layer)
                yield block
                del block

    def _top(self) -> Block:
        return self.source.block(None)

    def _divided(self, layer: int) -> tuple[Block, tuple[str, ...], _Matrices]:
        """(what stays as it is, the weights to encode, how to read their matrices)."""
        found = layer_paths(self.config, layer, self.source.quantization)
        paths = tuple(path for path, _ in found if path in self._todo)
        if isinstance(self.source, Divisible):
            return self.source.block(layer, without=paths), paths, partial(self.source.matrices, layer)
        block = self.source.block(layer)
        weights = {path: block.arrays[path].reshape(-1, matrix_shape(self.config, path)[-1]) for path in paths}
        rest = {path: array for path, array in block.arrays.items() if path not in weights}
        return Block(layer, rest, block.digests), paths, lambda path, start, stop: list(weights[path][start:stop])

    def _names(self, paths: tuple[str, ...]) -> Iterator[str]:
        """The arrays in place of these weights."""
        return (name for path in paths for name in self._specs if name.rpartition(".")[0] == path)

    def _encoded(self, path: str, matrices: list[np.ndarray]) -> dict[str, Any]:
        """Name -> array [matrices, ...] of each array in place of some matrices of the weight `path`."""
        raise NotImplementedError

    def _encoded_in_groups(self, path: str, matrices: np.ndarray) -> dict[str, np.ndarray]:
        """`_encoded` of matrices [_, elements], as many at a time as are fast, in NumPy."""
        size = group_size(*matrices.shape)
        groups = [self._encoded(path, list(matrices[i : i + size])) for i in range(0, len(matrices), size)]
        return {name: np.concatenate([np.asarray(group[name]) for group in groups]) for name in groups[0]}

    def _groups(self, paths: tuple[str, ...]) -> Iterator[tuple[str, int, int]]:
        """(path, first matrix, last matrix + 1) of what is encoded at a time."""
        for path in paths:
            *lead, elements = matrix_shape(self.config, path)
            size = group_size(math.prod(lead), elements)
            yield from ((path, start, start + size) for start in range(0, math.prod(lead), size))
