"""What each expert contributes: the loss and the output after one expert is removed, or forced on every token.

The control is an argument of one compiled program, so that nothing is compiled again from expert to expert.
"""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from captures import LabelledText
from jaxmoe.control.interventions import Intervention
from jaxmoe.distributed.collectives import sum_over_devices
from jaxmoe.distributed.mesh import SEQUENCE_AXES
from jaxmoe.distributed.placement import Placement
from jaxmoe.errors import UserError
from jaxmoe.model.adapted import weights_of
from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM
from jaxmoe.model.decoder import forward, head_weight
from jaxmoe.model.interface import Options, Tokens, control_specs
from jaxmoe.ops.contraction import PRECISION
from jaxmoe.ops.router import RoutingControl
from jaxmoe.routing import metrics
from jaxmoe.routing.capture import PackedBatch, pack_in_order
from jaxmoe.store.files import output_file

Action = Literal["ablate", "force"]


class Effect(NamedTuple):
    """What removing or forcing one expert does to a text.

    Attributes:
        layer: index in the model.
        expert: index in the layer.
        load: share of tokens that the unchanged model sends to it.
        loss: mean loss with the change, nats per token.
        change: how much higher the loss is than the unchanged model's.
        low: lower end of the 95 % interval of `change`, by bootstrap over blocks of text.
        high: its upper end.
        kl: mean KL divergence of the next-token distribution from the unchanged model's, nats.
        same_prediction: share of tokens whose most probable next token is the same.
    """

    layer: int
    expert: int
    load: float
    loss: float
    change: float
    low: float
    high: float
    kl: float
    same_prediction: float


class _Reference(NamedTuple):
    """One batch with the unchanged model's outcome: labels [B, T] (-1: none) and hidden states [B, T, D]."""

    batch: PackedBatch
    labels: np.ndarray
    hidden: Array


class _Outcome(NamedTuple):
    """Per token: loss (NaN without a label), KL(unchanged || changed) in nats, whether the prediction is the same."""

    loss: Any
    kl: Any
    same: Any

    def of_tokens(self, batch: PackedBatch) -> _Outcome:
        """Without padding, on the host."""
        return _Outcome(*(np.asarray(array)[batch.valid] for array in self))


@partial(jax.jit, static_argnames=("config", "options"))
def _run(params, adapters, tokens: Tokens, control, *, config, options: Options):
    """(hidden states [B, T, D], tokens per expert [Ls, E]) of one batch; the devices of the mesh share its tokens."""

    def of_share(params, adapters, tokens, control):
        out = forward(params, adapters, tokens, config=config, options=options, control=control)
        return out.hidden, sum_over_devices(out.stats.counts, options.mesh)

    placement = Placement(options.mesh, config, options.lora)
    of_tokens = placement.spec("batch", "sequence")
    run = placement.run_in_order(
        of_share,
        (placement.specs(params), placement.specs(adapters), of_tokens, control_specs(control, placement)),
        (of_tokens, PartitionSpec()),
    )
    hidden, counts = run(params, adapters, tokens, control)
    return hidden, placement.readable(counts)


@partial(jax.jit, static_argnames="placement")
def _outcome(
    hidden: Float[Array, "B T D"],
    reference: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    labels: Int[Array, "B T"],
    *,
    placement: Placement,
) -> _Outcome:
    """The outcome of the hidden states of a changed model, against the unchanged model's `reference`, per token."""

    def of_share(hidden, reference, head, labels):
        flat = lambda array: array.reshape(-1, *array.shape[2:])
        outcome = _outcome_of_tokens(flat(hidden), flat(reference), head, flat(labels))
        return _Outcome(*(array.reshape(labels.shape) for array in outcome))

    of_tokens = placement.spec("batch", "sequence")
    run = placement.run(of_share, (of_tokens, of_tokens, PartitionSpec(), of_tokens), of_tokens)
    return placement.readable(_Outcome(*(a.reshape(-1) for a in run(hidden, reference, head, labels))))


def _outcome_of_tokens(
    hidden: Float[Array, "M D"], reference: Float[Array, "M D"], head: Float[Array, "V D"], labels: Int[Array, " M"]
) -> _Outcome:
    """As `_outcome`, for the tokens of one device."""

    def of_chunk(part: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        changed, unchanged, wanted = part
        product = partial(jnp.einsum, "md,vd->mv", precision=PRECISION, preferred_element_type=jnp.float32)
        log_q, log_p = (jax.nn.log_softmax(product(x, head), axis=-1) for x in (changed, unchanged))
        loss = -jnp.take_along_axis(log_q, jnp.maximum(wanted, 0)[:, None], axis=1)[:, 0]
        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        return jnp.where(wanted < 0, jnp.nan, loss), kl, jnp.argmax(log_p, -1) == jnp.argmax(log_q, -1)

    tokens = hidden.shape[0]
    chunk = min(1024, tokens)
    pad = -tokens % chunk
    split = lambda a, fill: jnp.pad(a, ((0, pad), *[(0, 0)] * (a.ndim - 1)), constant_values=fill).reshape(
        -1, chunk, *a.shape[1:]
    )
    results = jax.lax.map(of_chunk, (split(hidden, 0), split(reference, 0), split(labels, -1)))
    return _Outcome(*(a.reshape(-1)[:tokens] for a in results))


def effects(
    model: Qwen3MoeForCausalLM,
    labels: LabelledText,
    *,
    action: Action = "ablate",
    experts: Iterable[tuple[int, int]] | None = None,
    batch_size: int = 8,
    on_expert: Callable[[Effect], None] = lambda effect: None,
) -> list[Effect]:
    """Runs the text once for each expert, with that expert removed ("ablate") or forced on every token ("force").

    The unchanged model's hidden states are kept on the device (tokens x D numbers); its logits are recomputed in
    chunks. Removing an expert that no token uses changes nothing, to the last bit.

    Args:
        model: any Qwen3-MoE, with adapter or quantised.
        labels: the text.
        action: what is done to each expert.
        experts: (layer, expert) pairs; all by default.
        batch_size: sequences of `labels.seq_length` tokens per step.
        on_expert: called with each result as soon as it is known.

    Returns:
        One `Effect` per pair, in the order of the pairs.

    Raises:
        UserError: a pair that the model does not have; a loss that is not finite; a batch or a length that the devices
            of the model's mesh cannot share evenly.
    """
    config, mesh = model.config, model.mesh
    mesh.check_batch(batch_size)
    mesh.check_length(labels.seq_length)
    if experts is None:
        experts = [(layer, expert) for layer in config.sparse_layers for expert in range(config.num_experts)]
    head = head_weight(weights_of(model.params, model.adapters, model.lora_config))
    run = partial(_run, model.params, model.adapters, config=config, options=Options(lora=model.lora_config, mesh=mesh))
    outcome = partial(_outcome, head=head, placement=Placement(mesh, config, model.lora_config))

    def joined(outcomes: list[_Outcome]) -> _Outcome:
        return _Outcome(*map(np.concatenate, zip(*outcomes, strict=True)))

    references: list[_Reference] = []
    outcomes: list[_Outcome] = []
    load = np.zeros((len(config.sparse_layers), config.num_experts), np.int64)
    nothing = RoutingControl(selection=jnp.zeros(load.shape, jnp.int32))
    for batch in pack_in_order(labels, batch_size, mesh.product(SEQUENCE_AXES)):
        wanted = np.where(batch.valid.reshape(batch.next.shape), batch.next, -1).astype(np.int32)
        hidden, counts = run(Tokens(*batch[:3]), nothing)
        references.append(_Reference(batch, wanted, hidden))
        outcomes.append(outcome(hidden, hidden, labels=wanted).of_tokens(batch))
        load += np.asarray(counts)
    before = joined(outcomes).loss
    blocks = metrics.blocks(labels.text.document, labels.text.position)
    known = np.concatenate([r.labels.reshape(-1)[r.batch.valid] >= 0 for r in references])
    if not np.isfinite(before[known]).all():
        raise UserError(
            "model: expected finite losses, found NaN or infinity; a weight is NaN, or the dtype is too narrow for the "
            "model"
        )
    found = []
    for layer, expert in experts:
        one = {layer: (expert,)}
        control = (Intervention(ablate=one) if action == "ablate" else Intervention(force=one)).control(config)
        assert control is not None
        after = joined(
            [
                outcome(run(Tokens(*r.batch[:3]), control)[0], r.hidden, labels=r.labels).of_tokens(r.batch)
                for r in references
            ]
        )
        sums = np.stack([(after.loss - before)[known], np.ones(known.sum())], axis=1)
        clusters = metrics.cluster_sums(sums, blocks[known], int(blocks[-1]) + 1)
        interval = metrics.bootstrap(clusters[clusters[:, 1] > 0], lambda s: s[0] / s[1])
        effect = Effect(
            layer,
            expert,
            float(load[config.sparse_layers.index(layer), expert] / len(labels.text.token)),
            float(after.loss[known].mean(dtype=np.float64)),
            *interval,
            float(after.kl.mean(dtype=np.float64)),
            float(after.same.mean()),
        )
        found.append(effect)
        on_expert(effect)
    return found


def write_effects(found: Sequence[Effect], path: pathlib.Path) -> None:
    """Writes the table as CSV: a header, then one line per expert."""
    with output_file(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Effect._fields)
        writer.writerows(found)
