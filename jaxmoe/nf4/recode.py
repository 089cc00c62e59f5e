"""Encodes the weights of a whole checkpoint into NF4, or decodes them, one layer at a time while it is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.nf4.codec import NF4, decode, dynamic_map
from jaxmoe.parameters import (
    NESTED_QUANT_MAP,
    Quantization,
    layer_paths,
    matrix_shape,
    parameter_specs,
    quantizable,
    stored_specs,
)
from jaxmoe.store.boxes import Box, shape_of, slices, whole
from jaxmoe.store.checkpoint import Block, Checkpoint, Layout, Parts, cast
from jaxmoe.store.recoded import Encoded, Recoded


class _Quantized(Encoded):
    """The weights `todo` in NF4, beside those that are in NF4 already."""

    def __init__(self, source: Checkpoint, layout: Layout, quantization: Quantization, todo: tuple[str, ...]) -> None:
        super().__init__(source, layout, quantization, todo)
        self._table = dynamic_map()

    def parts(self, layer: int | None, wanted: Mapping[str, Collection[Box]]) -> Parts:
        """Parts of the source's arrays, and of the encoded ones."""
        if layer is None:
            return self._top_parts(wanted)
        made = {name: boxes for name, boxes in wanted.items() if name.rpartition(".")[0] in self._todo}
        kept = self._kept(layer, {name: boxes for name, boxes in wanted.items() if name not in made})
        found: dict[str, dict[Box, np.ndarray]] = {name: {} for name in made}
        for path in self._todo:
            axes = len(matrix_shape(self.config, path)) - 1  # those that count matrices
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
        *experts, (first, last) = lead
        matrices, elements = matrix_shape(self.config, path)[-2:]
        *_, out, inner = parameter_specs(self.config)[path].shape
        box = (*experts, (first * out // matrices, last * out // matrices), (0, inner))
        weights = self._kept(layer, {path: [box]}).arrays[path][box].reshape(-1, elements)
        joined = self._encoded_in_groups(path, weights)
        return {name: array.reshape(*shape_of(lead), *array.shape[1:]) for name, array in joined.items()}

    def _top(self) -> Block:
        block = self.source.block(None)
        self._table = block.arrays.get(NESTED_QUANT_MAP, self._table)
        return Block(None, block.arrays | {NESTED_QUANT_MAP: self._table}, block.digests)

    def _encoded(self, path: str, matrices: list[np.ndarray]) -> dict[str, Any]:
        from jaxmoe.nf4.encode import encode  # loads JAX

        return encode(matrices, self._table).named(path)


def quantized(source: Checkpoint) -> Checkpoint:
    """The checkpoint with projections, dense MLPs and experts in NF4 (double quantisation), encoded while it is read.

    Router, embeddings, norms and head stay as they are, and so do weights that are in NF4 already and mixed stacks.

    Raises:
        UserError: weights that are in NF4 without double quantisation.
    """
    config, before = source.config, source.quantization
    if before is not None and not before.nested:
        raise UserError(f"{source.path}: quantize: expected NF4 with double quantisation, found it without")
    done = before.paths if before else ()
    todo = tuple(path for path in quantizable(config) if path not in done)
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
