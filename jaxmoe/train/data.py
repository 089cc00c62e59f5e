"""The data of a run: its sources read, tokenised, packed and, if they have weights, mixed."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from captures import Capture
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.control.base_logits import BaseLogits
from jaxmoe.control.replay import Replay
from jaxmoe.data.chat import load_tokenizer
from jaxmoe.data.chat_flags import chat_settings
from jaxmoe.data.chat_flags import notices as notices_of_template
from jaxmoe.data.inputs import check_split, opened
from jaxmoe.data.mixture import Mixture
from jaxmoe.data.packing import Document, Sequences, cut
from jaxmoe.data.records import Tokenising, digest, read_input
from jaxmoe.data.sources import weights_of
from jaxmoe.data.stream import Position, Stream
from jaxmoe.train.documents import Part, read_held_out, read_parts
from jaxmoe.train.identity import Identity
from jaxmoe.train.settings import TrainConfig


@dataclass(frozen=True)
class Data:
    """The sequences to train on, to evaluate on (None: no evaluation) and to measure the routing on; `captured` adds to
    each batch to train on what captures know of it; `digests` are the identity's entries for their content."""

    sequences: Sequences | Stream
    held_out: Sequences | None
    probe: Sequences | None
    captured: tuple[Replay | BaseLogits, ...]
    epochs: int | None  # None: as many as the steps take
    notices: list[str]
    digests: Identity

    @property
    def packed(self) -> bool:
        """Whether some sequence may hold several documents."""
        return any(each.packed for each in (self.sequences, self.held_out) if each is not None)

    def position(self) -> Position | None:
        """Where the next batch begins, if the data is a stream: what a checkpoint keeps of it."""
        return self.sequences.position() if isinstance(self.sequences, Stream) else None

    def restore(self, position: Position | None) -> None:
        """Goes to where the stream of the run that is resumed was."""
        if isinstance(self.sequences, Stream) and position is not None:
            self.sequences.restore(position)

    def close(self) -> None:
        """Ends what reads ahead."""
        if isinstance(self.sequences, Stream):
            self.sequences.close()


def tokenizer_folder(settings: TrainConfig) -> pathlib.Path:
    """The folder that holds the run's tokenizer."""
    folder = settings.tokenizer if settings.from_scratch is not None else settings.model
    assert folder is not None
    return folder


def read_data(
    settings: TrainConfig,
    config: Qwen3MoeConfig,
    previous: Mapping[str, Any] | None = None,
    shared: pathlib.Path | None = None,
) -> Data:
    """The data of a run, tokenised and packed; of a stream its first window. `previous` is the identity of the run that
    is resumed. Several processes read the data together, by way of the folder `shared`; a stream each of them reads.

    Raises:
        UserError: a source that cannot be read, or none with a token to learn.
    """
    check_split([source.name for source in settings.sources], settings.split, "split")
    check_split([source.name for source in settings.eval_sources], settings.eval_split, "eval_split")
    tokenizer = load_tokenizer(tokenizer_folder(settings))
    chat = chat_settings(tokenizer, settings.system, settings.thinking, settings.template_arg)
    how = Tokenising(tokenizer, config.vocab_size, chat, pairs=settings.learns_from_pairs)
    notices = notices_of_template(chat, tokenizer)
    none = digest([], (previous or {}).get("eval_data"))
    probe = _probe(settings, how)
    if settings.streaming:
        part = read_held_out(settings, how, previous or {})
        held_out, more = _held_out(settings, part)
        stream, said, digests = _streamed(settings, how)
        digests["eval_data"] = none if part is None else part.digest
        return Data(stream, held_out, probe, (), None, notices + said + more, digests)
    part, held_out_part = read_parts(settings, how, previous, shared)
    epochs = None if settings.max_steps is not None else settings.epochs or 1
    notices += part.lost.notices(settings.seq_length)
    captured: dict[str, Replay | BaseLogits] = {}
    if settings.replay is not None:
        captured["replay"] = Replay(Capture.open(settings.replay), config, tokenizer)
    if settings.routing_base is not None:
        captured["routing_base"] = BaseLogits(Capture.open(settings.routing_base), config, tokenizer)
    for each in captured.values():
        each.check(part.of_this_process())
    weights = weights_of(settings.sources)
    sequences = Sequences(
        part.documents,
        settings.seq_length,
        seed=settings.seed,
        pack=settings.pack,
        epochs=epochs,
        reference=_no_reference_yet(settings, part.documents),
        mixture=None if weights is None else Mixture(part.sizes, weights, settings.seed),
    )
    held_out, more = _held_out(settings, held_out_part)
    digests = {
        "data": part.digest,
        "eval_data": none if held_out_part is None else held_out_part.digest,
        **{name: captured[name].digest if name in captured else None for name in ("replay", "routing_base")},
        "mixture": weights and [[weight, size] for weight, size in zip(weights, part.sizes, strict=True)],
        "streaming": None,
    }
    return Data(sequences, held_out, probe, tuple(captured.values()), epochs, notices + more, digests)


def _held_out(settings: TrainConfig, part: Part | None) -> tuple[Sequences | None, list[str]]:
    """The sequences to evaluate on, and what to say about them."""
    if part is None:
        return None, []
    sequences = Sequences(
        part.documents,
        settings.seq_length,
        pack=settings.pack,
        shuffle=False,
        epochs=1,
        reference=_no_reference_yet(settings, part.documents),
    )
    return sequences, [f"held-out: {line}" for line in part.lost.notices(settings.seq_length)]


def _probe(settings: TrainConfig, how: Tokenising) -> Sequences | None:
    """The sequences to measure the routing on."""
    if settings.watch_routing is None:
        return None
    records = read_input(opened(str(settings.watch_routing)), replace(how, pairs=False))
    documents, _ = cut(records, settings.seq_length)
    return Sequences(documents, settings.seq_length, pack=settings.pack, shuffle=False, epochs=1)


def _no_reference_yet(settings: TrainConfig, documents: Sequence[Document]) -> np.ndarray | None:
    """Room for what the reference model says of each pair, if that is stored; it is computed when the weights are
    read."""
    return np.zeros((len(documents), 2), np.float32) if settings.stores_reference else None


def _streamed(settings: TrainConfig, how: Tokenising) -> tuple[Stream, list[str], Identity]:
    """The stream to train on, what to say about its first window, and the entries of the identity."""
    weights = weights_of(settings.sources)
    inputs = [opened(source.name, settings.split, streaming=True) for source in settings.sources]
    stream = Stream(
        inputs,
        how,
        settings.seq_length,
        weights=weights,
        window=settings.shuffle_buffer,
        seed=settings.seed,
        pack=settings.pack,
    )
    said = [
        f"the first {settings.shuffle_buffer:,} records: {line}" for line in stream.cut.notices(settings.seq_length)
    ]
    content = hashlib.sha256(json.dumps([stream.digest, *(each.content for each in inputs)]).encode()).hexdigest()
    none = dict.fromkeys(("replay", "routing_base"))  # no capture of what is not read yet
    return stream, said, {"data": content, "mixture": weights, "streaming": settings.shuffle_buffer, **none}
