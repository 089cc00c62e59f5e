"""Backward passes that have no derivative of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vjp, jvp, ...) is at work: it takes none of the functions below."""
    return torch._C._are_functorch_transforms_active()


def traced() -> bool:
    """Whether torch.compile, torch.export or torch.func takes the computation apart and differentiates its parts."""
    return torch.compiler.is_compiling() or transformed()


def exported() -> bool:
    """Whether torch.export traces the computation.

    torch.compile is asked first: in code that torch 2.11 compiles, is_exporting() is true.
    """
    return not torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting()


def without_memory(x: torch.Tensor) -> bool:
    """Whether `x` has no memory that a kernel could read, as in torch.export and FakeTensorMode.

    torch.compile knows kernels and keeps them.
    """
    return exported() or (not torch.compiler.is_dynamo_compiling() and is_fake(x))


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that refuses `create_graph=True`, under which its result would count as a constant.

    torch's decorator of this name refuses only if the incoming gradient has a gradient itself.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "create_graph: torch_ref has no second derivative here; use experts_implementation='loop', all logits "
                "(return_logits=True) and, on a GPU, TORCH_REF_KERNELS=0"
            )
        return backward(ctx, *grads)

    return checked
