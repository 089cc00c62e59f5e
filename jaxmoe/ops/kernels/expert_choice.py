"""From router logits to the chosen experts and their weights in one launch; XLA needs four.

A Pallas kernel in Triton, for any NVIDIA GPU. A program handles one token. It compares all pairs of probabilities,
which for so few is faster than sorting.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from jaxmoe.ops.router import Routing

_MOST_TOKENS, _MOST_EXPERTS = 64, 256


def unsupported(logits: Any) -> str | None:
    """Why the kernel cannot choose experts by these logits [M, E]; None if it can."""
    M, E = logits.shape
    if M > _MOST_TOKENS:
        return f"needs at most {_MOST_TOKENS} tokens, found {M}"
    return None if E <= _MOST_EXPERTS else f"needs at most {_MOST_EXPERTS} experts, found {E}"


def choose_experts(logits: Float[Array, "M E"], count: int, norm_topk_prob: bool, interpret: bool = False) -> Routing:
    """As `jaxmoe.ops.router.choose_experts`."""
    M, E = logits.shape
    experts, slots = pl.next_power_of_2(E), pl.next_power_of_2(count)

    def body(logits_ref: Any, probabilities: Any, chosen: Any, weights: Any) -> None:
        token, expert, slot = pl.program_id(0), jnp.arange(experts), jnp.arange(slots)
        inside = expert < E
        logit = triton.load(logits_ref.at[token, expert], mask=inside, other=-jnp.inf)
        exponential = jnp.exp(logit - jnp.max(logit))
        probability = exponential / jnp.sum(exponential)
        triton.store(probabilities.at[token, expert], probability, mask=inside)
        score = jnp.where(inside, probability, -1.0)
        own, other = score[:, None], score[None, :]
        before = (other > own) | ((other == own) & (expert[None, :] < expert[:, None]))
        rank = jnp.sum(before.astype(jnp.int32), axis=1)
        hit = (rank[:, None] == slot[None, :]) & inside[:, None]
        # Among NaN no score comes before another; the bound keeps the sum of their indices a valid index.
        index = jnp.minimum(jnp.sum(jnp.where(hit, expert[:, None], 0), axis=0), E - 1)
        weight = jnp.where(slot < count, jnp.sum(jnp.where(hit, probability[:, None], 0.0), axis=0), 0.0)
        weight = weight / jnp.sum(weight) if norm_topk_prob else weight
        triton.store(chosen.at[token, slot], index, mask=slot < count)
        triton.store(weights.at[token, slot], weight, mask=slot < count)

    shapes = [((M, E), jnp.float32), ((M, count), jnp.int32), ((M, count), jnp.float32)]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    kernel = pl.pallas_call(
        body,
        grid=(M,),
        out_shape=[jax.ShapeDtypeStruct(*shape) for shape in shapes],
        in_specs=[anywhere],
        out_specs=[anywhere] * 3,
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpret,
        name="expert_choice",
    )
    probabilities, chosen, weights = kernel(logits)
    return Routing(logits, probabilities, chosen, weights)


class OneLaunch:
    """The implementation "triton" of the choice of experts."""

    def unsupported(self, logits: Any) -> str | None:
        """Why it cannot choose experts by these logits [M, E], or None."""
        return unsupported(logits)

    def __call__(self, logits: Array, count: int, norm_topk_prob: bool) -> Routing:
        """As `jaxmoe.ops.router.choose_experts`."""
        return choose_experts(logits, count, norm_topk_prob)


ONE_LAUNCH = OneLaunch()
