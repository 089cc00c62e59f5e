"""What a training step minimises: losses as objects, and a cross-entropy that never holds the logits of all tokens.

A step minimises a sum of `Term`s, each a loss and its coefficient (`objective` builds the usual ones). To
add a loss, write a class with the three members of `Loss` and hand it to `make_train_step`; the step stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxmoe.data.packing import Batch
from jaxmoe.model.interface import RouterStats
from jaxmoe.ops.contraction import product
from jaxmoe.ops.frozen import define_vjp
from jaxmoe.ops.router import load_balancing_loss


@dataclass(frozen=True)
class Outputs:
    """What a forward pass over B sequences of T tokens hands to a loss; it never includes the logits of all tokens.

    `hidden` are the states after the final norm and `head` the output projection, both in the model's dtype; `router`
    holds the router's statistics. `chunk` and `frozen_head` are for `cross_entropy`: how many tokens' logits may exist
    at a time, and whether the head is frozen, so that it needs no gradient. `reference` sums over a document to the
    log-probability that the reference model gives to its learned tokens; None in a run without a reference.
    `router_logits` are the router's, and `base_router_logits` those of the model without adapters, if a loss of the run
    reads them.
    """

    hidden: Float[Array, "B T D"]
    head: Float[Array, "V D"]
    router: RouterStats
    chunk: int
    frozen_head: bool
    reference: Float[Array, "B T"] | None = None
    router_logits: Float[Array, "Ls B T E"] | None = None
    base_router_logits: Float[Array, "Ls B T E"] | None = None


@dataclass(frozen=True)
class BatchTotal:
    """A total that is computed from the whole batch alone, without a forward pass."""

    of: Callable[[Batch], PyTree]


OfOutputs = Callable[[Outputs, Batch], PyTree]  # what one micro-batch adds to a total
Total = OfOutputs | BatchTotal


@runtime_checkable
class Loss(Protocol):
    """A loss that is a sum over a batch divided by the batch's weight, so that micro-batches add up to it.

    `needs` names the totals over the whole batch that the loss reads, and says what each micro-batch adds to them. If
    the batch has several micro-batches, a first forward pass collects the totals; with one, or if all are
    `BatchTotal`s, there is no such pass. Totals carry no gradient.
    """

    @property
    def needs(self) -> Mapping[str, Total]:
        """Total by name; losses that share a name share the total."""
        ...

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """What the sum over the whole batch is divided by; `batch` is the whole one, [accumulation, B, T]."""
        ...

    def __call__(
        self, outputs: Outputs, batch: Batch, totals: Mapping[str, PyTree]
    ) -> tuple[Float[Array, ""], Mapping[str, Float[Array, ""]]]:
        """(sum over a micro-batch [B, T], further sums to report by name); all are divided by the same weight."""
        ...


class Term(NamedTuple):
    """A loss and the factor that it is multiplied by."""

    loss: Loss
    coefficient: float = 1.0


Objective = tuple[Term, ...]  # a run reports, and evaluates, the loss of the first term


def objective(loss: Loss, aux_coefficient: float = 0.0) -> Objective:
    """The loss, and load balancing unless its coefficient is 0."""
    balancing = (Term(LoadBalancing(), aux_coefficient),) if aux_coefficient else ()
    return Term(loss), *balancing


def next_token_objective(aux_coefficient: float = 0.0) -> Objective:
    """Next-token cross-entropy, and load balancing unless its coefficient is 0."""
    return objective(NextTokenCrossEntropy(), aux_coefficient)


class NextTokenCrossEntropy:
    """Mean of -log p(label) over the tokens, by their weights, in nats."""

    needs: Mapping[str, Total] = {}

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """The sum of the tokens' weights."""
        return jnp.sum(batch.weights)

    def __call__(
        self, outputs: Outputs, batch: Batch, totals: Mapping[str, PyTree]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The weighted sum over the tokens of a micro-batch."""
        hidden = outputs.hidden.reshape(-1, outputs.hidden.shape[-1])
        labels, weights = batch.labels.reshape(-1), batch.weights.reshape(-1)
        return cross_entropy(hidden, outputs.head, labels, weights, outputs.chunk, outputs.frozen_head), {}


def _router_total(outputs: Outputs, batch: Batch) -> RouterStats:
    return outputs.router


class LoadBalancing:
    """How unevenly the routers load their experts (`jaxmoe.ops.router.load_balancing_loss`); k if even.

    The loss is E * sum_e f_e P_e, a product of two means over the whole batch: f_e (routed rows, without a gradient)
    and P_e (probabilities). The sum of the micro-batches' own products would be another loss. With f_e known from the
    first pass it is linear in what each micro-batch adds to P_e.
    """

    needs: Mapping[str, Total] = {"router": _router_total}

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """1: the means are taken over the totals."""
        return jnp.ones(())

    def __call__(
        self, outputs: Outputs, batch: Batch, totals: Mapping[str, PyTree]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """What a micro-batch adds; 0 for a model without MoE layers."""
        whole: RouterStats = totals["router"]
        if not whole.counts.shape[0]:
            return jnp.zeros(()), {}
        return load_balancing_loss(whole.counts, outputs.router.prob_sums, whole.tokens), {}


def cross_entropy(
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    labels: Int[Array, " M"],
    weights: Float[Array, " M"],
    chunk: int = 1024,
    frozen_head: bool = False,
) -> Float[Array, ""]:
    """Weighted sum over tokens of -log softmax(hidden head^T)[label], in nats, float32.

    Only the logits (float32) of `chunk` tokens exist at a time. Divide by the sum of the weights for the mean. A token
    of weight 0 contributes nothing, whatever its label. The forward pass also computes the gradients (up to the factor
    that the backward pass brings), so that the logits are computed once. With `frozen_head` the head gets none.
    """
    chunk = min(chunk, hidden.shape[0])
    pieces = [in_chunks(array, chunk) for array in (hidden, labels, weights)]
    with jax.named_scope("head"):
        return (_frozen_head_loss if frozen_head else _trained_head_loss)(*pieces, head)


def in_chunks(array: Array, chunk: int) -> Array:
    """[M, ...] -> [chunks, chunk, ...], with zeros at the end."""
    padded = jnp.pad(array, ((0, -len(array) % chunk), *((0, 0),) * (array.ndim - 1)))
    return padded.reshape(-1, chunk, *array.shape[1:])


def _chunk_loss(hidden: Array, labels: Array, weights: Array, head: Array) -> Array:
    logits = product("md,vd->mv", hidden, head)
    target = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=1) - target))


def log_sum_exp(logits: Float[Array, "M V"]) -> Float[Array, " M"]:
    """Log-sum-exp over each token's logits, which must be finite, in one pass.

    A partial sum is carried together with the largest logit so far, to which it is relative.

    For a GPU: `jax.nn.logsumexp` reads the logits twice and takes 442 us; this takes 233 (1,024 x 151,936, H100). On a
    CPU, XLA does not vectorise this sum, which is then six times slower.
    """

    def add(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        (largest, total), (other, more) = first, second
        smaller = jnp.exp(-jnp.abs(largest - other))
        total = jnp.where(largest >= other, total + more * smaller, total * smaller + more)
        return jnp.maximum(largest, other), total

    nothing = jnp.asarray(jnp.finfo(logits.dtype).min), jnp.zeros((), logits.dtype)
    largest, total = jax.lax.reduce((logits, jnp.ones_like(logits)), nothing, add, (1,))
    return largest + jnp.log(total)


def _sum_of_chunks(hidden: Array, labels: Array, weights: Array, head: Array) -> Array:
    return jnp.sum(jax.lax.map(lambda a: _chunk_loss(a[0], a[1], a[2], head), (hidden, labels, weights)))


# Two functions, since a gradient rule does not see which gradients are asked for until it is too late to save work.
_frozen_head_loss = jax.custom_vjp(_sum_of_chunks)
_trained_head_loss = jax.custom_vjp(_sum_of_chunks)


def _chunk_gradients(hidden: Array, labels: Array, weights: Array, head: Array) -> tuple[Array, Array, Array]:
    """(loss, its gradient by the logits = weight * (softmax - one-hot), by `hidden`) of one chunk."""
    logits = product("md,vd->mv", hidden, head)
    log_sum = jax.lax.platform_dependent(logits, cuda=log_sum_exp, default=partial(jax.nn.logsumexp, axis=1))
    target = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    here = jnp.arange(logits.shape[1]) == labels[:, None]
    d_logits = (jnp.exp(logits - log_sum[:, None]) - here) * weights[:, None]
    # Rounded to the head's dtype: a float32 product would run outside the tensor cores.
    d_logits = d_logits.astype(head.dtype)
    d_hidden = product("mv,vd->md", d_logits, head)
    return jnp.sum(weights * (log_sum - target)), d_logits, d_hidden.astype(hidden.dtype)


def _frozen_head_forward(hidden: Array, labels: Array, weights: Array, head: Array) -> tuple[Array, Array]:
    """(loss, d loss / d hidden), a chunk at a time."""

    def of_chunk(piece: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        loss, _, d_hidden = _chunk_gradients(*piece, head)
        return loss, d_hidden

    with jax.named_scope("head"):
        losses, d_hidden = jax.lax.map(of_chunk, (hidden, labels, weights))
    return jnp.sum(losses), d_hidden


def _frozen_head_backward(d_hidden: Array, d_loss: Array) -> tuple[Array, None, None, None]:
    return _times(d_loss, d_hidden), None, None, None


def _trained_head_forward(hidden: Array, labels: Array, weights: Array, head: Array) -> tuple[Array, Any]:
    """(loss, (d loss / d hidden, d loss / d head)), a chunk at a time; the head's gradient is summed in float32."""

    def of_chunk(d_head: Array, piece: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        loss, d_logits, d_hidden = _chunk_gradients(*piece, head)
        return d_head + product("mv,md->vd", d_logits, piece[0]), (loss, d_hidden)

    with jax.named_scope("head"):
        d_head, (losses, d_hidden) = jax.lax.scan(
            of_chunk, jnp.zeros(head.shape, jnp.float32), (hidden, labels, weights)
        )
    return jnp.sum(losses), (d_hidden, d_head.astype(head.dtype))


def _trained_head_backward(gradients: tuple[Array, Array], d_loss: Array) -> tuple[Array, None, None, Array]:
    d_hidden, d_head = gradients
    return _times(d_loss, d_hidden), None, None, _times(d_loss, d_head)


def _times(factor: Array, gradient: Array) -> Array:
    return (factor * gradient.astype(jnp.float32)).astype(gradient.dtype)


define_vjp(_frozen_head_loss, _frozen_head_forward, _frozen_head_backward, frozen={3: "the head"})
define_vjp(_trained_head_loss, _trained_head_forward, _trained_head_backward, frozen={2: "the tokens' weights"})
