"""Balancing without a loss: the rule against a loop, a model that it balances, and the file that holds the bias."""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmoe.control import router_bias
from jaxmoe.control.interventions import Intervention
from jaxmoe.errors import UserError
from jaxmoe.ops.router import RoutingControl, moved_choice_bias, route
from jaxmoe.parameters import CHOICE_BIAS
from jaxmoe.train.loss import next_token_objective
from jaxmoe.train.metrics import expert_load
from jaxmoe.train.optimizers import learning_rate
from jaxmoe.train.step import Model, StepMetrics, TrainState, initial_state, make_train_step
from peers.configs import random_parameters
from tests.parity import COMPILER_OPTIONS
from tests.test_train import CONFIG, MIXED, random_batch

RATE = 0.01


# --- the rule


def routed(control: RoutingControl | None) -> Any:
    x, router = jax.random.normal(jax.random.key(0), (7, 8)), jax.random.normal(jax.random.key(1), (6, 8))
    return route(x, router, num_experts_per_tok=2, norm_topk_prob=False, control=control)


def test_the_bias_chooses_and_weighs_nothing() -> None:
    bias = [0.5, 0, 0, -0.5, 0.2, 0]
    found, plain = routed(RoutingControl(choice_bias=jnp.asarray(bias))), routed(None)
    np.testing.assert_array_equal(found.probabilities, plain.probabilities)
    for p, experts, weights in zip(*map(np.asarray, (found.probabilities, found.experts, found.weights)), strict=True):
        assert experts.tolist() == sorted(range(len(p)), key=lambda e: -(p[e] + bias[e]))[:2]
        assert weights.tolist() == [p[e] for e in experts]
    assert (np.sort(found.experts) != np.sort(plain.experts)).any()


def test_no_bias_brings_a_removed_expert_back() -> None:
    bias = jnp.asarray([9.0, 0, 0, -9, 0, 0])
    found = routed(RoutingControl(selection=jnp.asarray([-1, 0, 0, 1, 0, 0]), choice_bias=bias)).experts
    assert not (found == 0).any() and (found[:, 0] == 3).all()


def moved(bias: Any, counts: Any, rate: float) -> np.ndarray:
    """The rule, expert by expert."""
    found = np.array(bias, np.float32)
    for layer, experts in enumerate(counts):
        mean = sum(experts) / len(experts)
        for expert, count in enumerate(experts):
            found[layer, expert] += np.float32(rate if count < mean else -rate if count > mean else 0)
    return found


def test_the_bias_moves_towards_an_even_load() -> None:
    counts, bias = [[5, 1, 3, 3], [0, 0, 9, 3]], [[0.5, 0.25, 0, 0], [0, 0, 0, -0.5]]
    found = moved_choice_bias(jnp.asarray(bias), jnp.asarray(counts), 0.25)
    np.testing.assert_array_equal(found, moved(bias, counts, 0.25))


# --- in training


@functools.cache
def trained(*, forgets: bool = False) -> tuple[list[StepMetrics], list[np.ndarray]]:
    """40 steps of a model whose routers begin with clear favourites: numbers, and the bias after each. With `forgets`,
    the bias is 0 again before each step."""
    params = {path: jnp.asarray(array) for path, array in random_parameters(CONFIG).items()}
    params |= {CHOICE_BIAS: jnp.zeros((2, CONFIG.num_experts))}
    step, optimizer = compiled()
    state, batch = initial_state(params, optimizer), sequences()
    numbers, biases = [], []
    for _ in range(40):
        state, metrics = step({}, state, batch)
        numbers.append(metrics)
        biases.append(np.asarray(state.trainable[CHOICE_BIAS]))
        if forgets:
            state = TrainState(state.step, state.trainable | {CHOICE_BIAS: jnp.zeros_like(biases[0])}, state.optimizer)
    return numbers, biases


@functools.cache
def compiled() -> Any:
    """The step, and its optimizer."""
    model, rate = Model(CONFIG, None, remat="fast", choice_bias_rate=RATE), learning_rate("constant", 1e-2, 0, 1)
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(rate))
    step = make_train_step(model, optimizer, rate, next_token_objective())
    return jax.jit(step, compiler_options=COMPILER_OPTIONS), optimizer


def sequences() -> Any:
    return jax.tree.map(lambda array: jnp.asarray(array)[None], random_batch(CONFIG, 4, 48))


def test_a_step_moves_the_bias_by_all_tokens_of_its_batch() -> None:
    """Padding does not count, and weight decay leaves the bias alone."""
    numbers, biases = trained()
    expected = np.zeros_like(biases[0])
    for metrics, bias in zip(numbers, biases, strict=True):
        counts = np.asarray(metrics.expert_counts)
        tokens = int(np.sum(sequences().segment_ids > 0))
        assert counts.sum(axis=1).tolist() == [tokens * CONFIG.num_experts_per_tok] * 2
        expected = moved(expected, counts.tolist(), RATE)
        np.testing.assert_array_equal(bias, expected)


def unevenness(numbers: list[StepMetrics]) -> float:
    return float(np.mean([expert_load(np.asarray(each.expert_counts))["expert_load_cv"] for each in numbers[-5:]]))


def test_the_load_becomes_even() -> None:
    """And without the bias it does not."""
    with_bias, without = trained()[0], trained(forgets=True)[0]
    np.testing.assert_array_equal(with_bias[0].expert_counts, without[0].expert_counts)
    assert unevenness(with_bias) < 0.5 * unevenness(without)


# --- the file


def test_the_file_gives_the_same_bits(tmp_path: pathlib.Path) -> None:
    bias = np.random.default_rng(0).normal(size=(1, MIXED.num_experts)).astype(np.float32)
    (tmp_path / "bias.json").write_bytes(router_bias.as_bytes(bias, MIXED))
    found = router_bias.read(tmp_path / "bias.json", MIXED)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, bias)
    control = Intervention(choice_bias=found).control(MIXED)
    assert control is not None and control.logit_bias is None and control.selection is None
    np.testing.assert_array_equal(control.choice_bias, bias)
    assert Intervention(choice_bias=0 * found).control(MIXED) is None
    assert [*Intervention(choice_bias=found).describe()] == ["router_bias"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"0": [0.0] * 8}, "expected the 1 MoE layers of the model, found a difference at '0'"),
        ({"1": [0.0] * 7}, "layer 1: expected 8 finite numbers"),
        ({"1": [0.0] * 7 + [1e39]}, "layer 1: expected 8 finite numbers"),
        ({"1": [0.0] * 7 + [True]}, "layer 1: expected 8 finite numbers"),
        ({"1": 3}, "layer 1: expected 8 finite numbers, found 3"),
    ],
)
def test_other_files_are_refused(content: Any, message: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "bias.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        router_bias.read(tmp_path / "bias.json", MIXED)
