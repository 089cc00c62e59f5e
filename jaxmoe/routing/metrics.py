"""Metrics of routing: pure functions over NumPy arrays, each with its formula and its source.

There are n tokens and E experts, k of them per token; `experts` [n, k] are one layer's choices, the k of a token all
distinct. Counts are additive: a long capture is summed chunk by chunk, and ratios are formed at the end. Entropies are
in nats. A mean over nothing is NaN.

Sources: OLMoE (Muennighoff et al. 2024, arXiv 2409.02060, section 5), Mixtral (Jiang et al. 2024, arXiv 2401.04088,
section 5), Switch (Fedus et al. 2021, arXiv 2101.03961), Loss-free balancing (Wang et al. 2024, arXiv 2408.15664).
"""

from __future__ import annotations

from collections.abc import Callable
from math import comb
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, Num

Experts = Integer[np.ndarray, "n k"]


# ---- load and balance


def expert_load(experts: Experts, num_experts: int) -> Integer[np.ndarray, " E"]:
    """Tokens per expert: load_e = #{tokens whose k experts contain e}; sums to n k."""
    return np.bincount(experts.reshape(-1), minlength=num_experts)


def load_cv(load: Num[np.ndarray, "*layers E"]) -> Float[np.ndarray, "*layers"] | np.floating:
    """Coefficient of variation std_e(load) / mean_e(load), with the population's standard deviation; 0 is even.

    Source: Shazeer et al. 2017 (arXiv 1701.06538), section 4, whose importance loss is its square.
    """
    mean = load.mean(axis=-1)
    return np.divide(load.std(axis=-1), mean, out=np.full(np.shape(mean), np.nan), where=mean > 0)


def maximal_violation(
    load: Num[np.ndarray, "*layers E"],
) -> Float[np.ndarray, "*layers"] | np.floating:
    """MaxVio = (max_e load_e - mean load) / mean load; 0 is even, E/k - 1 the worst.

    Source: Wang et al. 2024, equation 4.
    """
    mean = load.mean(axis=-1)
    return np.divide(load.max(axis=-1) - mean, mean, out=np.full(np.shape(mean), np.nan), where=mean > 0)


def entropy(p: Float[np.ndarray, "*batch E"]) -> Float[np.ndarray, "*batch"] | np.floating:
    """Shannon entropy H = -sum_e p_e log p_e in nats, with 0 log 0 = 0."""
    return -(p * np.log(p, where=p > 0, out=np.zeros_like(p, dtype=np.float64))).sum(axis=-1)


def load_entropy(
    load: Num[np.ndarray, "*layers E"],
) -> Float[np.ndarray, "*layers"] | np.floating:
    """Entropy of the shares load_e / sum load, divided by log E: 1 is even, log k / log E the smallest value.

    Source: normalised Shannon entropy (Pielou's evenness, 1966).
    """
    return entropy(_shares(load)) / np.log(max(load.shape[-1], 2))


def effective_experts(
    load: Num[np.ndarray, "*layers E"],
) -> Float[np.ndarray, "*layers"] | np.floating:
    """exp(H(shares)): the number of equally loaded experts that has the same entropy; k to E.

    Source: Hill number of order 1 (Hill 1973, Ecology 54).
    """
    return np.exp(entropy(_shares(load)))


def routing_entropy(
    router_entropy: Float[np.ndarray, "*batch"] | np.floating, num_experts: int
) -> Float[np.ndarray, "*batch"] | np.floating:
    """A token's normalised routing entropy, -sum_e p_e log p_e / log E over all E router probabilities.

    0 means a certain router, 1 a uniform one. `router_entropy` is the numerator, from a capture or from `entropy`.
    """
    return router_entropy / np.log(max(num_experts, 2))


def load_balancing_loss(
    load: Integer[np.ndarray, "Ls E"], probability_sums: Float[np.ndarray, "Ls E"], tokens: int
) -> float:
    """E sum_e f_e P_e, pooled over layers: f_e = load_e / (n Ls), P_e the mean probability; even routing gives k.

    Source: Fedus et al. 2021, equations 4 to 6, in the form of transformers' `load_balancing_loss_func`.
    """
    layers, experts = load.shape
    fraction = load.sum(axis=0) / (tokens * layers)
    mean = probability_sums.sum(axis=0) / (tokens * layers)
    return float(experts * np.sum(fraction * mean))


# ---- one token


def topk_margin(probabilities: Float[np.ndarray, "*batch E"], k: int) -> Float[np.ndarray, "*batch"] | np.floating:
    """p_(k) - p_(k+1): the gap in probability between the last chosen expert and the first one left out; 1 if k = E.

    Changing every probability by less than half of it does not change the chosen set.
    """
    if k == probabilities.shape[-1]:
        return np.ones(probabilities.shape[:-1])
    ordered = np.sort(probabilities, axis=-1)
    return ordered[..., -k] - ordered[..., -k - 1]


# ---- experts with each other


def coactivation_counts(experts: Experts, num_experts: int) -> Integer[np.ndarray, "E E"]:
    """C_ij = #{tokens that choose both i and j}, over all pairs among the k; C_ii is the load."""
    if not len(experts):
        return np.zeros((num_experts, num_experts), np.int64)
    pairs = experts[:, :, None].astype(np.int64) * num_experts + experts[:, None, :]
    return np.bincount(pairs.reshape(-1), minlength=num_experts**2).reshape(num_experts, num_experts)


def coactivation(counts: Integer[np.ndarray, "E E"]) -> Float[np.ndarray, "E E"]:
    """Jaccard co-activation: C_ij / (C_ii + C_jj - C_ij), symmetric; the diagonal is 1 (0 for an unused expert)."""
    load = np.diag(counts)
    either = load[:, None] + load[None, :] - counts
    return np.divide(counts, either, out=np.zeros(counts.shape), where=either > 0)


def conditional_coactivation(counts: Integer[np.ndarray, "E E"]) -> Float[np.ndarray, "E E"]:
    """P(j | i) = C_ij / C_ii, the share of expert i's tokens that also go to j; NaN in the row of an unused expert.

    Source: OLMoE, equation for expert co-activation, N_ij / N_i. Independent choices give about (k - 1) / (E - 1).
    """
    load = np.diag(counts)[:, None]
    return np.divide(counts, load, out=np.full(counts.shape, np.nan), where=load > 0)


def transition_counts(before: Experts, after: Experts, num_experts: int) -> Integer[np.ndarray, "E E"]:
    """T_ij = #{tokens with expert i in one layer and j in the next one}, over all k x k pairs."""
    pairs = before[:, :, None].astype(np.int64) * num_experts + after[:, None, :]
    return np.bincount(pairs.reshape(-1), minlength=num_experts**2).reshape(num_experts, num_experts)


def transition(counts: Integer[np.ndarray, "E E"]) -> Float[np.ndarray, "E E"]:
    """P(j in layer l + 1 | i in layer l) = T_ij / sum_j T_ij, for one of the k choices; NaN in an unused expert's row.

    Source: cross-layer expert affinity (Yao et al. 2024, ExFlow, arXiv 2401.08383, section 4).
    """
    rows = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, rows, out=np.full(counts.shape, np.nan), where=rows > 0)


def mutual_information(counts: Integer[np.ndarray, "E E"]) -> float:
    """I = sum_ij p_ij log(p_ij / (p_i p_j)) in nats: how much one layer's expert says about the next layer's."""
    total = counts.sum()
    if not total:
        return float("nan")
    joint = counts / total
    return float(entropy(joint.sum(axis=1)) + entropy(joint.sum(axis=0)) - entropy(joint.reshape(-1)))


# ---- specialisation


def domain_specialisation(
    experts: Experts, domains: Integer[np.ndarray, " n"], num_domains: int, num_experts: int
) -> Float[np.ndarray, "domains E"]:
    """S(e, d) = #{tokens of d that choose e} / #{tokens of d}; a row sums to k, and k / E is the uniform baseline.

    Source: OLMoE, domain specialisation, with all k choices counted. NaN for a domain without tokens.
    """
    counts = pair_counts(domains, experts, num_domains, num_experts)
    tokens = np.bincount(domains, minlength=num_domains)[:, None]
    return np.divide(counts, tokens, out=np.full(counts.shape, np.nan), where=tokens > 0)


def pair_counts(
    labels: Integer[np.ndarray, " n"], experts: Experts, num_labels: int, num_experts: int
) -> Integer[np.ndarray, "labels E"]:
    """#{tokens with the label that choose the expert}, additive over chunks; every specialisation follows from it."""
    k = experts.shape[1]
    flat = np.repeat(labels.astype(np.int64), k) * num_experts + experts.reshape(-1)
    return np.bincount(flat, minlength=num_labels * num_experts).reshape(num_labels, num_experts)


class Vocabulary(NamedTuple):
    """Vocabulary specialisation: token ids, how often each occurs, and each expert's share of the occurrences."""

    token: Integer[np.ndarray, " x"]
    occurrences: Integer[np.ndarray, " x"]
    share: Float[np.ndarray, "x E"]


def vocabulary_specialisation(
    experts: Experts, tokens: Integer[np.ndarray, " n"], num_experts: int, least: int = 8
) -> Vocabulary:
    """V(e, x) = #{occurrences of token x that choose e} / #{occurrences of x}, for tokens with `least` occurrences.

    Source: OLMoE, vocabulary specialisation, with all k choices counted (k / E is the uniform baseline). `tokens` are
    the input ids or the predicted ids.
    """
    ids, inverse, occurrences = np.unique(tokens, return_inverse=True, return_counts=True)
    often = occurrences >= least
    place = np.cumsum(often) - 1
    kept = often[inverse]
    counts = pair_counts(place[inverse[kept]], experts[kept], int(often.sum()), num_experts)
    return Vocabulary(ids[often], occurrences[often], counts / np.maximum(occurrences[often], 1)[:, None])


def vocabulary_score(vocabulary: Vocabulary) -> float:
    """sum_x N_x max_e V(e, x) / sum_x N_x: the mean share of a token's occurrences that its most common expert has."""
    total = vocabulary.occurrences.sum()
    if not total:
        return float("nan")
    return float((vocabulary.occurrences * vocabulary.share.max(axis=1)).sum() / total)


# ---- two routings of the same tokens


def set_overlap(a: Experts, b: Experts) -> Float[np.ndarray, " n"]:
    """|A ∩ B| / k per token: 1 if both routings choose the same set; independent uniform choices give k / E."""
    return (a[:, :, None] == b[:, None, :]).any(axis=2).mean(axis=1)


def router_saturation(at: Experts, final: Experts) -> float:
    """Mean over tokens of |E(t) ∩ E(T)| / k: how much of the final checkpoint's routing an earlier one already shows.

    Source: OLMoE, equation for router saturation.
    """
    return float(set_overlap(at, final).mean()) if len(at) else float("nan")


def flips(a: Experts, b: Experts) -> Bool[np.ndarray, " n"]:
    """Whether a token's set of experts differs between two routings; the order within the set does not count."""
    return ~(np.sort(a, axis=1) == np.sort(b, axis=1)).all(axis=1)


class FlipsByMargin(NamedTuple):
    """Tokens and flips whose margin lies in [edges[i], edges[i + 1])."""

    edges: Num[np.ndarray, " edges"]
    tokens: Integer[np.ndarray, " bins"]
    flips: Integer[np.ndarray, " bins"]

    @property
    def rate(self) -> Float[np.ndarray, " bins"]:
        """Flips over tokens; NaN in an empty bin."""
        empty = np.full(len(self.tokens), np.nan)
        return np.divide(self.flips, self.tokens, out=empty, where=self.tokens > 0)


MARGIN_EDGES = np.array([0, *(10.0**e for e in np.arange(-6, 0.25, 0.5)), 2.0])


def flip_rate_by_margin(
    flipped: Bool[np.ndarray, " n"],
    margin: Num[np.ndarray, " n"],
    edges: Num[np.ndarray, " edges"] = MARGIN_EDGES,
) -> FlipsByMargin:
    """#{flips with margin in a bin} / #{tokens with margin in it}. Rounding only flips small margins, training any.

    `margin` is `topk_margin` of the reference routing. The bins are half a decade wide.
    """
    tokens = np.histogram(margin, edges)[0]
    return FlipsByMargin(np.asarray(edges, np.float64), tokens, np.histogram(margin[flipped], edges)[0])


def jensen_shannon(
    p: Float[np.ndarray, "*batch E"], q: Float[np.ndarray, "*batch E"]
) -> Float[np.ndarray, "*batch"] | np.floating:
    """JSD = H((p + q) / 2) - (H(p) + H(q)) / 2 in nats; 0 for equal distributions, log 2 for disjoint ones.

    Source: Lin 1991, equation 4.1 with equal weights.
    """
    return np.maximum(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2, 0)


def coarse_jensen_shannon(
    experts_p: Integer[np.ndarray, "n t"],
    p: Float[np.ndarray, "n t"],
    experts_q: Integer[np.ndarray, "n t"],
    q: Float[np.ndarray, "n t"],
) -> Float[np.ndarray, " n"]:
    """Jensen-Shannon divergence of two routers, known only by their t largest probabilities.

    Experts that both sides kept are separate classes; all others form one class. Merging classes never raises the
    divergence (data processing inequality), so this is a lower bound, exact if t = E.
    """
    p, q = (np.asarray(each, np.float64) for each in (p, q))  # in float32, equal routers would differ by 1e-8
    match = experts_p[:, :, None] == experts_q[:, None, :]
    shared = match.any(axis=2)
    left = np.where(shared, p, 0)
    right = np.einsum("nts,ns->nt", match.astype(np.float64), q)
    rest = lambda known: np.clip(1 - known.sum(axis=1, keepdims=True), 0, 1)
    return np.asarray(jensen_shannon(np.append(left, rest(left), axis=1), np.append(right, rest(right), axis=1)))


def rank_correlation(a: Num[np.ndarray, " E"], b: Num[np.ndarray, " E"]) -> float:
    """Spearman's rho: the correlation of the ranks, ties at their mean rank; NaN if a side is constant.

    On loads it says whether two captures agree on which experts are busy. Source: Spearman 1904.
    """
    from scipy.stats import rankdata

    x, y = rankdata(a) - (len(a) + 1) / 2, rankdata(b) - (len(b) + 1) / 2
    norm = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / norm) if norm else float("nan")


# ---- neighbours in the text


class Locality(NamedTuple):
    """Repetition between consecutive tokens: of the first choice, of any, of how many; and the same by chance."""

    first: float
    any: float
    overlap: float
    pairs: int
    chance_first: float
    chance_any: float
    chance_overlap: float


def consecutive_locality(experts: Experts, follows: Bool[np.ndarray, " n"], num_experts: int) -> Locality:
    """How often a token repeats experts of the token before it; `follows` marks tokens with one in their context.

    first: the same first choice, chance 1 / E. any: at least one of the k in common, chance 1 - C(E-k, k) / C(E, k).
    overlap: |A ∩ B| / k, chance k / E. Source: Mixtral, table 5 ("first choice", "first or second choice").
    """
    k = experts.shape[1]
    later = np.flatnonzero(follows)
    a, b = experts[later - 1], experts[later]
    overlap = set_overlap(a, b)
    mean = lambda x: float(x.mean()) if len(x) else float("nan")
    return Locality(
        mean(a[:, 0] == b[:, 0]),
        mean(overlap > 0),
        mean(overlap),
        len(later),
        1 / num_experts,
        1 - comb(num_experts - k, k) / comb(num_experts, k),
        k / num_experts,
    )


# ---- intervals


class Interval(NamedTuple):
    """An estimate with its bootstrap confidence interval."""

    value: float
    low: float
    high: float


def bootstrap(
    clusters: Num[np.ndarray, "c *sums"],  # noqa: F821 - dimensions, not a product
    statistic: Callable[[np.ndarray], np.ndarray | float],
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of `statistic(sum over clusters)`, resampling whole clusters with replacement.

    Tokens of one text are not independent, so whole texts (or blocks of text) are drawn. `clusters` holds the additive
    sums of each, for instance (flips, tokens). `statistic` uses their total [*sums]. The bounds of a single cluster
    are NaN.

    Source: Efron 1979; for clusters Davison and Hinkley 1997, section 3.8.
    """
    clusters = np.asarray(clusters, np.float64)
    value = float(statistic(clusters.sum(axis=0)))
    c = len(clusters)
    if c < 2:
        return Interval(value, float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    flat = clusters.reshape(c, -1)
    drawn = [
        float(statistic((times @ flat).reshape(clusters.shape[1:])))
        for times in rng.multinomial(c, np.full(c, 1 / c), size=draws).astype(np.float64)
    ]
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def cluster_sums(
    values: Num[np.ndarray, "n *sums"],  # noqa: F821
    cluster: Integer[np.ndarray, " n"],
    num_clusters: int,
) -> Float[np.ndarray, "c *sums"]:  # noqa: F821
    """The sum of `values` over each cluster."""
    total = np.zeros((num_clusters, *values.shape[1:]))
    np.add.at(total, cluster, values)
    return total


def blocks(
    document: Integer[np.ndarray, " n"], position: Integer[np.ndarray, " n"], size: int = 256
) -> Integer[np.ndarray, " n"]:
    """Clusters of neighbouring tokens: up to `size` consecutive ones of one context, numbered from 0."""
    starts = (position % size == 0) | np.append(True, document[1:] != document[:-1])
    return np.cumsum(starts) - 1


def _shares(load: np.ndarray) -> np.ndarray:
    total = load.sum(axis=-1, keepdims=True)
    return np.divide(load, total, out=np.full(load.shape, np.nan), where=total > 0)
