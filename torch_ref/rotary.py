"""The norm of queries and keys and the rotary embedding in one pass over memory, with `torch_ref.kernels`."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from torch_ref import kernels
from torch_ref.derivatives import once_differentiable


class _NormRotate(torch.autograd.Function):
    """RMSNorm over each head, then the rotation; saves x and the tables for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.epsilon = epsilon
        return kernels.norm_rotary(x, weight, cos, sin, epsilon)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin = ctx.saved_tensors
        return kernels.norm_rotary_backward(grads[0], x, weight, cos, sin, ctx.epsilon), *[None] * 4


def unsupported(x: Tensor, weight: Tensor, cos: Tensor) -> str | None:
    """Why `norm_and_rotate` cannot run on x [..., H]; None if it can."""
    width = x.shape[-1]
    if weight.requires_grad:
        return "the norm's weight is trained, and the kernel computes no gradient of it"
    if width < 2 or width & (width - 1):
        return f"expected a head width that is a power of two, found {width}"
    if cos.shape[-1] != width:
        return f"expected a rotary embedding of all {width} dimensions of a head, found {cos.shape[-1]}"
    return kernels.unsupported_activations(x)


def norm_and_rotate(
    x: Float[Tensor, "B T heads H"],
    weight: Float[Tensor, " H"],
    cos: Float[Tensor, "tables T H"],
    sin: Float[Tensor, "tables T H"],
    epsilon: float,
) -> Float[Tensor, "B T heads H"]:
    """RMSNorm over each head, then the rotation of the pairs (x[h], x[h + H/2]); rounds once. `tables` is B or 1."""
    return _NormRotate.apply(x, weight, cos, sin, epsilon)
