"""The norm of queries and keys and the rotary embedding in one pass over memory, by `torch_ref.kernels`."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from torch_ref import kernels


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


def can_fuse(x: Tensor, weight: Tensor, cos: Tensor) -> bool:
    """Whether `norm_and_rotate` can run: where kernels can, under a frozen norm, with heads of a power of two."""
    width = x.shape[-1]
    return kernels.usable(x) and not weight.requires_grad and width & (width - 1) == 0 and cos.shape[-1] == width > 1


def norm_and_rotate(
    x: Float[Tensor, "B T heads H"],
    weight: Float[Tensor, " H"],
    cos: Float[Tensor, "rows T H"],
    sin: Float[Tensor, "rows T H"],
    epsilon: float,
) -> Float[Tensor, "B T heads H"]:
    """RMSNorm over each head, then the rotation of the pairs (x[h], x[h + H/2]), rounded once; `rows` is B or 1."""
    return _NormRotate.apply(x, weight, cos, sin, epsilon)
