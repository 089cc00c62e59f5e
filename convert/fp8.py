"""Decodes weights in FP8: e4m3 codes, and beside them one scale for each block of 128 x 128.

The scale of the weight `X.weight` is `X.weight_scale_inv`, float32 or bfloat16; blocks at the right and lower edges may
be smaller. W = code * scale, formed in float32 and rounded once, as in `Fp8Dequantize` of transformers 5
(`integrations/finegrained_fp8.py`).

Transformers 5.17 to 5.23 reads blocks at the edges in two ways. Its FP8 layers take blocks of 128, the last ones
smaller, as `weight_dequant` of DeepSeek-V3 does, where the layout comes from; so does this module. `Fp8Dequantize`
divides a weight into as many equal blocks as there are scales, and fails where that leaves a rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np

from convert.names import Row
from convert.safetensors_io import Tensor
from jaxmoe.errors import UserError
from jaxmoe.store.boxes import Box, whole

BLOCK = 128
CODE = "F8_E4M3"
_SUFFIX = "_scale_inv"
_SCALES = ("F32", "BF16")


def scale_key(key: str) -> str:
    """The key of the scales of the weight `key`."""
    return f"{key}{_SUFFIX}"


def check_fp8(rows: Iterable[Row], tensors: Mapping[str, Tensor]) -> list[str]:
    """The keys of all weights in FP8, after a check of their scales.

    Raises:
        UserError: no weight in FP8, one without scales, or scales of another shape or dtype.
    """
    keys = []
    for row in rows:
        tensor, key = tensors.get(row.key), scale_key(row.key)
        if tensor is None or tensor.code != CODE:
            continue
        if (scales := tensors.get(key)) is None:
            raise UserError(f"{key}: missing tensor (the scales of {row.key}, which is in FP8)")
        *lead, out, inner = row.shape
        shape = (*lead, -(-out // BLOCK), -(-inner // BLOCK))
        if scales.code not in _SCALES or scales.shape != shape:
            found = f"{scales.code} {list(scales.shape)}"
            raise UserError(f"{key}: expected {' or '.join(_SCALES)} {list(shape)}, found {found}")
        keys.append(row.key)
    if not keys:
        raise UserError(
            f"quantization_config: expected weights in FP8 ({CODE}), found none; if they were decoded, remove "
            "quantization_config from config.json"
        )
    return keys


def uneven_blocks(keys: Iterable[str], tensors: Mapping[str, Tensor]) -> list[str]:
    """Those of the weights whose blocks differ in size, which transformers' `Fp8Dequantize` reads otherwise."""
    return [key for key in keys if any(size > BLOCK and size % BLOCK for size in tensors[key].shape[-2:])]


def decode_fp8(codes: Tensor, scales: Tensor, dtype: np.dtype, box: Box | None = None) -> np.ndarray:
    """The weight, or a box of it, in `dtype`, one matrix at a time."""
    *lead, (top, bottom), (left, right) = box or whole(codes.shape)
    blocks = tuple((start // BLOCK, -(-stop // BLOCK)) for start, stop in ((top, bottom), (left, right)))
    if box is None:
        matrices, grids = codes.data.view(ml_dtypes.float8_e4m3fn).reshape(codes.shape), scales.read()
    else:
        matrices, grids = codes.read_box(box), scales.read_box((*lead, *blocks))
    weight = np.empty((*matrices.shape[:-2], bottom - top, right - left), dtype)
    for place in np.ndindex(matrices.shape[:-2]):
        for i, row in enumerate(grids[place].astype(np.float32), blocks[0][0]):
            rows = slice(max(i * BLOCK, top) - top, min((i + 1) * BLOCK, bottom) - top)
            columns = np.repeat(row, BLOCK)[left - blocks[1][0] * BLOCK :][: right - left]
            weight[place][rows] = (matrices[place][rows].astype(np.float32) * columns).astype(dtype)
    return weight
