"""What trains the router besides the loss: z-loss, penalty and DenseMixer, against loops and difference quotients."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import LoraConfig
from jaxmoe.data.packing import Batch
from jaxmoe.model.interface import RouterStats
from jaxmoe.ops.dense_router import straight_through
from jaxmoe.ops.experts import ExpertWeights
from jaxmoe.ops.router import route
from jaxmoe.train.loss import NextTokenCrossEntropy, Outputs, Term
from jaxmoe.train.router_losses import RouterZLoss, RoutingPenalty
from jaxmoe.train.step import LossAndGradients, Model, loss_and_gradients
from tests.parity import COMPILER_OPTIONS
from tests.test_losses import distance
from tests.test_train import CONFIG, adapted, random_batch
from tests.tolerances import bound

LOSSES = RouterZLoss(), RoutingPenalty()
NAMES = [loss.name for loss in LOSSES]


# --- the losses, given the logits


def routed() -> tuple[Outputs, Batch]:
    """Logits of a router and of a base's, for sequences with padding."""
    batch = jax.tree.map(jnp.asarray, random_batch(CONFIG, 4, 24))
    now, base = np.random.default_rng(0).normal(size=(2, 2, 4, 24, CONFIG.num_experts)).astype(np.float32)
    return outputs_of(now, base), batch


def outputs_of(now: Any, base: Any) -> Outputs:
    hidden, head = jnp.zeros((*now.shape[1:3], 1)), jnp.zeros((1, 1))  # the losses read the router's logits alone
    stats = RouterStats(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1)), jnp.zeros((), jnp.int32))
    logits = {"router_logits": jnp.asarray(now), "base_router_logits": jnp.asarray(base)}
    return Outputs(hidden, head, stats, chunk=1, frozen_head=True, **logits)


def plainly() -> dict[str, float]:
    """Both losses, token by token."""
    outputs, batch = routed()
    now, base = (np.asarray(each, np.float64) for each in (outputs.router_logits, outputs.base_router_logits))
    squares, divergences = [], []
    for layer in range(len(now)):
        for line, place in zip(*np.nonzero(np.asarray(batch.segment_ids)), strict=True):
            p, q = (np.exp(each[layer, line, place]) for each in (now, base))
            squares.append(np.log(p.sum()) ** 2)
            p, q = p / p.sum(), q / q.sum()
            divergences.append(sum(p * np.log(p / q)))
    return {"router_z_loss": float(np.mean(squares)), "routing_kl": float(np.mean(divergences))}


def errors(parts: Any) -> list[float]:
    """How far the losses of parts of a batch together are from those of the loops, relative."""
    whole = routed()[1]
    total = lambda loss: sum(float(loss(outputs, batch, {})[1][loss.name]) for outputs, batch in parts)
    values = [total(loss) / float(loss.weight(whole)) for loss in LOSSES]
    return [abs(value / expected - 1) for value, expected in zip(values, plainly().values(), strict=True)]


def test_the_losses_are_means_over_tokens_and_layers() -> None:
    """Micro-batches add up to the whole batch, whatever padding each has."""
    outputs, batch = routed()
    assert max(errors([(outputs, batch)])) <= bound("router_losses_fp32")
    parts = []
    for lines in (slice(0, 1), slice(1, 4)):
        now, base = outputs.router_logits, outputs.base_router_logits
        assert now is not None and base is not None
        part = jax.tree.map(lambda array, lines=lines: array[lines], batch)
        parts.append((outputs_of(now[:, lines], base[:, lines]), part))
    assert max(errors(parts)) <= bound("router_losses_fp32")


@pytest.mark.parametrize("fault", ["padding", "twice the logits", "exchanged"])
def test_other_losses_are_noticed(fault: str) -> None:
    outputs, batch = routed()
    now, base = outputs.router_logits, outputs.base_router_logits
    assert now is not None
    if fault == "padding":
        batch = batch._replace(segment_ids=jnp.ones_like(batch.segment_ids))
    elif fault == "twice the logits":
        outputs = outputs_of(2 * now, base)
    else:
        outputs = outputs_of(base, now)
    assert min(errors([(outputs, batch)])) > 100 * bound("router_losses_fp32")


# --- in a model


@functools.cache
def setting() -> tuple[Model, Any, Any, Batch]:
    """A model whose router is trained in full beside adapters, and sequences whose tokens keep their experts, without
    which a loss would jump."""
    lora = LoraConfig(r=2, targets=("q_proj",))
    model, frozen, adapters = adapted(CONFIG, lora)
    router = 10 * frozen["sparse.gate"]  # a fresh one hardly prefers any expert
    frozen |= {"sparse.gate": router}
    adapters |= {"sparse.gate": router + 0.05 * jax.random.normal(jax.random.key(3), router.shape)}
    model = model._replace(lora=replace(lora, full_router=True), router_logits=True, base_router=True)
    batch = jax.tree.map(jnp.asarray, random_batch(CONFIG, 2, 12))
    experts = np.stack([np.random.default_rng(i).permutation(CONFIG.num_experts)[:2] for i in range(2 * 12 * 2)])
    return model, frozen, adapters, batch._replace(experts=jnp.asarray(experts.reshape(2, 12, 2, 2), jnp.int16))


@functools.cache
def stepped(*, dense_router: bool = False) -> Any:
    """(coefficients of the next-token loss and of the router's losses, adapters) -> loss and gradients, compiled."""
    model, frozen, _, sequences = setting()
    model = model._replace(dense_router=dense_router)
    batch = jax.tree.map(lambda array: array[None], sequences)

    def step(weights: Any, adapters: Any) -> LossAndGradients:
        losses = NextTokenCrossEntropy(), *LOSSES
        objective = tuple(Term(loss, weight) for loss, weight in zip(losses, weights, strict=True))
        return loss_and_gradients(model, frozen, adapters, batch, objective)

    return jax.jit(step, compiler_options=COMPILER_OPTIONS)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradients_are_slopes(name: str) -> None:
    """Along the gradient, and along that of the router alone."""
    adapters, weights = setting()[2], (0.0, *(float(each == name) for each in NAMES))
    gradients = stepped()(weights, adapters).gradients
    assert set(gradients) == {"attention.q_proj.lora_A", "attention.q_proj.lora_B", "sparse.gate"}
    for chosen in (gradients, {"sparse.gate": gradients["sparse.gate"]}):
        length = float(jnp.sqrt(sum(jnp.sum(g**2) for g in chosen.values())))
        moved = lambda step, chosen=chosen, length=length: {
            path: array + step * chosen[path] / length if path in chosen else array for path, array in adapters.items()
        }
        high, low = (float(stepped()(weights, moved(step)).metrics[name]) for step in (1e-2, -1e-2))
        assert (high - low) / 2e-2 == pytest.approx(length, rel=bound("difference_quotient"))


def test_a_penalty_of_nothing_has_no_gradient() -> None:
    """New adapters say what the base says: the divergence is 0 up to rounding, and so is its gradient."""
    _, frozen, adapters, _ = setting()
    same = {path: jnp.zeros_like(a) if path.endswith("lora_B") else a for path, a in adapters.items()}
    found = stepped()((0.0, 0.0, 1.0), same | {"sparse.gate": frozen["sparse.gate"]})
    assert abs(float(found.metrics["routing_kl"])) <= bound("no_penalty_fp32")
    assert max(float(jnp.max(jnp.abs(g))) for g in found.gradients.values()) <= bound("no_penalty_fp32")


def test_losses_of_no_weight_change_no_bit() -> None:
    """A step that computes z-loss and penalty and weighs them with 0 learns what a step without them learns."""
    model, frozen, adapters, sequences = setting()
    plain = model._replace(router_logits=False, base_router=False)
    batch = jax.tree.map(lambda array: array[None], sequences)
    objective = (Term(NextTokenCrossEntropy()),)
    step = jax.jit(lambda a: loss_and_gradients(plain, frozen, a, batch, objective), compiler_options=COMPILER_OPTIONS)
    expected = step(adapters)
    same = lambda found: all(map(np.array_equal, *(jax.tree.leaves((x.loss, x.gradients)) for x in (found, expected))))
    assert same(stepped()((1.0, 0.0, 0.0), adapters))
    assert not any(same(stepped()(weights, adapters)) for weights in ((1.0, 1e-3, 0.0), (1.0, 0.0, 1e-3)))


def test_dense_mixer_changes_gradients_and_no_value() -> None:
    adapters, weights = setting()[2], (1.0, 0.0, 0.0)
    without, found = stepped()(weights, adapters), stepped(dense_router=True)(weights, adapters)
    assert float(found.loss) == float(without.loss)
    assert distance(found.gradients, without.gradients) > 100 * bound("accumulation")


# --- DenseMixer


def mixture(norm: bool) -> tuple[Any, ...]:
    M, D, E, F = 7, 8, 6, 4
    keys = jax.random.split(jax.random.key(0), 5)
    x, router = jax.random.normal(keys[0], (M, D)), jax.random.normal(keys[1], (E, D))
    weights = ExpertWeights(
        jax.random.normal(keys[2], (E, 2 * F, D)), jax.random.normal(keys[3], (E, D, F)), 0, trainable=False
    )
    router_of = functools.partial(route, num_experts_per_tok=2, norm_topk_prob=norm)
    return x, router, weights, router_of, jax.random.normal(keys[4], (M, D))


def of_other_experts(norm: bool) -> np.ndarray:
    """The gradient by the router's weights that the experts outside a token's k add, from the definition."""
    x, router, weights, router_of, d_out = mixture(norm)
    outputs = []  # of each expert, [M, D]
    for gate_up, down in zip(np.asarray(weights.gate_up_proj), np.asarray(weights.down_proj), strict=True):
        gate, up = np.split(np.asarray(x) @ gate_up.T, 2, axis=1)
        outputs.append(gate / (1 + np.exp(-gate)) * up @ down.T)
    by_probability = np.einsum("emd,md->me", outputs, np.asarray(d_out))
    found, routing = np.zeros(router.shape), router_of(x, router)
    p, chosen = np.asarray(routing.probabilities, np.float64), np.asarray(routing.experts)
    for token in range(len(x)):
        scale = p[token, chosen[token]].sum() if norm else 1.0
        d_p = np.asarray([0 if e in chosen[token] else by_probability[token, e] / scale for e in range(len(router))])
        d_logits = p[token] * (d_p - (p[token] * d_p).sum())
        found += np.outer(d_logits, x[token])
    return found


def through(norm: bool, changed: Any = lambda routing: routing) -> Any:
    x, router, weights, router_of, d_out = mixture(norm)

    def value(router: Any) -> Any:
        out = straight_through(x, changed(router_of(x, router)), weights, norm_topk_prob=norm)
        return jnp.sum(out * d_out), out

    (_, out), gradient = jax.jit(jax.value_and_grad(value, has_aux=True), compiler_options=COMPILER_OPTIONS)(router)
    assert not out.any()
    return np.asarray(gradient)


def error(gradient: np.ndarray, norm: bool) -> float:
    expected = of_other_experts(norm)
    return float(np.linalg.norm(gradient - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("norm", [True, False])
def test_the_router_learns_from_other_experts(norm: bool) -> None:
    assert error(through(norm), norm) <= bound("dispatch_fp32")


def test_other_gradients_of_the_router_are_noticed() -> None:
    assert error(through(False), True) > 100 * bound("dispatch_fp32")
    one_chosen = lambda routing: routing._replace(experts=routing.experts[:, :1])
    assert error(through(True, one_chosen), True) > 100 * bound("dispatch_fp32")
