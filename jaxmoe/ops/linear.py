"""The dense building blocks: linear maps with an optional adapter, RMSNorm, rotary embedding, attention.

Precision, here and in the experts: every contraction accumulates in float32, at full precision for float32 operands
(never TF32); an operation's result is rounded to the activations' dtype once, at its end. transformers rounds more
often in bfloat16 (after the normalisation, each rotary product, each factor of SwiGLU, each sum of the residual stream,
which is float32 here), so this package is closer to the exact result; in float32 both compute the same thing up to the
order of sums.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.config import RopeParameters

PRECISION = jax.lax.Precision.HIGHEST
# An einsum whose sums and result are float32.
product = partial(jnp.einsum, precision=PRECISION, preferred_element_type=jnp.float32)


class Adapter(NamedTuple):
    """One low-rank adapter: A [..., r, in], B [..., out, r] and the factor on their product."""

    lora_A: Array
    lora_B: Array
    scale: float


def linear(
    x: Float[Array, "*batch inner"],
    weight: Float[Array, "out inner"],
    bias: Float[Array, " out"] | None = None,
    adapter: Adapter | None = None,
) -> Float[Array, "*batch out"]:
    """Forms x W^T + b + scale (x A^T) B^T in x's dtype; the sum is formed in float32 and rounded once.

    Source: torch.nn.Linear's layout; Hu et al. 2021, equation 3.
    """
    return finish_linear(contract(x, weight), x, bias, adapter)


def finish_linear(y: Array, x: Array, bias: Array | None, adapter: Adapter | None) -> Array:
    """The rest of `linear`, given the product y = x W^T in float32: adds bias and adapter and rounds once."""
    if bias is not None:
        y += bias
    if adapter is not None:
        y += low_rank(x, adapter.lora_A, adapter.scale * adapter.lora_B)
    return y.astype(x.dtype)


@jax.custom_vjp
def contract(x: Float[Array, "*batch inner"], weight: Float[Array, "out inner"]) -> Float[Array, "*batch out"]:
    """Forms x W^T in float32.

    The backward pass rounds the cotangent to x's dtype before it multiplies: where the result was rounded to that dtype
    that changes nothing, and a product of float32 with bfloat16 would run outside the tensor cores.
    """
    y: Array = product("...i,oi->...o", x, weight)
    return y


def _contract_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return contract(x, weight), (x, weight)


def _contract_backward(residuals: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    x, weight = residuals
    d_y = d_y.astype(x.dtype)
    d_x = product("...o,oi->...i", d_y, weight)
    d_weight = product("mo,mi->oi", d_y.reshape(-1, d_y.shape[-1]), x.reshape(-1, x.shape[-1]))
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


contract.defvjp(_contract_forward, _contract_backward)


def two_terms(weight: Float[Array, "..."], dtype: Any, axis: int) -> Float[Array, "..."]:
    """An adapter's matrix in 16 bits: rounded, and behind it along the rank's `axis` what rounding left.

    A model in 16 bits with adapters rounded to 16 bits is another model: its gradients were 1.7 times as far from
    float64 as those of PEFT, which multiplies adapters in float32. Two terms hold 16 of float32's 24 bits, and the
    products stay on the tensor cores. With a `dtype` of float32 the matrix stays as it is.
    """
    if dtype == jnp.float32:
        return weight
    kept = jnp.finfo(dtype)
    # XLA may take a conversion there and back for nothing; this it must carry out.
    rounded = jax.lax.reduce_precision(weight, kept.nexp, kept.nmant)
    return jnp.concatenate([rounded, weight - rounded], axis).astype(dtype)


def fold(rows: Float[Array, "*rows terms"], rank: int) -> Float[Array, "*rows r"]:
    """Rows of a product with the `two_terms` of a weight (and padding behind): the sum over the terms."""
    if rows.shape[-1] == rank:
        return rows
    # In float32: a product of 16-bit rows comes rounded from the experts' kernel.
    first, second = (rows[..., start : start + rank].astype(jnp.float32) for start in (0, rank))
    return (first + second).astype(rows.dtype)


def unfold(low: Float[Array, "*rows r"], width: int) -> Float[Array, "*rows width"]:
    """Low-rank rows for a product with the `two_terms` of a weight: once for each term, zeros where it is padded."""
    rank = low.shape[-1]
    if width == rank:
        return low
    twice = jnp.concatenate([low, low], -1)
    return jnp.pad(twice, [*[(0, 0)] * (low.ndim - 1), (0, width - 2 * rank)])


@jax.custom_vjp
def low_rank(
    x: Float[Array, "*batch inner"], a: Float[Array, "r inner"], b: Float[Array, "out r"]
) -> Float[Array, "*batch out"]:
    """Forms (x A^T) B^T in float32, the inner product rounded to x's dtype; A and B count in full (`two_terms`)."""
    return _low_rank_forward(x, a, b)[0]


def _low_rank_forward(x: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, ...]]:
    a_terms, b_terms = two_terms(a, x.dtype, 0), two_terms(b, x.dtype, 1)
    low = fold(product("...i,ri->...r", x, a_terms), a.shape[0]).astype(x.dtype)
    return product("...r,or->...o", unfold(low, b_terms.shape[1]), b_terms), (x, a, b, low)


def _low_rank_backward(residuals: tuple[Array, ...], d_y: Array) -> tuple[Array, Array, Array]:
    x, a, b, low = residuals
    a_terms, b_terms = two_terms(a, x.dtype, 0), two_terms(b, x.dtype, 1)
    d_y = d_y.astype(x.dtype)
    d_low = fold(product("...o,or->...r", d_y, b_terms), a.shape[0]).astype(x.dtype)
    d_x = product("...r,ri->...i", unfold(d_low, a_terms.shape[0]), a_terms)
    rows, low, d_low, d_y = (array.reshape(-1, array.shape[-1]) for array in (x, low, d_low, d_y))
    d_a, d_b = product("mr,mi->ri", d_low, rows), product("mo,mr->or", d_y, low)
    return d_x.astype(x.dtype), d_a.astype(a.dtype), d_b.astype(b.dtype)


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def rms_norm(x: Float[Array, "*batch D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "*batch D"]:
    """Scales x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32, rounded to x's dtype once.

    Source: Zhang and Sennrich 2019; transformers' `Qwen3MoeRMSNorm`, which rounds before the weight as well.
    """
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (y * weight.astype(jnp.float32)).astype(x.dtype)


def swiglu(gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
    """silu(gate) * up, in float32, rounded to gate's dtype once (Shazeer 2020)."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def rotary_frequencies(rope: RopeParameters, head_dim: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies (float32, [H/2]) and the factor on cosine and sine.

    Each step is rounded to float32 as transformers' is: at position 500, one unit in the last place of a frequency
    already moves the angle by 3e-5. Source: transformers' `Qwen3MoeRotaryEmbedding` and `modeling_rope_utils`
    (`linear`; `yarn`, Peng et al. 2023).
    """
    one = np.float32(1)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # The power in double, then rounded: what a correctly rounded float32 power gives on every platform.
    wavelengths = np.power(float(rope.rope_theta), exponents.astype(np.float64)).astype(np.float32)
    frequencies = one / wavelengths
    if rope.rope_type == "default":
        return frequencies, 1.0
    assert rope.factor is not None
    if rope.rope_type == "linear":
        return frequencies / np.float32(rope.factor), 1.0

    original = rope.original_max_position_embeddings
    assert rope.rope_type == "yarn" and original is not None

    def correction_dim(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = correction_dim(rope.beta_fast or 32), correction_dim(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # transformers' guard against a division by zero
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    extrapolate = one - np.clip(ramp, 0, 1).astype(np.float32)
    interpolated = one / (np.float32(rope.factor) * wavelengths)
    frequencies = interpolated * (one - extrapolate) + frequencies * extrapolate

    factor = rope.factor

    def magnitude(mscale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if rope.attention_factor is not None:
        return frequencies, float(rope.attention_factor)
    if rope.mscale and rope.mscale_all_dim:
        return frequencies, magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return frequencies, magnitude()


def rotary_tables(
    position_ids: Int[Array, "B T"], rope: RopeParameters, head_dim: int
) -> tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]:
    """Cosine and sine of position * inverse frequency, float32, one column per rotated pair."""
    frequencies, factor = rotary_frequencies(rope, head_dim)
    angles = position_ids[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rotary(
    x: Float[Array, "B T heads H"], cos: Float[Array, "B T H2"], sin: Float[Array, "B T H2"]
) -> Float[Array, "B T heads H"]:
    """Rotates the pairs (i, i + H/2) of each head, in float32, rounded to x's dtype once (Su et al. 2021)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attention_mask(
    query_index: Int[Array, "B T"],
    key_index: Int[Array, "B S"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    sliding_window: int | None,
) -> Bool[Array, "B T S"]:
    """Which key each query sees: not later, in the same segment (0 is padding, seen by none), inside the window.

    A window of w admits the last w positions, the query's own included, as transformers' sliding mask does.
    """
    distance = query_index[:, :, None] - key_index[:, None, :]
    mask = (distance >= 0) & (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments > 0)[:, None, :]
    return mask if sliding_window is None else mask & (distance < sliding_window)


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Grouped-query attention softmax(q k^T / sqrt(H)) v with float32 logits and softmax.

    A query whose row of the mask is empty (padding) gets the mean of the values: finite, and read by nobody.
    """
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], scale=query.shape[-1] ** -0.5)


def layer_slice(stack: Array, slot: Array | int) -> Array:
    """Layer `slot` of a stacked parameter; the stack itself stays where it is."""
    return jax.lax.dynamic_index_in_dim(stack, slot, keepdims=False)


# Results that a recomputation policy may keep; `jaxmoe.ops.router`, `dispatch` and `cudnn` name others.
LAYER_INPUT = "layer_input"
PROJECTED = "query_key_value"  # before norm and rotation
ATTENDED = "attention_update"  # what attention adds to the residual stream
