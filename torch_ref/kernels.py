"""Triton kernels for what lies around the matrix products on CUDA: one pass over memory where eager torch makes many.

Each has a twin in plain torch beside its caller, which computes the same from the same arguments and is what runs on a
CPU; the tests compare the two. Inside, everything is float32, rounded once on the way out.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = None

_TILE = 2048  # elements a program holds of each operand


def usable(x: Tensor) -> bool:
    """Whether the kernels can run on `x`: on CUDA, in 16 or 32 bit, outside autocast, with Triton installed."""
    if triton is None or not x.is_cuda or torch.is_autocast_enabled("cuda"):
        return False
    return x.dtype in (torch.bfloat16, torch.float16, torch.float32)


def swiglu(product: Float[Tensor, "R F2"]) -> Float[Tensor, "R F"]:
    """silu(gate) * up, of products that hold gate and up side by side."""
    rows, width = product.shape[0], product.shape[1] // 2
    out = product.new_empty(rows, width)
    block, tile = _tile(width)
    if rows:
        _swiglu_kernel[(triton.cdiv(rows, tile),)](product, out, rows, width, tile, block)
    return out


def swiglu_backward(
    d_hidden: Float[Tensor, "R F"], product: Float[Tensor, "R F2"], weights: Float[Tensor, " R"]
) -> tuple[Float[Tensor, "R F2"], Float[Tensor, " R"]]:
    """Gradients of weights[r] * swiglu(product)[r] for the gradient `d_hidden`: of the product, and of the weights."""
    rows, width = d_hidden.shape
    d_product, d_weights = torch.empty_like(product), torch.empty_like(weights)
    block, tile = _tile(width)
    if rows:
        _swiglu_backward_kernel[(triton.cdiv(rows, tile),)](
            d_hidden, product, weights, d_product, d_weights, rows, width, tile, block
        )
    return d_product, d_weights


def combine(
    rows: Float[Tensor, "R D"], inverse: Int[Tensor, " R"], k: int, weights: Float[Tensor, "M k"] | None = None
) -> Float[Tensor, "M D"]:
    """Sums each token's k rows, which stand at inverse[token * k + j], times their weights where there are any."""
    tokens, width = len(inverse) // k, rows.shape[1]
    out = rows.new_empty(tokens, width)
    block = min(1024, triton.next_power_of_2(width))
    if tokens:
        _combine_kernel[(tokens, triton.cdiv(width, block))](
            rows, inverse, rows if weights is None else weights.contiguous(), out, width, k, weights is not None, block
        )
    return out


def norm_rotary(
    x: Float[Tensor, "B T heads H"], weight: Float[Tensor, " H"], cos: Tensor, sin: Tensor, epsilon: float
) -> Float[Tensor, "B T heads H"]:
    """RMSNorm over each head, then the rotary embedding; `cos` and `sin` are [B or 1, T, H]; H is a power of two."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch_norm_rotary(x.contiguous(), None, weight, cos, sin, epsilon, out)
    return out


def norm_rotary_backward(
    d_out: Float[Tensor, "B T heads H"],
    x: Float[Tensor, "B T heads H"],
    weight: Float[Tensor, " H"],
    cos: Tensor,
    sin: Tensor,
    epsilon: float,
) -> Float[Tensor, "B T heads H"]:
    """The gradient of `norm_rotary` in x."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch_norm_rotary(x.contiguous(), d_out.contiguous(), weight, cos, sin, epsilon, out)
    return out


def _launch_norm_rotary(
    x: Tensor, d_out: Tensor | None, weight: Tensor, cos: Tensor, sin: Tensor, epsilon: float, out: Tensor
) -> None:
    B, T, heads, H = x.shape
    tile = max(1, _TILE // H)
    rows = B * T * heads
    if rows:
        _norm_rotary_kernel[(triton.cdiv(rows, tile),)](
            x,
            x if d_out is None else d_out,
            weight,
            cos.contiguous(),
            sin.contiguous(),
            out,
            rows,
            heads,
            len(cos) * T,
            epsilon,
            d_out is not None,
            tile,
            H // 2,
        )


def decode_4bit(
    codes: UInt8[Tensor, "parts bytes"],
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    nested_quant_map: Tensor | None,
    quant_map: Float[Tensor, "16"],
    blocksize: int,
    dtype: torch.dtype,
) -> Float[Tensor, "parts values"]:
    """The values of 4-bit codes, two to a byte: quant_map[code] * absmax[block], rounded to `dtype` once.

    Args:
        codes: the parts' bytes; each part begins a block of `blocksize` values.
        absmax: the blocks' maxima [parts, blocks], float32, or 8-bit codes of maxima where the rest is given:
            nested_quant_map[absmax] * nested_absmax[block // 256] + offset, both operations rounded, as bitsandbytes
            computes it.
        nested_absmax: float32 [parts, ceil(blocks / 256)].
        offset: float32 [parts].
        nested_quant_map: float32 [256].
        quant_map: the values of the codes.
        blocksize: values that share a maximum, a power of two.
        dtype: of the result.
    """
    parts, size = codes.shape
    blocks = absmax.shape[1]
    out = torch.empty(parts, 2 * size, dtype=dtype, device=codes.device)
    tile = max(1, _TILE // blocksize)
    nested = nested_absmax is not None
    absent = quant_map
    _decode_kernel[(parts, triton.cdiv(blocks, tile))](
        codes,
        absmax,
        nested_absmax if nested else absent,
        offset if offset is not None else absent,
        nested_quant_map if nested_quant_map is not None else absent,
        quant_map,
        out,
        size,
        blocks,
        nested_absmax.shape[1] if nested_absmax is not None else 0,
        nested,
        tile,
        blocksize // 2,
        enable_fp_fusion=False,  # a fused multiply-add would change the last bit of a maximum
    )
    return out


def _tile(width: int) -> tuple[int, int]:
    """Columns that a program holds at a time, and its rows."""
    block = min(256, triton.next_power_of_2(width))
    return block, max(1, _TILE // block)


if triton is not None:

    @triton.jit
    def _swiglu_kernel(
        product: Any, out: Any, rows: Any, width: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr
    ) -> None:
        row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
        for start in tl.static_range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            inside = (row < rows) & (column < width)
            gate = tl.load(product + row * (2 * width) + column, inside, 0.0).to(tl.float32)
            up = tl.load(product + row * (2 * width) + width + column, inside, 0.0).to(tl.float32)
            tl.store(out + row * width + column, gate * tl.sigmoid(gate) * up, inside)

    @triton.jit
    def _swiglu_backward_kernel(
        d_hidden: Any,
        product: Any,
        weights: Any,
        d_product: Any,
        d_weights: Any,
        rows: Any,
        width: tl.constexpr,
        TILE: tl.constexpr,
        BLOCK: tl.constexpr,
    ) -> None:
        lines = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        row = lines[:, None]
        weight = tl.load(weights + lines, lines < rows, 0.0).to(tl.float32)[:, None]
        total = tl.zeros([TILE], tl.float32)
        for start in tl.static_range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            inside = (row < rows) & (column < width)
            gate = tl.load(product + row * (2 * width) + column, inside, 0.0).to(tl.float32)
            up = tl.load(product + row * (2 * width) + width + column, inside, 0.0).to(tl.float32)
            d = tl.load(d_hidden + row * width + column, inside, 0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            activated = gate * sigmoid
            total += tl.sum(d * activated * up, 1)
            d *= weight
            d_gate = d * up * (sigmoid + activated * (1 - sigmoid))
            tl.store(d_product + row * (2 * width) + column, d_gate, inside)
            tl.store(d_product + row * (2 * width) + width + column, d * activated, inside)
        tl.store(d_weights + lines, total, lines < rows)

    @triton.jit
    def _combine_kernel(
        rows: Any,
        inverse: Any,
        weights: Any,
        out: Any,
        width: Any,
        K: tl.constexpr,
        WEIGHTED: tl.constexpr,
        BLOCK: tl.constexpr,
    ) -> None:
        token = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for j in tl.static_range(K):
            row = tl.load(inverse + token * K + j).to(tl.int64)
            value = tl.load(rows + row * width + column, column < width, 0.0).to(tl.float32)
            if WEIGHTED:
                value *= tl.load(weights + token * K + j).to(tl.float32)
            total += value
        tl.store(out + token * width + column, total, column < width)

    @triton.jit
    def _norm_rotary_kernel(
        x: Any,
        d_out: Any,
        weight: Any,
        cos: Any,
        sin: Any,
        out: Any,
        rows: Any,
        heads: Any,
        positions: Any,
        epsilon: Any,
        BACKWARD: tl.constexpr,
        TILE: tl.constexpr,
        HALF: tl.constexpr,
    ) -> None:
        """`rows` are heads of tokens; the tables' lines repeat after `positions` tokens."""
        row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
        column = tl.arange(0, HALF)[None, :]
        inside = (row < rows) & (column < HALF)
        low = row * (2 * HALF) + column
        table = (row // heads % positions) * (2 * HALF) + column
        x_low = tl.load(x + low, inside, 0.0).to(tl.float32)
        x_high = tl.load(x + low + HALF, inside, 0.0).to(tl.float32)
        weight_low = tl.load(weight + column).to(tl.float32)
        weight_high = tl.load(weight + HALF + column).to(tl.float32)
        cos_low = tl.load(cos + table, inside, 0.0).to(tl.float32)
        cos_high = tl.load(cos + table + HALF, inside, 0.0).to(tl.float32)
        sin_low = tl.load(sin + table, inside, 0.0).to(tl.float32)
        sin_high = tl.load(sin + table + HALF, inside, 0.0).to(tl.float32)
        mean = (tl.sum(x_low * x_low, 1) + tl.sum(x_high * x_high, 1)) / (2 * HALF)
        scale = (1 / tl.sqrt(mean + epsilon))[:, None]
        x_low *= scale
        x_high *= scale
        if BACKWARD:
            d_low = tl.load(d_out + low, inside, 0.0).to(tl.float32)
            d_high = tl.load(d_out + low + HALF, inside, 0.0).to(tl.float32)
            # through the rotation, then the weight, then the normalisation of x, whose unit vector x is by now
            n_low = (d_low * cos_low + d_high * sin_high) * weight_low
            n_high = (d_high * cos_high - d_low * sin_low) * weight_high
            along = ((tl.sum(n_low * x_low, 1) + tl.sum(n_high * x_high, 1)) / (2 * HALF))[:, None]
            y_low = (n_low - x_low * along) * scale
            y_high = (n_high - x_high * along) * scale
        else:
            x_low *= weight_low
            x_high *= weight_high
            y_low = x_low * cos_low - x_high * sin_low
            y_high = x_high * cos_high + x_low * sin_high
        tl.store(out + low, y_low, inside)
        tl.store(out + low + HALF, y_high, inside)

    @triton.jit
    def _decode_kernel(
        codes: Any,
        absmax: Any,
        nested_absmax: Any,
        offset: Any,
        nested_quant_map: Any,
        quant_map: Any,
        out: Any,
        size: Any,
        blocks: Any,
        nested_blocks: Any,
        NESTED: tl.constexpr,
        TILE: tl.constexpr,
        BYTES: tl.constexpr,
    ) -> None:
        part = tl.program_id(0).to(tl.int64)
        block = tl.program_id(1) * TILE + tl.arange(0, TILE)
        known = block < blocks
        if NESTED:
            scale = tl.load(nested_quant_map + tl.load(absmax + part * blocks + block, known, 0).to(tl.int32))
            scale *= tl.load(nested_absmax + part * nested_blocks + block // 256, known, 0.0)
            scale += tl.load(offset + part)
        else:
            scale = tl.load(absmax + part * blocks + block, known, 0.0)
        byte = block[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
        code = tl.load(codes + part * size + byte, byte < size, 0).to(tl.int32)
        first = tl.load(quant_map + (code >> 4)) * scale[:, None]
        second = tl.load(quant_map + (code & 15)) * scale[:, None]
        value = block[:, None] * (2 * BYTES) + tl.arange(0, 2 * BYTES)[None, :]
        tl.store(out + part * (2 * size) + value, tl.interleave(first, second), value < 2 * size)
