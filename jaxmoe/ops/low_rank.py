"""The algebra of LoRA: adapters, their 16-bit terms, and the product (x A^T) B^T with its gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jaxmoe.distributed.chunks import own_part
from jaxmoe.ops.contraction import product

DropoutKeys = Key[Array, " B"]  # a random key for each sequence


class Dropout(NamedTuple):
    """Which elements of an adapter's input x [B, T, in] are dropped: each with probability `rate`.

    A sequence draws from its own key, so its mask does not depend on the micro-batch that it is in. Where `devices` of
    the mesh share a sequence, each takes its own tokens' part of the mask of the whole sequence.
    """

    keys: DropoutKeys
    rate: float
    devices: int = 1

    def __call__(self, x: Float[Array, "B T inner"]) -> Float[Array, "B T inner"]:
        """X with zeros where it is dropped; the rest is not scaled (`Adapter.factors` does that)."""

        def kept(key: Array) -> Array:
            whole = jax.random.bernoulli(key, 1 - self.rate, (x.shape[1] * self.devices, x.shape[2]))
            return own_part(whole, self.devices)

        return jnp.where(jax.vmap(kept)(self.keys), x, 0)


class Adapter(NamedTuple):
    """One low-rank adapter: A [..., r, in], B [..., out, r], the factor on their product, its dropout, if any, and of
    an adapter on experts which ones have it: the others' A and B are zero. None: all of them."""

    lora_A: Array
    lora_B: Array
    scale: float | Array
    dropout: Dropout | None = None
    experts: Bool[Array, " E"] | None = None

    def factors(self) -> Factors:
        """A and scale * B, divided by the share of x that dropout leaves. Scaling in float32 costs no rounding."""
        scale = self.scale if self.dropout is None else self.scale / (1 - self.dropout.rate)
        return Factors(self.lora_A, scale * self.lora_B)


class Factors(NamedTuple):
    """The two factors of an adapter's delta, float32: A [..., r, in] and scale * B [..., out, r]."""

    a: Array
    b: Array

    @property
    def rank(self) -> int:
        """The adapter's rank r."""
        return self.a.shape[-2]

    def terms(self, dtype: Any, multiple: int = 1) -> tuple[Array, Array]:
        """A and B in the form that products in `dtype` need (`split_high_low`), their rank padded to a multiple."""
        a, b = split_high_low(self.a, dtype, -2), split_high_low(self.b, dtype, -1)
        return pad_to_multiple(a, -2, multiple), pad_to_multiple(b, -1, multiple)


def pad_to_multiple(array: Float[Array, "..."], axis: int, multiple: int) -> Float[Array, "..."]:
    """Zeros appended along `axis` until its length is a multiple."""
    extra = -array.shape[axis] % multiple
    axis %= array.ndim
    return jnp.pad(array, [(0, extra if i == axis else 0) for i in range(array.ndim)])


def split_high_low(weight: Float[Array, "..."], dtype: Any, axis: int) -> Float[Array, "..."]:
    """An adapter's matrix as two 16-bit terms along the rank's `axis`: the rounded matrix, then the rounding error.

    Rounding an adapter to 16 bits changes it: its gradients were 1.7 times as far from float64 as those of PEFT, which
    multiplies adapters in float32. Two terms hold 16 of float32's 24 bits, and the products stay on the tensor cores.
    With a `dtype` of float32 the matrix is returned unchanged.
    """
    if dtype == jnp.float32:
        return weight
    kept = jnp.finfo(dtype)
    # XLA may drop a conversion to another dtype and back; it must carry out this one.
    rounded = jax.lax.reduce_precision(weight, kept.nexp, kept.nmant)
    return jnp.concatenate([rounded, weight - rounded], axis).astype(dtype)


def fold(rows: Float[Array, "*rows terms"], rank: int) -> Float[Array, "*rows r"]:
    """Adds up the two terms of rows that were multiplied by a `split_high_low` matrix, and drops padding."""
    if rows.shape[-1] == rank:
        return rows
    # In float32: a product of 16-bit rows comes rounded from the experts' kernel.
    first, second = (rows[..., start : start + rank].astype(jnp.float32) for start in (0, rank))
    return (first + second).astype(rows.dtype)


def unfold(low: Float[Array, "*rows r"], width: int) -> Float[Array, "*rows width"]:
    """Repeats low-rank rows for a product with a `split_high_low` matrix: once per term, then zeros up to `width`."""
    rank = low.shape[-1]
    if width == rank:
        return low
    twice = jnp.concatenate([low, low], -1)
    return jnp.pad(twice, [*[(0, 0)] * (low.ndim - 1), (0, width - 2 * rank)])


@jax.custom_vjp
def low_rank(
    x: Float[Array, "*batch inner"], a: Float[Array, "r inner"], b: Float[Array, "out r"]
) -> Float[Array, "*batch out"]:
    """Forms (x A^T) B^T in float32, x A^T rounded to x's dtype; A and B enter in full (`split_high_low`)."""
    return _low_rank_forward(x, a, b)[0]


def _low_rank_forward(x: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, ...]]:
    a_terms, b_terms = split_high_low(a, x.dtype, 0), split_high_low(b, x.dtype, 1)
    low = fold(product("...i,ri->...r", x, a_terms), a.shape[0]).astype(x.dtype)
    return product("...r,or->...o", unfold(low, b_terms.shape[1]), b_terms), (x, a, b, low)


def _low_rank_backward(residuals: tuple[Array, ...], d_y: Array) -> tuple[Array, Array, Array]:
    x, a, b, low = residuals
    a_terms, b_terms = split_high_low(a, x.dtype, 0), split_high_low(b, x.dtype, 1)
    d_y = d_y.astype(x.dtype)
    d_low = fold(product("...o,or->...r", d_y, b_terms), a.shape[0]).astype(x.dtype)
    d_x = product("...r,ri->...i", unfold(d_low, a_terms.shape[0]), a_terms)
    rows, low, d_low, d_y = (array.reshape(-1, array.shape[-1]) for array in (x, low, d_low, d_y))
    d_a, d_b = product("mr,mi->ri", d_low, rows), product("mo,mr->or", d_y, low)
    return d_x.astype(x.dtype), d_a.astype(a.dtype), d_b.astype(b.dtype)


low_rank.defvjp(_low_rank_forward, _low_rank_backward)
