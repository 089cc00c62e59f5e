"""Distances between the arrays of two runs, in float64 NumPy: relative errors, KL divergence, agreement, flips."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
_CHUNK = 32  # tokens at a time: a vocabulary of 151,936 in float64 is 39 MB


class LogitErrors(NamedTuple):
    """How far logits are from the expected ones; KL(expected || found) in nats per token, agreements as shares."""

    max_abs: float
    relative: float
    kl: NDArray[np.float64]
    top1: float
    top10: float


class Flip(NamedTuple):
    """A token whose experts differ from the reference's: `gained` replace `lost`, which the reference chose.

    `margin` is the reference's last chosen router logit minus the first one left out.
    """

    slot: int
    row: int
    token: int
    lost: tuple[int, ...]
    gained: tuple[int, ...]
    margin: float


def relative_error(found: Any, expected: Any) -> float:
    """|found - expected| / |expected| in L2, in double; 0 for two empty arrays."""
    expected = np.asarray(expected, np.float64)
    # not numpy.linalg.norm: its dot product waits for BLAS's threads
    error, norm = (float(np.square(x).sum()) for x in (np.asarray(found, np.float64) - expected, expected))
    return math.sqrt(error / norm) if norm else 0.0


def logit_errors(found: np.ndarray, expected: np.ndarray) -> LogitErrors:
    """Compares logits [tokens, V].

    `top10` is the share of the ten most probable expected tokens that are among the ten found.
    """
    ten = min(10, found.shape[-1])

    def part(rows: slice) -> tuple[float, float, float, NDArray[np.float64], int, float]:
        p, q = np.asarray(expected[rows], np.float64), np.asarray(found[rows], np.float64)
        difference = q - p
        kl = kl_divergence(p, q)
        first = int((p.argmax(-1) == q.argmax(-1)).sum())
        best_p, best_q = (np.argpartition(-x, ten - 1, axis=-1)[:, :ten] for x in (p, q))
        shared = (best_p[:, :, None] == best_q[:, None, :]).any(-1).sum() / ten
        return float(np.abs(difference).max()), float((difference**2).sum()), float((p**2).sum()), kl, first, shared

    parts = list(_over_chunks(part, len(expected)))
    largest, errors, norms, kl, first, shared = zip(*parts, strict=True)
    relative = float(np.sqrt(sum(errors) / sum(norms))) if sum(norms) else 0.0
    n = len(expected)
    return LogitErrors(max(largest), relative, np.concatenate(kl), sum(first) / n, float(sum(shared)) / n)


def kl_divergence(expected: NDArray[np.float64], found: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(softmax(expected) || softmax(found)) over the last axis, in nats."""
    p, q = (x - x.max(-1, keepdims=True) for x in (expected, found))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    # sum of p (log p - log q), plus sum(q) - sum(p), which is zero: so every term is at least zero, and no large ones
    # cancel
    return (np.exp(p) * (np.expm1(q - p) - (q - p))).sum(-1)


def margins(router_logits: np.ndarray, k: int) -> NDArray[np.float64]:
    """The k-th largest router logit [..., E] minus the next one; infinite if all are chosen."""
    logits = np.asarray(router_logits, np.float64)
    if k >= logits.shape[-1]:
        return np.full(logits.shape[:-1], np.inf)
    ordered = -np.sort(-logits, axis=-1)
    return ordered[..., k - 1] - ordered[..., k]


def differing(found: np.ndarray, expected: np.ndarray) -> NDArray[np.bool_]:
    """Boolean [...]: whether the chosen experts [..., k] differ as sets."""
    return (np.sort(found, -1) != np.sort(expected, -1)).any(-1)


def flips(found: np.ndarray, expected: np.ndarray, router_logits: np.ndarray) -> list[Flip]:
    """Every token whose experts [Ls, B, T, k] differ as sets, widest margin first; `router_logits` are the
    reference's."""
    margin = margins(router_logits, expected.shape[-1])
    out = []
    for slot, row, token in np.argwhere(differing(found, expected)):
        had, has = (set(x[slot, row, token].tolist()) for x in (expected, found))
        lost, gained = tuple(sorted(had - has)), tuple(sorted(has - had))
        out.append(Flip(int(slot), int(row), int(token), lost, gained, float(margin[slot, row, token])))
    return sorted(out, key=lambda flip: -flip.margin)


def gap_errors(found: np.ndarray, expected: np.ndarray) -> NDArray[np.float64]:
    """[...]: the largest error of the difference of any two of a token's router logits [..., E].

    A choice of experts can only flip if its margin is at most this.
    """
    error = np.asarray(found, np.float64) - np.asarray(expected, np.float64)
    return error.max(-1) - error.min(-1)


def dense_weights(selected: np.ndarray, weights: np.ndarray, num_experts: int) -> NDArray[np.float64]:
    """Routing weights [..., k] of the experts `selected` spread over all experts [..., E], zero elsewhere."""
    out = np.zeros((*selected.shape[:-1], num_experts))
    np.put_along_axis(out, selected.astype(np.int64), weights.astype(np.float64), axis=-1)
    return out


def _over_chunks(function: Callable[[slice], T], length: int) -> Iterator[T]:
    slices = [slice(start, start + _CHUNK) for start in range(0, length, _CHUNK)]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        yield from pool.map(function, slices)
