"""How rows get to their experts and back: on one device, or to the devices that hold the experts.

A dispatch carries tokens to rows that lie expert by expert (`jaxmoe.ops.schedule`), and what the experts made of the
rows back to the tokens. The mixture of experts (`jaxmoe.ops.experts`) does not know which dispatch it uses.

With an `expert` axis, each device holds some of the experts. No weight travels, and no row is dropped: there is room
for all rows of all devices on each. There are two ways, and the one that sends less is taken; between GPUs of several
processes, it is always the first:

    Gathered   Few devices: each token goes to all of them once, whichever of its k experts they hold. Each device sums
               its experts' results for a token, and the devices' sums are added up.
    Exchange   Many devices: each device sorts the routed rows of its own tokens by the device of their expert, and the
               devices swap them all to all. On the way back the same rows travel in the other direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxmoe.distributed.collectives import gather, rows_can_travel, shares_of_sum, sizes_between, travel
from jaxmoe.distributed.mesh import MeshShape
from jaxmoe.ops.contraction import PRECISION
from jaxmoe.ops.grouped_matmul import GroupedMatmul
from jaxmoe.ops.implementations import choose
from jaxmoe.ops.schedule import Schedule, make_schedule, permute, row_weights, rows_at


@runtime_checkable
class Dispatch(Protocol):
    """The way of M tokens to P rows, expert by expert, and back."""

    @property
    def schedule(self) -> Schedule:
        """The layout of the rows by expert."""
        ...

    def rows(self, x: Float[Array, "M D"], *, finite: bool = True) -> Float[Array, "P D"]:
        """Each token's row at its k places. Padding holds arbitrary rows; without `finite`, anything, NaN too."""
        ...

    def weights(self, weights: Float[Array, "M k"]) -> Float[Array, "P 1"]:
        """The weight of each place's row, zero at padding."""
        ...

    def back(self, values: Shaped[Array, "P ..."]) -> Shaped[Array, "M k ..."]:
        """What each token's k rows have become."""
        ...

    def total(self, rows: Float[Array, "P D"], weights: Float[Array, "M k"] | None) -> Float[Array, "M D"]:
        """The sum of what each token's k rows have become, each times its weight, in float32."""
        ...


def combine(rows: Float[Array, "P D"], weights: Float[Array, "M k"], dispatch: Dispatch) -> Float[Array, "M D"]:
    """sum_k weights[m, k] * the token's k-th row, in float32, the dtype of the residual stream that it joins."""
    return dispatch.total(rows, weights)


def _weighted_sum(rows: Float[Array, "M k D"], weights: Float[Array, "M k"] | None) -> Float[Array, "M D"]:
    rows = rows.astype(jnp.float32)
    return rows.sum(axis=1) if weights is None else jnp.einsum("mkd,mk->md", rows, weights, precision=PRECISION)


class Local(NamedTuple):
    """The dispatch on a device that holds all experts."""

    schedule: Schedule

    def rows(self, x: Float[Array, "M D"], *, finite: bool = True) -> Float[Array, "P D"]:
        """As `Dispatch.rows`."""
        return permute(x, self.schedule) if finite else choose("row_copies", x).value(x, self.schedule)

    def weights(self, weights: Float[Array, "M k"]) -> Float[Array, "P 1"]:
        """As `Dispatch.weights`."""
        return row_weights(weights, self.schedule)

    def back(self, values: Shaped[Array, "P ..."]) -> Shaped[Array, "M k ..."]:
        """As `Dispatch.back`."""
        return jnp.take(values, self.schedule.destination, axis=0)

    def total(self, rows: Float[Array, "P D"], weights: Float[Array, "M k"] | None) -> Float[Array, "M D"]:
        """As `Dispatch.total`."""
        return _weighted_sum(self.back(rows), weights)


@partial(jax.tree_util.register_dataclass, data_fields=["schedule", "place"], meta_fields=["axis"])
@dataclass(frozen=True)
class Gathered:
    """The dispatch of the tokens of all devices of a mesh axis on each of them, to the experts that it holds.

    `schedule` lays out the rows of these experts; `place` [devices * M, k] is where the routed rows of all tokens lie
    in it, P for those whose expert is elsewhere.
    """

    schedule: Schedule
    place: Any
    axis: str

    def rows(self, x: Float[Array, "M D"], *, finite: bool = True) -> Float[Array, "P D"]:
        """As `Dispatch.rows`."""
        return permute(gather(x, 0, self.axis), self.schedule)

    def weights(self, weights: Float[Array, "M k"]) -> Float[Array, "P 1"]:
        """As `Dispatch.weights`."""
        return row_weights(gather(weights, 0, self.axis), self.schedule)

    def back(self, values: Shaped[Array, "P ..."]) -> Shaped[Array, "M k ..."]:
        """As `Dispatch.back`."""
        return shares_of_sum(self._here(values), self.axis)

    def total(self, rows: Float[Array, "P D"], weights: Float[Array, "M k"] | None) -> Float[Array, "M D"]:
        """As `Dispatch.total`."""
        every = None if weights is None else gather(weights, 0, self.axis)
        return shares_of_sum(_weighted_sum(self._here(rows), every), self.axis)

    def _here(self, values: Array) -> Array:
        """What the rows of all tokens have become here; zero for those whose expert is elsewhere."""
        return jnp.take(values, self.place, axis=0, mode="fill", fill_value=0)


@partial(jax.tree_util.register_dataclass, data_fields=["schedule", "order", "place", "sizes"], meta_fields=["axis"])
@dataclass(frozen=True)
class Exchange:
    """The dispatch between the devices of a mesh axis.

    Routed rows (token * k + slot) leave in `order`, sorted by the device of their expert; `place` [M, k] is the
    inverse. `sizes[i, j]` rows go from device i to device j, where they follow those of the devices before i.
    `schedule` lays out what arrived here, one routed row a "token".
    """

    schedule: Schedule
    order: Any
    place: Any
    sizes: Any
    axis: str

    def rows(self, x: Float[Array, "M D"], *, finite: bool = True) -> Float[Array, "P D"]:
        """As `Dispatch.rows`."""
        return permute(self._out(rows_at(x, self.order // self.place.shape[1])), self.schedule)

    def weights(self, weights: Float[Array, "M k"]) -> Float[Array, "P 1"]:
        """As `Dispatch.weights`."""
        arrived = self._out(weights.reshape(-1)[self.order])
        return row_weights(arrived[:, None], self.schedule)

    def back(self, values: Shaped[Array, "P ..."]) -> Shaped[Array, "M k ..."]:
        """As `Dispatch.back`."""
        arrived = values.at[self.schedule.destination[:, 0]].get(mode="promise_in_bounds")
        return jnp.take(travel(arrived, self.order.shape[0], self.sizes.T, self.axis), self.place, axis=0)

    def total(self, rows: Float[Array, "P D"], weights: Float[Array, "M k"] | None) -> Float[Array, "M D"]:
        """As `Dispatch.total`."""
        return _weighted_sum(self.back(rows), weights)

    def _out(self, rows: Array) -> Array:
        return travel(rows, self.schedule.destination.shape[0], self.sizes, self.axis)


def make_dispatch(experts: Int[Array, "M k"], num_experts: int, products: GroupedMatmul, mesh: MeshShape) -> Dispatch:
    """The dispatch of tokens to `num_experts` experts, which the devices of the mesh's `expert` axis share evenly."""
    M, k = experts.shape
    devices = mesh["expert"]
    here = num_experts // devices
    layout = products.tile_rows(M * k, here), products.span_rows(M * k, here)
    if devices == 1:
        return Local(make_schedule(experts, num_experts, *layout))
    if gathering_sends_less(devices, k) or not rows_can_travel(devices):
        return _gathered(experts, here, layout)
    return _exchange(experts, here, layout, devices)


def gathering_sends_less(devices: int, k: int) -> bool:
    """Whether a device sends less if each token goes to all devices in 16 bits and the sums come back in 32, 6 (n - 1)
    bytes an element, than if each of its k rows goes there and back in 16, 4 k (n - 1) / n."""
    return 6 * devices < 4 * k


def _gathered(experts: Int[Array, "M k"], here: int, layout: Any) -> Gathered:
    local = gather(experts.astype(jnp.int32), 0, "expert") - jax.lax.axis_index("expert") * here
    held = (local >= 0) & (local < here)
    schedule = make_schedule(jnp.where(held, local, here), here, *layout, some_nowhere=True)
    return Gathered(schedule, jnp.where(held, schedule.destination, schedule.source.shape[0]), "expert")


def _exchange(experts: Int[Array, "M k"], here: int, layout: Any, devices: int) -> Exchange:
    M, k = experts.shape
    flat = experts.reshape(-1).astype(jnp.int32)
    order = jnp.argsort(flat // here, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(M * k, dtype=jnp.int32), unique_indices=True)
    going = jnp.sum(flat[:, None] // here == jnp.arange(devices), axis=0, dtype=jnp.int32)
    sizes = sizes_between(going, "expert")
    # A token has no more rows on a device than that device has experts.
    most = devices * M * min(k, here)
    arrived = travel(flat[order] % here, most, sizes, "expert")
    filled = jnp.arange(most) < jnp.sum(sizes[:, jax.lax.axis_index("expert")])
    schedule = make_schedule(jnp.where(filled, arrived, here)[:, None], here, *layout, some_nowhere=True)
    return Exchange(schedule, order, place.reshape(M, k), sizes, "expert")
