"""Rotary position embedding in three passes over the activations, where transformers' formula makes eight or more.

On CUDA the norm of queries and keys goes into the same single pass.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from torch_ref import kernels


class _Rotate(torch.autograd.Function):
    """A rotation; its backward pass is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    out = x * cos
    low, high = out.chunk(2, -1)
    x_low, x_high = x.chunk(2, -1)
    sin_low, sin_high = sin.chunk(2, -1)
    low.addcmul_(x_high, sin_low, value=-direction)
    high.addcmul_(x_low, sin_high, value=direction)
    return out


def apply_rotary(
    x: Float[Tensor, "B T heads H"], cos: Float[Tensor, "rows T H"], sin: Float[Tensor, "rows T H"]
) -> Float[Tensor, "B T heads H"]:
    """Rotates the pairs (x[h], x[h + H/2]) of every head, in x's dtype (Su et al. 2021); `rows` is B or 1.

    In 16 bit the sum of the two products is rounded twice; transformers rounds both products first, then their sum.
    """
    return _Rotate.apply(x, cos.unsqueeze(2).to(x.dtype), sin.unsqueeze(2).to(x.dtype))


class _NormRotate(torch.autograd.Function):
    """RMSNorm over each head, then the rotation; keeps x and the tables."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.epsilon = epsilon
        return kernels.norm_rotary(x, weight, cos, sin, epsilon)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin = ctx.saved_tensors
        return kernels.norm_rotary_backward(grads[0], x, weight, cos, sin, ctx.epsilon), *[None] * 4


def can_fuse_norm(x: Tensor, weight: Tensor, cos: Tensor) -> bool:
    """Whether `norm_and_rotate` can run: on CUDA, under a frozen norm, with heads whose width is a power of two."""
    width = x.shape[-1]
    return kernels.usable(x) and not weight.requires_grad and width & (width - 1) == 0 and cos.shape[-1] == width > 1


def norm_and_rotate(
    x: Float[Tensor, "B T heads H"],
    weight: Float[Tensor, " H"],
    cos: Float[Tensor, "rows T H"],
    sin: Float[Tensor, "rows T H"],
    epsilon: float,
) -> Float[Tensor, "B T heads H"]:
    """`apply_rotary` of F.rms_norm(x), rounded once."""
    return _NormRotate.apply(x, weight, cos, sin, epsilon)
