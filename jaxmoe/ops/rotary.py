"""Rotary position embedding, and norm and rotation of queries and keys in two steps."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmoe.config import RopeParameters
from jaxmoe.ops.norm import rms_norm


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


class TwoSteps:
    """The implementation "xla" of norm and rotation."""

    def unsupported(self, x: Any, frozen: bool) -> str | None:
        """None: it runs anywhere."""
        return None

    def __call__(
        self, x: Float[Array, "B T heads H"], weight: Float[Array, " H"], tables: tuple[Array, Array], eps: float
    ) -> Float[Array, "B T heads H"]:
        """Normalises by head and rotates, rounded once; `tables` are cosine and sine [B, T, H/2]."""
        return apply_rotary(rms_norm(x.astype(jnp.float32), weight, eps), *tables).astype(x.dtype)


TWO_STEPS = TwoSteps()
