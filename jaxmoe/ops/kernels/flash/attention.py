"""Causal attention for cards from compute capability 8.0 on, by mma.sync and cp.async, also for packed sequences.

A token sees a contiguous range of keys: from the start of its segment, or of the window, to itself. So two numbers say
all there is to a mask: `low[t]`, the first key that token t sees, and `high[s]`, the last token that sees key s. Both
rise with their index; the tiles that a program walks along follow from them, and what no token sees costs nothing.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxmoe.ops.attention_masked import attention, attention_mask
from jaxmoe.ops.kept import ATTENTION_LOG_SUM, ATTENTION_OUT
from jaxmoe.ops.kernels.ampere import default_capability, unsupported
from jaxmoe.ops.kernels.flash.backward import Saved, gradient_of_query, gradients_of_keys
from jaxmoe.ops.kernels.flash.block import Shape
from jaxmoe.ops.kernels.flash.forward import forward
from jaxmoe.ops.kernels.flash.tiles import UNIT, WIDTHS, AttentionTiles, default_tiles, padded_width
from jaxmoe.ops.small_case import relative_error, why_not


class _Plan(NamedTuple):
    """What is decided while tracing: the tiles, how many of a head's numbers are not padding, and the parameters of
    JAX's interpreter if it runs the kernels."""

    tiles: AttentionTiles
    head_dim: int
    interpret: Any

    def shape(self, query: Array, key: Array) -> Shape:
        """The sizes of these operands."""
        B, T, N, width = query.shape
        return Shape(B, T, N, key.shape[2], width, self.head_dim)


def ranges(
    segments: Int[Array, "B T"] | None, shape: tuple[int, int], window: int | None
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """`low` and `high` of sequences [B, T]; a run of equal segment ids sees itself."""
    index = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    low, high = jnp.zeros_like(index), jnp.full_like(index, shape[1] - 1)
    if segments is not None:
        changes = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        low = jax.lax.cummax(jnp.where(changes, index, 0), axis=1)
        ends = jnp.pad(changes[:, 1:], ((0, 0), (0, 1)), constant_values=True)
        high = jax.lax.cummin(jnp.where(ends, index, shape[1] - 1), axis=1, reverse=True)
    if window is not None:
        low, high = jnp.maximum(low, index - window + 1), jnp.minimum(high, index + window - 1)
    return low, high


def causal_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None,
    window: int | None,
    *,
    tiles: AttentionTiles | None = None,
    interpret: Any = None,
) -> Float[Array, "B T N H"]:
    """As `jaxmoe.ops.attention.causal_attention`; a token of segment 0 attends to those of its own piece of padding."""
    B, T, _, H = query.shape
    width, extra = padded_width(H), -T % UNIT
    low, high = ranges(segments, (B, T), window)
    if extra or width > H:  # zeros at the end of a head change no logit
        padding = (0, 0), (0, extra), (0, 0), (0, width - H)
        query, key, value = (jnp.pad(array, padding) for array in (query, key, value))
    if extra:  # the tokens that fill the last tile see themselves, and no one sees them
        new = jnp.broadcast_to(jnp.arange(T, T + extra, dtype=jnp.int32), (B, extra))
        low, high = (jnp.concatenate([numbers, new], axis=1) for numbers in (low, high))
    plan = _Plan(tiles or default_tiles(width, default_capability()), H, interpret)
    out: Any = _attend(plan, query, key, value, low, high)
    return out[:, :T, :, :H]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, query: Array, key: Array, value: Array, low: Array, high: Array) -> Array:
    return _attend_forward(plan, query, key, value, low, high)[0]


def _attend_forward(plan: _Plan, query: Array, key: Array, value: Array, low: Array, high: Array) -> Any:
    out, log_sum = forward(plan.shape(query, key), plan.tiles.forward, query, key, value, low, plan.interpret)
    out, log_sum = checkpoint_name(out, ATTENTION_OUT), checkpoint_name(log_sum, ATTENTION_LOG_SUM)
    return out, (query, key, value, low, high, out, log_sum)


def _attend_backward(plan: _Plan, residuals: tuple[Array, ...], d_out: Array) -> tuple[Any, ...]:
    query, key, value, low, high, out, log_sum = residuals
    delta = jnp.einsum("btnh,btnh->bnt", out, d_out, preferred_element_type=jnp.float32)
    shape, saved = plan.shape(query, key), Saved(query, key, value, log_sum, delta, d_out)
    d_query = gradient_of_query(shape, plan.tiles.d_query, saved, low, plan.interpret)
    d_key, d_value = gradients_of_keys(shape, plan.tiles.d_keys, saved, high, plan.interpret)
    return d_query, d_key, d_value, None, None


_attend.defvjp(_attend_forward, _attend_backward)


class Flash:
    """The implementation "flash" of attention."""

    def unsupported(self, query: Any, key: Any, segments: Any = None) -> str | None:
        """Why it cannot run on these operands, or None; on a GPU the first call runs a small case."""
        if (why := unsupported(query.dtype)) is not None:
            return why
        if key.dtype != query.dtype:
            return f"needs queries and keys of one dtype, found {query.dtype} and {key.dtype}"
        if query.shape[-1] > max(WIDTHS):
            return f"needs a head size of at most {max(WIDTHS)}, found {query.shape[-1]}"
        return _small_case(padded_width(query.shape[-1]), query.dtype.name) if jax.default_backend() == "gpu" else None

    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
        segments: Int[Array, "B T"] | None,
        window: int | None,
    ) -> Float[Array, "B T N H"]:
        """As the function `causal_attention`."""
        return causal_attention(query, key, value, segments, window)


@cache
def _small_case(width: int, dtype: str) -> str | None:
    return why_not(partial(small_error, width, dtype), "a small case")


def small_error(width: int, dtype: str = "bfloat16", interpret: Any = None) -> float:
    """The largest relative L2 error of output and gradients of packed sequences, against masked attention."""
    T, K, group = 192, 1, 2
    index = jnp.arange(T)[None]
    segments = 1 + index // 70
    keys = jax.random.split(jax.random.key(0), 4)
    *operands, d_out = (
        jax.random.normal(k, (1, T, heads, width), dtype)
        for k, heads in zip(keys, (K * group, K, K, K * group), strict=True)
    )

    def masked(query: Array, key: Array, value: Array) -> Array:
        return attention(query, key, value, attention_mask(index, index, segments, segments, None))

    def run(function: Any, *operands: Array) -> tuple[Array, ...]:
        out, pull = jax.vjp(function, *operands[:3])
        return out, *pull(operands[3])

    packed = partial(causal_attention, segments=segments, window=None, interpret=interpret)
    found = jax.jit(partial(run, packed))(*operands, d_out)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(partial(run, masked))(*(array.astype(jnp.float32) for array in (*operands, d_out)))
    return float(jnp.max(jnp.stack([relative_error(a, b) for a, b in zip(found, exact, strict=True)])))


FLASH = Flash()
