"""Runs a model over a labelled text and writes its routing; the device never waits for the host or the disk.

A step's arrays leave the device in the writer's thread, while the next step runs. Nothing of size [tokens, E] leaves it
unless all router logits are asked for.
"""

from __future__ import annotations

import pathlib
import platform
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from captures import Capture, CaptureWriter, LabelledText, Model
from captures.format import DEFAULT_TOP
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.errors import UserError
from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM
from jaxmoe.model.decoder import forward, head_weight
from jaxmoe.model.interface import Options, Tokens
from jaxmoe.ops.contraction import PRECISION
from jaxmoe.ops.router import RoutingControl


class PackedRows(NamedTuple):
    """A batch of whole contexts in rows of T tokens; segment 0 is padding, `part` its place in the stream."""

    input_ids: Int32[np.ndarray, "B T"]
    position_ids: Int32[np.ndarray, "B T"]
    segment_ids: Int32[np.ndarray, "B T"]
    next: Int32[np.ndarray, "B T"]
    part: slice

    @property
    def valid(self) -> Bool[np.ndarray, " M"]:
        """Which of the B * T places hold a token; they come in the order of the stream."""
        return self.segment_ids.reshape(-1) > 0


def model_of(config: Qwen3MoeConfig) -> Model:
    """What a capture says about the model."""
    return Model(
        tuple(config.sparse_layers),
        config.num_experts,
        config.num_experts_per_tok,
        config.norm_topk_prob,
        config.vocab_size,
    )


def pack_in_order(labels: LabelledText, batch_size: int) -> Iterator[PackedRows]:
    """Fills rows with contexts in the order of the stream; a context that does not fit begins the next row.

    All batches have one shape, so that one program is compiled; the last one may hold empty rows.
    """
    text, length = labels.text, labels.seq_length
    rows: list[list[slice]] = [[]]
    used = 0
    for context in text.contexts():
        n = context.stop - context.start
        if n > length:
            raise UserError(f"seq-length: expected at least the longest context's {n} tokens, found {length}")
        if used + n > length:
            rows.append([])
            used = 0
        rows[-1].append(context)
        used += n
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        ids, positions, segments, following = (np.zeros((batch_size, length), np.int32) for _ in range(4))
        for row, contexts in enumerate(batch):
            at = 0
            for segment, context in enumerate(contexts, start=1):
                place = row, slice(at, at + context.stop - context.start)
                ids[place], positions[place] = text.token[context], text.position[context]
                following[place], segments[place] = text.next[context], segment
                at = place[1].stop
        yield PackedRows(ids, positions, segments, following, slice(batch[0][0].start, batch[-1][-1].stop))


def token_predictions(
    hidden: Float[Array, "M D"], head: Float[Array, "V D"], labels: Int[Array, " M"], chunk: int = 1024
) -> tuple[Int[Array, " M"], Float[Array, " M"]]:
    """(most probable next token, -log softmax(hidden head^T)[label] in nats, NaN where the label is negative).

    Holds the logits of `chunk` tokens at a time; the float32 numbers are those of `jaxmoe.train.loss.cross_entropy`.
    """
    tokens = hidden.shape[0]
    chunk = min(chunk, tokens)
    pad = -tokens % chunk
    hidden, labels = jnp.pad(hidden, ((0, pad), (0, 0))), jnp.pad(labels, (0, pad), constant_values=-1)

    def piece(arguments: tuple[Array, Array]) -> tuple[Array, Array]:
        rows, wanted = arguments
        logits = jnp.einsum("md,vd->mv", rows, head, precision=PRECISION, preferred_element_type=jnp.float32)
        target = jnp.take_along_axis(logits, jnp.maximum(wanted, 0)[:, None], axis=1)[:, 0]
        loss = jnp.where(wanted < 0, jnp.nan, jax.nn.logsumexp(logits, axis=1) - target)
        return jnp.argmax(logits, axis=1).astype(jnp.int32), loss

    with jax.named_scope("head"):
        rows = hidden.reshape(-1, chunk, hidden.shape[1])
        predicted, loss = jax.lax.map(piece, (rows, labels.reshape(-1, chunk)))
    return predicted.reshape(-1)[:tokens], loss.reshape(-1)[:tokens]


@partial(jax.jit, static_argnames=("config", "lora", "top", "predictions"))
def capture_step(
    params: Mapping[str, Array],
    adapters: Mapping[str, Array],
    input_ids: Int[Array, "B T"],
    position_ids: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    following: Int[Array, "B T"],
    control: RoutingControl | None,
    *,
    config: Qwen3MoeConfig,
    lora: Any,
    top: int,
    predictions: bool,
) -> dict[str, Array]:
    """One batch through the model: the arrays of a shard (`captures.format`), padding among them."""
    out = forward(
        dict(params),
        dict(adapters),
        Tokens(input_ids, position_ids, segment_ids),
        config=config,
        options=Options(lora=lora, keep_logits=top),
        control=control,
    )
    assert out.routing is not None
    flat = {name: a.reshape(a.shape[0], -1, *a.shape[3:]) for name, a in out.routing._asdict().items()}
    arrays = flat | {"probability_sums": out.stats.prob_sums}
    if predictions:
        head = head_weight(dict(params), config)
        hidden = out.hidden.reshape(-1, out.hidden.shape[-1])
        arrays["predicted"], arrays["loss"] = token_predictions(hidden, head, following.reshape(-1))
    return arrays


def capture(
    model: Qwen3MoeForCausalLM,
    labels: LabelledText,
    folder: str | pathlib.Path,
    *,
    batch_size: int = 8,
    top: int = DEFAULT_TOP,
    predictions: bool = True,
    control: RoutingControl | None = None,
    replay: Capture | None = None,
    description: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | None = None,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> Capture:
    """Runs `model` once over the text and writes the capture `folder`.

    Args:
        model: any Qwen3-MoE, with adapter or in NF4.
        labels: the text, from `jaxmoe.routing.text` or another capture's `labelled_text`.
        folder: new or empty; it appears whole or not at all.
        batch_size: rows of `labels.seq_length` tokens per step.
        top: how many of the largest router logits to keep, num_experts for all.
        predictions: also keep each token's most probable successor and its loss.
        control: biases, forced and removed experts, [Ls, E]; all logits are then kept.
        replay: a capture of the same text whose experts are imposed; all logits are then kept.
        description: what the manifest says about `control`.
        source: what the manifest says about the model: its folder, its adapter.
        on_batch: called with the number of tokens queued so far.

    Raises:
        UserError: a replayed capture of another text or model, or a text that does not fit the model.
    """
    config = model.config
    if labels.seq_length > config.max_position_embeddings:
        raise UserError(
            f"seq-length: expected at most the model's max_position_embeddings {config.max_position_embeddings}, "
            f"found {labels.seq_length}"
        )
    if (largest := int(labels.text.token.max())) >= config.vocab_size:
        raise UserError(f"data: expected token ids below the model's vocab_size {config.vocab_size}, found {largest}")
    if replay is not None:
        check_replay(replay, labels, model_of(config))
    imposed = None
    if control is not None or replay is not None:
        imposed = dict(description or {}) | ({"replay": str(replay.folder)} if replay is not None else {})
        imposed = imposed or {"control": "given as arrays"}
    about = {"framework": "jaxmoe", "dtype": str(model.params["embed_tokens"].dtype)}
    about |= {"quantization": "nf4" if model.quantization else None, **(source or {}), "versions": versions()}
    params, adapters = model.params, model.adapters
    with CaptureWriter(folder, model_of(config), labels=labels, source=about, control=imposed, top=top) as writer:
        for rows in pack_in_order(labels, batch_size):
            step_control = control
            if replay is not None:
                step_control = (control or RoutingControl())._replace(experts=replayed_rows(replay, rows))
            arrays = capture_step(
                params,
                adapters,
                *rows[:4],
                step_control,
                config=config,
                lora=model.lora_config,
                top=writer.top,
                predictions=predictions,
            )
            for array in arrays.values():
                array.copy_to_host_async()
            part = type(labels.text)(*(a[rows.part] for a in labels.text))
            writer.put(part, arrays, None if rows.valid.all() else rows.valid)
            on_batch(rows.part.stop)
    return Capture.open(folder)


def check_replay(replay: Capture, labels: LabelledText, model: Model) -> None:
    """Refuses a capture that was made of another text, or by a model of other experts.

    Raises:
        UserError: what differs.
    """
    for name in ("layers", "num_experts", "num_experts_per_tok"):
        expected, found = getattr(model, name), getattr(replay.model, name)
        if expected != found:
            raise UserError(f"{replay.folder}: {name}: expected the model's {expected}, found {found}")
    recorded = replay.read_text()
    same = all(
        np.array_equal(a, b)
        for a, b in ((recorded.token, labels.text.token), (recorded.position, labels.text.position))
    )
    if replay.text["tokenizer"] != labels.tokenizer or not same:
        raise UserError(f"{replay.folder}: expected a capture of the same text with the same tokenizer, found another")


def replayed_rows(replay: Capture, rows: PackedRows) -> Int32[np.ndarray, "Ls B T k"]:
    """The captured experts of a batch; -1, the model's own choice, at padding."""
    chunk = replay.read(rows.part.start, rows.part.stop)
    layers, _, k = chunk.experts.shape
    experts = np.full((layers, rows.input_ids.size, k), -1, np.int32)
    experts[:, rows.valid] = chunk.experts
    return experts.reshape(layers, *rows.input_ids.shape, k)


def versions() -> dict[str, str]:
    """Versions of what a capture's numbers depend on."""
    found = {"python": platform.python_version(), "device": jax.devices()[0].device_kind}
    for name in ("jaxmoe", "jax", "jaxlib", "flax", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a source tree that is not installed
            continue
    return found
