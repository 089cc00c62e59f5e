"""Encodes the weights of a whole checkpoint into FP8, or decodes them, one layer at a time while it is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxmoe.fp8.codec import FP8, decode
from jaxmoe.parameters import Quantization, layer_paths, matrix_shape, parameter_specs, quantizable, stored_specs
from jaxmoe.store.boxes import Box, slices, whole
from jaxmoe.store.checkpoint import Block, Checkpoint, Layout, Parts, cast
from jaxmoe.store.recoded import Encoded, Recoded


class _Quantized(Encoded):
    """The weights `todo` in FP8, beside those that are in FP8 already."""

    def parts(self, layer: int | None, wanted: Mapping[str, Collection[Box]]) -> Parts:
        """Parts of the source's arrays, and of the encoded ones: of these, the experts that a box counts are encoded
        whole, so that no block is cut."""
        made = {name: boxes for name, boxes in wanted.items() if name.rpartition(".")[0] in self._todo}
        kept = self._kept(layer, {name: boxes for name, boxes in wanted.items() if name not in made})
        found: dict[str, dict[Box, np.ndarray]] = {name: {} for name in made}
        for path in self._todo:
            assert layer is not None or not made
            names = [name for name in made if name.rpartition(".")[0] == path]
            axes = len(parameter_specs(self.config)[path].shape) - 3  # those that count experts
            for lead in dict.fromkeys(box[:axes] for name in names for box in made[name]):
                arrays = self._encoded_experts(layer, path, lead)
                for name in names:
                    for box in made[name]:
                        if box[:axes] == lead:
                            found[name][box] = arrays[name][(..., *slices(box[axes:]))]
        return Parts(kept.where, kept.arrays | found, kept.digests)

    def _encoded_experts(self, layer: int | None, path: str, lead: Box) -> dict[str, np.ndarray]:
        """FP8's arrays of the experts in `lead`, or of the whole weight if it has none."""
        *_, out, inner = parameter_specs(self.config)[path].shape
        box = (*lead, (0, out), (0, inner))
        weights = self._kept(layer, {path: [box]}).arrays[path][box]
        made = self._encoded_in_groups(path, weights.reshape(-1, matrix_shape(self.config, path)[-1]))
        experts = weights.shape[:-2]
        return {
            name: array.reshape(*experts, *self._specs[name].shape[1 + len(experts) :]) for name, array in made.items()
        }

    def _encoded(self, path: str, matrices: list[np.ndarray]) -> dict[str, Any]:
        from jaxmoe.fp8.encode import encode  # loads JAX

        inner = parameter_specs(self.config)[path].shape[-1]
        codes, scales = encode(matrices, (matrices[0].size // inner, inner))
        return {f"{path}.codes": codes, f"{path}.scales": scales}


def quantized(source: Checkpoint) -> Checkpoint:
    """The checkpoint with projections, dense MLPs and experts in FP8, encoded while it is read.

    Router, embeddings, norms and head stay as they are, and so do weights that are in FP8 already and mixed stacks.
    """
    config, before = source.config, source.quantization
    done = before.paths if before else ()
    todo = tuple(path for path in quantizable(config) if path not in done)
    if not todo:
        return source
    # Qwen's form has no fused experts
    layout: Layout = "per_expert" if config.sparse_layers else source.layout
    scales, unquantized = (before.scales, before.unquantized) if before else ("float32", ())
    return _Quantized(source, layout, Quantization.in_fp8((*done, *todo), scales, unquantized), todo)


class _Dequantized(Recoded):
    """Every weight in FP8 decoded."""

    def __init__(self, source: Checkpoint, quantization: Quantization) -> None:
        super().__init__(source, source.layout, None)
        self._paths, self._stored = quantization.paths, stored_specs(source.config, quantization)

    def block(self, layer: int | None) -> Block:
        """The source's block, decoded."""
        arrays = dict(self.source.block(layer).arrays)
        for path in self._paths:
            if f"{path}.codes" in arrays:
                packed = arrays.pop(f"{path}.codes"), arrays.pop(f"{path}.scales")
                arrays[path] = _decoded(*packed, self.dtypes[path])
            elif f"{path}.weight" in arrays:
                arrays[path] = cast(path, arrays.pop(f"{path}.weight"), self.dtypes[path])
        return Block(layer, arrays)

    def parts(self, layer: int | None, wanted: Mapping[str, Collection[Box]]) -> Parts:
        """Parts of the source's arrays, and of the decoded ones."""
        made = {path: boxes for path, boxes in wanted.items() if path in self._paths}
        kept = self._kept(layer, {path: boxes for path, boxes in wanted.items() if path not in made})
        found = {path: {box: self._decoded_part(layer, path, box) for box in boxes} for path, boxes in made.items()}
        return Parts(kept.where, kept.arrays | found)

    def _decoded_part(self, layer: int | None, path: str, box: Box) -> np.ndarray:
        assert layer is not None
        names = {name for name, _ in layer_paths(self.config, layer, self.source.quantization)}
        if f"{path}.codes" not in names:
            plain = self._kept(layer, {f"{path}.weight": [box]}).arrays[f"{path}.weight"][box]
            return cast(path, plain, self.dtypes[path])
        *experts, rows, columns = box
        shapes = {name: self._stored[name].shape[1 + len(experts) :] for name in (f"{path}.codes", f"{path}.scales")}
        boxes = {name: [(*experts, *whole(shape))] for name, shape in shapes.items()}
        arrays = self._kept(layer, boxes).arrays
        codes, scales = (arrays[name][boxes[name][0]] for name in shapes)
        return _decoded(codes, scales, self.dtypes[path])[(..., *slices((rows, columns)))]


def _decoded(codes: np.ndarray, scales: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The weights [..., out, in] of codes [..., out, in] and scales [..., matrices, rows, columns]."""
    matrices = codes.reshape(*scales.shape[:-2], -1, codes.shape[-1])
    return decode(FP8(matrices, scales), dtype).reshape(codes.shape)


def dequantized(source: Checkpoint) -> Checkpoint:
    """The checkpoint with its FP8 weights decoded, while it is read.

    Unquantised layers of a mixed stack are cast to the dtype of the others.
    """
    return source if source.quantization is None else _Dequantized(source, source.quantization)
