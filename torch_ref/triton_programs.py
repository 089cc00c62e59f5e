"""The Triton programs of `torch_ref.kernels`, which documents what each computes. CUDA builds of torch contain Triton.

Triton reads annotations as its own types, so pointers and sizes have none.
"""
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def swiglu(product, out, rows, width: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    for start in tl.static_range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (column < width)
        gate = tl.load(product + row * (2 * width) + column, inside, 0.0).to(tl.float32)
        up = tl.load(product + row * (2 * width) + width + column, inside, 0.0).to(tl.float32)
        tl.store(out + row * width + column, gate * tl.sigmoid(gate) * up, inside)


@triton.jit
def swiglu_backward(
    d_hidden,
    product,
    weights,
    d_product,
    d_weights,
    rows,
    width: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    flat = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row = flat[:, None]
    weight = tl.load(weights + flat, flat < rows, 0.0).to(tl.float32)[:, None]
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
    tl.store(d_weights + flat, total, flat < rows)


@triton.jit
def combine(
    rows,
    inverse,
    weights,
    out,
    width,
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
def norm_rotary(
    x,
    d_out,
    weight,
    cos,
    sin,
    out,
    rows,
    heads,
    positions,
    epsilon,
    BACKWARD: tl.constexpr,
    TILE: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """`rows` is the number of tokens times heads; the entries of the tables repeat after `positions` tokens."""
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
        # through the rotation, the weight and the normalisation; x is already divided by its root mean square
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
def decode(
    codes,
    absmax,
    nested_absmax,
    offset,
    nested_quant_map,
    quant_map,
    out,
    size,
    blocks,
    nested_blocks,
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
