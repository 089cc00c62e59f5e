"""DenseMixer: the router also learns from the experts that a token does not use.

Source: the straight-through gradient of DenseMixer (github.com/yaof20/DenseMixer, models/qwen3_moe_custom.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.distributed.mesh import ONE_DEVICE, MeshShape
from jaxmoe.ops.experts import ExpertWeights, sorted_experts
from jaxmoe.ops.low_rank import Adapter
from jaxmoe.ops.router import Routing


def straight_through(
    x: Float[Array, "M D"],
    routing: Routing,
    weights: ExpertWeights,
    gate_up_adapter: Adapter | None = None,
    down_adapter: Adapter | None = None,
    *,
    norm_topk_prob: bool,
    mesh: MeshShape = ONE_DEVICE,
) -> Float[Array, "M D"]:
    """Zeros, to add to the mixture's output: the gradient by the probability of each expert outside a token's k is
    that of a mixture to which it contributes, too.

    Its weight there is its probability, divided with `norm_topk_prob` by the sum of those of the k, which counts as a
    constant. Experts, adapters and x count as constants, too; the k experts have their gradient from `sorted_experts`.
    The backward pass computes all E experts, k or fewer at a time.
    """
    at = jnp.arange(len(routing.experts))[:, None]
    chosen = jnp.zeros(routing.probabilities.shape, bool).at[at, routing.experts].set(True)
    others = jnp.where(chosen, 0, routing.probabilities)
    if norm_topk_prob:
        of_chosen = jnp.take_along_axis(routing.probabilities, routing.experts, axis=-1)
        others = others / jax.lax.stop_gradient(jnp.sum(of_chosen, axis=-1, keepdims=True))
    constants = jax.lax.stop_gradient(
        (x, routing, (weights.gate_up_proj, weights.down_proj, weights.offset), (gate_up_adapter, down_adapter))
    )
    return _no_output(others, constants, mesh)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _no_output(others: Float[Array, "M E"], constants: Any, mesh: MeshShape) -> Float[Array, "M D"]:
    return jnp.zeros(constants[0].shape, jnp.float32)


def _forward(others: Array, constants: Any, mesh: MeshShape) -> tuple[Array, Any]:
    return _no_output(others, constants, mesh), constants


def _backward(mesh: MeshShape, constants: Any, d_out: Float[Array, "M D"]) -> tuple[Array, None]:
    """d_others[m, e] = d_out[m] . expert_e(x[m])."""
    x, routing, (gate_up, down, offset), adapters = constants
    tokens, num_experts = routing.logits.shape
    most = routing.experts.shape[1]
    size = max(count for count in range(1, most + 1) if num_experts % count == 0)
    frozen = ExpertWeights(gate_up, down, offset, trainable=False)

    def of_group(group: Array) -> Array:
        experts = jnp.broadcast_to(group, (tokens, size))

        def mixture(weights: Array) -> Array:
            return sorted_experts(x, routing._replace(experts=experts, weights=weights), frozen, *adapters, mesh=mesh)

        # A mixture is linear in its weights, so those at which it is differentiated do not matter.
        return jax.vjp(mixture, jnp.ones((tokens, size)))[1](d_out)[0]

    with jax.named_scope("other_experts"):
        d_groups = jax.lax.map(of_group, jnp.arange(num_experts).reshape(-1, size))
    return jnp.moveaxis(d_groups, 0, 1).reshape(tokens, num_experts), None


_no_output.defvjp(_forward, _backward)
