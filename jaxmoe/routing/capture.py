"""Runs a model over a labelled text and writes its routing; the device never waits for the host or the disk.

The writer's thread fetches a step's arrays while the next step runs. Nothing of size [tokens, E] leaves the device
unless all router logits are asked for.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int32

from captures import Capture, CaptureWriter, LabelledText, Text
from captures.format import DEFAULT_KEEP_LOGITS
from jaxmoe.config import LoraConfig, Qwen3MoeConfig
from jaxmoe.control.captured_text import check_experts
from jaxmoe.control.provenance import imposed_routing, model_of, versions
from jaxmoe.distributed import launch
from jaxmoe.distributed.agreement import wait_for_all
from jaxmoe.distributed.collectives import sum_over_devices
from jaxmoe.distributed.mesh import ONE_DEVICE, SEQUENCE_AXES, MeshShape
from jaxmoe.distributed.placement import Placement
from jaxmoe.errors import UserError
from jaxmoe.model.adapted import weights_of
from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM
from jaxmoe.model.decoder import forward, head_weight
from jaxmoe.model.interface import Options, Params, Tokens, control_specs
from jaxmoe.ops.contraction import PRECISION
from jaxmoe.ops.router import CapturedRouting, RoutingControl


class PackedBatch(NamedTuple):
    """B sequences of T tokens, filled with whole contexts; segment 0 is padding.

    `next` holds the token that follows each; `part` is the batch's place in the stream.
    """

    input_ids: Int32[np.ndarray, "B T"]
    position_ids: Int32[np.ndarray, "B T"]
    segment_ids: Int32[np.ndarray, "B T"]
    next: Int32[np.ndarray, "B T"]
    part: slice

    @property
    def valid(self) -> Bool[np.ndarray, " M"]:
        """Which of the B * T places hold a token; the tokens are in the order of the stream."""
        return self.segment_ids.reshape(-1) > 0


def pack_in_order(labels: LabelledText, batch_size: int, multiple: int = 1) -> Iterator[PackedBatch]:
    """Fills sequences with contexts in the order of the stream; a context that does not fit begins the next sequence.

    All batches have one shape, so that one program is compiled; the last batch may have empty sequences. A batch has no
    more than `batch_size` sequences, and no more than there are, rounded up to a `multiple`.

    Raises:
        UserError: a context longer than `labels.seq_length`.
    """
    text, length = labels.text, labels.seq_length
    sequences: list[list[slice]] = [[]]
    used = 0
    for context in text.contexts():
        n = context.stop - context.start
        if n > length:
            raise UserError(f"seq-length: expected at least the longest context's {n} tokens, found {length}")
        if used + n > length:
            sequences.append([])
            used = 0
        sequences[-1].append(context)
        used += n
    batch_size = min(batch_size, -(-len(sequences) // multiple) * multiple)
    for first in range(0, len(sequences), batch_size):
        batch = sequences[first : first + batch_size]
        ids, positions, segments, following = (np.zeros((batch_size, length), np.int32) for _ in range(4))
        for sequence, contexts in enumerate(batch):
            at = 0
            for segment, context in enumerate(contexts, start=1):
                place = sequence, slice(at, at + context.stop - context.start)
                ids[place], positions[place] = text.token[context], text.position[context]
                following[place], segments[place] = text.next[context], segment
                at = place[1].stop
        yield PackedBatch(ids, positions, segments, following, slice(batch[0][0].start, batch[-1][-1].stop))


def token_predictions(
    hidden: Float[Array, "M D"], head: Float[Array, "V D"], labels: Int[Array, " M"], chunk: int = 1024
) -> tuple[Int[Array, " M"], Float[Array, " M"]]:
    """(most probable next token, -log softmax(hidden head^T)[label] in nats, NaN where the label is negative).

    Computes the logits of `chunk` tokens at a time. The float32 losses equal `jaxmoe.train.loss.cross_entropy`'s.
    """
    tokens = hidden.shape[0]
    chunk = min(chunk, tokens)
    pad = -tokens % chunk
    hidden, labels = jnp.pad(hidden, ((0, pad), (0, 0))), jnp.pad(labels, (0, pad), constant_values=-1)

    def of_chunk(arguments: tuple[Array, Array]) -> tuple[Array, Array]:
        states, wanted = arguments
        logits = jnp.einsum("md,vd->mv", states, head, precision=PRECISION, preferred_element_type=jnp.float32)
        target = jnp.take_along_axis(logits, jnp.maximum(wanted, 0)[:, None], axis=1)[:, 0]
        loss = jnp.where(wanted < 0, jnp.nan, jax.nn.logsumexp(logits, axis=1) - target)
        return jnp.argmax(logits, axis=1).astype(jnp.int32), loss

    with jax.named_scope("head"):
        chunks = hidden.reshape(-1, chunk, hidden.shape[1])
        predicted, loss = jax.lax.map(of_chunk, (chunks, labels.reshape(-1, chunk)))
    return predicted.reshape(-1)[:tokens], loss.reshape(-1)[:tokens]


@dataclass(frozen=True)
class CaptureProgram:
    """What the compiled step depends on: the model, router logits kept per token, whether predictions are kept, the
    devices that share the tokens."""

    config: Qwen3MoeConfig
    lora: LoraConfig | None
    keep_logits: int
    predictions: bool
    mesh: MeshShape = ONE_DEVICE


@partial(jax.jit, static_argnames="program")
def capture_step(
    params: Params,
    adapters: Params,
    tokens: tuple[Int[Array, "B T"], Int[Array, "B T"], Int[Array, "B T"], Int[Array, "B T"]],
    control: RoutingControl | None,
    *,
    program: CaptureProgram,
) -> dict[str, Array]:
    """Runs the model over the first four arrays of a `PackedBatch`.

    Returns the arrays of a shard (`captures.format`); padding included.
    """
    placement = Placement(program.mesh, program.config, program.lora)
    of_tokens = placement.spec("batch", "sequence")
    run = placement.run_in_order(
        partial(_capture_share, program=program),
        (placement.specs(params), placement.specs(adapters), of_tokens, control_specs(control, placement)),
        (placement.spec(None, "batch", "sequence"), PartitionSpec(), of_tokens),
    )
    routing, probability_sums, predictions = run(params, adapters, tokens, control)
    flat = {name: a.reshape(a.shape[0], -1, *a.shape[3:]) for name, a in routing._asdict().items()}
    flat |= {name: a.reshape(-1) for name, a in predictions.items()}
    return placement.readable(flat | {"probability_sums": probability_sums})


def _capture_share(
    params: Params, adapters: Params, tokens: tuple[Array, ...], control: RoutingControl | None, program: CaptureProgram
) -> tuple[CapturedRouting, Float[Array, "Ls E"], dict[str, Array]]:
    """What one device finds for its tokens: (routing, probability sums of all devices, predictions [B, T] if kept)."""
    input_ids, position_ids, segment_ids, following = tokens
    out = forward(
        params,
        adapters,
        Tokens(input_ids, position_ids, segment_ids),
        config=program.config,
        options=Options(lora=program.lora, keep_logits=program.keep_logits, mesh=program.mesh),
        control=control,
    )
    assert out.routing is not None
    predictions = {}
    if program.predictions:
        head = head_weight(weights_of(params, adapters, program.lora))
        predicted = token_predictions(out.hidden.reshape(-1, out.hidden.shape[-1]), head, following.reshape(-1))
        predictions = {
            name: array.reshape(input_ids.shape) for name, array in zip(("predicted", "loss"), predicted, strict=True)
        }
    return out.routing, sum_over_devices(out.stats.prob_sums, program.mesh), predictions


def capture(
    model: Qwen3MoeForCausalLM,
    labels: LabelledText,
    folder: str | pathlib.Path,
    *,
    batch_size: int = 8,
    keep_logits: int = DEFAULT_KEEP_LOGITS,
    predictions: bool = True,
    control: RoutingControl | None = None,
    replay: Capture | None = None,
    description: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | None = None,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> Capture:
    """Runs `model` once over the text and writes the capture `folder`; of several processes the first writes it.

    Args:
        model: any Qwen3-MoE, with adapter or quantised.
        labels: the text, from `jaxmoe.routing.text` or another capture's `labelled_text`.
        folder: new or empty; it appears whole or not at all.
        batch_size: sequences of `labels.seq_length` tokens per step.
        keep_logits: how many router logits to keep per token, the largest ones; num_experts for all.
        predictions: also keep each token's loss and the most probable next token.
        control: biases, forced and removed experts, [Ls, E]; all router logits are then kept.
        replay: a capture of the same text whose experts are imposed; all router logits are then kept.
        description: what the manifest says about `control`.
        source: what the manifest says about the model: its folder, its adapter.
        on_batch: called with the number of tokens queued so far.

    Returns:
        The capture, opened.

    Raises:
        UserError: a replayed capture of another text or model, or a text that does not fit the model; a batch or a
            length that the devices of the model's mesh cannot share evenly.
    """
    config, mesh = model.config, model.mesh
    mesh.check_batch(batch_size)
    mesh.check_length(labels.seq_length)
    _check_text(labels, config)
    if replay is not None:
        _check_replay(replay, labels, config)
    about = {"framework": "jaxmoe", "dtype": str(model.params["embed_tokens"].dtype)}
    about |= {"quantization": model.quantization and model.quantization.form, **(source or {}), "versions": versions()}
    imposed = imposed_routing(control, replay, description)
    params, adapters = model.params, model.adapters
    is_first = launch.this().is_first
    writer = CaptureWriter(
        folder, model_of(config), labels=labels, source=about, control=imposed, keep_logits=keep_logits
    )
    with writer if is_first else contextlib.nullcontext():
        program = CaptureProgram(config, model.lora_config, writer.keep_logits, predictions, mesh)
        for batch in pack_in_order(labels, batch_size, mesh.product(SEQUENCE_AXES)):
            step_control = control
            if replay is not None:
                step_control = (control or RoutingControl())._replace(experts=_replayed_experts(replay, batch))
            arrays = capture_step(params, adapters, batch[:4], step_control, program=program)
            if is_first:
                for array in arrays.values():
                    array.copy_to_host_async()
                part = Text(*(a[batch.part] for a in labels.text))
                writer.put(part, arrays, None if batch.valid.all() else batch.valid)
            on_batch(batch.part.stop)
    wait_for_all()
    return Capture.open(folder)


def _check_text(labels: LabelledText, config: Qwen3MoeConfig) -> None:
    if labels.seq_length > config.max_position_embeddings:
        raise UserError(
            f"seq-length: expected at most the model's max_position_embeddings {config.max_position_embeddings}, "
            f"found {labels.seq_length}"
        )
    if (largest := int(labels.text.token.max())) >= config.vocab_size:
        raise UserError(f"data: expected token ids below the model's vocab_size {config.vocab_size}, found {largest}")


def _check_replay(replay: Capture, labels: LabelledText, config: Qwen3MoeConfig) -> None:
    """Raises UserError for a capture of another text or of a model with other experts."""
    check_experts(replay, config)
    recorded = replay.read_text()
    same = all(
        np.array_equal(a, b)
        for a, b in ((recorded.token, labels.text.token), (recorded.position, labels.text.position))
    )
    if replay.text["tokenizer"] != labels.tokenizer or not same:
        raise UserError(f"{replay.folder}: expected a capture of the same text with the same tokenizer, found another")


def _replayed_experts(replay: Capture, batch: PackedBatch) -> Int32[np.ndarray, "Ls B T k"]:
    """The captured experts of a batch; at padding they are -1 (the model chooses)."""
    chunk = replay.read(batch.part.start, batch.part.stop)
    layers, _, k = chunk.experts.shape
    experts = np.full((layers, batch.input_ids.size, k), -1, np.int32)
    experts[:, batch.valid] = chunk.experts
    return experts.reshape(layers, *batch.input_ids.shape, k)
