"""Records -> documents -> packed sequences -> batches.

A document is a record, or a piece of a long one, that fits into one sequence. A sequence is one line of a batch:
several documents, one after the other, then padding. Which documents share a sequence, and in which order the sequences
come, depends only on (records, seed, epoch). The batch of a step depends only on (records, seed, step), so a run that
resumes at a step sees the same batches as one that never stopped.

Preference pairs fill pairs of sequences: document s of a sequence with an even number in the batch is the chosen side
of a pair, document s of the next sequence its rejected side.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int16, Int32

from jaxmoe.data.mixture import Mixture
from jaxmoe.data.records import Record
from jaxmoe.errors import UserError, counted

_WINDOW = 1024  # documents; enough to fill sequences, few enough that every epoch packs different documents together


class Document(NamedTuple):
    """A record, or a piece of one, that fits into one sequence: `labels[i]` is the token that follows `inputs[i]`.

    Of a preference pair this is the chosen side, and `rejected` the other one.
    """

    inputs: Int32[np.ndarray, " n"]
    labels: Int32[np.ndarray, " n"]
    weights: Float32[np.ndarray, " n"]
    rejected: Document | None = None

    @property
    def sides(self) -> tuple[Document, ...]:
        """The document itself, and the rejected side of a pair."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def length(self) -> int:
        """Tokens that it needs of a sequence; of a pair the longer side decides."""
        return max(len(side.inputs) for side in self.sides)


class Cut(NamedTuple):
    """How many records `cut` changed: split into several documents, truncated, dropped."""

    split: int = 0
    truncated: int = 0
    dropped: int = 0

    def notices(self, seq_length: int) -> list[str]:
        """Messages for the user, one line for each kind of change that happened."""
        lines = []
        if self.split:
            lines.append(
                f"longer than {seq_length} tokens: {counted(self.split, 'text')}, split into several documents"
            )
        if self.truncated:
            lines.append(f"longer than {seq_length} tokens: {counted(self.truncated, 'record')}, truncated at the end")
        if self.dropped:
            lines.append(f"no token to learn within {seq_length} tokens: {counted(self.dropped, 'record')}, dropped")
        return lines


class Batch(NamedTuple):
    """Sequences of T tokens with any leading axes, here [accumulation, B]; padding has segment 0 and weight 0.

    A document has one segment id (1, 2, ... within its sequence) and positions that start at 0. `labels` is the next
    token of the same document. `experts`, if given, replays a captured routing: the k experts of each token in each MoE
    layer, -1 where the model chooses. `reference`, if given, sums over a document to the log-probability that a
    reference model gives to its learned tokens. `base_logits`, if given, are captured router logits. Arrays are NumPy
    here and JAX within a step.
    """

    input_ids: Int32[Any, "*lead T"]
    labels: Int32[Any, "*lead T"]
    weights: Float32[Any, "*lead T"]
    segment_ids: Int32[Any, "*lead T"]
    position_ids: Int32[Any, "*lead T"]
    experts: Int16[Any, "*lead T Ls k"] | None = None
    reference: Float32[Any, "*lead T"] | None = None
    base_logits: Float32[Any, "*lead T Ls E"] | None = None


def cut(records: Iterable[Record], seq_length: int) -> tuple[list[Document], Cut]:
    """Records -> documents of at most `seq_length` tokens.

    A longer text becomes consecutive documents in which each token is predicted once (the first tokens of a document
    see none before it). A longer conversation, or a longer prompt with its completion, is truncated at its end. Tokens
    after the last one to learn are left out. A record without a token to learn is dropped.

    Of a preference pair each side keeps its first `seq_length` tokens, the last one included although nothing follows
    it, and a pair whose prompt leaves no room for an answer is dropped, as in TRL 1.16 (`max_length` with
    `truncation_mode="keep_start"`).

    Raises:
        UserError: every record is longer than `seq_length` before its first token to learn.
    """
    records = list(records)
    documents, lost = divide(records, seq_length)
    if records and not documents:
        raise UserError(nothing_fits(records, seq_length))
    return documents, lost


def divide(records: Iterable[Record], seq_length: int) -> tuple[list[Document], Cut]:
    """As `cut`, of records that may all be without a token to learn."""
    cuts = [documents_of(record, seq_length) for record in records]
    return [document for found, _ in cuts for document in found], total_of([lost for _, lost in cuts])


def total_of(cuts: Sequence[Cut]) -> Cut:
    """What happened to several lots of records."""
    return Cut(*(sum(counts) for counts in zip(*cuts, strict=True))) if cuts else Cut()


def documents_of(record: Record, seq_length: int) -> tuple[list[Document], Cut]:
    """What `cut` makes of one record."""
    if record.rejected is not None:
        pair = _cut_pair(record, seq_length)
        truncated = max(len(side.tokens) for side in record.sides) > seq_length
        return [pair] if pair is not None else [], Cut(truncated=int(truncated), dropped=int(pair is None))
    inputs, labels, weights = record.tokens[:-1], record.tokens[1:], record.weights[1:]
    learned = np.flatnonzero(weights)
    length = int(learned[-1]) + 1 if len(learned) else 0
    truncated = length > seq_length and not record.splittable
    if truncated:
        learned = learned[learned < seq_length]
        length = int(learned[-1]) + 1 if len(learned) else 0
    if not length:
        return [], Cut(truncated=int(truncated), dropped=1)
    pieces = [slice(start, min(start + seq_length, length)) for start in range(0, length, seq_length)]
    documents = [Document(inputs[piece], labels[piece], weights[piece]) for piece in pieces]
    return documents, Cut(int(len(pieces) > 1), int(truncated))


def _cut_pair(record: Record, seq_length: int) -> Document | None:
    """Both sides of a pair; None if one of them has no token to learn."""
    chosen, rejected = (_from_the_start(side, seq_length) for side in record.sides)
    if not (chosen.weights.any() and rejected.weights.any()):
        return None
    return chosen._replace(rejected=rejected)


def _from_the_start(record: Record, seq_length: int) -> Document:
    tokens, weights = record.tokens[:seq_length], record.weights[1:seq_length]
    return Document(tokens, np.append(tokens[1:], np.int32(0)), np.append(weights, np.float32(0)))


def nothing_fits(records: Sequence[Record], seq_length: int) -> str:
    """Why no record has a token to learn, with the lengths that a user needs to choose another `seq_length`."""
    message = "data: expected at least one record with a token to learn, found none"
    first = [int(learned[0]) + 1 for r in records if len(learned := np.flatnonzero(r.weights[1:]))]
    if not first:
        return f"{message} in {counted(len(records), 'record')}"
    found = f"in all {len(records):,} records" if len(records) > 1 else "in the only record"
    return (
        f"{message} within seq_length {seq_length}: {found} the answer comes later "
        f"(after {min(first) - 1} tokens in the shortest, {max(first) - 1} in the longest); raise --seq-length"
    )


def pack(lengths: Sequence[int], seq_length: int, rng: np.random.Generator) -> list[list[int]]:
    """Lengths of documents -> sequences of at most `seq_length` tokens, each a list of indices, in random order.

    Best-fit decreasing: each document goes into the fullest sequence that still has room for it. The documents are
    shuffled first and packed in windows, so that sequences are nearly full and differ in every epoch.
    """
    order = rng.permutation(len(lengths)).tolist()
    sequences: list[list[int]] = []
    for first in range(0, len(order), _WINDOW):
        room: list[tuple[int, int]] = []  # (free tokens, sequence), sorted
        for index in sorted(order[first : first + _WINDOW], key=lambda i: -lengths[i]):
            slot = bisect.bisect_left(room, (lengths[index], -1))
            if slot == len(room):
                free, number = seq_length, len(sequences)
                sequences.append([])
            else:
                free, number = room.pop(slot)
            sequences[number].append(index)
            if free > lengths[index]:
                bisect.insort(room, (free - lengths[index], number))
    return [sequences[i] for i in rng.permutation(len(sequences))]


LinesOf = Callable[[tuple[int, ...]], Container[int] | None]


def lengths_of(documents: Sequence[Document]) -> list[int]:
    """`Document.length` of each; documents that are read when they are wanted know it without being read."""
    known = getattr(documents, "lengths", None)
    return [document.length for document in documents] if known is None else known


class Sequences:
    """A stream of packed sequences, endless or `epochs` long, read in batches.

    Every epoch holds every document exactly once, or what a mixture of sources says. A batch may hold the end of one
    epoch and the start of the next. After the last epoch, sequences are empty. Where the documents are preference
    pairs, a sequence stands for two lines of a batch, which lie next to each other.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        seq_length: int,
        *,
        seed: int = 0,
        pack: bool = True,
        shuffle: bool = True,
        epochs: int | None = None,
        reference: Float32[np.ndarray, "documents 2"] | None = None,
        mixture: Mixture | None = None,
    ) -> None:
        """`reference` holds what a reference model says of the sides of each pair; it may be filled in later. `mixture`
        says which documents an epoch holds (default: each of them once)."""
        if not documents:
            raise UserError("data: expected at least one record with a token to learn, found none")
        self.seq_length = seq_length
        self.reference = reference
        self._documents = documents
        self._lengths = lengths_of(documents)
        self._seed, self._pack, self._shuffle, self._epochs = seed, pack, shuffle, epochs
        self._ends: list[int] = []  # sequences up to and including each epoch planned so far
        self._plans: dict[int, list[list[int]]] = {}
        self._mixture = mixture

    @classmethod
    def planned(cls, documents: Sequence[Document], plan: list[list[int]], seq_length: int) -> Sequences:
        """One epoch whose sequences are given, each as indices of documents."""
        sequences = cls(documents, seq_length, epochs=1)
        sequences._plans, sequences._ends = {0: plan}, [len(plan)]
        return sequences

    @property
    def count_of_documents(self) -> int:
        """How many documents an epoch holds."""
        return len(self._documents)

    def in_order(self) -> Sequences:
        """One epoch of the same documents, not shuffled and without a reference."""
        return self.cut_to(self.seq_length)

    def cut_to(self, seq_length: int) -> Sequences:
        """`in_order`, in sequences of another length, which holds the longest document."""
        return Sequences(self._documents, seq_length, pack=self._pack, shuffle=False, epochs=1)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self._lengths)

    @property
    def packed(self) -> bool:
        """Whether a sequence may hold several documents; False if the two shortest do not fit into one."""
        return self._pack and sum(sorted(self._lengths)[:2]) <= self.seq_length and len(self._lengths) > 1

    def epoch(self, epoch: int) -> list[list[int]]:
        """The sequences of one epoch, each a list of indices of documents."""
        if epoch not in self._plans:
            rng = np.random.default_rng((self._seed, epoch))
            members = range(len(self._documents)) if self._mixture is None else self._mixture.epoch(epoch)
            if self._pack:
                plan = pack([self._lengths[i] for i in members], self.seq_length, rng)
                plan = plan if self._shuffle else sorted(plan)
            else:
                order = rng.permutation(len(members)) if self._shuffle else range(len(members))
                plan = [[int(i)] for i in order]
            plan = [[members[i] for i in sequence] for sequence in plan]
            self._plans = {e: kept for e, kept in self._plans.items() if e == epoch - 1} | {epoch: plan}
        return self._plans[epoch]

    def count(self, epochs: int) -> int:
        """How many sequences the first `epochs` epochs have."""
        while len(self._ends) < epochs:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + len(self.epoch(len(self._ends))))
        return self._ends[epochs - 1] if epochs else 0

    def steps(self, epochs: int, per_step: int) -> int:
        """How many batches of `per_step` sequences cover the first `epochs` epochs."""
        return -(-self.count(epochs) // per_step)

    def batch(self, step: int, shape: tuple[int, ...], lines_of: LinesOf = lambda shape: None) -> Batch:
        """Batch number `step` (from 0) with leading axes `shape`, for instance (accumulation, B); of pairs, 2 B.

        `lines_of` says of such axes which lines are wanted, numbered from 0 on in all axes taken together; None: all.
        The others are left empty, and their documents are not read.
        """
        sides = len(self._documents[0].sides)
        shape = (*shape[:-1], shape[-1] * sides)
        size, lines = int(np.prod(shape)), lines_of(shape)
        floats = {"weights"} if self.reference is None else {"weights", "reference"}
        arrays: dict[str, np.ndarray] = {
            name: np.zeros((size, self.seq_length), np.float32 if name in floats else np.int32)
            for name in Batch._fields
            if name not in {"experts", "reference", "base_logits"} - floats
        }
        for slot, indices in enumerate(self.plan(step, size // sides)):
            for side in range(sides):
                if lines is not None and slot * sides + side not in lines:
                    continue
                self._fill({name: array[slot * sides + side] for name, array in arrays.items()}, indices, side)
        return Batch(**{name: array.reshape(*shape, self.seq_length) for name, array in arrays.items()})

    def _fill(self, line: dict[str, np.ndarray], indices: list[int], side: int) -> None:
        """Writes one side of the documents `indices` into a line of a batch."""
        at = 0
        for number, index in enumerate(indices, start=1):
            document = self._documents[index].sides[side]
            span = slice(at, at + len(document.inputs))
            line["input_ids"][span] = document.inputs
            line["labels"][span] = document.labels
            line["weights"][span] = document.weights
            line["segment_ids"][span] = number
            line["position_ids"][span] = np.arange(len(document.inputs))
            if self.reference is not None:
                line["reference"][at] = self.reference[index, side]
            at = span.stop

    def plan(self, step: int, size: int) -> Iterator[list[int]]:
        """The sequences of batch number `step` of `size` sequences, each a list of indices of documents; fewer after
        the last epoch."""
        return self._plan(step * size, (step + 1) * size)

    def _plan(self, start: int, stop: int) -> Iterator[list[int]]:
        """Sequences `start` to `stop` of the stream, each a list of indices of documents."""
        epoch = 0
        for number in range(start, stop):
            while self.count(epoch + 1) <= number:
                epoch += 1
                if epoch == self._epochs:
                    return
            yield self.epoch(epoch)[number - self.count(epoch)]
