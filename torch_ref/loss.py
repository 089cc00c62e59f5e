"""Next-token cross-entropy that never holds the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 1024


def cross_entropy(
    hidden: Float[Tensor, "M D"],
    head: Callable[[Tensor], Tensor],
    labels: Int[Tensor, " M"],
    num_items: Tensor | int | None = None,
    ignore_index: int = -100,
) -> Float[Tensor, ""]:
    """Mean over labelled tokens (or sum / `num_items`) of -log softmax(head(hidden))[label], in nats, float32.

    The logits of `CHUNK` tokens exist at a time, in the forward pass and again in the backward pass. The result is that
    of transformers' `ForCausalLMLoss`: not a number where no token is labelled. `labels` are shifted already.
    """

    def chunk_loss(rows: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(rows).float(), targets, ignore_index=ignore_index, reduction="sum")

    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for rows, targets in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
        total = total + checkpoint(chunk_loss, rows, targets, use_reentrant=False)
    if num_items is None:
        return total / (labels != ignore_index).sum()
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


def shifted_labels(labels: Int[Tensor, "B T"], ignore_index: int = -100) -> Int[Tensor, "B T"]:
    """labels[:, t + 1] at t; the last position of a row predicts nothing."""
    return F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
