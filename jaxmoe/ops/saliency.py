"""How much each expert of a layer contributes: sums over tokens, from which pruning decides what stays."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.ops.router import Routing


class ExpertSums(NamedTuple):
    """Sums over the tokens that use an expert, of one layer or of all.

    `weighted_norms` sums w |y|: the expert's weight times the norm of its output. `changes` sums |new - old|: how far
    the layer's output moves if this expert is removed and the token uses its next most probable expert instead.
    """

    weighted_norms: Float[Array, "*layers E"]
    changes: Float[Array, "*layers E"]


def candidates(routing: Routing) -> Int[Array, "M k1"]:
    """Each token's k experts, and the one that it would use next; k is below E."""
    return jax.lax.top_k(routing.probabilities, routing.experts.shape[-1] + 1)[1]


def expert_sums(
    routing: Routing,
    experts: Int[Array, "M k1"],
    outputs: Float[Array, "M k1 D"],
    valid: Bool[Array, " M"],
    norm_topk_prob: bool,
) -> tuple[Float[Array, "M D"], ExpertSums]:
    """(the mixture's output, the layer's sums), float32, from the outputs of the `candidates`.

    Without expert j the softmax runs over the other experts, as it does in a pruned model: weights are p / (1 - p_j),
    or, renormalised, p over the sum of p of the k experts that are left.
    """
    outputs = outputs.astype(jnp.float32)
    p = jnp.take_along_axis(routing.probabilities, experts, axis=-1)
    parts = p[..., None] * outputs
    chosen = parts[:, :-1]
    before = jnp.sum(chosen, axis=1)
    left = 1 - p[:, :-1]
    if norm_topk_prob:
        before = before / jnp.sum(p[:, :-1], axis=-1, keepdims=True)
        left = jnp.sum(p, axis=-1, keepdims=True) - p[:, :-1]
    after = (jnp.sum(parts, axis=1)[:, None] - chosen) / left[..., None]
    norm = lambda a: jnp.sqrt(jnp.sum(jnp.square(a), axis=-1))
    hits = (routing.experts[:, :, None] == jnp.arange(routing.logits.shape[-1])) & valid[:, None, None]
    total = lambda values: jnp.sum(jnp.where(hits, values[..., None], 0), axis=(0, 1))
    weighted = total(routing.weights * norm(outputs[:, :-1]))
    return before, ExpertSums(weighted, total(norm(after - before[:, None])))
