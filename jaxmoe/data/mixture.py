"""Several sources with weights: what each epoch holds of each source, and in which order a stream takes from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Mixture:
    """Which documents each epoch holds, of sources whose weights are their shares.

    An epoch holds as many documents as all sources have together. Each source gives its share of them. It is gone
    through in an order that depends on the seed, again and again, and each epoch goes on where the one before it ended.
    A small source with a large weight is repeated, and a large one with a small weight is spread over several epochs.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """`sizes` are the numbers of documents of the sources, which lie one after the other."""
        self._sizes, self._seed = sizes, seed
        self._counts = apportioned(sum(sizes), weights)

    def epoch(self, epoch: int) -> list[int]:
        """Indices of the documents of an epoch, from 0 on; a document may occur several times."""
        members: list[int] = []
        start = 0
        for source, (size, count) in enumerate(zip(self._sizes, self._counts, strict=True)):
            members += [start + i for i in self._taken(source, size, epoch * count, count)]
            start += size
        return members

    def _taken(self, source: int, size: int, first: int, count: int) -> list[int]:
        """Documents number `first` to `first + count` of the endless walk through a source."""
        taken: list[int] = []
        while count:
            walk, at = divmod(first, size)
            order = np.random.default_rng((self._seed, source, walk)).permutation(size)[at : at + count]
            taken += order.tolist()
            first, count = first + len(order), count - len(order)
        return taken


def apportioned(total: int, weights: Sequence[float]) -> list[int]:
    """`total` divided in proportion to `weights`: whole numbers of at least 1, by largest remainders."""
    shares = np.asarray(weights, np.float64) / np.max(weights)  # their sum is then finite, too
    exact = total * shares / shares.sum()
    counts = np.floor(exact).astype(np.int64)
    for source in np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]:
        counts[source] += 1
    return np.maximum(counts, 1).tolist()


def next_source(taken: Sequence[int], weights: Sequence[float]) -> int:
    """The source that a stream takes its next record from, if it has `taken` so many of each: the one that is furthest
    behind its share."""
    share = (sum(taken) + 1) / sum(weights)
    return min(range(len(weights)), key=lambda source: (taken[source] - share * weights[source], source))
