"""Losses on the router's logits: how large they are, and how far its probabilities are from the base model's.

Both are means over the tokens that are not padding and over the MoE layers, so that neither packing, accumulation nor
the devices of a mesh change them.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxmoe.data.packing import Batch
from jaxmoe.train.loss import Outputs, Total


class _OfRouterLogits:
    """A mean over tokens and MoE layers of a number that the router's logits give for each."""

    name: str  # of the number in the metrics
    needs: Mapping[str, Total] = {}

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """How many tokens are not padding."""
        return jnp.maximum(jnp.sum(batch.segment_ids > 0), 1).astype(jnp.float32)

    def __call__(
        self, outputs: Outputs, batch: Batch, totals: Mapping[str, PyTree]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The sum over the tokens of a micro-batch of the mean over layers; it is also reported."""
        total = jnp.sum(jnp.where(batch.segment_ids > 0, jnp.mean(self._of_tokens(outputs), axis=0), 0))
        return total, {self.name: total}

    def _of_tokens(self, outputs: Outputs) -> Float[Array, "Ls B T"]:
        raise NotImplementedError


class RouterZLoss(_OfRouterLogits):
    """The mean of (log sum_e exp logit_e)^2, which keeps the router's logits small.

    Source: Zoph et al. 2022 (ST-MoE), equation 5.
    """

    name = "router_z_loss"

    def _of_tokens(self, outputs: Outputs) -> Float[Array, "Ls B T"]:
        assert outputs.router_logits is not None
        return jax.nn.logsumexp(outputs.router_logits, axis=-1) ** 2


class RoutingPenalty(_OfRouterLogits):
    """The mean of KL(p || q) = sum_e p_e log(p_e / q_e) in nats, of the router's probabilities p from the base's q.

    The base is the model without adapters; it has no gradient.
    """

    name = "routing_kl"

    def _of_tokens(self, outputs: Outputs) -> Float[Array, "Ls B T"]:
        assert outputs.router_logits is not None and outputs.base_router_logits is not None
        p = jax.nn.log_softmax(outputs.router_logits)
        q = jax.nn.log_softmax(outputs.base_router_logits)
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)
