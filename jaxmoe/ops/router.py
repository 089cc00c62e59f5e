"""Which experts each token goes to, and how uneven the load is."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Integer

from jaxmoe.ops.contraction import PRECISION, contract
from jaxmoe.ops.implementations import choose, default_device
from jaxmoe.ops.kept import ROUTING
from jaxmoe.ops.low_rank import Adapter

_FEW_TOKENS = 64  # up to here comparing all pairs of scores is faster than sorting on a GPU


class Routing(NamedTuple):
    """The router's output for M tokens: logits and probabilities over E experts, the k chosen and their weights."""

    logits: Float[Array, "M E"]
    probabilities: Float[Array, "M E"]
    experts: Int[Array, "M k"]
    weights: Float[Array, "M k"]


class RoutingControl(NamedTuple):
    """What a caller imposes on the routing; every field may be None.

    `experts` replays a recorded choice; -1 in a token's first slot lets the model choose for that token. `logit_bias`
    is added to the router logits before the softmax. `selection` is 1 for an expert that every token uses and -1 for
    one that no token uses; it leaves the probabilities unchanged, and so does `choice_bias`, which is added to the
    probabilities where experts are chosen. The weights are always the model's own probabilities of the experts that are
    used. Fields for all MoE layers are [Ls, B, T, k] and [Ls, E]; for one layer, [M, k] and [E].
    """

    experts: Int[Array, "Ls B T k"] | Int[Array, "M k"] | None = None
    logit_bias: Float[Array, "Ls E"] | Float[Array, " E"] | None = None
    selection: Int[Array, "Ls E"] | Int[Array, " E"] | None = None
    choice_bias: Float[Array, "Ls E"] | Float[Array, " E"] | None = None

    def layer(self, slot: Array | int) -> RoutingControl:
        """The control of MoE layer `slot`, its experts as [M, k]."""
        pick = lambda a: None if a is None else jax.lax.dynamic_index_in_dim(a, slot, keepdims=False)
        experts = pick(self.experts)
        return RoutingControl(
            None if experts is None else experts.reshape(-1, experts.shape[-1]),
            pick(self.logit_bias),
            pick(self.selection),
            pick(self.choice_bias),
        )


class CapturedRouting(NamedTuple):
    """What a capture keeps of a layer's routing (`captures.format` says how it is stored): the experts that were used,
    the t most probable ones with their logits, the log-sum-exp of all E logits, and the entropy (nats) of the router's
    distribution. Expert indices are uint8 where they fit: they leave the device in every step."""

    experts: Integer[Array, "*tokens k"]
    top_experts: Integer[Array, "*tokens t"]
    top_logits: Float[Array, "*tokens t"]
    log_sum_exp: Float[Array, "*tokens"]
    entropy: Float[Array, "*tokens"]


def route(
    x: Float[Array, "M D"],
    weight: Float[Array, "E D"],
    *,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    adapter: Adapter | None = None,
    control: RoutingControl | None = None,
) -> Routing:
    """Softmax over all experts, then the k most probable, renormalised to sum 1 if `norm_topk_prob`; all float32.

    Ties go to the lowest index. transformers' `Qwen3MoeTopKRouter` rounds the logits to the model's dtype first; here
    they stay float32, so that in bfloat16 fewer tokens are routed by a rounding error. A LoRA on the router is added to
    the weight before the product, as PEFT does for a parameter. `control` is for this one layer.
    """
    if adapter is not None:
        delta = jnp.einsum("er,rd->ed", adapter.lora_B, adapter.lora_A, precision=PRECISION)
        weight = weight.astype(jnp.float32) + adapter.scale * delta
    logits: Array = contract(x.astype(weight.dtype), weight)
    if control is not None and control.logit_bias is not None:
        logits = logits + control.logit_bias
    logits = checkpoint_name(logits, ROUTING)
    probabilities = jax.nn.softmax(logits, axis=-1)
    scores, reach = jax.lax.stop_gradient(probabilities), 1.0  # how far two scores can be apart
    if control is not None and control.choice_bias is not None:
        bias = jax.lax.stop_gradient(control.choice_bias)
        scores, reach = scores + bias, reach + jnp.max(bias) - jnp.min(bias)
    if control is not None and control.selection is not None:
        scores = scores + 2.0 * reach * control.selection  # forced experts come first and removed ones last
    experts: Array = _largest(scores, num_experts_per_tok)
    if control is not None and control.experts is not None:
        experts = jnp.where(control.experts[:, :1] < 0, experts, control.experts)
    # The weights are read at the indices of the saved experts, so that the backward pass does not sort again.
    experts = checkpoint_name(experts, ROUTING)
    weights = _weights(probabilities, experts, norm_topk_prob)
    return Routing(logits, probabilities, experts, checkpoint_name(weights, ROUTING))


def choose_experts(logits: Float[Array, "M E"], count: int, norm_topk_prob: bool) -> Routing:
    """What `route` makes of its logits, for few tokens that nothing is imposed on; there is no backward pass."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    experts = _largest(probabilities, count)
    return Routing(logits, probabilities, experts, _weights(probabilities, experts, norm_topk_prob))


def _weights(probabilities: Float[Array, "M E"], experts: Int[Array, "M k"], norm_topk_prob: bool) -> Array:
    weights = jnp.take_along_axis(probabilities, experts, axis=-1)
    return weights / jnp.sum(weights, axis=-1, keepdims=True) if norm_topk_prob else weights


def _largest(scores: Float[Array, "M E"], count: int) -> Int[Array, "M count"]:
    """The indices of the largest scores in descending order; ties go to the lowest index."""
    if len(scores) <= _FEW_TOKENS and default_device().platform == "gpu":
        return largest_by_rank(scores, count)
    return choose("top_experts", scores, count).value(scores, count)


class Sort:
    """The implementation "xla" of the choice of experts."""

    def unsupported(self, scores: Any, count: int) -> str | None:
        """None: it runs anywhere."""
        return None

    def __call__(self, scores: Float[Array, "M E"], count: int) -> Int[Array, "M count"]:
        """The indices of the largest scores in descending order; ties go to the lowest index."""
        return jax.lax.top_k(scores, count)[1]


SORT = Sort()


def largest_by_rank(scores: Float[Array, "M E"], count: int) -> Int[Array, "M count"]:
    """As `jax.lax.top_k`, by counting for each score how many come before it: two small kernels on a GPU, no sort."""
    index = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    own, other = scores[:, :, None], scores[:, None, :]
    before = (other > own) | ((other == own) & (index[None, :] < index[:, None]))
    rank = jnp.sum(before, axis=-1, dtype=jnp.int32)
    chosen = jnp.where(rank[:, None, :] == jnp.arange(count)[:, None], index, 0)
    # Among NaN no score comes before another; the bound keeps the sum of their indices a valid index.
    return jnp.minimum(jnp.sum(chosen, axis=-1), scores.shape[-1] - 1)


def no_routing(tokens: int, num_experts: int, num_experts_per_tok: int) -> Routing:
    """Zeros, for M tokens of a layer that has no router."""
    logits = jnp.zeros((tokens, num_experts), jnp.float32)
    experts = jnp.zeros((tokens, num_experts_per_tok), jnp.int32)
    return Routing(logits, logits, experts, logits[:, :num_experts_per_tok])


def captured_routing(routing: Routing, top: int) -> CapturedRouting:
    """Reduces M tokens' routing to what a capture keeps, with the `top` largest logits.

    The order is that of the probabilities, like the choice itself: where two logits give one probability, the lower
    expert comes first.
    """
    small = jnp.uint8 if routing.logits.shape[-1] <= 256 else jnp.uint16
    order = jax.lax.top_k(routing.probabilities, top)[1]
    log_sum_exp = jax.nn.logsumexp(routing.logits, axis=-1)
    # A removed expert has the logit -inf and no part in the sum.
    finite = jnp.where(routing.probabilities > 0, routing.logits, 0)
    return CapturedRouting(
        routing.experts.astype(small),
        order.astype(small),
        jnp.take_along_axis(routing.logits, order, axis=-1),
        log_sum_exp,
        log_sum_exp - jnp.sum(routing.probabilities * finite, axis=-1),
    )


def expert_counts(experts: Int[Array, "M k"], valid: Bool[Array, " M"], num_experts: int) -> Int[Array, " E"]:
    """How many routed rows of valid tokens each expert receives."""
    # Compare and sum, which fuse into one pass; a histogram's atomic adds would queue up for E addresses on a GPU.
    hits = (experts[:, :, None] == jnp.arange(num_experts)) & valid[:, None, None]
    return jnp.sum(hits, axis=(0, 1), dtype=jnp.int32)


def moved_choice_bias(bias: Float[Array, "Ls E"], counts: Int[Array, "Ls E"], rate: float) -> Float[Array, "Ls E"]:
    """The bias with rate * sign(mean load - load) added: experts with few of the `counts` routed rows are chosen more.

    Source: Wang et al. 2024 (arXiv 2408.15664), algorithm 1.
    """
    load = counts.astype(jnp.float32)
    return bias + rate * jnp.sign(jnp.mean(load, axis=1, keepdims=True) - load)


def load_balancing_loss(
    counts: Int[Array, "Ls E"] | Float[Array, "Ls E"],
    probability_sums: Float[Array, "Ls E"],
    tokens: Int[Array, ""] | Float[Array, ""],
) -> Float[Array, ""]:
    """E * sum_e (count_e / n) (sum p_e / n), pooled over the MoE layers, n = tokens * Ls; balanced routing gives k.

    `counts` are routed rows per expert, `probability_sums` the router probabilities summed over tokens. Source: Fedus
    et al. 2021, equations 4 to 6, in the form of transformers' `load_balancing_loss_func`.
    """
    layers, experts = probability_sums.shape
    n = jnp.maximum(tokens, 1).astype(jnp.float32) * layers
    fraction = counts.sum(0).astype(jnp.float32) / n
    return experts * jnp.sum(fraction * probability_sums.sum(0) / n)
