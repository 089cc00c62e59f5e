"""The mixture of experts: sort by expert, grouped matmul, un-permute by gather, weigh, sum over k.

`dense_experts` is the oracle, `sorted_experts` the implementation. The mixture has its own backward pass (`_mixture`).
It saves x and the product of gate and up, and nothing else of that size. The gathered rows are cheap to gather again.
The experts' outputs are not needed, since

    d w_row = <d out, y_row> = <a_row, W_down^T d out>,    a = silu(gate) * up,

is a by-product of the gradient of a.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.distributed.mesh import ONE_DEVICE, MeshShape
from jaxmoe.ops.contraction import PRECISION
from jaxmoe.ops.dispatch import Dispatch, Local, combine, make_dispatch
from jaxmoe.ops.few_experts import few_experts
from jaxmoe.ops.fp8_products import QuantizedRows, prepared, quantized_matmul
from jaxmoe.ops.frozen import define_vjp
from jaxmoe.ops.grouped_matmul import GroupedMatmul, LowRankTerm
from jaxmoe.ops.implementations import Choice, choose
from jaxmoe.ops.kept import GATE_UP, SCHEDULE
from jaxmoe.ops.low_rank import Adapter, Factors, fold, unfold
from jaxmoe.ops.router import Routing
from jaxmoe.ops.schedule import Schedule, of_experts
from jaxmoe.ops.swiglu import swiglu_of_product
from jaxmoe.quantized_stack import QuantizedStack


class ExpertWeights(NamedTuple):
    """The fused experts of one layer inside a stack of groups (layers * experts): group = offset + expert.

    `gate_up_proj` [groups, 2F, D] (rows :F gate, F: up) and `down_proj` [groups, D, F] may hold all layers: `offset`
    selects the layer, and no slice of it is copied. `trainable` says whether they get a gradient. Frozen ones may be
    quantised: an expert is decoded when it is multiplied, forwards and backwards.
    """

    gate_up_proj: Array | QuantizedStack
    down_proj: Array | QuantizedStack
    offset: Array | int
    trainable: bool


def implementation(dtype: Any, hidden_size: int, moe_intermediate_size: int) -> Choice:
    """How the experts' products of this dtype and these widths run on the default device, and why."""
    return choose("grouped_matmul", dtype, hidden_size, moe_intermediate_size)


def dense_experts(
    x: Float[Array, "M D"],
    routing: Routing,
    weights: ExpertWeights,
    gate_up_adapter: Adapter | None = None,
    down_adapter: Adapter | None = None,
) -> Float[Array, "M D"]:
    """The oracle of `sorted_experts` for small sizes: every expert computes every token; unchosen ones count zero."""
    M, E = routing.logits.shape
    layer = partial(jax.lax.dynamic_slice_in_dim, start_index=weights.offset, slice_size=E)

    def project(rows: Array, equation: str, weight: Array | QuantizedStack, adapter: Adapter | None) -> Array:
        assert not isinstance(weight, QuantizedStack)
        full = layer(weight).astype(jnp.float32)
        if adapter is not None:
            delta = jnp.einsum("eor,eri->eoi", adapter.lora_B, adapter.lora_A, precision=PRECISION)
            full = full + adapter.scale * delta
        return jnp.einsum(equation, rows, full, precision=PRECISION)

    gate, up = jnp.split(project(x.astype(jnp.float32), "mi,eoi->meo", weights.gate_up_proj, gate_up_adapter), 2, -1)
    out = project(jax.nn.silu(gate) * up, "mei,eoi->meo", weights.down_proj, down_adapter)
    mixture = jnp.zeros((M, E)).at[jnp.arange(M)[:, None], routing.experts].set(routing.weights)
    return jnp.einsum("meo,me->mo", out, mixture, precision=PRECISION)


def sorted_experts(
    x: Float[Array, "M D"],
    routing: Routing,
    weights: ExpertWeights,
    gate_up_adapter: Adapter | None = None,
    down_adapter: Adapter | None = None,
    *,
    in_scan: bool = False,
    one_by_one: bool = False,
    mesh: MeshShape = ONE_DEVICE,
) -> Float[Array, "M D"]:
    """The mixture's output sum_k w_k down_k(silu(gate_k x) * up_k x), float32, by sort-based dispatch.

    Adapters hold one A and B per expert ([E, r, in], [E, out, r]); their products join the base's before it is rounded.
    `in_scan` says that this is a step of a scan that will be differentiated: its saved results are then slices of a
    stack. `one_by_one` decodes a quantised stack for each product anew, so that no two decoded ones exist at once; that
    takes less memory and more time. On a mesh with an `expert` axis, x are the tokens of this device, `weights` and
    adapters its own share of the experts.
    """
    num_experts = routing.logits.shape[-1]
    widths = *weights.gate_up_proj.shape[1:], weights.down_proj.shape[2]
    products: GroupedMatmul = choose("grouped_matmul", x.dtype, *widths).value
    with jax.named_scope("permute"):
        dispatch = make_dispatch(routing.experts, num_experts, products, mesh)
        dispatch = jax.tree.map(partial(checkpoint_name, name=SCHEDULE), dispatch)
        adapted = _adapted(dispatch.schedule, gate_up_adapter or down_adapter)
        adapted = jax.tree.map(partial(checkpoint_name, name=SCHEDULE), adapted)
    adapters = tuple(adapter and adapter.factors() for adapter in (gate_up_adapter, down_adapter))
    stacks = weights.gate_up_proj, weights.down_proj
    offset = jnp.asarray(weights.offset, jnp.int32)
    one_by_one = one_by_one and any(isinstance(stack, QuantizedStack) for stack in stacks)
    plan = _Plan(products, weights.trainable, in_scan, one_by_one)
    few = choose("few_rows", x.dtype, *stacks).value.most_rows(*stacks) if mesh["expert"] == 1 else 0
    experts = routing.experts if not weights.trainable and x.shape[0] <= few else None
    return _mixture(x, routing.weights, stacks, offset, adapters, dispatch, adapted, experts, plan)


class _Adapted(NamedTuple):
    """The rows that low-rank products run over: a schedule, and which rows count if others are not written."""

    schedule: Schedule
    rows: Bool[Array, "P 1"] | None

    def low(self, products: GroupedMatmul, rows: Array, factor: Array, rank: int, *, transposed: bool) -> Array:
        """The rows of a low-rank product, zero where there is no adapter."""
        low: Array = fold(products.matmul(rows, factor, self.schedule, 0, transposed=transposed), rank)
        return low if self.rows is None else jnp.where(self.rows, low, 0)


def _adapted(schedule: Schedule, adapter: Adapter | None) -> _Adapted:
    """The rows of the experts that have the adapter; all of them where the products read no spans."""
    if adapter is None or adapter.experts is None or not schedule.spans:
        return _Adapted(schedule, None)
    tiles = schedule.tile_expert.shape[0]
    tile = schedule.source.shape[0] // tiles
    rows = jnp.repeat(adapter.experts[schedule.tile_expert], tile, total_repeat_length=tiles * tile)
    return _Adapted(of_experts(schedule, adapter.experts, tile), rows[:, None])


def routed_outputs(
    x: Float[Array, "M D"],
    experts: Int[Array, "M k"],
    num_experts: int,
    weights: ExpertWeights,
    gate_up_adapter: Adapter | None = None,
    down_adapter: Adapter | None = None,
    *,
    mesh: MeshShape = ONE_DEVICE,
) -> Float[Array, "M k D"]:
    """The output down_e(silu(gate_e x) * up_e x) of each token's experts, before they are weighted and summed.

    As `sorted_experts`, without a gradient; the experts of a token may be any, but no two the same.
    """
    widths = *weights.gate_up_proj.shape[1:], weights.down_proj.shape[2]
    products: GroupedMatmul = choose("grouped_matmul", x.dtype, *widths).value
    dispatch = make_dispatch(experts, num_experts, products, mesh)
    factors = [adapter and adapter.factors() for adapter in (gate_up_adapter, down_adapter)]
    offset, schedule = jnp.asarray(weights.offset, jnp.int32), dispatch.schedule
    rows = dispatch.rows(x, finite=False)
    adapted = _adapted(schedule, gate_up_adapter or down_adapter)
    hidden, _ = _project(rows, weights.gate_up_proj, offset, factors[0], schedule, adapted, products, swiglu=True)
    rows, _ = _project(hidden, weights.down_proj, offset, factors[1], schedule, adapted, products)
    return dispatch.back(rows)


class _Plan(NamedTuple):
    """What is decided while tracing: the products' implementation, whether the stacks get gradients, whether the
    results saved for the backward pass lie in a scan's stack, and whether quantised stacks are decoded one by one."""

    products: GroupedMatmul
    trainable: bool
    in_scan: bool
    one_by_one: bool

    def in_turn(self, offset: Any, *inputs: Any) -> tuple[Any, ...]:
        """The same values; with `one_by_one` no work that needs this offset begins before the inputs are there.

        XLA would otherwise decode the stacks of several products early, or once for all, and hold them together.
        """
        return jax.lax.optimization_barrier((offset, *inputs)) if self.one_by_one else (offset, *inputs)


class _Residuals(NamedTuple):
    x: Array
    weights: Array
    gate_up: Array  # [P, 2F]
    low: tuple[Array | None, Array | None]  # rows of the low-rank products, [P, r]
    stacks: tuple[Any, Any]
    offset: Any
    adapters: tuple[Factors | None, Factors | None]
    dispatch: Dispatch
    adapted: _Adapted


@partial(jax.custom_vjp, nondiff_argnums=(8,))
def _mixture(
    x: Array,
    weights: Array,
    stacks: tuple[Any, Any],
    offset: Any,
    adapters: tuple[Factors | None, Factors | None],
    dispatch: Dispatch,
    adapted: _Adapted,
    experts: Array | None,
    plan: _Plan,
) -> Array:
    """The forward pass without differentiation: nothing is saved, so SwiGLU is part of the product of gate and up.

    For a few tokens `experts` are those that they chose; the dispatch is then not used, so it is not computed.
    """
    if experts is not None:
        kernel = choose("few_rows", x.dtype, *stacks).value
        return few_experts(x, experts, weights, stacks, offset, adapters, kernel)
    with jax.named_scope("permute"):
        rows = _rows(x, stacks[0], adapters[0], dispatch, finite=False)
    with jax.named_scope("gate_up"):
        operands = rows, stacks[0], offset, adapters[0], dispatch.schedule, adapted
        hidden, _ = _project(*operands, plan.products, swiglu=True)
    with jax.named_scope("down"):
        rows, _ = _project(hidden, stacks[1], offset, adapters[1], dispatch.schedule, adapted, plan.products)
    with jax.named_scope("combine"):
        return combine(rows, weights, dispatch)


def _rows(x: Array, stack: Any, adapter: Factors | None, dispatch: Dispatch, *, finite: bool = True) -> Any:
    """The tokens' rows at their places, in the form in which they are multiplied with the stack.

    Without `finite` padding may hold anything: without a backward pass no row is added to another one.
    """
    form = prepared(x, stack, low_rank=adapter is not None) if isinstance(dispatch, Local) else x
    return jax.tree.map(partial(dispatch.rows, finite=finite), form)


def _product(
    rows: Array | QuantizedRows,
    stack: Any,
    offset: Any,
    schedule: Schedule,
    products: GroupedMatmul,
    *,
    swiglu: bool,
) -> Array:
    """Rows W^T, or SwiGLU of it."""
    form = rows if isinstance(rows, QuantizedRows) else prepared(rows, stack, low_rank=False)
    if isinstance(form, QuantizedRows):
        return quantized_matmul(form, stack, schedule, offset, swiglu=swiglu)
    return products.matmul(form, stack, schedule, offset, transposed=True, swiglu=swiglu)


def _project(
    rows: Any,
    stack: Any,
    offset: Any,
    adapter: Factors | None,
    schedule: Schedule,
    adapted: _Adapted,
    products: GroupedMatmul,
    swiglu: bool = False,
) -> tuple[Array, Array | None]:
    """(rows W^T + (rows A^T) B^T, or SwiGLU of it, and rows A^T)."""
    if adapter is None:
        return _product(rows, stack, offset, schedule, products, swiglu=swiglu), None
    a, b = adapter.terms(rows.dtype, products.rank_multiple)
    low = adapted.low(products, rows, a, adapter.rank, transposed=True)
    term = LowRankTerm(unfold(low, a.shape[1]), b)
    return products.matmul(rows, stack, schedule, offset, transposed=True, swiglu=swiglu, low=term), low


def _project_back(
    d_rows: Any,
    stack: Any,
    offset: Any,
    adapter: Factors | None,
    schedule: Schedule,
    adapted: _Adapted,
    products: GroupedMatmul,
) -> tuple[Array, Array | None]:
    """(dY W + (dY B) A, dY B): the gradient of the rows, and of the low-rank rows."""
    if adapter is None:
        return products.matmul(d_rows, stack, schedule, offset, transposed=False), None
    a, b = adapter.terms(d_rows.dtype, products.rank_multiple)
    low = adapted.low(products, d_rows, b, adapter.rank, transposed=False)
    term = LowRankTerm(unfold(low, a.shape[1]), a)
    return products.matmul(d_rows, stack, schedule, offset, transposed=False, low=term), low


def _mixture_forward(x, weights, stacks, offset, adapters, dispatch, adapted, experts, plan: _Plan):
    with jax.named_scope("permute"):
        rows = _rows(x, stacks[0], adapters[0], dispatch)
        offset, rows = plan.in_turn(offset, rows)
    with jax.named_scope("gate_up"):
        operands = rows, stacks[0], offset, adapters[0], dispatch.schedule, adapted
        gate_up, low_up = _project(*operands, plan.products)
        gate_up = checkpoint_name(gate_up, GATE_UP)
    with jax.named_scope("swiglu"):
        hidden = swiglu_of_product(gate_up)
        offset, hidden = plan.in_turn(offset, hidden)
    with jax.named_scope("down"):
        operands = hidden, stacks[1], offset, adapters[1], dispatch.schedule, adapted
        rows, low_down = _project(*operands, plan.products)
    with jax.named_scope("combine"):
        out = combine(rows, weights, dispatch)
    low: Any = tuple(None if a is None else checkpoint_name(a, GATE_UP) for a in (low_up, low_down))
    return out, _Residuals(x, weights, gate_up, low, stacks, offset, adapters, dispatch, adapted)


def _mixture_backward(plan: _Plan, residuals: _Residuals, d_out: Array):
    x, weights, gate_up, (low_up, low_down), stacks, offset, adapters, dispatch, adapted = residuals
    with jax.named_scope("combine"):
        d_rows = dispatch.rows(d_out.astype(x.dtype))  # not yet weighted
        weight_of_row = dispatch.weights(weights)
        offset, d_rows, gate_up = plan.in_turn(offset, d_rows, gate_up)
    with jax.named_scope("down"):
        operands = d_rows, stacks[1], offset, adapters[1], dispatch.schedule, adapted
        d_hidden, d_low_down = _project_back(*operands, plan.products)
    with jax.named_scope("swiglu"):
        # At padding the weight is zero, and so is everything that follows: no sum over rows needs a mask.
        again = plan.trainable or adapters[1] is not None
        gradient = choose("swiglu_gradient", gate_up, plan.in_scan).value
        hidden, d_gate_up, d_weight_of_row = gradient(gate_up, d_hidden, weight_of_row, with_hidden=again)
        offset, d_gate_up = plan.in_turn(offset, d_gate_up)
    with jax.named_scope("gate_up"):
        operands = d_gate_up, stacks[0], offset, adapters[0], dispatch.schedule, adapted
        d_x_rows, d_low_up = _project_back(*operands, plan.products)
    with jax.named_scope("permute"):
        d_x = dispatch.total(d_x_rows, None).astype(x.dtype)
        d_weights = dispatch.back(d_weight_of_row).astype(weights.dtype)

    def weighed(rows: Array) -> Array:
        return (rows.astype(jnp.float32) * weight_of_row).astype(rows.dtype)

    outer, of_adapted = (partial(plan.products.outer, schedule=each) for each in (dispatch.schedule, adapted.schedule))
    d_adapters: list[Factors | None] = [None, None]
    d_stacks: list[Array | None] = [None, None]
    with jax.named_scope("weight_gradients"):
        rows: Any = dispatch.rows(x) if plan.trainable or adapters[0] is not None else None
        if adapters[0] is not None:
            d_adapters[0] = _adapter_gradient(of_adapted, rows, low_up, d_gate_up, d_low_up, adapters[0])
        if adapters[1] is not None:
            assert hidden is not None and low_down is not None and d_low_down is not None
            d_adapters[1] = _adapter_gradient(
                of_adapted, hidden, weighed(low_down), d_rows, weighed(d_low_down), adapters[1]
            )
        if plan.trainable:
            assert hidden is not None
            d_stacks = [
                outer(d_gate_up, rows).astype(stacks[0].dtype),
                outer(weighed(d_rows), hidden).astype(stacks[1].dtype),
            ]
    return d_x, d_weights, tuple(d_stacks), None, tuple(d_adapters), None, None, None


def _adapter_gradient(outer: Any, rows: Array, low: Any, d_y: Array, d_low: Any, adapter: Factors) -> Factors:
    """The sums dA = dLow^T rows and dB = dY^T low; at padding one factor of each pair is zero."""
    d_a: Array = outer(d_low, rows)
    d_b: Array = outer(d_y, low)
    return Factors(d_a.astype(adapter.a.dtype), d_b.astype(adapter.b.dtype))


def _frozen(*arguments: Any) -> dict[int, str]:
    return {} if arguments[-1].trainable else {2: "experts' weights"}


define_vjp(_mixture, _mixture_forward, _mixture_backward, _frozen)
