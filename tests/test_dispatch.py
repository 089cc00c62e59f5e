"""Sort-based dispatch against the dense oracle, and the properties of its schedule, on fresh random inputs."""

from __future__ import annotations

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from jax.extend.core import jaxprs_in_params

from jaxmoe.ops import experts as dispatch
from jaxmoe.ops.dispatch import Local
from jaxmoe.ops.experts import ExpertWeights, dense_experts, sorted_experts
from jaxmoe.ops.implementations import OPERATIONS, default_device, forced
from jaxmoe.ops.kernels.grouped_matmul import xla
from jaxmoe.ops.low_rank import Adapter
from jaxmoe.ops.router import Routing, expert_counts, load_balancing_loss, route
from jaxmoe.ops.schedule import make_schedule
from tests.tolerances import bound

# (M, D, F, E, k): one token; k = E; one expert; more experts than rows; several tiles per expert; odd sizes
SHAPES = [(1, 8, 4, 4, 2), (9, 8, 4, 3, 3), (20, 8, 4, 1, 1), (3, 12, 20, 40, 2), (200, 16, 8, 5, 2)]
SKEWS = ("random", "last experts", "reversed", "ties")

# One fixture serves all examples of a test.
UNCHECKED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
examples = settings(max_examples=30, deadline=None, suppress_health_check=UNCHECKED)
cases = given(st.sampled_from(SHAPES), st.sampled_from(SKEWS), st.integers(0, 2**31))


# The entries of the registry that run here, in float32: a new one is compared without another line.
GROUPED_MATMULS = {
    name: entry.load()
    for name, entry in OPERATIONS["grouped_matmul"].items()
    if entry.unsupported(default_device()) is None and entry.load().unsupported("float32") is None
}


@pytest.fixture(params=GROUPED_MATMULS)
def grouped_matmul(request):
    """Each of them in turn, selected by name."""
    with forced(grouped_matmul=request.param):
        yield GROUPED_MATMULS[request.param]


routed = jax.jit(route, static_argnames=("num_experts_per_tok", "norm_topk_prob"))


def make_case(shape, skew, seed):
    """Inputs of the mixture (float32), and routing of the given skew."""
    M, D, F, E, k = shape
    rng = np.random.default_rng(seed)

    def normal(*size):
        return rng.normal(size=size).astype(np.float32)

    x, gate_up, down, gate = normal(M, D), normal(E, 2 * F, D) / 3, normal(E, D, F) / 3, normal(E, D)
    if skew == "ties":
        gate = np.zeros_like(gate)
    routing = routed(x, gate, num_experts_per_tok=k, norm_topk_prob=seed % 2 == 0)
    if skew in ("last experts", "reversed"):
        # Every token to the same k experts, the last ones; the others stay empty.
        chosen = np.arange(E - k, E, dtype=np.int32)[:: -1 if skew == "reversed" else 1]
        routing = routing._replace(experts=np.broadcast_to(chosen, (M, k)))
    rank = 2
    adapters = ((normal(E, rank, D), normal(E, 2 * F, rank) / 3), (normal(E, rank, F), normal(E, D, rank) / 3))
    return x, routing, (gate_up, down), adapters


def run(experts, x, weights, stacks, adapters, routing):
    """One number that depends on every output, differentiable in everything except the choice of experts."""
    pairs = [Adapter(a, b, scale) for (a, b), scale in zip(adapters, (0.5, 2.0), strict=True)]
    y = experts(x, routing._replace(weights=weights), ExpertWeights(stacks[0], stacks[1], 0, True), *pairs)
    return weighted_sum(y), y


def weighted_sum(y):
    """A linear function with a different coefficient for each element, so that no error cancels or is amplified."""
    return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))


@partial(jax.jit, static_argnums=0)
def outputs_and_gradients(experts, x, weights, stacks, adapters, routing):
    run_on = partial(run, experts)
    return jax.value_and_grad(run_on, argnums=(0, 1, 2, 3), has_aux=True)(x, weights, stacks, adapters, routing)


NUDGE = 2.0**-20  # relative, uniform: some units in the last place


def nudged(tree, seed):
    """The arrays with every number slightly off, as rounding would make them."""
    rng = np.random.default_rng([seed, 1])
    return jax.tree.map(lambda a: np.asarray(a * (1 + NUDGE * rng.uniform(-1, 1, np.shape(a))), np.float32), tree)


def relative_error(found, expected, elsewhere):
    """L2 error over the norm, or over the size of the terms if they cancel.

    A gradient of one token may be a hundredth of its terms, and rounding is relative to the terms. `elsewhere` is the
    result for inputs that are off by rounding; it differs by as much as rounding may cause.
    """
    scale = max(np.linalg.norm(expected), np.linalg.norm(elsewhere - expected) / NUDGE)
    return np.linalg.norm(np.asarray(found) - expected) / (scale if scale > 0 else 1)


def worst_error(shape, skew, seed):
    """Largest relative L2 error of the output and of each gradient, sorted dispatch against the oracle."""
    x, routing, stacks, adapters = make_case(shape, skew, seed)
    inputs = (x, np.asarray(routing.weights), stacks, adapters)

    def results(experts, inputs):
        (_, y), gradients = jax.device_get(outputs_and_gradients(experts, *inputs, routing))
        return y, gradients

    exact = results(dense_experts, inputs), results(dense_experts, nudged(inputs, seed))
    return max(jax.tree.leaves(jax.tree.map(relative_error, results(sorted_experts, inputs), *exact)))


@pytest.mark.parametrize("grouped_matmul", [n for n in GROUPED_MATMULS if n != "ragged_dot"], indirect=True)
@example((1, 8, 4, 4, 2), "random", 1177)  # the gradients of the routing weights nearly cancel
@cases
@examples
def test_equals_the_oracle(grouped_matmul, shape, skew, seed):
    assert worst_error(shape, skew, seed) <= bound("dispatch_fp32")


def test_the_comparison_sees_another_expert(grouped_matmul, monkeypatch):
    """A planted fault that fits every implementation: each row times the weights of another expert.

    Of "ragged_dot", which is JAX's own, this is the only comparison.
    """
    kind = type(grouped_matmul)
    matmul = kind.matmul

    def wrong(self, x, weight, *where, **options):
        return matmul(self, x, jnp.roll(weight, 1, axis=0), *where, **options)

    case = ((200, 16, 8, 5, 2), "random", 7)
    assert worst_error(*case) <= bound("dispatch_fp32")
    monkeypatch.setattr(kind, "matmul", wrong)
    jax.clear_caches()
    assert worst_error(*case) > 100 * bound("dispatch_fp32")


def swapped_gate_and_up(gate_up):
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(up) * gate


def without_the_last_row(rows, weights, way):
    schedule = way.schedule
    dropped = schedule._replace(destination=schedule.destination.at[-1, -1].set(schedule.source.shape[0] - 1))
    return original_combine(rows, weights, Local(dropped))


class OffByOneExpert(xla.Xla):
    def matmul(self, x, weight, schedule, offset, **options):
        rolled = schedule._replace(tile_expert=jnp.roll(schedule.tile_expert, 1))
        return super().matmul(x, weight, rolled, offset, **options)


def forgotten_gradient(outer, rows, low, d_y, d_low, adapter):
    return original_gradient(outer, rows, low, d_y, jnp.ones_like(d_low), adapter)


original_combine = dispatch.combine
original_gradient = dispatch._adapter_gradient  # pyright: ignore[reportPrivateUsage]
FAULTS = {
    "swiglu_of_product": (dispatch, swapped_gate_and_up),
    "combine": (dispatch, without_the_last_row),
    "XLA": (xla, OffByOneExpert()),
    "_adapter_gradient": (dispatch, forgotten_gradient),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_comparison_sees_a_planted_fault(monkeypatch, name):
    case = ((200, 16, 8, 5, 2), "random", 7)
    assert worst_error(*case) <= bound("dispatch_fp32")
    owner, fault = FAULTS[name]
    monkeypatch.setattr(owner, name, fault)
    jax.clear_caches()
    assert worst_error(*case) > 100 * bound("dispatch_fp32")
    monkeypatch.undo()
    jax.clear_caches()


scheduled = jax.jit(make_schedule, static_argnums=(1, 2))


@cases
@examples
def test_schedule_places_every_row_once(shape, skew, seed):
    M, _, _, E, k = shape
    _, routing, _, _ = make_case(shape, skew, seed)
    experts = np.asarray(routing.experts)
    tile = xla.XLA.tile_rows(M * k, E)
    schedule = jax.device_get(scheduled(routing.experts, E, tile))
    positions = schedule.destination.reshape(-1)
    assert len(set(positions.tolist())) == M * k  # no two rows share a position, none is dropped
    assert (schedule.source[positions] == np.arange(M * k)).all()  # the two directions are inverse
    assert (schedule.source >= 0).sum() == M * k
    assert (schedule.tile_expert[positions // tile] == experts.reshape(-1)).all()  # a tile holds one expert's rows
    sizes = np.bincount(experts.reshape(-1), minlength=E)
    assert schedule.tiles_used == sum(-(-size // tile) for size in sizes)
    assert positions.max() < schedule.tiles_used * tile <= len(schedule.source)
    order = schedule.source[schedule.source >= 0]
    assert (np.lexsort((order, experts.reshape(-1)[order])) == np.arange(M * k)).all()  # the sort is stable


@pytest.mark.parametrize("shape", [(1, 8, 4, 4, 2), (200, 16, 8, 5, 2)])
def test_stack_of_layers_is_indexed_in_place(shape):
    """The layer that `offset` selects from a stack of three gives the same as the layer alone, as does x's gradient."""
    x, routing, stacks, _ = make_case(shape, "random", 11)
    three = tuple(np.concatenate([np.full_like(s, np.nan), s, np.full_like(s, np.nan)]) for s in stacks)

    @partial(jax.jit, static_argnums=3)
    @partial(jax.value_and_grad, argnums=0)
    def value(x, stacks, offset, trainable):
        return weighted_sum(sorted_experts(x, routing, ExpertWeights(stacks[0], stacks[1], offset, trainable)))

    alone = value(x, stacks, 0, True)
    inside = value(x, three, shape[3], False)
    jax.tree.map(np.testing.assert_array_equal, alone, inside)


def largest_intermediate(function, *arguments):
    """The size, in elements, of the largest value that the traced function computes, also in loops and branches."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            for inner in jaxprs_in_params(equation.params):
                yield from walk(inner)
            yield from (variable.aval.size for variable in equation.outvars if hasattr(variable.aval, "size"))

    return max(walk(jax.make_jaxpr(function)(*arguments).jaxpr))


def test_no_buffer_exceeds_the_padded_rows_times_the_widest_layer():
    M, D, F, E, k = shape = (256, 32, 16, 16, 2)
    x, routing, stacks, _ = make_case(shape, "random", 0)
    tile = xla.XLA.tile_rows(M * k, E)
    rows = (M * k // tile + E) * tile

    def gradient_of(experts):
        def value(x, stacks):
            return jnp.sum(experts(x, routing, ExpertWeights(stacks[0], stacks[1], 0, True)))

        return jax.grad(value, argnums=(0, 1))

    limit = rows * max(D, 2 * F)
    assert largest_intermediate(gradient_of(sorted_experts), x, stacks) <= limit
    assert largest_intermediate(gradient_of(dense_experts), x, stacks) > limit  # the measure sees [M, E, 2F]


def test_ties_go_to_the_lowest_experts():
    routing = route(jnp.ones((5, 8)), jnp.zeros((6, 8)), num_experts_per_tok=3, norm_topk_prob=True)
    np.testing.assert_array_equal(routing.experts, np.tile([0, 1, 2], (5, 1)))
    np.testing.assert_allclose(routing.weights, 1 / 3, rtol=bound("routing_weights_fp32"))


def test_load_balancing_loss_by_hand():
    """Two tokens, two experts, k = 1, one layer: both go to expert 0 with probability 3/4."""
    counts, sums = jnp.array([[2, 0]]), jnp.array([[1.5, 0.5]])
    assert float(load_balancing_loss(counts, sums, jnp.array(2))) == pytest.approx(2 * (1.0 * 0.75 + 0.0 * 0.25))


def test_counts_leave_out_padding():
    experts = jnp.array([[0, 2], [1, 2], [0, 1]])
    np.testing.assert_array_equal(expert_counts(experts, jnp.array([True, True, False]), 4), [1, 1, 2, 0])


def test_same_input_gives_the_same_output():
    x, routing, stacks, _ = make_case((200, 16, 8, 5, 2), "random", 3)
    block = jax.jit(
        lambda x: sorted_experts(x, routing, ExpertWeights(jnp.asarray(stacks[0]), jnp.asarray(stacks[1]), 0, True))
    )
    first = block(x)
    for _ in range(5):
        np.testing.assert_array_equal(block(x), first)


def test_routing_is_renormalised_only_when_asked():
    rng = np.random.default_rng(0)
    x, gate = (rng.normal(size=(n, 8)).astype(np.float32) for n in (7, 6))
    plain: Routing = routed(x, gate, num_experts_per_tok=2, norm_topk_prob=False)
    scaled: Routing = routed(x, gate, num_experts_per_tok=2, norm_topk_prob=True)
    np.testing.assert_allclose(scaled.weights.sum(-1), 1, rtol=bound("routing_weights_fp32"))
    assert (plain.weights.sum(-1) < 0.999).any()
    renormalised = plain.weights / plain.weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(renormalised, scaled.weights, rtol=bound("routing_weights_fp32"))
