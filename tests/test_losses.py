"""Losses as objects: a loss from outside jaxmoe is passed to the step, with and without accumulation."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import LoraConfig
from jaxmoe.data.packing import Batch
from jaxmoe.train.loss import (
    LoadBalancing,
    Loss,
    NextTokenCrossEntropy,
    Outputs,
    Term,
    Total,
    cross_entropy,
    next_token_objective,
)
from jaxmoe.train.step import LossAndGradients, Model, loss_and_gradients, make_eval_step
from tests.parity import COMPILER_OPTIONS
from tests.test_train import CONFIG, adapted, random_batch
from tests.tolerances import bound


class PairPreference:
    """-log sigmoid(beta * (log p(preferred) - log p(rejected))): sequences 2i and 2i + 1 of a batch are a pair.

    Source: direct preference optimisation (Rafailov et al. 2023, equation 7), without the reference model's part.
    """

    needs: Mapping[str, Total] = {}
    beta = 0.1

    def weight(self, batch: Batch) -> Any:
        """The number of pairs."""
        return jnp.asarray(batch.weights.size / batch.weights.shape[-1] / 2)

    def __call__(self, outputs: Outputs, batch: Batch, totals: Any) -> Any:
        """The sum over the pairs of a micro-batch, and how many prefer what they should."""

        def of_sequence(sequence: Any) -> Any:
            hidden, labels, weights = sequence
            return -cross_entropy(hidden, outputs.head, labels, weights, outputs.chunk, outputs.frozen_head)

        log_p = jax.lax.map(of_sequence, (outputs.hidden, batch.labels, batch.weights)).reshape(-1, 2)
        margin = self.beta * (log_p[:, 0] - log_p[:, 1])
        return -jnp.sum(jax.nn.log_sigmoid(margin)), {"preferred": jnp.sum((margin > 0).astype(jnp.float32))}


class RelativeNorm:
    """Sum of |h|^3 over the batch, divided by the sum of h^2 over the whole batch, which has no gradient.

    The loss is wrong unless it receives that total.
    """

    needs: Mapping[str, Total] = {"norms": lambda outputs, batch: jnp.sum(outputs.hidden**2)}

    def weight(self, batch: Batch) -> Any:
        return jnp.ones(())

    def __call__(self, outputs: Outputs, batch: Batch, totals: Any) -> Any:
        cubes = jnp.sum(jnp.abs(outputs.hidden) ** 3)
        return cubes / totals["norms"], {}


@functools.cache
def setting() -> tuple[Model, Any, Any, Batch]:
    model, frozen, adapters = adapted(CONFIG, LoraConfig(r=2, targets=("q_proj", "gate")))
    return model, frozen, adapters, jax.tree.map(jnp.asarray, random_batch(CONFIG, 4, 24))


def run(objective: Any, micro_batches: int) -> LossAndGradients:
    model, frozen, adapters, sequences = setting()
    batch = jax.tree.map(lambda array: array.reshape(micro_batches, -1, array.shape[-1]), sequences)
    step = lambda f, a, b: loss_and_gradients(model, f, a, b, objective)
    return jax.jit(step, compiler_options=COMPILER_OPTIONS)(frozen, adapters, batch)


def distance(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest relative distance of a gradient."""
    assert found.keys() == expected.keys()
    return max(float(jnp.linalg.norm(found[p] - expected[p]) / jnp.linalg.norm(expected[p])) for p in expected)


def plainly() -> tuple[Any, Any, Any]:
    """(loss, share of pairs with the right preference, gradients), from all logits and by the formula."""
    model, frozen, adapters, sequences = setting()

    def loss(adapters: Any) -> Any:
        outputs = model.run(frozen, adapters, sequences, train=True)
        log_p = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", outputs.hidden, outputs.head, precision="highest"))
        log_p = jnp.take_along_axis(log_p, jnp.asarray(sequences.labels)[..., None], axis=-1)[..., 0]
        log_p = jnp.sum(log_p * sequences.weights, axis=1)
        margins = [0.1 * (log_p[i] - log_p[i + 1]) for i in (0, 2)]
        value = sum(jnp.log1p(jnp.exp(-margin)) for margin in margins) / 2
        return value, sum((margin > 0).astype(jnp.float32) for margin in margins) / 2

    (value, preferred), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=COMPILER_OPTIONS)(
        adapters
    )
    return value, preferred, gradients


def check_preference(loss: Loss) -> None:
    value, preferred, gradients = plainly()
    for micro_batches in (1, 2):
        found = run((Term(loss),), micro_batches)
        assert float(found.loss) == pytest.approx(float(value), rel=bound("accumulation"))
        assert float(found.metrics["preferred"]) == float(preferred)
        assert distance(found.gradients, gradients) <= bound("preference_gradients_fp32")


def test_a_preference_loss_over_pairs_needs_no_change_of_the_step() -> None:
    assert isinstance(PairPreference(), Loss)
    check_preference(PairPreference())


def test_a_preference_loss_of_another_strength_is_noticed() -> None:
    other = PairPreference()
    other.beta = 0.11
    with pytest.raises(AssertionError):
        check_preference(other)


def test_accumulation_is_exact_for_each_of_several_losses() -> None:
    objective = (*next_token_objective(0.1), Term(PairPreference(), 0.5), Term(RelativeNorm(), 0.3))
    whole, split = run(objective, 1), run(objective, 2)
    assert float(split.loss) == pytest.approx(float(whole.loss), rel=bound("accumulation"))
    assert distance(split.gradients, whole.gradients) <= bound("accumulation")
    # Each loss contributes to the gradients.
    for left_out in range(len(objective)):
        rest = [term for index, term in enumerate(objective) if index != left_out]
        assert distance(run(tuple(rest), 1).gradients, whole.gradients) > 100 * bound("accumulation")


def test_totals_of_one_micro_batch_are_not_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run((Term(RelativeNorm()),), 1)
    right = RelativeNorm.__call__

    def own(self: RelativeNorm, outputs: Outputs, batch: Batch, totals: Any) -> Any:
        return right(self, outputs, batch, {"norms": jax.lax.stop_gradient(jnp.sum(outputs.hidden**2))})

    monkeypatch.setattr(RelativeNorm, "__call__", own)
    assert distance(run((Term(RelativeNorm()),), 2).gradients, whole.gradients) > 100 * bound("accumulation")


@pytest.mark.parametrize(
    ("objective", "micro_batches", "passes"),
    [
        (next_token_objective(0.0), 2, ["train"]),
        (next_token_objective(0.1), 1, ["train"]),
        (next_token_objective(0.1), 2, ["first", "train"]),
        ((Term(PairPreference()),), 2, ["train"]),
    ],
    ids=["no totals", "one micro-batch", "totals", "preference"],
)
def test_a_first_pass_is_made_where_a_loss_needs_totals(
    objective: Any, micro_batches: int, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right, traced = Model.run, []

    def recorded(self: Model, *args: Any, train: bool, **more: Any) -> Outputs:
        traced.append("train" if train else "first")
        return right(self, *args, train=train, **more)

    monkeypatch.setattr(Model, "run", recorded)
    model, frozen, adapters, sequences = setting()
    batch = jax.tree.map(lambda array: array.reshape(micro_batches, -1, array.shape[-1]), sequences)
    jax.eval_shape(lambda f, a, b: loss_and_gradients(model, f, a, b, objective), frozen, adapters, batch)
    assert sorted(set(traced)) == passes


def test_evaluation_uses_the_loss_that_it_is_given() -> None:
    model, frozen, adapters, sequences = setting()
    for loss, weight in ((PairPreference(), 2.0), (NextTokenCrossEntropy(), float(np.sum(sequences.weights)))):
        evaluate = jax.jit(make_eval_step(model, loss), compiler_options=COMPILER_OPTIONS)
        summed, found = evaluate(frozen, adapters, sequences)
        assert float(found) == weight
        expected = float(run((Term(loss),), 1).loss)
        assert float(summed.loss / found) == pytest.approx(expected, rel=bound("accumulation"))
    with pytest.raises(
        ValueError, match=r"^loss: expected one without totals to evaluate, found one that needs router"
    ):
        make_eval_step(model, LoadBalancing())


def test_two_losses_may_not_report_the_same_name() -> None:
    with pytest.raises(ValueError, match="expected metrics of different names, found 'preferred' twice"):
        run((Term(PairPreference()), Term(PairPreference())), 1)


def test_the_usual_objective() -> None:
    assert [type(term.loss) for term in next_token_objective()] == [NextTokenCrossEntropy]
    both = next_token_objective(0.25)
    assert [(type(term.loss), term.coefficient) for term in both] == [
        (NextTokenCrossEntropy, 1.0),
        (LoadBalancing, 0.25),
    ]
