"""Counts from one pass over a capture; all figures of one capture follow from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer

from captures import Capture
from jaxmoe.errors import UserError
from jaxmoe.routing import metrics

CHUNK = 8192
MAX_BYTES = 4 * 2**30  # of the tables over pairs of experts; 94 layers of 512 experts need a tenth
# Experts are counted for this many token ids, the most frequent ones: a table for all would be [V, Ls, E].
FREQUENT = 256


@dataclass(frozen=True)
class Summary:
    """Counts over the n tokens of a capture; `jaxmoe.routing.metrics` forms ratios from them."""

    capture: Capture
    tokens: int
    load: Integer[np.ndarray, "Ls E"]
    domain_load: Integer[np.ndarray, "domains Ls E"]
    domain_tokens: Integer[np.ndarray, " domains"]
    role_load: Integer[np.ndarray, "roles Ls E"]
    role_tokens: Integer[np.ndarray, " roles"]
    position_load: Integer[np.ndarray, "places Ls E"]
    position_edges: Integer[np.ndarray, " edges"]
    coactivation: Integer[np.ndarray, "Ls E E"]
    transition: Integer[np.ndarray, "Ls-1 E E"]
    entropy: Float[np.ndarray, " Ls"]
    margin_histogram: Integer[np.ndarray, "Ls bins"]
    probability_sums: Float[np.ndarray, "Ls E"]
    locality: tuple[metrics.Locality, ...]
    input_tokens: Integer[np.ndarray, " x"]
    input_load: Integer[np.ndarray, "x Ls E"]
    input_occurrences: Integer[np.ndarray, " x"]
    predicted_tokens: Integer[np.ndarray, " y"]
    predicted_load: Integer[np.ndarray, "y Ls E"]
    predicted_occurrences: Integer[np.ndarray, " y"]

    @property
    def load_balancing_loss(self) -> float:
        """The load-balancing loss, pooled over all layers and tokens; even routing gives k."""
        return metrics.load_balancing_loss(self.load, self.probability_sums, self.tokens)

    def vocabulary(self, layer: int, predicted: bool = False) -> metrics.Vocabulary:
        """Vocabulary specialisation of a layer over the frequent tokens; `layer` counts MoE layers only."""
        if predicted:
            tokens, load, times = self.predicted_tokens, self.predicted_load, self.predicted_occurrences
        else:
            tokens, load, times = self.input_tokens, self.input_load, self.input_occurrences
        return metrics.Vocabulary(tokens, times, load[:, layer] / np.maximum(times, 1)[:, None])

    def balance(self) -> dict[str, np.ndarray]:
        """Per layer: measures of how even the load is, and the mean normalised routing entropy of a token."""
        return {
            "load_cv": np.asarray(metrics.load_cv(self.load)),
            "maximal_violation": np.asarray(metrics.maximal_violation(self.load)),
            "load_entropy": np.asarray(metrics.load_entropy(self.load)),
            "effective_experts": np.asarray(metrics.effective_experts(self.load)),
            "routing_entropy": np.asarray(metrics.routing_entropy(self.entropy, self.load.shape[1])),
        }


def summarise(capture: Capture) -> Summary:
    """Counts what the figures need.

    Streams through the capture (twice if it holds predictions); needs about 16 E^2 bytes per layer.

    Raises:
        UserError: the capture has no router logits, or more experts than fit into memory in pairs.
    """
    capture.check_logits()
    layers, E = len(capture.model.layers), capture.model.num_experts
    if (needed := 16 * layers * E * E) > MAX_BYTES:
        raise UserError(
            f"{capture.folder}: expected pairs of experts that fit into {MAX_BYTES >> 30} GiB, found {E:,} experts in "
            f"{layers} layers, which need {needed >> 30:,} GiB"
        )
    text = capture.read_text()
    domains, roles = len(capture.text["domains"]), len(capture.text["roles"])
    edges = _position_edges(int(text.position.max()) + 1)
    load = np.zeros((layers, E), np.int64)
    domain_load, role_load = np.zeros((domains, layers, E), np.int64), np.zeros((roles, layers, E), np.int64)
    position_load = np.zeros((len(edges) - 1, layers, E), np.int64)
    pairs, steps = np.zeros((layers, E, E), np.int64), np.zeros((layers - 1, E, E), np.int64)
    entropy, histogram = np.zeros(layers), np.zeros((layers, len(metrics.MARGIN_EDGES) - 1), np.int64)
    repeats: list[list[metrics.Locality]] = [[] for _ in range(layers)]
    inputs = _frequent(text.token)
    predicted = np.zeros(0, np.int64)
    if capture.predictions:
        predicted = _frequent(np.concatenate([_predictions(chunk) for chunk in capture.chunks(layers=slice(0, 1))]))
    vocabulary = [np.zeros((len(tokens), layers, E), np.int64) for tokens in (inputs, predicted)]
    occurrences = [np.zeros(len(tokens), np.int64) for tokens in (inputs, predicted)]
    for chunk in capture.chunks(CHUNK):
        follows = chunk.text.position > 0
        follows[0] = False  # the token before it is in another chunk
        places = np.digitize(chunk.text.position, edges[1:-1])
        seen = []
        for number, (tokens, wanted) in enumerate(((chunk.text.token, inputs), (chunk.predicted, predicted))):
            if tokens is None or not len(wanted):
                continue
            at = np.minimum(np.searchsorted(wanted, tokens), len(wanted) - 1)
            kept = wanted[at] == tokens
            occurrences[number] += np.bincount(at[kept], minlength=len(wanted))
            seen.append((number, at[kept], kept))
        for layer, experts in enumerate(chunk.experts):
            load[layer] += metrics.expert_load(experts, E)
            domain_load[:, layer] += metrics.pair_counts(chunk.text.domain, experts, domains, E)
            role_load[:, layer] += metrics.pair_counts(chunk.text.role, experts, roles, E)
            position_load[:, layer] += metrics.pair_counts(places, experts, len(edges) - 1, E)
            pairs[layer] += metrics.coactivation_counts(experts, E)
            if layer:
                steps[layer - 1] += metrics.transition_counts(chunk.experts[layer - 1], experts, E)
            entropy[layer] += chunk.entropy[layer].sum(dtype=np.float64)
            histogram[layer] += np.histogram(chunk.margin[layer], metrics.MARGIN_EDGES)[0]
            repeats[layer].append(metrics.consecutive_locality(experts, follows, E))
            for number, at, kept in seen:
                vocabulary[number][:, layer] += metrics.pair_counts(at, experts[kept], len(occurrences[number]), E)
    return Summary(
        capture,
        capture.tokens,
        load,
        domain_load,
        np.bincount(text.domain, minlength=domains),
        role_load,
        np.bincount(text.role, minlength=roles),
        position_load,
        edges,
        pairs,
        steps,
        entropy / capture.tokens,
        histogram,
        capture.probability_sums(),
        tuple(map(_pool, repeats)),
        inputs,
        vocabulary[0],
        occurrences[0],
        predicted,
        vocabulary[1],
        occurrences[1],
    )


def _predictions(chunk) -> np.ndarray:
    assert chunk.predicted is not None
    return chunk.predicted


def _frequent(tokens: np.ndarray) -> np.ndarray:
    """The `FREQUENT` most frequent token ids, sorted by id."""
    ids, times = np.unique(tokens, return_counts=True)
    return np.sort(ids[np.argsort(-times, kind="stable")[:FREQUENT]]).astype(np.int64)


def _position_edges(longest: int) -> np.ndarray:
    """0, 1, 2, 4, 8, ...: the first tokens of a context, where attention sinks are, have bins of their own."""
    doublings = [1 << power for power in range(max(longest - 1, 1).bit_length())]
    return np.asarray([0, *[edge for edge in doublings if edge < longest], longest])


def _pool(parts: list[metrics.Locality]) -> metrics.Locality:
    """The mean of the chunks' localities, weighted by their pairs."""
    pairs = np.asarray([part.pairs for part in parts])
    total = int(pairs.sum())
    mean = lambda name: float(np.nansum([getattr(p, name) * p.pairs for p in parts]) / total) if total else float("nan")
    return parts[0]._replace(first=mean("first"), any=mean("any"), overlap=mean("overlap"), pairs=total)
