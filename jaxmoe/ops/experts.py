"""Sort-based expert dispatch with static shapes: sort, grouped matmul, un-permute by gather, weigh, sum over k.

The R = M*k routed rows are laid out expert by expert, each expert's rows padded to whole tiles, so that a tile of rows
belongs to one expert:

    destination: routed row (token*k + slot) -> position in the padded layout
    source:      position -> routed row, or -1 for padding

No token is ever dropped: the layout has room for every routed row whatever the skew. The number of tiles in use is a
value, not a shape; its bound, floor(R / tile) + min(E, R), is static. Both directions of both permutations are gathers,
and the sums over k run in a fixed order, so the result is deterministic. Nothing of size [M, E, ...] exists.

The mixture has its own backward pass (`_mixture`), which keeps x and the product of gate and up, and nothing else as
large: the gathered rows are a gather away, and the experts' outputs are not needed, since

    d w_row = <d out, y_row> = <a_row, W_down^T d out>,    a = silu(gate) * up,

is a by-product of the gradient of a.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Shaped

from jaxmoe.nf4.stack import NF4Stack
from jaxmoe.ops import implementations
from jaxmoe.ops.kernels.grouped_matmul import xla as tiled
from jaxmoe.ops.kernels.swiglu_gradient import swiglu_gradient, swiglu_gradient_obstacle
from jaxmoe.ops.linear import PRECISION, Adapter, fold, swiglu, two_terms, unfold
from jaxmoe.ops.router import Routing

GATE_UP = "gate_up_product"  # what a recomputation policy may keep: [P, 2F], the largest result of a layer
SCHEDULE = "expert_schedule"  # and the row layout, small and made by a sort


class Schedule(NamedTuple):
    """Where every routed row lies, and which expert each tile of rows belongs to (P = tiles * tile positions).

    `first_tile` and `tile_count` say the same by expert; `blocks` does as the Mosaic GPU kernel takes it, by the most
    rows that a block may have. It is made here, once for all products of a layer.
    """

    destination: Int[Array, "M k"]
    source: Int[Array, " P"]
    tile_expert: Int[Array, " tiles"]
    tiles_used: Int[Array, ""]
    first_tile: Int[Array, " E"]
    tile_count: Int[Array, " E"]
    blocks: dict[int, Any]  # to `jaxmoe.ops.kernels.grouped_matmul.hopper.Blocks`


class ExpertWeights(NamedTuple):
    """The fused experts of one layer inside a stack of groups (layers * experts): group = offset + expert.

    `gate_up_proj` [groups, 2F, D] (rows :F gate, F: up) and `down_proj` [groups, D, F] may hold all layers: the layer
    is picked by `offset`, no slice of it is copied. `trainable` says whether they get a gradient. Frozen ones may be in
    NF4: an expert is decoded when it is multiplied, forwards and backwards.
    """

    gate_up_proj: Array | NF4Stack
    down_proj: Array | NF4Stack
    offset: Array | int
    trainable: bool


def tile_rows(routed_rows: int, num_experts: int) -> int:
    """Rows per tile: a power of two from 8 to 128, about half an expert's mean load, so that padding stays small."""
    mean = max(1, routed_rows // num_experts)
    return min(128, max(8, 1 << (mean.bit_length() - 1) >> 1))


def make_schedule(experts: Int[Array, "M k"], num_experts: int, tile: int, block_rows: Sequence[int] = ()) -> Schedule:
    """Lays out the routed rows by expert; rows of one expert keep the order of their tokens.

    A counting sort: a row's place is its expert's first one, and as many behind it as earlier rows have that expert.
    `block_rows`: the heights to list blocks for (`kernel_block_rows`), if the Mosaic GPU kernel is to run.
    """
    rows = experts.size
    flat = experts.reshape(-1).astype(jnp.int32)
    tiles = rows // tile + min(num_experts, rows)

    # In pieces of about as many rows as there are pieces: within a piece rows are compared with each other, and of the
    # pieces before it the rows of each expert are counted.
    length = 1 << rows.bit_length() // 2
    pieces = jnp.pad(flat, (0, -rows % length), constant_values=num_experts).reshape(-1, length)
    count = partial(jnp.sum, dtype=jnp.int32)
    hits = count(pieces[:, :, None] == jnp.arange(num_experts), axis=1)
    before = _sum_before(hits)
    tile_count = (before[-1] + hits[-1] + tile - 1) // tile
    first_tile = _sum_before(tile_count)
    tile_end = first_tile + tile_count

    earlier = count((pieces[:, :, None] == pieces[:, None, :]) & jnp.tri(length, k=-1, dtype=bool), axis=2)
    start = first_tile * tile + before
    destination = (jnp.take_along_axis(start, pieces, axis=1, mode="clip") + earlier).reshape(-1)[:rows]
    index = jnp.arange(rows, dtype=jnp.int32)
    source = jnp.full(tiles * tile, -1, jnp.int32)
    source = source.at[destination].set(index, unique_indices=True, mode="promise_in_bounds")

    # Tiles past the last used one are given to the last expert; they hold only padding.
    ends = jnp.searchsorted(tile_end, jnp.arange(tiles), side="right", method="compare_all")
    tile_expert = jnp.minimum(ends, num_experts - 1).astype(jnp.int32)
    blocks = {most: _blocks(first_tile, tile_count, tiles, most // tile) for most in block_rows}
    destination = destination.reshape(experts.shape)
    return Schedule(destination, source, tile_expert, tile_end[-1], first_tile, tile_count, blocks)


def _sum_before(counts: Int[Array, "n *rest"]) -> Int[Array, "n *rest"]:
    """For each place of the first axis the sum of those before it, which XLA fuses with what they are made of."""
    earlier = jnp.tri(counts.shape[0], k=-1, dtype=bool).reshape(*2 * counts.shape[:1], *(1,) * (counts.ndim - 1))
    return jnp.sum(jnp.where(earlier, counts, 0), axis=1, dtype=jnp.int32)


def _blocks(first_tile: Int[Array, " E"], tile_count: Int[Array, " E"], tiles: int, most: int) -> Any:
    """Blocks of at most so many tiles, of nearly equal height in an expert.

    Equal heights, since the multiprocessors then stay in step and read the same weights at the same time.
    """
    from jaxmoe.ops.kernels.grouped_matmul.hopper import Blocks

    E = tile_count.shape[0]
    blocks_of_expert = -(-tile_count // most)
    end = _sum_before(blocks_of_expert) + blocks_of_expert
    index = jnp.arange(tiles // most + E, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(end, index, side="right", method="compare_all"), E - 1).astype(jnp.int32)
    within = index - (end - blocks_of_expert)[expert]
    height, higher = jnp.divmod(tile_count[expert], jnp.maximum(blocks_of_expert[expert], 1))
    first = first_tile[expert] + within * height + jnp.minimum(within, higher)
    return Blocks(first, height + (within < higher), expert, end[-1])


def kernel_block_rows(routed_rows: int, num_experts: int) -> tuple[int, ...]:
    """The most rows of a block, for each kind of blocks that some product of a layer wants."""
    from jaxmoe.ops.kernels.grouped_matmul.hopper import LARGE, SMALL

    return (SMALL, LARGE) if routed_rows >= _LARGE_ROWS * num_experts else (SMALL,)


def _rows_at(x: Shaped[Array, "rows D"], index: Int[Array, "*places"]) -> Shaped[Array, "*places D"]:
    """Rows of x; every index is one of a row (the schedule's are), so none is checked.

    For gathers that stand alone: fused with a sum, as in `combine`, XLA made one without the check forty times slower.
    """
    return x.at[index].get(mode="promise_in_bounds")


def permute(x: Float[Array, "M D"], schedule: Schedule) -> Float[Array, "P D"]:
    """Each token's row at its k positions; at padding the row of some token, which nobody reads."""
    token = jnp.maximum(schedule.source, 0) // schedule.destination.shape[1]
    if x.dtype.itemsize != 2 or x.shape[1] % 2:
        return _rows_at(x, token)
    # XLA copies element by element: with two values in one a gather takes three quarters of the time on a GPU.
    pairs = jax.lax.bitcast_convert_type(x.reshape(x.shape[0], -1, 2), jnp.uint32)
    return jax.lax.bitcast_convert_type(_rows_at(pairs, token), x.dtype).reshape(-1, x.shape[1])


def combine(rows: Float[Array, "P D"], weights: Float[Array, "M k"], schedule: Schedule) -> Float[Array, "M D"]:
    """sum_k weights[m, k] * rows[destination[m, k]], in float32 as the residual stream that it joins."""
    gathered = jnp.take(rows, schedule.destination, axis=0).astype(jnp.float32)
    return jnp.einsum("mkd,mk->md", gathered, weights, precision=PRECISION)


def row_weights(weights: Float[Array, "M k"], schedule: Schedule) -> Float[Array, "P 1"]:
    """The weight of each position's routed row, zero at padding."""
    source = schedule.source
    return jnp.where(source >= 0, weights.reshape(-1)[jnp.maximum(source, 0)], 0)[:, None]


def grouped_matmul(
    x: Float[Array, "P inner"],
    weight: Array | NF4Stack,
    schedule: Schedule,
    offset: Any,
    *,
    transposed: bool,
    mosaic: bool = False,
    activate: bool = False,
    low: Float[Array, "P rank"] | None = None,
    low_weight: Array | None = None,
) -> Float[Array, "P out"]:
    """Rows times weight[offset + the row's expert] (its transpose if `transposed`), plus a low-rank term, rounded once.

    By the Mosaic GPU kernel, which takes a schedule with tiles of 16 rows and blocks, or by the tiled loop. With
    `activate` the product is that of gate and up, and SwiGLU of it is returned: the kernel never writes the product.
    """
    if not mosaic:
        tiles = schedule.tile_expert, schedule.tiles_used
        low_rank: dict[str, Any] = {"low": low, "low_weight": low_weight}
        y: Array = tiled.grouped_matmul(x, weight, *tiles, offset, transposed=transposed, **low_rank)
        return _activation(y) if activate else y
    from jaxmoe.ops.kernels.grouped_matmul import hopper as kernel

    if isinstance(weight, NF4Stack):  # one layer's experts are decoded at a time, for this product alone
        weight, offset = weight[offset + jnp.arange(schedule.first_tile.shape[0])], 0
    options: dict[str, Any] = {"transposed": transposed, "swiglu": activate, "low": low, "low_weight": low_weight}
    large = weight.shape[1] * weight.shape[2] >= _LARGE_MATRIX and not activate
    rows = kernel.LARGE if large and kernel.LARGE in schedule.blocks else kernel.SMALL
    tiles = kernel.default_tiles(weight.shape[1 if transposed else 2], rows, activate)
    return kernel.grouped_matmul(x, weight, schedule.blocks[rows], offset, tiles=tiles, **options)


def grouped_outer(
    left: Float[Array, "P A"], right: Float[Array, "P C"], schedule: Schedule, *, mosaic: bool = False
) -> Float[Array, "E A C"]:
    """For each expert the sum over its rows of left[row]^T right[row], float32; one of the two is zero at padding."""
    a, c = left.shape[1], right.shape[1]
    if not mosaic:
        where = schedule.tile_expert, schedule.tiles_used, schedule.first_tile.shape[0]
        if 4 * c > a:
            return tiled.grouped_outer(left, right, *where)
        # With a narrow side, an adapter's rank, in front the loop takes half the time on a CPU.
        return tiled.grouped_outer(right, left, *where).swapaxes(1, 2)
    from jaxmoe.ops.kernels.grouped_matmul import hopper as kernel

    columns = a + -a % _MOSAIC_ROWS, c + -c % _MOSAIC_ROWS
    left = jnp.pad(left, ((0, 0), (0, -a % _MOSAIC_RANK)))
    right = jnp.pad(right, ((0, 0), (0, max(columns[1], _MOSAIC_RANK) - c)))
    return kernel.grouped_outer(left, right, schedule.first_tile, schedule.tile_count, columns=columns)[:, :a, :c]


def implementation(dtype: Any, *sizes: int) -> implementations.Choice:
    """How grouped matmuls of this dtype and these widths run on the default device, and why."""
    return implementations.choose("grouped_matmul", {"mosaic": _mosaic_obstacle(dtype, sizes)})


def _mosaic_obstacle(dtype: Any, sizes: tuple[int, ...]) -> str | None:
    if tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 11):
        return f"needs jax 0.11 or newer, found {jax.__version__}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, found {jnp.dtype(dtype).name}"
    if odd := [size for size in sizes if size % 16]:  # Pallas' narrowest swizzle is one of 16 values
        return f"needs widths that are multiples of 16, found {', '.join(map(str, odd))}"
    return None


_MOSAIC_ROWS, _MOSAIC_RANK = 16, 64  # what the kernel's rows of an expert, and an adapter's rank, are padded to
# From so many rows an expert and elements of its matrix on, higher blocks of fewer columns are faster (docs/log.md).
_LARGE_ROWS, _LARGE_MATRIX = 1024, 2**21


class _LowRank(NamedTuple):
    """An adapter of all experts: A [E, r, in] and scale * B [E, out, r]; scaled in float32, which costs no rounding."""

    a: Array
    b: Array

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    def terms(self, dtype: Any, mosaic: bool) -> tuple[Array, Array]:
        """A and B as the products take them, in `dtype`; the kernel wants ranks that are multiples of 64."""
        a, b = two_terms(self.a, dtype, 1), two_terms(self.b, dtype, 2)
        extra = -a.shape[1] % _MOSAIC_RANK if mosaic else 0
        return jnp.pad(a, ((0, 0), (0, extra), (0, 0))), jnp.pad(b, ((0, 0), (0, 0), (0, extra)))


class _Residuals(NamedTuple):
    x: Array
    weights: Array
    gate_up: Array  # [P, 2F]
    low: tuple[Array | None, Array | None]  # rows of the low-rank products, [P, r]
    stacks: tuple[Any, Any]
    offset: Any
    adapters: tuple[_LowRank | None, _LowRank | None]
    schedule: Schedule


class _Static(NamedTuple):
    """What is decided while tracing: whether the stacks get gradients, whether the kernel runs, and whether what is
    kept for the backward pass lies in a scan's stack."""

    trainable: bool
    mosaic: bool
    scanned: bool


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _mixture(
    x: Array,
    weights: Array,
    stacks: tuple[Any, Any],
    offset: Any,
    adapters: tuple[_LowRank | None, _LowRank | None],
    schedule: Schedule,
    static: _Static,
) -> Array:
    """What is not differentiated: nothing is kept, so SwiGLU is part of the product of gate and up."""
    with jax.named_scope("permute"):
        rows = permute(x, schedule)
    with jax.named_scope("gate_up"):
        hidden, _ = _project(rows, stacks[0], offset, adapters[0], schedule, static.mosaic, activate=True)
    with jax.named_scope("down"):
        rows, _ = _project(hidden, stacks[1], offset, adapters[1], schedule, static.mosaic)
    with jax.named_scope("combine"):
        return combine(rows, weights, schedule)


def _project(
    rows: Array,
    stack: Any,
    offset: Any,
    adapter: _LowRank | None,
    schedule: Schedule,
    mosaic: bool,
    activate: bool = False,
) -> tuple[Array, Array | None]:
    """(rows W^T + (rows A^T) B^T, or SwiGLU of it, and rows A^T)."""
    multiply = partial(grouped_matmul, rows, transposed=True, mosaic=mosaic)
    if adapter is None:
        return multiply(stack, schedule, offset, activate=activate), None
    a, b = adapter.terms(rows.dtype, mosaic)
    low: Array = fold(multiply(a, schedule, 0), adapter.rank)
    return multiply(stack, schedule, offset, activate=activate, low=unfold(low, a.shape[1]), low_weight=b), low


def _project_back(
    d_rows: Array, stack: Any, offset: Any, adapter: _LowRank | None, schedule: Schedule, mosaic: bool
) -> tuple[Array, Array | None]:
    """(dY W + (dY B) A, dY B): the gradient of the rows, and of the low-rank rows."""
    multiply = partial(grouped_matmul, d_rows, transposed=False, mosaic=mosaic)
    if adapter is None:
        return multiply(stack, schedule, offset), None
    a, b = adapter.terms(d_rows.dtype, mosaic)
    low: Array = fold(multiply(b, schedule, 0), adapter.rank)
    return multiply(stack, schedule, offset, low=unfold(low, a.shape[1]), low_weight=a), low


def _activation(gate_up: Array) -> Array:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return swiglu(gate, up)


def _activation_gradient(
    gate_up: Array, d_hidden: Array, weight_of_row: Array, *, scanned: bool, with_hidden: bool
) -> tuple[Array | None, Array, Array]:
    """The activation again (None unless asked for), the gradient of gate and up, and that of each row's weight."""
    obstacle = "would be handed a copy of what a scan keeps" if scanned else swiglu_gradient_obstacle(gate_up)
    if implementations.choose("swiglu_gradient", {"triton": obstacle}).name == "triton":
        return swiglu_gradient(gate_up, d_hidden, weight_of_row, with_hidden=with_hidden)
    hidden, pull = jax.vjp(_activation, gate_up)
    d_weight_of_row = jnp.sum(hidden.astype(jnp.float32) * d_hidden.astype(jnp.float32), axis=-1)
    (d_gate_up,) = pull((d_hidden.astype(jnp.float32) * weight_of_row).astype(hidden.dtype))
    return hidden, d_gate_up, d_weight_of_row


def _mixture_forward(x, weights, stacks, offset, adapters, schedule, static: _Static):
    with jax.named_scope("permute"):
        rows = permute(x, schedule)
    with jax.named_scope("gate_up"):
        gate_up, low_up = _project(rows, stacks[0], offset, adapters[0], schedule, static.mosaic)
        gate_up = checkpoint_name(gate_up, GATE_UP)
    with jax.named_scope("swiglu"):
        hidden = _activation(gate_up)
    with jax.named_scope("down"):
        rows, low_down = _project(hidden, stacks[1], offset, adapters[1], schedule, static.mosaic)
    with jax.named_scope("combine"):
        out = combine(rows, weights, schedule)
    low: Any = tuple(None if a is None else checkpoint_name(a, GATE_UP) for a in (low_up, low_down))
    return out, _Residuals(x, weights, gate_up, low, stacks, offset, adapters, schedule)


def _mixture_backward(static: _Static, residuals: _Residuals, d_out: Array):
    x, weights, gate_up, (low_up, low_down), stacks, offset, adapters, schedule = residuals
    with jax.named_scope("combine"):
        d_rows = permute(d_out.astype(x.dtype), schedule)  # not yet weighed
        weight_of_row = row_weights(weights, schedule)
    with jax.named_scope("down"):
        d_hidden, d_low_down = _project_back(d_rows, stacks[1], offset, adapters[1], schedule, static.mosaic)
    with jax.named_scope("swiglu"):
        # At padding the weight is zero, and with it all that follows: no sum over rows needs a mask.
        again = static.trainable or adapters[1] is not None
        hidden, d_gate_up, d_weight_of_row = _activation_gradient(
            gate_up, d_hidden, weight_of_row, scanned=static.scanned, with_hidden=again
        )
    with jax.named_scope("gate_up"):
        d_x_rows, d_low_up = _project_back(d_gate_up, stacks[0], offset, adapters[0], schedule, static.mosaic)
    with jax.named_scope("permute"):
        gathered = jnp.take(d_x_rows, schedule.destination, axis=0).astype(jnp.float32)
        d_x = gathered.sum(axis=1).astype(x.dtype)
        d_weights = jnp.take(d_weight_of_row, schedule.destination, axis=0).astype(weights.dtype)

    def weighed(rows: Array) -> Array:
        return (rows.astype(jnp.float32) * weight_of_row).astype(rows.dtype)

    outer = partial(grouped_outer, schedule=schedule, mosaic=static.mosaic)
    d_adapters: list[_LowRank | None] = [None, None]
    d_stacks: list[Array | None] = [None, None]
    with jax.named_scope("weight_gradients"):
        rows: Any = permute(x, schedule) if static.trainable or adapters[0] is not None else None
        if adapters[0] is not None:
            d_adapters[0] = _adapter_gradient(outer, rows, low_up, d_gate_up, d_low_up, adapters[0])
        if adapters[1] is not None:
            assert hidden is not None and low_down is not None and d_low_down is not None
            d_adapters[1] = _adapter_gradient(
                outer, hidden, weighed(low_down), d_rows, weighed(d_low_down), adapters[1]
            )
        if static.trainable:
            assert hidden is not None
            d_stacks = [
                outer(d_gate_up, rows).astype(stacks[0].dtype),
                outer(weighed(d_rows), hidden).astype(stacks[1].dtype),
            ]
    return d_x, d_weights, tuple(d_stacks), None, tuple(d_adapters), None


def _adapter_gradient(outer: Any, rows: Array, low: Any, d_y: Array, d_low: Any, adapter: _LowRank) -> _LowRank:
    """The sums dA = dLow^T rows and dB = dY^T low; of each pair of factors one is zero at padding."""
    d_a: Array = outer(d_low, rows)
    d_b: Array = outer(d_y, low)
    return _LowRank(d_a.astype(adapter.a.dtype), d_b.astype(adapter.b.dtype))


_mixture.defvjp(_mixture_forward, _mixture_backward)


def sorted_experts(
    x: Float[Array, "M D"],
    routing: Routing,
    weights: ExpertWeights,
    gate_up_adapter: Adapter | None = None,
    down_adapter: Adapter | None = None,
    *,
    scanned: bool = False,
) -> Float[Array, "M D"]:
    """The mixture's output sum_k w_k down_k(silu(gate_k x) * up_k x), float32, by sort-based dispatch.

    Adapters hold one A and B per expert ([E, r, in], [E, out, r]); their products join the base's before it is rounded.
    `scanned` says that this is a step of a scan that will be differentiated: what it keeps is then a slice of a stack.
    """
    num_experts = routing.logits.shape[-1]
    on_mosaic = implementation(x.dtype, *weights.gate_up_proj.shape[1:], weights.down_proj.shape[2]).name == "mosaic"
    rows = routing.experts.size
    tile = _MOSAIC_ROWS if on_mosaic else tile_rows(rows, num_experts)
    with jax.named_scope("permute"):
        block_rows = kernel_block_rows(rows, num_experts) if on_mosaic else ()
        schedule = make_schedule(routing.experts, num_experts, tile, block_rows)
        schedule = jax.tree.map(partial(checkpoint_name, name=SCHEDULE), schedule)
    adapters = tuple(
        adapter and _LowRank(adapter.lora_A, adapter.scale * adapter.lora_B)
        for adapter in (gate_up_adapter, down_adapter)
    )
    stacks = weights.gate_up_proj, weights.down_proj
    offset = jnp.asarray(weights.offset, jnp.int32)
    static = _Static(weights.trainable, on_mosaic, scanned)
    return _mixture(x, routing.weights, stacks, offset, adapters, schedule, static)


def dense_experts(
    x: Float[Array, "M D"],
    routing: Routing,
    weights: ExpertWeights,
    gate_up_adapter: Adapter | None = None,
    down_adapter: Adapter | None = None,
) -> Float[Array, "M D"]:
    """The oracle of `sorted_experts`: every expert computes every token, unchosen ones weigh zero. Small sizes only."""
    M, E = routing.logits.shape
    layer = partial(jax.lax.dynamic_slice_in_dim, start_index=weights.offset, slice_size=E)

    def project(rows: Array, product: str, weight: Array | NF4Stack, adapter: Adapter | None) -> Array:
        assert not isinstance(weight, NF4Stack)
        full = layer(weight).astype(jnp.float32)
        if adapter is not None:
            delta = jnp.einsum("eor,eri->eoi", adapter.lora_B, adapter.lora_A, precision=PRECISION)
            full = full + adapter.scale * delta
        return jnp.einsum(product, rows, full, precision=PRECISION)

    gate, up = jnp.split(project(x.astype(jnp.float32), "mi,eoi->meo", weights.gate_up_proj, gate_up_adapter), 2, -1)
    out = project(jax.nn.silu(gate) * up, "mei,eoi->meo", weights.down_proj, down_adapter)
    mixture = jnp.zeros((M, E)).at[jnp.arange(M)[:, None], routing.experts].set(routing.weights)
    return jnp.einsum("meo,me->mo", out, mixture, precision=PRECISION)
