"""Compares two captures of one text token by token, and the domains of one capture with each other.

Only the same token in the same context is compared: captures of different tokenizers or texts are refused. Intervals
are 95 % bootstrap intervals over blocks of up to 256 neighbouring tokens (`metrics.bootstrap`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from captures import Capture, Chunk
from jaxmoe.errors import UserError
from jaxmoe.routing import metrics
from jaxmoe.routing.metrics import FlipsByMargin, Interval

CHUNK = 8192


class LayerDrift(NamedTuple):
    """How one layer's routing in B differs from that in A.

    Attributes:
        layer: index in the model.
        flip_rate: share of tokens whose set of experts differs.
        overlap: mean |A ∩ B| / k (router saturation, if A is an earlier checkpoint of B).
        weight_distance: mean sum_e |w_A - w_B| over the experts' weights, 0 to 2.
        logit_rms: root mean square difference of the router logits that both kept, after each token's mean is removed
            (softmax ignores it).
        divergence: mean Jensen-Shannon divergence of the routers, nats; a lower bound if not all logits were kept.
        load_divergence: Jensen-Shannon divergence of the experts' loads, nats.
        load_correlation: rank correlation of the experts' loads.
    """

    layer: int
    flip_rate: Interval
    overlap: Interval
    weight_distance: float
    logit_rms: float
    divergence: Interval
    load_divergence: float
    load_correlation: float


class Flip(NamedTuple):
    """A token with different experts: its place, the layer, its margin in A (probability), and both sets of experts."""

    token: int
    layer: int
    margin: float
    experts_a: list[int]
    experts_b: list[int]


@dataclass(frozen=True)
class Comparison:
    """How capture B differs from capture A.

    After its first flip a token has another hidden state, so later flips say little about rounding. `by_margin` counts
    the flips of all layers; `first_by_margin` only counts tokens that have not flipped in an earlier layer, and
    `clean_flips` counts these first flips per layer, with their margins in `first_margins`. `widest` lists the first
    flips with the widest margins.
    """

    a: Capture
    b: Capture
    layers: tuple[LayerDrift, ...]
    tokens: int
    flipped_tokens: Interval
    by_margin: FlipsByMargin
    first_by_margin: FlipsByMargin
    clean_flips: Integer[np.ndarray, " Ls"]
    load_a: Integer[np.ndarray, "Ls E"]
    load_b: Integer[np.ndarray, "Ls E"]
    loss_a: float | None
    loss_change: Interval | None
    widest: tuple[Flip, ...]
    first_margins: Float[np.ndarray, " flips"]

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """The table of drift: (header, one line per layer)."""
        header: list[str] = [
            *"layer flip_rate flip_low flip_high overlap overlap_low overlap_high weight_distance logit_rms".split(),
            *"divergence divergence_low divergence_high load_divergence load_correlation first_flips".split(),
        ]
        body = [
            [d.layer, *d.flip_rate, *d.overlap, d.weight_distance, d.logit_rms, *d.divergence]
            + [d.load_divergence, d.load_correlation, int(first)]
            for d, first in zip(self.layers, self.clean_flips, strict=True)
        ]
        return header, body

    def pooled(self, name: str) -> float:
        """The mean over all layers of a field of `LayerDrift`."""
        values = [getattr(layer, name) for layer in self.layers]
        return float(np.mean([value.value if isinstance(value, Interval) else value for value in values]))


def check_comparable(a: Capture, b: Capture) -> None:
    """Raises UserError unless both captures hold the same tokens in the same contexts, over the same experts."""
    pair = f"{a.folder} and {b.folder}"
    if a.text["tokenizer"] != b.text["tokenizer"]:
        raise UserError(f"{pair}: expected captures made with one tokenizer, found two tokenizers")
    if a.text["digest"] != b.text["digest"]:
        counts = (
            f"{a.tokens} tokens and {b.tokens}, contexts of up to {a.text['seq_length']} and {b.text['seq_length']}"
        )
        raise UserError(
            f"{pair}: expected captures of one text, cut into the same contexts; found two texts ({counts})"
        )
    for name in ("layers", "num_experts", "num_experts_per_tok"):
        x, y = getattr(a.model, name), getattr(b.model, name)
        if x != y:
            raise UserError(f"{pair}: {name}: expected the same in both, found {x} and {y}")


def compare(a: Capture, b: Capture, *, widest: int = 20) -> Comparison:
    """Compares two captures token by token.

    Streams through both once; holds a few numbers per layer and block, and one margin per flip. `widest` is how many
    flips are listed.

    Raises:
        UserError: captures that cannot be aligned token by token.
    """
    check_comparable(a, b)
    for one in (a, b):
        one.check_logits()
    layers, E = len(a.model.layers), a.model.num_experts
    text = a.read_text()
    blocks = metrics.blocks(text.document, text.position)
    sums = np.zeros((int(blocks[-1]) + 1, layers, 4))  # flips, overlap, divergence, tokens
    any_flip = np.zeros((len(sums), 2))
    loss = np.zeros((len(sums), 3))  # of A, change, tokens
    distance, squares = np.zeros(layers), np.zeros((layers, 2))
    load = np.zeros((2, layers, E), np.int64)
    binned = np.zeros((2, 2, len(metrics.MARGIN_EDGES) - 1), np.int64)  # all and first; tokens and flips
    clean = np.zeros(layers, np.int64)
    listed: list[Flip] = []
    first_margins: list[np.ndarray] = []
    start = 0
    for x, y in zip(a.chunks(CHUNK), b.chunks(CHUNK), strict=True):
        block = blocks[start : start + len(x)]
        before = np.zeros(len(x), bool)
        for layer in range(layers):
            ours, theirs = x.experts[layer], y.experts[layer]
            flipped = metrics.flips(ours, theirs)
            columns = [flipped, metrics.set_overlap(ours, theirs), _divergence(x, y, layer), np.ones(len(x))]
            np.add.at(sums[:, layer], block, np.stack(columns, axis=1))
            distance[layer] += _weight_distance(ours, x.weights[layer], theirs, y.weights[layer]).sum()
            squares[layer] += _logit_squares(x, y, layer)
            load[0, layer] += metrics.expert_load(ours, E)
            load[1, layer] += metrics.expert_load(theirs, E)
            margin = x.margin[layer]
            first = flipped & ~before
            for kind, (who, flips) in enumerate(((slice(None), flipped), (~before, first[~before]))):
                table = metrics.flip_rate_by_margin(flips, margin[who])
                binned[kind] += np.stack([table.tokens, table.flips])
            clean[layer] += first.sum()
            first_margins.append(margin[first].astype(np.float32))
            listed += [
                Flip(start + int(i), a.model.layers[layer], float(margin[i]), ours[i].tolist(), theirs[i].tolist())
                for i in np.flatnonzero(first)[np.argsort(-margin[first])[:widest]]
            ]
            before |= flipped
        listed = sorted(listed, key=lambda flip: -flip.margin)[:widest]
        np.add.at(any_flip, block, np.stack([before, np.ones(len(x))], axis=1))
        if x.loss is not None and y.loss is not None:
            known = ~np.isnan(x.loss) & ~np.isnan(y.loss)
            columns = [x.loss[known], (y.loss - x.loss)[known], np.ones(known.sum())]
            np.add.at(loss, block[known], np.stack(columns, axis=1).astype(np.float64))
        start += len(x)
    ratio = lambda s: s[0] / s[1]
    rated = lambda layer, column: metrics.bootstrap(sums[:, layer, [column, 3]], ratio)
    drift = tuple(
        LayerDrift(
            a.model.layers[layer],
            rated(layer, 0),
            rated(layer, 1),
            float(distance[layer] / start),
            float(np.sqrt(squares[layer, 0] / max(squares[layer, 1], 1))),
            rated(layer, 2),
            float(metrics.jensen_shannon(*(load[side, layer] / load[side, layer].sum() for side in (0, 1)))),
            metrics.rank_correlation(load[0, layer], load[1, layer]),
        )
        for layer in range(layers)
    )
    measured = loss[:, 2].sum() > 0
    every, firsts = (FlipsByMargin(metrics.MARGIN_EDGES, tokens, flips) for tokens, flips in binned)
    return Comparison(
        a,
        b,
        drift,
        start,
        metrics.bootstrap(any_flip, ratio),
        every,
        firsts,
        clean,
        load[0],
        load[1],
        float(loss[:, 0].sum() / loss[:, 2].sum()) if measured else None,
        metrics.bootstrap(loss[loss[:, 2] > 0][:, 1:], ratio) if measured else None,
        tuple(listed),
        np.concatenate(first_margins),
    )


def _divergence(x: Chunk, y: Chunk, layer: int) -> Float[np.ndarray, " n"]:
    return metrics.coarse_jensen_shannon(
        x.top_experts[layer], x.probabilities[layer], y.top_experts[layer], y.probabilities[layer]
    )


def _weight_distance(ours: np.ndarray, u: np.ndarray, theirs: np.ndarray, v: np.ndarray) -> Float[np.ndarray, " n"]:
    """Per token sum_e |u_e - v_e| of two sparse weight vectors."""
    match = ours[:, :, None] == theirs[:, None, :]
    aligned = (match * v[:, None, :]).sum(axis=2)
    unmatched = np.where(match.any(axis=1), 0, v).sum(axis=1)
    return np.abs(u - aligned).sum(axis=1) + unmatched


def _logit_squares(x: Chunk, y: Chunk, layer: int) -> tuple[float, int]:
    """(sum of squared centred logit differences, how many) over the experts that both captures kept."""
    match = x.top_experts[layer][:, :, None] == y.top_experts[layer][:, None, :]
    shared = match.any(axis=2)
    theirs = np.take_along_axis(y.top_logits[layer], match.argmax(axis=2), axis=1)
    finite = shared & np.isfinite(x.top_logits[layer]) & np.isfinite(theirs)
    ours = np.where(finite, x.top_logits[layer], 0)
    difference = ours - np.where(finite, theirs, 0)
    number = finite.sum(axis=1, keepdims=True)
    centred = np.where(finite, difference - difference.sum(axis=1, keepdims=True) / np.maximum(number, 1), 0)
    return float((centred.astype(np.float64) ** 2).sum()), int(number.sum())


class DomainDrift(NamedTuple):
    """How two domains of one capture differ in one layer.

    Attributes:
        layer: index in the model.
        first: name of one domain.
        second: name of the other.
        divergence: Jensen-Shannon divergence of their expert loads, nats.
        floor: the noise: the larger divergence between two random halves of one of the domains.
        correlation: rank correlation of the loads.
        expert: the expert whose share of tokens differs most.
        share_first: its share of the first domain's tokens.
        share_second: its share of the second domain's.
    """

    layer: int
    first: str
    second: str
    divergence: Interval
    floor: float
    correlation: float
    expert: int
    share_first: float
    share_second: float


def compare_domains(capture: Capture, *, seed: int = 0) -> list[DomainDrift]:
    """Compares every pair of domains in every layer; `seed` decides the random halves.

    Raises:
        UserError: a capture with fewer than two domains.
    """
    names = capture.text["domains"]
    if len(names) < 2:
        raise UserError(
            f"{capture.folder}: expected a capture with at least two domains, or a second capture; "
            f"found {', '.join(names)}"
        )
    layers, E, k = len(capture.model.layers), capture.model.num_experts, capture.model.num_experts_per_tok
    text = capture.read_text()
    # A block lies within one document, so it belongs to one domain.
    blocks = metrics.blocks(text.document, text.position)
    domain = text.domain[np.unique(blocks, return_index=True)[1]]
    load = np.zeros((len(domain), layers, E), np.int32)
    start = 0
    for chunk in capture.chunks(CHUNK):
        block = blocks[start : start + len(chunk)]
        for layer in range(layers):
            np.add.at(load[:, layer], (block[:, None], chunk.experts[layer]), 1)
        start += len(chunk)
    half = np.random.default_rng(seed).random(len(domain)) < 0.5
    divergence = lambda s: float(metrics.jensen_shannon(*(s / np.maximum(s.sum(axis=1, keepdims=True), 1))))
    found = []
    for i, j in combinations(range(len(names)), 2):
        for layer in range(layers):
            sides = [load[domain == side, layer] for side in (i, j)]
            shares = [side.sum(axis=0) * k / max(side.sum(), 1) for side in sides]
            halves = [
                divergence(np.stack([load[(domain == d) & part, layer].sum(axis=0) for part in (half, ~half)]))
                for d in (i, j)
            ]
            expert = int(np.argmax(np.abs(shares[0] - shares[1])))
            split = np.zeros((sum(map(len, sides)), 2, E), np.int32)
            split[: len(sides[0]), 0], split[len(sides[0]) :, 1] = sides
            found.append(
                DomainDrift(
                    capture.model.layers[layer],
                    names[i],
                    names[j],
                    metrics.bootstrap(split, divergence, draws=200),
                    max(halves),
                    metrics.rank_correlation(shares[0], shares[1]),
                    expert,
                    float(shares[0][expert]),
                    float(shares[1][expert]),
                )
            )
    return found
