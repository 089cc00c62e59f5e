"""Sort-based expert dispatch with static shapes: sort, grouped matmul, un-permute by gather, weigh, sum over k.

The R = M*k routed rows are laid out expert by expert, each expert's rows padded to whole tiles, so that a tile of rows
belongs to one expert:

    destination: routed row (token*k + slot) -> position in the padded layout
    source:      position -> routed row, or -1 for padding

No token is ever dropped: the layout has room for every routed row whatever the skew. The number of tiles in use is a
value, not a shape; its bound, floor(R / tile) + min(E, R), is static. Both directions of both permutations are gathers,
and the sums over k run in a fixed order, so the result is deterministic. Nothing of size [M, E, ...] exists.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.dequantize import NF4Stack
from jaxmoe.layers import PRECISION, Adapter, swiglu
from jaxmoe.router import Routing


class Schedule(NamedTuple):
    """Where every routed row lies, and which expert each tile of rows belongs to (P = tiles * tile positions)."""

    destination: Int[Array, "M k"]
    source: Int[Array, " P"]
    tile_expert: Int[Array, " tiles"]
    tiles_used: Int[Array, ""]


class ExpertWeights(NamedTuple):
    """The fused experts of one layer inside a stack of groups (layers * experts): group = offset + expert.

    `gate_up_proj` [groups, 2F, D] (rows :F gate, F: up) and `down_proj` [groups, D, F] may hold all layers: the layer
    is picked by `offset`, no slice of it is copied. `trainable` says whether they get a gradient. Frozen ones may be in
    NF4: an expert is decoded when one of its tiles is multiplied, forwards and backwards.
    """

    gate_up_proj: Array | NF4Stack
    down_proj: Array | NF4Stack
    offset: Array | int
    trainable: bool


def tile_rows(routed_rows: int, num_experts: int) -> int:
    """Rows per tile: a power of two from 8 to 128, about half an expert's mean load, so that padding stays small."""
    mean = max(1, routed_rows // num_experts)
    return min(128, max(8, 1 << (mean.bit_length() - 1) >> 1))


def make_schedule(experts: Int[Array, "M k"], num_experts: int, tile: int) -> Schedule:
    """Lays out the routed rows by expert; rows of one expert keep the order of their tokens (the sort is stable)."""
    rows = experts.size
    flat = experts.reshape(-1)
    tiles = rows // tile + min(num_experts, rows)

    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=num_experts)
    tiles_of_expert = (sizes + tile - 1) // tile
    tile_end = jnp.cumsum(tiles_of_expert)
    first_position = (tile_end - tiles_of_expert) * tile
    first_sorted = jnp.cumsum(sizes) - sizes

    rank = jnp.zeros(rows, jnp.int32).at[order].set(jnp.arange(rows, dtype=jnp.int32), unique_indices=True)
    destination = first_position[flat] + rank - first_sorted[flat]

    # Tiles past the last used one are given to the last expert; they hold only padding.
    tile_expert = jnp.minimum(jnp.searchsorted(tile_end, jnp.arange(tiles), side="right"), num_experts - 1)
    position = jnp.arange(tiles * tile)
    owner = jnp.repeat(tile_expert, tile)
    within = position - first_position[owner]
    filled = within < sizes[owner]
    source = jnp.where(filled, order[jnp.where(filled, first_sorted[owner] + within, 0)], -1)
    int32 = partial(jnp.asarray, dtype=jnp.int32)
    return Schedule(int32(destination.reshape(experts.shape)), int32(source), int32(tile_expert), int32(tile_end[-1]))


@jax.custom_vjp
def permute(x: Float[Array, "M D"], schedule: Schedule) -> Float[Array, "P D"]:
    """Each token's row at its k positions, zeros at padding; the backward pass gathers and sums over k in float32."""
    k = schedule.destination.shape[1]
    rows = jnp.take(x, jnp.maximum(schedule.source, 0) // k, axis=0)
    return jnp.where(schedule.source[:, None] >= 0, rows, 0)


def _permute_forward(x: Array, schedule: Schedule) -> tuple[Array, Schedule]:
    return permute(x, schedule), schedule


def _permute_backward(schedule: Schedule, d_rows: Array) -> tuple[Array, None]:
    gathered = jnp.take(d_rows, schedule.destination, axis=0)
    return gathered.astype(jnp.float32).sum(axis=1).astype(d_rows.dtype), None


permute.defvjp(_permute_forward, _permute_backward)


@jax.custom_vjp
def combine(rows: Float[Array, "P D"], weights: Float[Array, "M k"], schedule: Schedule) -> Float[Array, "M D"]:
    """sum_k weights[m, k] * rows[destination[m, k]], in float32, rounded to rows' dtype once."""
    gathered = jnp.take(rows, schedule.destination, axis=0).astype(jnp.float32)
    return jnp.einsum("mkd,mk->md", gathered, weights, precision=PRECISION).astype(rows.dtype)


def _combine_forward(rows: Array, weights: Array, schedule: Schedule) -> tuple[Array, tuple[Array, Array, Schedule]]:
    return combine(rows, weights, schedule), (rows, weights, schedule)


def _combine_backward(residuals: tuple[Array, Array, Schedule], d_out: Array) -> tuple[Array, Array, None]:
    rows, weights, schedule = residuals
    k = weights.shape[1]
    source = jnp.maximum(schedule.source, 0)
    weight_of_row = jnp.where(schedule.source >= 0, weights.reshape(-1)[source], 0)
    d_rows = jnp.take(d_out, source // k, axis=0).astype(jnp.float32) * weight_of_row[:, None]
    gathered = jnp.take(rows, schedule.destination, axis=0).astype(jnp.float32)
    d_weights = jnp.einsum("mkd,md->mk", gathered, d_out.astype(jnp.float32), precision=PRECISION)
    return d_rows.astype(rows.dtype), d_weights.astype(weights.dtype), None


combine.defvjp(_combine_forward, _combine_backward)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def grouped_matmul(
    x: Float[Array, "P inner"],
    weight: Float[Array, "groups out inner"] | NF4Stack,
    tile_expert: Int[Array, " tiles"],
    tiles_used: Int[Array, ""],
    offset: Int[Array, ""] | int,
    trainable: bool,
) -> Float[Array, "P out"]:
    """Rows x W[offset + expert of the row's tile]^T, float32 sums rounded to x's dtype; unused tiles give zeros.

    The gradient of x uses the weights as they lie. The weights' gradient is formed only if `trainable`.
    """
    return _tiled_matmul(x, weight, offset + tile_expert, tiles_used, "cti,coi->cto", weight.shape[1])


def _grouped_matmul_forward(x, weight, tile_expert, tiles_used, offset, trainable):
    y = grouped_matmul(x, weight, tile_expert, tiles_used, offset, trainable)
    # The frozen weight is a reference to the stack, not a copy; x is needed for the weights' gradient only.
    return y, (x if trainable else None, weight, tile_expert, tiles_used, offset)


def _grouped_matmul_backward(trainable, residuals, d_y):
    x, weight, tile_expert, tiles_used, offset = residuals
    d_x = _tiled_matmul(d_y, weight, offset + tile_expert, tiles_used, "cto,coi->cti", weight.shape[2])
    d_weight = _tiled_weight_gradient(x, d_y, weight, offset + tile_expert, tiles_used) if trainable else None
    return d_x, d_weight, None, None, None


grouped_matmul.defvjp(_grouped_matmul_forward, _grouped_matmul_backward)


def _tiles_per_step(tiles: int, tile: int, weight: Array | NF4Stack) -> int:
    """Tiles multiplied at once by the loop: as many as keep their gathered weights below the size of the rows.

    One on a CPU, where a tile's matmul already fills the cores and a batched one runs slower.
    """
    if jax.default_backend() == "cpu":
        return 1
    _, out, inner = weight.shape
    return max(1, min(tiles, tiles * tile * max(out, inner) // (out * inner)))


def _tiled_matmul(
    x: Array, weight: Array | NF4Stack, group: Array, tiles_used: Array, product: str, width: int
) -> Array:
    """Runs `product` over the tiles in use, `c` of them a step, each with its own expert's weight."""
    tiles = group.shape[0]
    tile = x.shape[0] // tiles
    c = _tiles_per_step(tiles, tile, weight)
    padded = -(-tiles // c) * c
    x = jnp.pad(x.reshape(tiles, tile, -1), ((0, padded - tiles), (0, 0), (0, 0)))
    group = jnp.pad(group, (0, padded - tiles), mode="edge")

    def step(i: Array, y: Array) -> Array:
        rows = jax.lax.dynamic_slice_in_dim(x, i * c, c)
        experts = weight[jax.lax.dynamic_slice_in_dim(group, i * c, c)]
        out = jnp.einsum(product, rows, experts, precision=PRECISION, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(y, out.astype(y.dtype), i * c, 0)

    y = jax.lax.fori_loop(0, -(-tiles_used // c), step, jnp.zeros((padded, tile, width), x.dtype))
    return y[:tiles].reshape(tiles * tile, width)


def _tiled_weight_gradient(x: Array, d_y: Array, weight: Array, group: Array, tiles_used: Array) -> Array:
    """dW[g] = sum over g's tiles of dY^T X, summed in float32 in a fixed order."""
    groups, tiles = weight.shape[0], group.shape[0]
    c = _tiles_per_step(tiles, x.shape[0] // tiles, weight)
    padded = -(-tiles // c) * c
    x, d_y = (
        jnp.pad(rows.reshape(tiles, -1, rows.shape[-1]), ((0, padded - tiles), (0, 0), (0, 0))) for rows in (x, d_y)
    )
    group = jnp.pad(group, (0, padded - tiles), mode="edge")

    def step(i: Array, total: Array) -> Array:
        rows, d_rows, owner = (jax.lax.dynamic_slice_in_dim(a, i * c, c) for a in (x, d_y, group))
        part = jnp.einsum("cto,cti->coi", d_rows, rows, precision=PRECISION, preferred_element_type=jnp.float32)
        if c == 1:
            return total.at[owner[0]].add(part[0])
        # A product with the one-hot owner instead of a scatter-add, whose order on a GPU is not fixed.
        return total + jnp.einsum("cg,coi->goi", jax.nn.one_hot(owner, groups), part, precision=PRECISION)

    return jax.lax.fori_loop(0, -(-tiles_used // c), step, jnp.zeros(weight.shape, jnp.float32)).astype(weight.dtype)


def sorted_experts(
    x: Float[Array, "M D"],
    routing: Routing,
    weights: ExpertWeights,
    gate_up_adapter: Adapter | None = None,
    down_adapter: Adapter | None = None,
) -> Float[Array, "M D"]:
    """The mixture's output sum_k w_k down_k(silu(gate_k x) * up_k x), by sort-based dispatch.

    Adapters hold one A and B per expert ([E, r, in], [E, out, r]); their products are grouped matmuls like the base's,
    and each of the two is rounded to x's dtype before they are added.
    """
    num_experts = routing.logits.shape[-1]
    tile = tile_rows(routing.experts.size, num_experts)
    with jax.named_scope("permute"):
        schedule = make_schedule(routing.experts, num_experts, tile)
        rows: Array = permute(x, schedule)

    def project(rows: Array, weight: Array | NF4Stack, adapter: Adapter | None) -> Array:
        tiles = schedule.tile_expert, schedule.tiles_used
        y: Array = grouped_matmul(rows, weight, *tiles, weights.offset, weights.trainable)
        if adapter is not None:
            low: Array = grouped_matmul(rows, adapter.lora_A.astype(rows.dtype), *tiles, 0, True)
            delta: Array = grouped_matmul(low, adapter.lora_B.astype(rows.dtype), *tiles, 0, True)
            y = (y.astype(jnp.float32) + adapter.scale * delta.astype(jnp.float32)).astype(y.dtype)
        return y

    with jax.named_scope("gate_up"):
        gate, up = jnp.split(project(rows, weights.gate_up_proj, gate_up_adapter), 2, axis=-1)
    with jax.named_scope("swiglu"):
        hidden = swiglu(gate, up)
    with jax.named_scope("down"):
        rows = project(hidden, weights.down_proj, down_adapter)
    with jax.named_scope("combine"):
        return combine(rows, routing.weights, schedule)


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
    return jnp.einsum("meo,me->mo", out, mixture, precision=PRECISION).astype(x.dtype)


def explain() -> list[tuple[str, str, str]]:
    """(operation, implementation, reason) for the default device, as `python -m jaxmoe.doctor` prints it."""
    backend = jax.default_backend()
    how = "one tile a step" if backend == "cpu" else "as many tiles a step as the rows' memory allows"
    return [
        ("expert dispatch", "sort", "stable sort by expert, gathers both ways, no token dropped"),
        ("grouped matmul", "tiled loop", f"pure JAX over expert-aligned row tiles on {backend}, {how}"),
    ]
