"""Finds and reads the FP8 weights of an HF checkpoint: e4m3 codes, and beside them one scale for each 128 x 128 block.

The scale of the weight `X.weight` is `X.weight_scale_inv`, float32 or bfloat16; blocks at the right and lower edges may
be smaller. `jaxmoe.fp8.codec` has the arithmetic.

Transformers 5.17 to 5.23 reads blocks at the edges in two ways. Its FP8 layers take blocks of 128, the last ones
smaller, as `weight_dequant` of DeepSeek-V3 does, where the layout comes from; so does this module. `Fp8Dequantize`
divides a weight into as many equal blocks as there are scales, and fails where that leaves a rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from convert.mixed import quantized_stacks, skipped_modules
from convert.names import Row
from convert.safetensors_io import FLOATS, Tensor
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.errors import UserError
from jaxmoe.fp8.codec import FP8, decode
from jaxmoe.parameters import FP8_BLOCK, Quantization, quantizable
from jaxmoe.store.boxes import Box, slices

CODE = "F8_E4M3"
_SUFFIX = "_scale_inv"
_SCALES = ("F32", "BF16")


def scale_key(key: str) -> str:
    """The key of the scales of the weight `key`."""
    return f"{key}{_SUFFIX}"


def check_fp8(where: str, rows: Iterable[Row], tensors: Mapping[str, Tensor]) -> list[str]:
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
            raise UserError(f"{where}: missing tensor {key} (the scales of {row.key}, which is in FP8)")
        *lead, out, inner = row.shape
        shape = (*lead, -(-out // FP8_BLOCK), -(-inner // FP8_BLOCK))
        if scales.code not in _SCALES or scales.shape != shape:
            found = f"{scales.code} {list(scales.shape)}"
            raise UserError(f"{scales.where}: expected {' or '.join(_SCALES)} {list(shape)}, found {found}")
        keys.append(row.key)
    if not keys:
        raise _none(where)
    return keys


def _none(where: str) -> UserError:
    return UserError(
        f"{where}: quantization_config: expected weights in FP8 ({CODE}), found none; if they were decoded, remove "
        "quantization_config from config.json"
    )


def uneven_blocks(keys: Iterable[str], tensors: Mapping[str, Tensor]) -> list[str]:
    """Those of the weights whose blocks differ in size, which transformers' `Fp8Dequantize` reads otherwise."""
    return [key for key in keys if any(size > FP8_BLOCK and size % FP8_BLOCK for size in tensors[key].shape[-2:])]


def find_quantization(
    where: str, config: Qwen3MoeConfig, tensors: Mapping[str, Tensor], blocks: Mapping[int | None, Sequence[Row]]
) -> Quantization:
    """The parameters of an HF checkpoint in FP8, and the layers of them that are not.

    Raises:
        UserError: no tensor is in FP8, or weights in FP8 that can only be decoded: other ones than projections, routers
            and MLPs, a layer whose experts are not all in FP8, scales of several dtypes, or blocks that lie in gate and
            up of fused experts.
    """
    form_of = lambda key: "FP8" if key in tensors and tensors[key].code == CODE else None
    paths, left = quantized_stacks(where, config, tensors, blocks, form_of)
    if not paths:
        raise _none(where)
    found = [row for block in blocks.values() for row in block if form_of(row.key) is not None]
    codes = {tensors[scale_key(row.key)].code for row in found if scale_key(row.key) in tensors}
    for row in found:
        if row.path not in quantizable(config, router=True):
            raise _only_decoded(f"{where}: {row.key}: expected 16 or 32 bits, found FP8")
        if row.path == "sparse.gate_up_proj" and not row.part and row.shape[1] // 2 % FP8_BLOCK:
            raise _only_decoded(f"{where}: {row.key}: expected gate and up of whole blocks, found {list(row.shape)}")
    if len(codes) > 1:
        raise _only_decoded(f"{where}: expected one dtype of all scales, found {', '.join(sorted(codes))}")
    dtypes = [FLOATS[code].name for code in codes if code in _SCALES]
    return Quantization.in_fp8(paths, *dtypes, unquantized=left)


def _only_decoded(what: str) -> UserError:
    return UserError(f"{what}; --dequantize, or dequantize=True, decodes all weights")


def settings_of(config: Qwen3MoeConfig, quantization: Quantization) -> dict[str, Any]:
    """The quantization_config of a model in FP8, as Qwen writes it."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": skipped_modules(config, quantization),
        "quant_method": "fp8",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }


def read_codes(tensor: Tensor, box: Box | None = None) -> np.ndarray:
    """The codes, or a box of them."""
    if box is not None:
        return tensor.read_box(box)
    return tensor.data.view(tensor.stored_dtype).reshape(tensor.shape)


def matrix_tensors(row: Row, codes: np.ndarray, scales: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The HF tensors of the weight of `row`, from its parameter's codes and scales."""
    yield row.key, codes[row.part]
    if row.part:
        yield scale_key(row.key), scales[row.matrix]
    else:  # the blocks of a weight's matrices, one below the other
        yield scale_key(row.key), scales.reshape(*scales.shape[:-3], -1, scales.shape[-1])


def decode_fp8(codes: Tensor, scales: Tensor, dtype: np.dtype, box: Box | None = None) -> np.ndarray:
    """The weight, or a box of it, in `dtype`: the blocks that the box touches are read and decoded."""
    if box is None:
        return decode(FP8(read_codes(codes), scales.read()), dtype)
    *lead, rows, columns = box
    blocks = tuple((start // FP8_BLOCK, -(-stop // FP8_BLOCK)) for start, stop in (rows, columns))
    sides = zip(blocks, codes.shape[-2:], strict=True)
    touched = tuple((start * FP8_BLOCK, min(stop * FP8_BLOCK, side)) for (start, stop), side in sides)
    found = decode(FP8(codes.read_box((*lead, *touched)), scales.read_box((*lead, *blocks))), dtype)
    return found[(..., *slices((rows, columns), [start for start, _ in touched]))]
