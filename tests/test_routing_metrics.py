"""Every metric on a case worked out by hand, and against a plain loop over random routings."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from jaxmoe.routing import metrics
from tests.tolerances import bound

# Four tokens, four experts, two each. Loads: 0 three times, 1 twice, 2 twice, 3 once.
HAND = np.array([[0, 1], [1, 0], [0, 2], [2, 3]])
RNG = np.random.default_rng(5)


def random_experts(n: int, E: int, k: int, seed: int = 0) -> np.ndarray:
    return np.argsort(np.random.default_rng(seed).random((n, E)), axis=1)[:, :k].astype(np.uint8)


def test_load_by_hand():
    load = metrics.expert_load(HAND, 4)
    assert load.tolist() == [3, 2, 2, 1]
    # mean 2, deviations 1, 0, 0, -1
    assert metrics.load_cv(load) == pytest.approx(math.sqrt(0.5) / 2)
    assert metrics.maximal_violation(load) == pytest.approx(0.5)
    bits = -(3 / 8 * math.log(3 / 8) + 2 * 2 / 8 * math.log(2 / 8) + 1 / 8 * math.log(1 / 8))
    assert metrics.load_entropy(load) == pytest.approx(bits / math.log(4))
    assert metrics.effective_experts(load) == pytest.approx(math.exp(bits))


def test_even_and_collapsed_loads():
    even, collapsed = np.full(8, 5), np.array([40, 0, 0, 0, 0, 0, 0, 0])
    assert metrics.load_cv(even) == metrics.maximal_violation(even) == 0
    assert metrics.load_entropy(even) == pytest.approx(1)
    assert metrics.effective_experts(even) == pytest.approx(8)
    assert metrics.load_cv(collapsed) == pytest.approx(math.sqrt(7))
    assert metrics.maximal_violation(collapsed) == pytest.approx(7)  # E / k - 1 with k = 1
    assert metrics.load_entropy(collapsed) == pytest.approx(0)
    assert metrics.effective_experts(collapsed) == pytest.approx(1)


def test_an_unused_layer_has_no_balance():
    load = np.stack([np.zeros(4), np.ones(4)])
    for metric in (metrics.load_cv, metrics.maximal_violation, metrics.load_entropy, metrics.effective_experts):
        values = np.asarray(metric(load))
        assert np.isnan(values[0]) and np.isfinite(values[1])


def test_routing_entropy_by_hand():
    p = np.array([[0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    assert metrics.routing_entropy(metrics.entropy(p), 4) == pytest.approx([0.5, 0, 1])


def test_load_balancing_loss_is_k_when_routing_is_even_and_by_hand():
    assert metrics.load_balancing_loss(np.full((3, 8), 6), np.full((3, 8), 3.0), 24) == pytest.approx(2)
    # one layer, 4 tokens: f = (3, 2, 2, 1) / 4, P = (0.4, 0.3, 0.2, 0.1)
    sums = np.array([[1.6, 1.2, 0.8, 0.4]])
    expected = 4 * (3 * 0.4 + 2 * 0.3 + 2 * 0.2 + 1 * 0.1) / 4
    assert metrics.load_balancing_loss(metrics.expert_load(HAND, 4)[None], sums, 4) == pytest.approx(expected)


def test_load_balancing_loss_is_that_of_the_router():
    import jax.numpy as jnp

    from jaxmoe.ops.router import load_balancing_loss

    load, sums = RNG.integers(1, 50, (3, 8)), RNG.random((3, 8)) * 20
    model = load_balancing_loss(jnp.asarray(load), jnp.asarray(sums, jnp.float32), jnp.asarray(90))
    assert metrics.load_balancing_loss(load, sums, 90) == pytest.approx(float(model), rel=bound("metrics_fp32"))


def test_margin_by_hand():
    p = np.array([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]])
    assert metrics.topk_margin(p, 2) == pytest.approx([0.1, 0])
    assert metrics.topk_margin(p, 4) == pytest.approx([1, 1])


def test_coactivation_by_hand():
    counts = metrics.coactivation_counts(HAND, 4)
    assert counts.tolist() == [[3, 2, 1, 0], [2, 2, 0, 0], [1, 0, 2, 1], [0, 0, 1, 1]]
    assert metrics.coactivation(counts)[0].tolist() == pytest.approx([1, 2 / 3, 1 / 4, 0])
    assert metrics.conditional_coactivation(counts)[1].tolist() == [1, 1, 0, 0]
    assert metrics.conditional_coactivation(counts)[3].tolist() == [0, 0, 1, 1]


def test_coactivation_counts_all_pairs_not_neighbours_only():
    experts = random_experts(200, 9, 4)
    expected = Counter(pair for row in experts.tolist() for pair in combinations(sorted(row), 2))
    counts = metrics.coactivation_counts(experts, 9)
    for i, j in combinations(range(9), 2):
        assert counts[i, j] == counts[j, i] == expected[i, j]
    assert np.array_equal(np.diag(counts), metrics.expert_load(experts, 9))


def test_unused_experts_have_no_conditionals():
    counts = metrics.coactivation_counts(np.array([[0, 1]]), 3)
    assert np.isnan(metrics.conditional_coactivation(counts)[2]).all()
    assert metrics.coactivation(counts)[2].tolist() == [0, 0, 0]
    assert metrics.coactivation_counts(np.zeros((0, 2), int), 3).tolist() == [[0] * 3] * 3


def test_transition_by_hand_and_by_loop():
    counts = metrics.transition_counts(np.array([[0], [0], [1]]), np.array([[1], [0], [1]]), 2)
    assert counts.tolist() == [[1, 1], [0, 1]]
    assert metrics.transition(counts).tolist() == [[0.5, 0.5], [0, 1]]
    a, b = random_experts(150, 7, 3, 1), random_experts(150, 7, 3, 2)
    expected = np.zeros((7, 7), int)
    for before, after in zip(a, b, strict=True):
        for i in before:
            for j in after:
                expected[i, j] += 1
    assert np.array_equal(metrics.transition_counts(a, b, 7), expected)


def test_mutual_information_of_independent_and_of_equal_choices():
    assert metrics.mutual_information(np.full((4, 4), 3)) == pytest.approx(0, abs=bound("metrics_fp64"))
    assert metrics.mutual_information(np.eye(4, dtype=int) * 5) == pytest.approx(math.log(4))
    # p = [[1/2, 1/4], [0, 1/4]]: rows 3/4 and 1/4, columns 1/2 and 1/2
    by_hand = 1 / 2 * math.log(4 / 3) + 1 / 4 * math.log(2 / 3) + 1 / 4 * math.log(2)
    assert metrics.mutual_information(np.array([[2, 1], [0, 1]])) == pytest.approx(by_hand)


def test_domain_specialisation_by_hand():
    table = metrics.domain_specialisation(HAND, np.array([0, 0, 1, 1]), 3, 4)
    assert table[:2].tolist() == [[1, 1, 0, 0], [0.5, 0, 1, 0.5]]
    assert np.isnan(table[2]).all()
    assert table[:2].sum(axis=1).tolist() == [2, 2]  # k


def test_vocabulary_specialisation_by_hand_and_by_loop():
    tokens = np.array([7, 7, 9, 9])
    vocabulary = metrics.vocabulary_specialisation(HAND, tokens, 4, least=2)
    assert vocabulary.token.tolist() == [7, 9] and vocabulary.occurrences.tolist() == [2, 2]
    assert vocabulary.share.tolist() == [[1, 1, 0, 0], [0.5, 0, 1, 0.5]]
    assert metrics.vocabulary_score(vocabulary) == 1
    experts, tokens = random_experts(300, 6, 2, 3), RNG.integers(0, 40, 300)
    vocabulary = metrics.vocabulary_specialisation(experts, tokens, 6, least=5)
    for token, occurrences, share in zip(*vocabulary, strict=True):
        rows = [set(row) for row, t in zip(experts.tolist(), tokens, strict=True) if t == token]
        assert occurrences == len(rows) >= 5
        assert share.tolist() == pytest.approx([sum(e in row for row in rows) / len(rows) for e in range(6)])
    assert set(tokens) - set(vocabulary.token) == {t for t, n in Counter(tokens.tolist()).items() if n < 5}
    assert math.isnan(metrics.vocabulary_score(metrics.vocabulary_specialisation(HAND, np.arange(4), 4, least=2)))


def test_overlap_saturation_and_flips_by_hand():
    other = np.array([[1, 0], [1, 2], [3, 1], [2, 3]])
    assert metrics.set_overlap(HAND, other).tolist() == [1, 0.5, 0, 1]
    assert metrics.router_saturation(HAND, other) == pytest.approx(2.5 / 4)
    assert metrics.flips(HAND, other).tolist() == [False, True, True, False]


def test_overlap_and_flips_by_loop():
    a, b = random_experts(200, 8, 4, 1), random_experts(200, 8, 4, 2)
    overlap = [len(set(x) & set(y)) / 4 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert metrics.set_overlap(a, b).tolist() == overlap
    assert metrics.flips(a, b).tolist() == [value < 1 for value in overlap]


def test_flips_by_margin_by_hand():
    flipped = np.array([True, False, True, False, False])
    margin = np.array([0.05, 0.05, 0.2, 0.5, 1.0])
    table = metrics.flip_rate_by_margin(flipped, margin, np.array([0, 0.1, 0.3, 2]))
    assert table.tokens.tolist() == [2, 1, 2] and table.flips.tolist() == [1, 1, 0]
    assert table.rate.tolist() == [0.5, 1, 0]
    # every margin, 0 and 1 included, has a bin among the standard ones
    assert metrics.flip_rate_by_margin(np.ones(3, bool), np.array([0, 1e-9, 1.0])).tokens.sum() == 3


def test_jensen_shannon_by_hand():
    p, q = np.array([1.0, 0, 0]), np.array([0, 0.5, 0.5])
    assert metrics.jensen_shannon(p, p) == 0
    assert metrics.jensen_shannon(p, q) == pytest.approx(math.log(2))
    half = np.array([0.5, 0.5, 0])
    mixed = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert metrics.jensen_shannon(p, half) == pytest.approx(mixed - math.log(2) / 2)


def test_coarse_divergence_is_exact_with_all_experts_and_else_a_lower_bound():
    p, q = (np.random.default_rng(seed).dirichlet(np.full(10, 0.4), 60) for seed in (1, 2))
    exact = metrics.jensen_shannon(p, q)
    bounds = []
    for t in (10, 6, 3):
        a, b = np.argsort(-p, axis=1)[:, :t], np.argsort(-q, axis=1)[:, :t]
        take = np.take_along_axis
        bounds.append(metrics.coarse_jensen_shannon(a, take(p, a, 1), b, take(q, b, 1)))
    assert bounds[0] == pytest.approx(exact, abs=bound("metrics_fp64"))
    assert all((coarse <= exact + bound("metrics_fp64")).all() for coarse in bounds[1:])
    assert 0 < bounds[2].mean() < exact.mean()


def test_equal_routers_in_float32_have_no_divergence():
    p = np.random.default_rng(3).dirichlet(np.full(32, 0.4), 200).astype(np.float32)
    order = np.argsort(-p, axis=1)
    for t in (32, 16):
        experts, known = order[:, :t], np.take_along_axis(p, order[:, :t], 1)
        found = metrics.coarse_jensen_shannon(experts, known, experts, known)
        assert found.max() == 0


def test_rank_correlation_by_hand_and_against_scipy():
    assert metrics.rank_correlation(np.array([1, 2, 3.0]), np.array([10, 20, 30.0])) == pytest.approx(1)
    assert metrics.rank_correlation(np.array([1, 2, 3.0]), np.array([3, 2, 1.0])) == pytest.approx(-1)
    # ranks 1 2 3 4 and 1 3 2 4: 1 - 6 * 2 / (4 * 15)
    assert metrics.rank_correlation(np.arange(4.0), np.array([0, 2, 1, 3.0])) == pytest.approx(0.8)
    assert math.isnan(metrics.rank_correlation(np.ones(4), np.arange(4.0)))
    from scipy.stats import spearmanr

    a, b = RNG.integers(0, 6, 40), RNG.integers(0, 6, 40)  # with ties
    assert metrics.rank_correlation(a, b) == pytest.approx(spearmanr(a, b)[0])


def test_locality_by_hand_and_by_loop():
    follows = np.array([False, True, False, True])  # two contexts of two tokens
    found = metrics.consecutive_locality(HAND, follows, 4)
    # (0,1)->(1,0): other first choice, both in common; (0,2)->(2,3): other first choice, one in common
    assert (found.first, found.any, found.overlap, found.pairs) == (0, 1, 0.75, 2)
    assert found.chance_first == 0.25 and found.chance_overlap == 0.5
    assert found.chance_any == pytest.approx(1 - 1 / 6)
    experts = random_experts(20_000, 8, 2, 4)
    follows = np.arange(20_000) % 50 > 0
    found = metrics.consecutive_locality(experts, follows, 8)
    rows = experts.tolist()
    pairs = [(rows[i - 1], rows[i]) for i in range(len(rows)) if follows[i]]
    assert found.first == pytest.approx(sum(a[0] == b[0] for a, b in pairs) / len(pairs))
    assert found.any == pytest.approx(sum(bool(set(a) & set(b)) for a, b in pairs) / len(pairs))
    # independent choices: chance, within five standard errors
    error = 5 / math.sqrt(len(pairs))
    assert abs(found.first - found.chance_first) < error
    assert abs(found.any - found.chance_any) < error
    assert abs(found.overlap - found.chance_overlap) < error


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    """95 % intervals of a rate over 60 clusters that differ: 88 % to 99 % of 200 intervals contain the true value."""
    rng = np.random.default_rng(0)
    held = 0
    for repeat in range(200):
        rates = np.clip(rng.normal(0.3, 0.1, 60), 0, 1)
        flips = rng.binomial(50, rates)
        clusters = np.stack([flips, np.full(60, 50)], axis=1)
        found = metrics.bootstrap(clusters, lambda s: s[0] / s[1], draws=200, seed=repeat)
        assert found.low <= found.value <= found.high
        held += found.low <= 0.3 <= found.high
    assert 0.88 <= held / 200 <= 0.99


def test_bootstrap_of_tokens_would_be_too_sure():
    """If the tokens of a cluster agree with each other, the interval must be the clusters', four times as wide."""
    flips = np.repeat([0, 1], 8)
    clusters = np.stack([flips * 16, np.full(16, 16)], axis=1)
    tokens = np.stack([np.repeat(flips, 16), np.ones(256)], axis=1)
    rate = lambda s: s[0] / s[1]
    width = lambda interval: interval.high - interval.low
    assert width(metrics.bootstrap(clusters, rate)) > 3 * width(metrics.bootstrap(tokens, rate))
    assert math.isnan(metrics.bootstrap(clusters[:1], rate).low)


def test_blocks_end_with_their_context_and_sums_follow_them():
    position = np.array([0, 1, 2, 3, 4, 0, 1, 0])
    document = np.array([0, 0, 0, 0, 0, 0, 0, 1])
    assert metrics.blocks(document, position, 3).tolist() == [0, 0, 0, 1, 1, 2, 2, 3]
    assert metrics.cluster_sums(np.arange(8.0), metrics.blocks(document, position, 3), 4).tolist() == [3, 7, 11, 7]
