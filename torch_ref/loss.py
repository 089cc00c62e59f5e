"""Next-token cross-entropy that never holds the logits of all tokens at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torch_ref.derivatives import once_differentiable, traced, transformed

CHUNK = 1024
CHUNKED = "torch_ref_chunked_loss"  # the attribute of a model that chooses this loss for training


class _FrozenHeadLoss(torch.autograd.Function):
    """The summed loss for a head that is not trained: the forward pass also computes the gradient, chunk by chunk.

    The head's product is then computed once; checkpointing would compute it twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for rows, targets, out in zip(hidden.split(CHUNK), labels.split(CHUNK), gradient.split(CHUNK), strict=True):
            with torch.enable_grad():
                leaf = rows.detach().requires_grad_()
                loss = loss_of(leaf, targets)
                out.copy_(torch.autograd.grad(loss, leaf)[0])
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grads[0]).to(gradient.dtype), None, None


class LogitsNotComputed(AttributeError, ValueError):
    """The logits of a step with the chunked loss were read.

    Also an AttributeError, so that `hasattr` on the placeholder is false.
    """


class NoLogits:
    """Stands where logits would be after the chunked loss; every use of it says why there are none."""

    _REASON = (
        "logits: not computed, because get_peft_model, for_training or return_logits=False chose the chunked loss; "
        "pass return_logits=True, or call for_training(model, chunked_loss=False)"
    )

    def __repr__(self) -> str:
        """What the placeholder stands for."""
        return f"<{self._REASON}>"

    def __getattr__(self, name: str) -> Any:
        """Raises `LogitsNotComputed`."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise LogitsNotComputed(self._REASON)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise LogitsNotComputed(self._REASON)

    __getitem__ = __len__ = __iter__ = __array__ = __float__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __matmul__ = _refuse

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        """Raises `LogitsNotComputed`: a function of torch got the placeholder."""
        raise LogitsNotComputed(cls._REASON)


NO_LOGITS: Any = NoLogits()


def cross_entropy(
    hidden: Float[Tensor, "M D"],
    head: Callable[[Tensor], Tensor],
    labels: Int[Tensor, " M"],
    num_items: Tensor | int | None = None,
    ignore_index: int = -100,
) -> Float[Tensor, ""]:
    """Mean over labelled tokens (or sum / `num_items`) of -log softmax(head(hidden))[label], in nats, float32.

    The logits of `CHUNK` tokens exist at a time; a trained head computes them again in the backward pass. The result
    equals transformers' `ForCausalLMLoss`, which is NaN if no token has a label. `labels` must be shifted already.
    """

    def chunk_loss(rows: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(rows).float(), targets, ignore_index=ignore_index, reduction="sum")

    frozen = isinstance(head, nn.Module) and not any(parameter.requires_grad for parameter in head.parameters())
    if frozen and hidden.requires_grad and torch.is_grad_enabled() and not traced():
        total = _FrozenHeadLoss.apply(hidden, labels, chunk_loss)
    else:
        # torch.func cannot recompute; it keeps the logits of all chunks
        recomputed = chunk_loss if transformed() else functools.partial(checkpoint, chunk_loss, use_reentrant=False)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for rows, targets in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
            total = total + recomputed(rows, targets)
    if num_items is None:
        return total / (labels != ignore_index).sum()
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


def shifted_labels(labels: Int[Tensor, "B T"], ignore_index: int = -100) -> Int[Tensor, "B T"]:
    """labels[:, t + 1] at t; the last position of a sequence predicts nothing."""
    return F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
