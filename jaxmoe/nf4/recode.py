"""Encodes the weights of a whole checkpoint into NF4, or decodes them, one layer at a time while it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.nf4.codec import NF4, decode, dynamic_map, encode
from jaxmoe.parameters import NESTED_QUANT_MAP, Quantization, matrix_shape, nf4_candidates, parameter_specs
from jaxmoe.store.checkpoint import Block, Checkpoint, Layout, cast


@dataclass
class Recoded:
    """A checkpoint whose blocks are changed while they are read, one at a time."""

    source: Checkpoint
    layout: Layout
    quantization: Quantization | None
    change: Callable[[Block], Block]

    def __post_init__(self) -> None:
        self.path, self.config, self.dtypes = self.source.path, self.source.config, self.source.dtypes
        self.stored_tied_head = self.source.stored_tied_head

    def block(self, layer: int | None) -> Block:
        """The source's block, changed. Read the top level first: it holds the table of the second quantisation."""
        return self.change(self.source.block(layer))

    def blocks(self) -> Iterator[Block]:
        """The source's blocks, each changed."""
        for block in self.source.blocks():
            changed = self.change(block)
            del block
            yield changed
            del changed


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

    table = dynamic_map()

    def change(block: Block) -> Block:
        nonlocal table
        if block.layer is None:
            table = block.arrays.get(NESTED_QUANT_MAP, table)
            return Block(None, block.arrays | {NESTED_QUANT_MAP: table})
        arrays = dict(block.arrays)
        for path in todo:
            if path in arrays:
                *lead, elements = matrix_shape(config, path)
                weight = arrays.pop(path).reshape(-1, elements)
                parts = zip(*(encode(matrix, table) for matrix in weight), strict=True)
                packed = NF4(*(np.stack(part).reshape(*lead, *part[0].shape) for part in parts))
                arrays |= packed.named(path)
        return Block(block.layer, arrays)

    # bitsandbytes has no form for fused experts
    layout: Layout = "per_expert" if config.sparse_layers else source.layout
    unquantized = before.unquantized if before else ()
    return Recoded(source, layout, Quantization(tuple(sorted((*done, *todo))), unquantized=unquantized), change)


def dequantized(source: Checkpoint) -> Checkpoint:
    """The checkpoint with its NF4 weights decoded, while it is read, to the dtypes that they had before quantisation.

    Unquantised layers of a mixed stack are cast to the dtype of the others.
    """
    quantization = source.quantization
    if quantization is None:
        return source
    config, table = source.config, None
    shapes = {path: spec.shape[1:] for path, spec in parameter_specs(config).items() if path in quantization.paths}

    def change(block: Block) -> Block:
        nonlocal table
        arrays = dict(block.arrays)
        if block.layer is None:
            table = arrays.pop(NESTED_QUANT_MAP, None)
        for path, shape in shapes.items():
            if f"{path}.codes" in arrays:
                packed = NF4.of(arrays, path)
                for name in packed.named(path):
                    del arrays[name]
                elements = matrix_shape(config, path)[-1]
                arrays[path] = decode(packed, elements, source.dtypes[path], table).reshape(shape)
            elif f"{path}.weight" in arrays:
                arrays[path] = cast(path, arrays.pop(f"{path}.weight"), source.dtypes[path])
        return Block(block.layer, arrays)

    return Recoded(source, source.layout, None, change)
