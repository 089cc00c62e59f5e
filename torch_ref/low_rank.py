"""An adapter's matrices in 16 bits without rounding them: each as two terms, its value and what rounding left.

An adapter that is rounded to bfloat16 is another adapter: on a 24-layer model its gradients were 1.7 times as far from
float64 as PEFT's, which raises the activations to the adapter's float32 instead (docs/log.md, 2026-11-25).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def two_terms(weight: Tensor, dtype: torch.dtype, rank_dim: int) -> Tensor:
    """A float32 matrix as `dtype`, the second term behind the first along its rank; as it is where nothing is lost.

    The gradient is that of the first term.
    """
    rounded = weight.to(dtype)
    if dtype == weight.dtype:
        return rounded
    rest = weight.detach() - rounded.detach().to(weight.dtype)
    return torch.cat([rounded, rest.to(dtype)], rank_dim)


def fold(product: Tensor, rank: int) -> Tensor:
    """A product [..., width] with a matrix of one or two terms, then padding: [..., rank], the terms' sum."""
    first = product[..., :rank]
    return first if product.shape[-1] < 2 * rank else first + product[..., rank : 2 * rank]


def unfold(low: Tensor, width: int) -> Tensor:
    """Low-rank rows [..., rank] for a product with such a matrix: [..., width], once a term, then zeros."""
    rank = low.shape[-1]
    terms = low if width < 2 * rank else torch.cat([low, low], -1)
    return F.pad(terms, (0, width - terms.shape[-1]))
