"""How the next token is chosen (greedy, or drawn with temperature, top-k and top-p), and a checkpoint's defaults."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.config import read_json
from jaxmoe.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    At temperature 0 it is the most probable token. Otherwise it is drawn from softmax(logits / temperature), restricted
    to the `top_k` most probable tokens (0: all) and, of these, to the smallest set whose probability reaches `top_p`.

    Raises:
        UserError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature: expected at least 0, found {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top-k: expected at least 0, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p: expected more than 0 and at most 1, found {self.top_p}")


GREEDY = Sampling()


def sample(
    logits: Float[Array, "B V"],
    keys: Array,
    temperature: Float[Array, ""] | float,
    top_k: Int[Array, ""] | int,
    top_p: Float[Array, ""] | float,
) -> Int[Array, " B"]:
    """Draws one token per sequence: temperature, then top-k, then top-p (nucleus sampling), as in transformers.

    `keys` holds one random key per sequence. Among equal logits at the cut, the lower token ids are kept.

    Source: Holtzman et al. 2020 (arXiv 1904.09751).
    """
    scaled = logits / temperature
    order = jnp.argsort(-scaled, axis=-1, stable=True)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    rank = jnp.arange(ranked.shape[-1])
    ranked = jnp.where((top_k > 0) & (rank >= top_k), -jnp.inf, ranked)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The first token is kept even if its own probability exceeds top_p.
    ranked = jnp.where((mass_before >= top_p) & (rank > 0), -jnp.inf, ranked)
    choice = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


def generation_defaults(folder: pathlib.Path) -> tuple[Sampling, tuple[int, ...]]:
    """Sampling and stop tokens from the folder's generation_config.json; greedy without stop tokens if it has none."""
    path = folder / "generation_config.json"
    raw = read_json(path) if path.is_file() else {}
    eos = raw.get("eos_token_id")
    stop = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    if not raw.get("do_sample", False):
        return GREEDY, stop
    # Fields that the file leaves out have transformers' defaults.
    defaults = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
    given = {name: raw[name] for name in defaults if raw.get(name) is not None}
    return Sampling(**defaults | given), stop
