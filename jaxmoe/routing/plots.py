"""The figures of a capture, of a comparison, and of a table of effects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from captures import Capture
from jaxmoe.figures.figure import Bars, Figure, Heatmap, Lines, Passage, Series, Table
from jaxmoe.routing import metrics
from jaxmoe.routing.compare import Comparison, DomainDrift
from jaxmoe.routing.summary import Summary

_PASSAGE = 300  # tokens shown of each domain
Decode = Callable[[int], str]


def layer_names(layers: Sequence[int]) -> tuple[str, ...]:
    """The names of layers in legends and on pages."""
    return tuple(f"layer {layer}" for layer in layers)


def load_map(summary: Summary) -> Heatmap:
    """Layer x expert: tokens per expert, relative to an even share."""
    load = summary.load / summary.load.mean(axis=1, keepdims=True)
    caption = "Tokens per expert divided by the even share n k / E. 1: an even share; 0: an expert that no token uses."
    layers = summary.capture.model.layers
    return Heatmap(
        "load", "Expert load", caption, "layer", "expert", "load / even share", load[None], layers, center=1.0
    )


def load_curves(summary: Summary) -> Lines:
    """The loads of each layer, largest first; one line per layer."""
    share = np.sort(summary.load / summary.tokens, axis=1)[:, ::-1]
    E, k = share.shape[1], summary.capture.model.num_experts_per_tok
    even = Series("even", np.full(E, k / E), dashed=True)
    series = [Series(name, row) for name, row in zip(layer_names(summary.capture.model.layers), share, strict=True)]
    caption = "Share of tokens that use each expert of a layer, busiest expert first. A flat line is a balanced layer."
    return Lines(
        "load-curves",
        "Load curves",
        caption,
        "rank",
        "share of tokens",
        np.arange(1, E + 1),
        (*series, even),
        ordered=True,
    )


def balance(summary: Summary) -> Lines:
    """Balance of the load and sharpness of the router, by layer."""
    values = summary.balance()
    E = summary.load.shape[1]
    named = {
        "load entropy / log E": values["load_entropy"],
        "effective experts / E": values["effective_experts"] / E,
        "coefficient of variation": values["load_cv"],
        "routing entropy of a token / log E": values["routing_entropy"],
    }
    caption = (
        "Load entropy and effective experts are 1 if all experts have the same load. A token's routing entropy is 0 if "
        f"the router is certain. Load-balancing loss: {summary.load_balancing_loss:.3f} "
        f"(even routing: {summary.capture.model.num_experts_per_tok})."
    )
    series = tuple(Series(name, y) for name, y in named.items())
    layers = np.asarray(summary.capture.model.layers)
    return Lines("balance", "Balance and sharpness by layer", caption, "layer", "", layers, series)


def margins(summary: Summary) -> Lines:
    """The distribution of the top-k margins."""
    edges = metrics.MARGIN_EDGES
    below = np.cumsum(summary.margin_histogram, axis=1) / summary.tokens
    names = layer_names(summary.capture.model.layers)
    series = tuple(Series(name, row) for name, row in zip(names, below, strict=True))
    caption = (
        "Share of tokens whose k-th and next expert differ by less than x in probability. A change of that size in the "
        "probabilities can flip them."
    )
    return Lines(
        "margins",
        "Top-k margins",
        caption,
        "margin (probability)",
        "share below",
        edges[1:],
        series,
        log_x=True,
        ordered=True,
    )


def coactivation(summary: Summary) -> Heatmap:
    """P(expert j | expert i) in one layer; a page per layer."""
    pages = np.stack([metrics.conditional_coactivation(counts) for counts in summary.coactivation])
    for page in pages:
        np.fill_diagonal(page, np.nan)
    k, E = summary.capture.model.num_experts_per_tok, summary.load.shape[1]
    chance = (k - 1) / max(E - 1, 1)
    caption = (
        "P(column | row): the share of the row's tokens that also use the column's expert. "
        f"Independent choices give {chance:.3f}."
    )
    layers = summary.capture.model.layers
    return Heatmap(
        "coactivation",
        "Co-activation",
        caption,
        "expert i",
        "expert j",
        "P(j | i)",
        pages,
        tuple(range(E)),
        layer_names(layers),
    )


def transitions(summary: Summary) -> Heatmap:
    """P(expert in the next MoE layer | expert in this one); a page per pair of layers."""
    pages = np.stack([metrics.transition(counts) for counts in summary.transition])
    E = summary.load.shape[1]
    bits = [metrics.mutual_information(counts) for counts in summary.transition]
    layers = summary.capture.model.layers
    names = tuple(f"layer {a} to {b} ({x:.3f} nats)" for a, b, x in zip(layers, layers[1:], bits, strict=False))
    caption = (
        "P(column in the next MoE layer | row in this one), over all k x k pairs. In brackets: the mutual information "
        "of the two layers' experts."
    )
    return Heatmap(
        "transitions",
        "From layer to layer",
        caption,
        "expert here",
        "expert next",
        "P(next | here)",
        pages,
        tuple(range(E)),
        names,
    )


def domain_bars(summary: Summary) -> Bars:
    """Share of each domain's tokens per expert, with the uniform share; a page per layer."""
    shares = summary.domain_load / np.maximum(summary.domain_tokens, 1)[:, None, None]
    E, k = summary.load.shape[1], summary.capture.model.num_experts_per_tok
    caption = "Share of each domain's tokens that use an expert. The line is the uniform share k / E."
    return Bars(
        "domains",
        "Domain specialisation",
        caption,
        "expert",
        "share of tokens",
        shares.swapaxes(0, 1),
        tuple(summary.capture.text["domains"]),
        layer_names(summary.capture.model.layers),
        k / E,
        f"uniform {k / E:.3f}",
    )


def domain_divergence(drifts: Sequence[DomainDrift]) -> Lines:
    """Divergence of the domains' loads by layer, and between random halves of one domain for comparison."""
    layers = list(dict.fromkeys(drift.layer for drift in drifts))
    series = []
    for first, second in dict.fromkeys((drift.first, drift.second) for drift in drifts):
        mine = [drift for drift in drifts if (drift.first, drift.second) == (first, second)]
        columns = np.asarray([drift.divergence for drift in mine]).T
        series.append(Series(f"{first} / {second}", *columns))
        series.append(Series(f"halves of {first}, {second}", np.asarray([drift.floor for drift in mine]), dashed=True))
    caption = (
        "Jensen-Shannon divergence between the domains' expert loads. Dashed: between random halves of one domain."
    )
    return Lines(
        "domain-divergence",
        "How far domains differ, by layer",
        caption,
        "layer",
        "nats",
        np.asarray(layers),
        tuple(series),
    )


def locality(summary: Summary) -> Lines:
    """How often consecutive tokens use the same experts, by layer."""
    found = summary.locality
    layers = np.asarray(summary.capture.model.layers)
    series = []
    for name, key in (("same first choice", "first"), ("share of experts in common", "overlap")):
        series.append(Series(name, np.asarray([getattr(part, key) for part in found])))
        chance = np.full(len(layers), getattr(found[0], f"chance_{key}"))
        series.append(Series(f"{name}, by chance", chance, dashed=True))
    caption = (
        "How often a token uses the experts of the token before it. Dashed: independent uniform choices "
        "(Mixtral, table 5)."
    )
    return Lines("locality", "Consecutive tokens", caption, "layer", "share", layers, tuple(series))


def vocabulary_scores(summary: Summary) -> Lines:
    """How concentrated the occurrences of a token are on one expert, by input token and by predicted token."""
    layers = range(len(summary.capture.model.layers))
    score = lambda predicted: np.asarray([metrics.vocabulary_score(summary.vocabulary(l, predicted)) for l in layers])
    E, k = summary.load.shape[1], summary.capture.model.num_experts_per_tok
    series = [Series("input token", score(False))]
    if len(summary.predicted_tokens):
        series.append(Series("predicted token", score(True)))
    series.append(Series(f"uniform {k / E:.3f}", np.full(len(layers), k / E), dashed=True))
    caption = (
        "The share of a token's occurrences that use its most common expert, averaged over the most frequent tokens "
        "(OLMoE)."
    )
    x = np.asarray(summary.capture.model.layers)
    return Lines("vocabulary", "Vocabulary specialisation", caption, "layer", "share", x, tuple(series))


def favourite_tokens(summary: Summary, decode: Decode, least: int = 16, each: int = 8) -> Table:
    """The most specialised experts of each layer, and the tokens that use them far more often than average."""
    body = []
    for slot, layer in enumerate(summary.capture.model.layers):
        vocabulary = summary.vocabulary(slot)
        often = vocabulary.occurrences >= least
        if not often.any():
            continue
        share = vocabulary.share[often]
        lift = share - summary.load[slot] / summary.tokens
        for expert in np.argsort(-np.sort(lift, axis=0)[-each:].mean(axis=0))[:4]:
            best = np.argsort(-lift[:, expert])[:each]
            tokens = "  ".join(f"{decode(int(vocabulary.token[often][t]))!r} {share[t, expert]:.0%}" for t in best)
            body.append((layer, int(expert), float(summary.load[slot, expert] / summary.tokens), tokens))
    caption = "The four most specialised experts of each layer, and the tokens that use them most above average."
    return Table(
        "tokens",
        "Tokens of specialised experts",
        caption,
        ("layer", "expert", "share of all tokens", "tokens"),
        tuple(body),
    )


def positions(summary: Summary) -> Lines:
    """Divergence of the load at each position in the context from the layer's whole load."""
    edges = summary.position_edges
    total = summary.position_load.sum(axis=2)
    share = summary.position_load / np.maximum(total, 1)[..., None]
    whole = summary.load / summary.load.sum(axis=1, keepdims=True)
    series = tuple(
        Series(
            name, np.asarray(metrics.jensen_shannon(share[:, slot], np.broadcast_to(whole[slot], share[:, slot].shape)))
        )
        for slot, name in enumerate(layer_names(summary.capture.model.layers))
    )
    caption = "Jensen-Shannon divergence (nats) of the load at a position in the context from the layer's whole load."
    return Lines(
        "positions",
        "Positions in the context",
        caption,
        "position, from this one on",
        "nats",
        edges[:-1] + 1,
        series,
        log_x=True,
        ordered=True,
    )


def passage(capture: Capture, decode: Decode) -> Passage:
    """The beginning of the first context of each domain, coloured by expert."""
    text = capture.read_text()
    picked: list[slice] = []
    for domain in range(len(capture.text["domains"])):
        for part in text.contexts():
            if text.domain[part.start] == domain:
                picked.append(slice(part.start, min(part.stop, part.start + _PASSAGE)))
                break
    chunks = [capture.read(part.start, part.stop) for part in picked]
    join = lambda name: np.concatenate([getattr(chunk, name) for chunk in chunks], axis=1)
    tokens = np.concatenate([chunk.text.token for chunk in chunks])
    domains = np.concatenate([chunk.text.domain for chunk in chunks])
    losses = (
        None if chunks[0].loss is None else np.concatenate([chunk.loss for chunk in chunks if chunk.loss is not None])
    )
    return Passage(
        "text",
        "Text by expert",
        "Each token has the colour of its first expert in the layer. Hover for all experts, weights and the margin.",
        tuple(decode(int(token)) for token in tokens),
        tuple(capture.text["domains"][domain] for domain in domains),
        join("experts").astype(np.int32),
        join("weights"),
        join("margin"),
        losses,
        capture.model.num_experts,
        layer_names(capture.model.layers),
    )


def of_capture(summary: Summary, decode: Decode, domains: Sequence[DomainDrift] = ()) -> list[Figure]:
    """All figures of one capture."""
    figures: list[Figure] = [load_map(summary), load_curves(summary), balance(summary), margins(summary)]
    figures += [coactivation(summary)]
    figures += [transitions(summary)] if len(summary.transition) else []
    figures += [domain_bars(summary)]
    figures += [domain_divergence(domains)] if domains else []
    figures += [positions(summary), locality(summary), vocabulary_scores(summary), favourite_tokens(summary, decode)]
    return [*figures, passage(summary.capture, decode)]


def drift(found: Comparison) -> Lines:
    """Flips, lost overlap and divergence, by layer."""
    columns = lambda name: np.asarray([getattr(layer, name) for layer in found.layers]).T
    flips, overlap, divergence = columns("flip_rate"), columns("overlap"), columns("divergence")
    series = (
        Series("flip rate (another set of experts)", *flips),
        Series("experts not shared (1 - overlap)", 1 - overlap[0], 1 - overlap[2], 1 - overlap[1]),
        Series("divergence of the routers, nats", *divergence),
    )
    tokens = found.flipped_tokens
    caption = (
        f"{found.b.name} against {found.a.name}, token by token, with 95 % intervals. {tokens.value:.2%} of "
        f"{found.tokens:,} tokens use different experts in at least one layer."
    )
    layers = np.asarray(found.a.model.layers)
    return Lines(f"drift-{found.b.name}", f"Drift by layer: {found.b.name}", caption, "layer", "", layers, series)


def margin_against_flips(found: Comparison) -> Lines:
    """Flip rate by the margin in the reference capture."""
    edges = found.by_margin.edges
    centers = np.sqrt(np.maximum(edges[:-1], edges[1] / 3) * edges[1:])
    some = found.by_margin.tokens > 0
    series = (
        Series("all layers", found.by_margin.rate[some]),
        Series("tokens without an earlier flip", found.first_by_margin.rate[some]),
    )
    caption = (
        f"Share of tokens with another set of experts in {found.b.name}, by their margin in {found.a.name}. "
        "Rounding flips only the smallest margins."
    )
    return Lines(
        f"flips-{found.b.name}",
        f"Flips by margin: {found.b.name}",
        caption,
        "margin (probability)",
        "flip rate",
        centers[some],
        series,
        log_x=True,
    )


def load_change(found: Comparison) -> Heatmap:
    """Layer x expert: share of tokens in B minus the share in A."""
    change = (found.load_b - found.load_a) / found.tokens
    layers = found.a.model.layers
    return Heatmap(
        f"load-change-{found.b.name}",
        f"Change of load: {found.b.name}",
        f"Share of tokens that use an expert in {found.b.name}, minus the share in {found.a.name}.",
        "layer",
        "expert",
        "change of share",
        change[None],
        layers,
        center=0.0,
    )


def widest_flips(found: Comparison, decode: Decode) -> Table:
    """The flips with the widest margins, which rounding explains least."""
    text = found.a.read_text()
    body = []
    for flip in found.widest:
        around = text.token[max(0, flip.token - 4) : flip.token]
        left, gained = (
            sorted(set(flip.experts_a) - set(flip.experts_b)),
            sorted(set(flip.experts_b) - set(flip.experts_a)),
        )
        context = "".join(decode(int(token)) for token in around)
        body.append(
            (flip.token, flip.layer, flip.margin, context, decode(int(text.token[flip.token])), str(left), str(gained))
        )
    header = ("place", "layer", "margin", "text before", "token", "experts lost", "experts gained")
    caption = "Tokens whose first flip has the widest margin."
    return Table(f"widest-{found.b.name}", f"Widest flips: {found.b.name}", caption, header, tuple(body))


def of_comparison(found: Comparison, decode: Decode) -> list[Figure]:
    """All figures of two captures."""
    return [drift(found), margin_against_flips(found), load_change(found), widest_flips(found, decode)]


def effect_map(effects: Sequence[dict[str, Any]]) -> Heatmap:
    """Layer x expert: change of the loss if the expert is removed or forced."""
    layers = sorted({int(effect["layer"]) for effect in effects})
    experts = max(int(effect["expert"]) for effect in effects) + 1
    change = np.full((len(layers), experts), np.nan)
    for effect in effects:
        change[layers.index(int(effect["layer"])), int(effect["expert"])] = float(effect["change"])
    caption = "Change of the mean loss (nats per token) if only this expert of this layer is removed or forced."
    return Heatmap(
        "effects",
        "Effect of each expert",
        caption,
        "layer",
        "expert",
        "change of loss",
        change[None],
        tuple(layers),
        center=0.0,
    )
