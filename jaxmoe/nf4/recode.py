"""Encodes the weights of a whole checkpoint into NF4, or decodes them, one layer at a time while it is read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.nf4.codec import NF4, decode, dynamic_map
from jaxmoe.parameters import (
    NESTED_QUANT_MAP,
    Quantization,
    layer_paths,
    matrix_shape,
    nf4_candidates,
    parameter_specs,
    stored_specs,
)
from jaxmoe.store.boxes import Box, shape_of, slices, whole
from jaxmoe.store.checkpoint import Block, Checkpoint, Divisible, Layout, Parts, Pieces, ReadInParts, cast

_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# (path, first matrix, last matrix + 1) -> matrices of a weight of one layer
_Matrices = Callable[[str, int, int], list[np.ndarray]]


class Recoded:
    """A checkpoint whose blocks are changed while they are read, one at a time."""

    def __init__(self, source: Checkpoint, layout: Layout, quantization: Quantization | None) -> None:
        self.source, self.quantization = source, quantization
        self.layout: Layout = layout
        self.path, self.config, self.dtypes = source.path, source.config, source.dtypes
        self.stored_tied_head = source.stored_tied_head

    def block(self, layer: int | None) -> Block:
        """The source's block, changed. Read the top level first: it holds the table of the second quantisation."""
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

    def _matrix_axes(self, path: str) -> int:
        """How many leading axes of NF4's arrays count the matrices of a weight of one layer."""
        return len(matrix_shape(self.config, path)) - 1


class _Quantized(Recoded):
    """The weights `todo` in NF4, beside those that are in NF4 already."""

    def __init__(self, source: Checkpoint, layout: Layout, quantization: Quantization, todo: tuple[str, ...]) -> None:
        super().__init__(source, layout, quantization)
        self._todo, self._table = todo, dynamic_map()
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

    def parts(self, layer: int | None, wanted: Mapping[str, Collection[Box]]) -> Parts:
        """Parts of the source's arrays, and of the encoded ones."""
        if layer is None:
            return self._top_parts(wanted)
        made = {name: boxes for name, boxes in wanted.items() if name.rpartition(".")[0] in self._todo}
        kept = self._kept(layer, {name: boxes for name, boxes in wanted.items() if name not in made})
        found: dict[str, dict[Box, np.ndarray]] = {name: {} for name in made}
        for path in self._todo:
            axes = self._matrix_axes(path)
            names = [name for name in made if name.rpartition(".")[0] == path]
            for lead in dict.fromkeys(box[:axes] for name in names for box in made[name]):
                arrays = self._encoded_matrices(layer, path, lead)
                for name in names:
                    for box in made[name]:
                        if box[:axes] == lead:
                            found[name][box] = arrays[name][(..., *slices(box[axes:]))]
        return Parts(kept.where, kept.arrays | found, kept.digests)

    def _top_parts(self, wanted: Mapping[str, Collection[Box]]) -> Parts:
        before = self.source.quantization
        made = {name: boxes for name, boxes in wanted.items() if name == NESTED_QUANT_MAP and before is None}
        kept = self._kept(None, {name: boxes for name, boxes in wanted.items() if name not in made})
        for box, table in kept.arrays.get(NESTED_QUANT_MAP, {}).items():
            if box == whole(self._table.shape):
                self._table = table
        found = {name: {box: self._table[slices(box)] for box in boxes} for name, boxes in made.items()}
        return Parts(kept.where, kept.arrays | found, kept.digests)

    def _encoded_matrices(self, layer: int, path: str, lead: Box) -> dict[str, np.ndarray]:
        """NF4's arrays of those matrices of a weight that a box of the leading axes counts."""
        from jaxmoe.nf4.encode import group_size  # loads JAX

        *experts, (first, last) = lead
        matrices, elements = matrix_shape(self.config, path)[-2:]
        *_, out, inner = parameter_specs(self.config)[path].shape
        box = (*experts, (first * out // matrices, last * out // matrices), (0, inner))
        weights = self._kept(layer, {path: [box]}).arrays[path][box].reshape(-1, elements)
        size = group_size(len(weights), elements)
        groups = [self._encoded(path, list(weights[i : i + size])) for i in range(0, len(weights), size)]
        joined = {name: np.concatenate([np.asarray(group[name]) for group in groups]) for name in groups[0]}
        return {name: array.reshape(*shape_of(lead), *array.shape[1:]) for name, array in joined.items()}

    def _top(self) -> Block:
        block = self.source.block(None)
        self._table = block.arrays.get(NESTED_QUANT_MAP, self._table)
        return Block(None, block.arrays | {NESTED_QUANT_MAP: self._table}, block.digests)

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
        from jaxmoe.nf4.encode import encode  # loads JAX

        return encode(matrices, self._table).named(path)

    def _groups(self, paths: tuple[str, ...]) -> Iterator[tuple[str, int, int]]:
        """(path, first matrix, last matrix + 1) of what is encoded at a time."""
        from jaxmoe.nf4.encode import group_size  # loads JAX

        for path in paths:
            *lead, elements = matrix_shape(self.config, path)
            size = group_size(math.prod(lead), elements)
            yield from ((path, start, start + size) for start in range(0, math.prod(lead), size))


def quantized(source: Checkpoint, form: str = "nf4") -> Checkpoint:
    """The checkpoint with projections, dense MLPs and experts in NF4 (double quantisation), encoded while it is read.

    Router, embeddings, norms and head stay as they are, and so do weights that are in NF4 already and mixed stacks.

    Raises:
        UserError: another form than "nf4", or weights that are in NF4 without double quantisation.
    """
    if form != "nf4":
        raise UserError(f"quantize: expected 'nf4' or None, found {form!r}")
    config, before = source.config, source.quantization
    if before is not None and not before.nested:
        raise UserError(f"{source.path}: quantize: expected NF4 with double quantisation, found it without")
    done = before.paths if before else ()
    todo = tuple(path for path in nf4_candidates(config) if path not in done)
    if not todo:
        return source
    # bitsandbytes has no form for fused experts
    layout: Layout = "per_expert" if config.sparse_layers else source.layout
    unquantized = before.unquantized if before else ()
    return _Quantized(source, layout, Quantization(tuple(sorted((*done, *todo))), unquantized=unquantized), todo)


class _Dequantized(Recoded):
    """Every weight in NF4 decoded."""

    def __init__(self, source: Checkpoint, quantization: Quantization) -> None:
        super().__init__(source, source.layout, None)
        specs = parameter_specs(source.config)
        self._shapes = {path: spec.shape[1:] for path, spec in specs.items() if path in quantization.paths}
        self._stored, self._nested = stored_specs(source.config, quantization), quantization.nested
        self._table: np.ndarray | None = None

    def block(self, layer: int | None) -> Block:
        """The source's block, decoded."""
        arrays = dict(self.source.block(layer).arrays)
        if layer is None:
            self._table = arrays.pop(NESTED_QUANT_MAP, None)
        for path, shape in self._shapes.items():
            if f"{path}.codes" in arrays:
                packed = NF4.of(arrays, path)
                for name in packed.named(path):
                    del arrays[name]
                elements = matrix_shape(self.config, path)[-1]
                arrays[path] = decode(packed, elements, self.dtypes[path], self._table).reshape(shape)
            elif f"{path}.weight" in arrays:
                arrays[path] = cast(path, arrays.pop(f"{path}.weight"), self.dtypes[path])
        return Block(layer, arrays)

    def parts(self, layer: int | None, wanted: Mapping[str, Collection[Box]]) -> Parts:
        """Parts of the source's arrays, and of the decoded ones."""
        if layer is None:
            kept = self._kept(None, {**wanted, NESTED_QUANT_MAP: [whole((256,))]} if self._nested else wanted)
            self._table = next(iter(kept.arrays.pop(NESTED_QUANT_MAP, {}).values()), None)
            return Parts(kept.where, kept.arrays)
        stored = {name for name, _ in layer_paths(self.config, layer, self.source.quantization)}
        kept = self._kept(layer, {path: boxes for path, boxes in wanted.items() if path not in self._shapes})
        found = {
            path: {box: self._decoded_part(layer, path, box, stored) for box in wanted[path]}
            for path in self._shapes
            if path in wanted
        }
        return Parts(kept.where, kept.arrays | found)

    def _decoded_part(self, layer: int, path: str, box: Box, stored: Collection[str]) -> np.ndarray:
        if f"{path}.codes" not in stored:
            return cast(
                path, self._kept(layer, {f"{path}.weight": [box]}).arrays[f"{path}.weight"][box], self.dtypes[path]
            )
        *experts, rows, columns = box
        *_, matrices, elements = matrix_shape(self.config, path)
        lead = (*experts, (0, matrices))
        names = [name for name in stored if name.rpartition(".")[0] == path]
        shapes = {name: self._stored[name].shape[1:] for name in names}
        wanted = {name: [(*lead, *whole(shape[len(lead) :]))] for name, shape in shapes.items()}
        arrays = {name: parts[wanted[name][0]] for name, parts in self._kept(layer, wanted).arrays.items()}
        weight = decode(NF4.of(arrays, path), elements, self.dtypes[path], self._table)
        weight = weight.reshape(*shape_of(tuple(experts)), *self._shapes[path][-2:])
        return weight[(..., *slices((rows, columns)))]


def dequantized(source: Checkpoint) -> Checkpoint:
    """The checkpoint with its NF4 weights decoded, while it is read, to the dtypes that they had before quantisation.

    Unquantised layers of a mixed stack are cast to the dtype of the others.
    """
    return source if source.quantization is None else _Dequantized(source, source.quantization)
