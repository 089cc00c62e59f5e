"""CUDA kernels for the operations around the matrix products: one pass over memory where eager torch makes many.

On an H200 they shorten a LoRA step at Qwen3-30B-A3B's size from 745 to 570 ms. TORCH_REF_KERNELS=0 switches them off.
The caller of each kernel also has the same computation in plain torch; the tests compare the two. A kernel computes in
float32 and rounds its result once.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from torch_ref.derivatives import transformed, without_memory

programs: Any
try:
    from torch_ref import triton_programs as programs
except ImportError:  # CPU builds of torch do not contain Triton
    programs = None

SWITCHED_ON = os.environ.get("TORCH_REF_KERNELS") != "0"
_TILE = 2048  # elements of each operand that one program holds


def unsupported(x: Tensor) -> str | None:
    """Why no kernel can run on the device of `x`; None if kernels can."""
    if not SWITCHED_ON:
        return "TORCH_REF_KERNELS=0 switches the kernels off"
    if programs is None:
        return "this build of torch does not contain Triton"
    if without_memory(x):
        return "the kernels read memory, which tensors have neither in torch.export nor in FakeTensorMode"
    return None if x.is_cuda else f"the kernels need CUDA, found {x.device.type}"


def unsupported_activations(x: Tensor) -> str | None:
    """Why no kernel can process activations like `x`; None if kernels can."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"expected bfloat16, float16 or float32, found {x.dtype}"
    if torch.is_autocast_enabled("cuda"):
        return "the kernels do not follow autocast"
    if transformed():
        return "torch.func cannot transform the kernels"
    return unsupported(x)


def swiglu(product: Float[Tensor, "R F2"]) -> Float[Tensor, "R F"]:
    """silu(gate) * up, from products that hold gate and up side by side."""
    rows, width = product.shape[0], product.shape[1] // 2
    out = product.new_empty(rows, width)
    block, tile = _tile(width)
    if rows:
        programs.swiglu[(_cdiv(rows, tile),)](product, out, rows, width, tile, block)
    return out


def swiglu_backward(
    d_hidden: Float[Tensor, "R F"], product: Float[Tensor, "R F2"], weights: Float[Tensor, " R"]
) -> tuple[Float[Tensor, "R F2"], Float[Tensor, " R"]]:
    """Gradients of weights[r] * swiglu(product)[r], given its gradient `d_hidden`: of the product, of the weights."""
    rows, width = d_hidden.shape
    d_product, d_weights = torch.empty_like(product), torch.empty_like(weights)
    block, tile = _tile(width)
    if rows:
        programs.swiglu_backward[(_cdiv(rows, tile),)](
            d_hidden, product, weights, d_product, d_weights, rows, width, tile, block
        )
    return d_product, d_weights


def combine(
    rows: Float[Tensor, "R D"], inverse: Int[Tensor, " R"], k: int, weights: Float[Tensor, "M k"] | None = None
) -> Float[Tensor, "M D"]:
    """The sum of each token's k rows, which are at inverse[token * k + j], times `weights` if given."""
    tokens, width = inverse.shape[0] // k, rows.shape[1]
    out = rows.new_empty(tokens, width)
    block = min(1024, _next_power_of_2(width))
    if tokens:
        programs.combine[(tokens, _cdiv(width, block))](
            rows, inverse, rows if weights is None else weights.contiguous(), out, width, k, weights is not None, block
        )
    return out


def norm_rotary(
    x: Float[Tensor, "B T heads H"], weight: Float[Tensor, " H"], cos: Tensor, sin: Tensor, epsilon: float
) -> Float[Tensor, "B T heads H"]:
    """RMSNorm over each head, then the rotary embedding.

    `cos` and `sin` are [B or 1, T, H]; H is a power of two.
    """
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
    """The gradient of `norm_rotary` with respect to x, given the gradient `d_out` of its result."""
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
        programs.norm_rotary[(_cdiv(rows, tile),)](
            x,
            x if d_out is None else d_out,
            weight,
            cos.contiguous(),
            sin.contiguous(),
            out,
            rows,
            heads,
            cos.shape[0] * T,
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
        codes: the bytes of each part; every part starts a new block of `blocksize` values.
        absmax: the maxima of the blocks [parts, blocks]: float32, or 8-bit codes if the next three arguments are given.
            A maximum is then nested_quant_map[absmax] * nested_absmax[block // 256] + offset, where the product and the
            sum are both rounded, as bitsandbytes does it.
        nested_absmax: float32 [parts, ceil(blocks / 256)].
        offset: float32 [parts].
        nested_quant_map: float32 [256].
        quant_map: the values of the codes.
        blocksize: how many values share a maximum; a power of two.
        dtype: dtype of the result.
    """
    parts, size = codes.shape
    blocks = absmax.shape[1]
    out = torch.empty(parts, 2 * size, dtype=dtype, device=codes.device)
    tile = max(1, _TILE // blocksize)
    nested = nested_absmax is not None
    absent = quant_map
    programs.decode[(parts, _cdiv(blocks, tile))](
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
    """How many columns a program holds at a time, and how many rows."""
    block = min(256, _next_power_of_2(width))
    return block, max(1, _TILE // block)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
