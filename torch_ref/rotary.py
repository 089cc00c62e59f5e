"""Rotary position embedding in three passes over the activations, where transformers' formula makes eight or more."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class _Rotate(torch.autograd.Function):
    """A rotation; its backward pass is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(grads[0], *ctx.saved_tensors, -1), None, None


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
