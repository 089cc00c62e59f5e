"""JSONL records -> token ids and loss weights -> packed batches.

A line holds one record of one of three kinds: `{"messages": [...]}` (optionally with `"tools"`), rendered by the
checkpoint's own chat template with the loss on the assistant's turns; `{"prompt": ..., "completion": ...}` with the
loss on the completion; `{"text": ...}` with the loss on every token. Which records share a row, and in which order rows
come, is a pure function of (records, seed, epoch), and the batch of a step one of (records, seed, step): a run that
resumes at step s sees what it would have seen.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int16, Int32

from jaxmoe.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_KEYS = {"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name"}
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What a template of a thinking model appends to the generation prompt and leaves out of earlier turns.
_OPENED_THOUGHT = re.compile(r"<think>\s*(</think>\s*)?$")
_TOGETHER = 2**20  # bytes of a file whose texts are encoded in one call: enough for many cores, little memory
_PACKING_WINDOW = 1024  # records; wide enough to fill rows, narrow enough that every epoch mixes other neighbours


@dataclass(frozen=True)
class Record:
    """One tokenised line: `weights[i]` is the loss weight of predicting `tokens[i]` from what comes before it.

    `splittable` says whether a record longer than a row is cut into several segments (text) or truncated (the rest).
    """

    tokens: Int32[np.ndarray, " n"]
    weights: Float32[np.ndarray, " n"]
    splittable: bool


class Segment(NamedTuple):
    """A piece of a record that fits into one row: `labels[i]` is the token that follows `inputs[i]`."""

    inputs: Int32[np.ndarray, " n"]
    labels: Int32[np.ndarray, " n"]
    weights: Float32[np.ndarray, " n"]


class Cut(NamedTuple):
    """How many records `cut` did not take as they were: split into several rows, truncated, dropped."""

    split: int
    truncated: int
    dropped: int

    def notices(self, seq_length: int) -> list[str]:
        """One line for each kind of loss that happened, for the user."""
        lines = []
        if self.split:
            lines.append(f"{self.split} text records are longer than {seq_length} tokens: split into consecutive rows")
        if self.truncated:
            lines.append(f"{self.truncated} records are longer than {seq_length} tokens: truncated at the end")
        if self.dropped:
            lines.append(f"{self.dropped} records have no token to learn within {seq_length} tokens: dropped")
        return lines


class Batch(NamedTuple):
    """Rows of T tokens with any leading axes, here [accumulation, B]; padding has segment 0 and weight 0.

    A document has one segment id (1.. within its row) and positions that start at 0; `labels` is the document's next
    token and never one of another document. `experts`, where given, replays a captured routing: the k experts of each
    token in each MoE layer, -1 where the model chooses. The arrays are NumPy's here and JAX's within a step.
    """

    input_ids: Int32[Any, "*lead T"]
    labels: Int32[Any, "*lead T"]
    weights: Float32[Any, "*lead T"]
    segment_ids: Int32[Any, "*lead T"]
    position_ids: Int32[Any, "*lead T"]
    experts: Int16[Any, "*lead T Ls k"] | None = None


def load_tokenizer(folder: str | pathlib.Path) -> Any:
    """The tokenizer in a model folder (HF form or converted), through transformers' `AutoTokenizer`.

    Raises:
        UserError: the folder holds no tokenizer, or one without an end-of-text token.
    """
    if not pathlib.Path(folder).is_dir():
        raise UserError(f"{folder}: expected a folder with a tokenizer, found none")
    try:
        tokenizer = _auto_tokenizer().from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{folder}: expected a tokenizer, found none that loads ({reason[0]})") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: expected a tokenizer with an eos_token, found none")
    return tokenizer


def _auto_tokenizer() -> Any:
    """Transformers' `AutoTokenizer`; slow to import, and only text needs it.

    Without PyTorch, which nothing here needs, transformers says while it is imported that models won't be available.
    """
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(quiet)
    os.environ[quiet] = "1"
    try:
        from transformers import AutoTokenizer
    finally:
        if before is None:
            del os.environ[quiet]
        else:
            os.environ[quiet] = before
    return AutoTokenizer


OnRead = Callable[[int, int, int], None]  # bytes read, bytes of the file, records so far


def read_records(
    path: str | pathlib.Path, tokenizer: Any, vocab_size: int, on_read: OnRead = lambda *_: None
) -> list[Record]:
    """Every record of a JSONL file, tokenised; blank lines are skipped. `on_read` is called some times a second.

    Raises:
        UserError: the file is missing, holds no record, or a line is bad (the message starts with FILE:LINE).
    """
    path = pathlib.Path(path)
    records: list[Record] = []
    waiting: list[tuple[str, _Draft]] = []
    encoded_to = 0

    def encode() -> None:
        drafted, waiting[:] = list(waiting), []
        encoded = _encode([draft for _, draft in drafted], tokenizer)
        for (where, _), record in zip(drafted, encoded, strict=True):
            largest = int(record.tokens.max())
            if largest >= vocab_size:
                wanted = f"token ids below the model's vocab_size {vocab_size}"
                raise UserError(f"{where}: expected {wanted}, found {largest}")
            records.append(record)

    try:
        for where, raw, end in read_lines(path):
            try:
                waiting.append((where, _draft(raw, tokenizer)))
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            if end - encoded_to >= _TOGETHER:
                encode()
                encoded_to = end
                on_read(end, path.stat().st_size, len(records))
    except UserError:
        encode()  # what is wrong with an earlier line is said first
        raise
    encode()
    if not records:
        raise UserError(f"{path}: expected at least one record, found none")
    return records


def tokenize_record(raw: Any, tokenizer: Any) -> Record:
    """One parsed JSON value -> tokens and loss weights; special tokens are added by the chat template and, behind text
    and completions, as `eos_token`, never by the tokenizer (Qwen3 has no beginning-of-text token).

    Raises:
        UserError: not a record of one of the three kinds, or nothing in it to learn.
    """
    return next(_encode([_draft(raw, tokenizer)], tokenizer))


def assistant_spans(
    messages: Sequence[dict[str, Any]], tools: list[Any] | None, tokenizer: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and the character range of every assistant turn in it.

    A turn begins where the generation prompt ends, as the model will meet it, and ends with the special token that
    closes it; a thought that the template keeps belongs to the turn. Growing prefixes cannot find the turns: Qwen3's
    template writes an empty thought into the last turn and strips the thoughts of turns before the last question, so
    a prefix's rendering is no prefix of the whole. Here the whole is rendered once more per turn, with the answer
    replaced by a character that occurs nowhere in it: what stands before and behind that character must stand in the
    true rendering as well.

    Raises:
        UserError: there is no chat template, it rejects the messages, or the turns cannot be told apart.
    """
    whole = _render(messages, tools, tokenizer)
    prompted = _render(messages, tools, tokenizer, add_generation_prompt=True)
    prompt = prompted[len(whole) :]
    if not prompt or not prompted.startswith(whole):
        raise UserError("chat template: expected a generation prompt behind the messages, found another rendering")
    mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in prompted)
    closers = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        replaced = [*messages[:turn], {"role": "assistant", "content": mark}, *messages[turn + 1 :]]
        before, found, behind = _render(replaced, tools, tokenizer).partition(mark)
        # A template that opens a thought in the generation prompt may leave it out of earlier turns.
        headers = (prompt, _OPENED_THOUGHT.sub("", prompt))
        start = max((before.rfind(header) + len(header) for header in headers if header in before), default=-1)
        end = len(whole) - len(behind)
        bounded = whole.startswith(before[:start]) and whole.endswith(behind) and start <= end
        if not found or start < (spans[-1][1] if spans else 0) or not bounded:
            raise UserError(f"chat template: cannot tell the answer of message {turn + 1} from what surrounds it")
        closer = next((token for token in closers if behind.lstrip().startswith(token)), None)
        if closer is None:
            raise UserError(
                f"chat template: expected a special token behind the answer of message {turn + 1}, "
                f"found {behind[:20]!r}"
            )
        spans.append((start, end + behind.index(closer) + len(closer)))
    return whole, spans


def cut(records: Iterable[Record], seq_length: int) -> tuple[list[Segment], Cut]:
    """Records -> segments of at most `seq_length` tokens.

    A text that is longer becomes consecutive segments in which each of its tokens is predicted once (a segment's first
    tokens see no earlier ones); a conversation or a prompt with its completion is truncated at its end. Tokens behind
    the last one to learn are left out. A record with nothing left to learn is dropped.
    """
    segments: list[Segment] = []
    split = truncated = dropped = 0
    for record in records:
        inputs, labels, weights = record.tokens[:-1], record.tokens[1:], record.weights[1:]
        learned = np.flatnonzero(weights)
        length = int(learned[-1]) + 1 if len(learned) else 0
        if length > seq_length and not record.splittable:
            truncated += 1
            learned = learned[learned < seq_length]
            length = int(learned[-1]) + 1 if len(learned) else 0
        if not length:
            dropped += 1
            continue
        split += length > seq_length
        for start in range(0, length, seq_length):
            piece = slice(start, min(start + seq_length, length))
            segments.append(Segment(inputs[piece], labels[piece], weights[piece]))
    return segments, Cut(split, truncated, dropped)


def hold_out(records: list[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    """(training records, held-out records); the choice depends on the number of records alone, not on the run's seed,
    so that runs with several seeds are judged on the same text.

    Raises:
        UserError: a fraction outside (0, 1), or one of the two parts would be empty.
    """
    if not 0 < fraction < 1:
        raise UserError(f"eval_fraction: expected a number between 0 and 1, found {fraction!r}")
    count = max(1, round(len(records) * fraction))
    if count >= len(records):
        raise UserError(f"eval_fraction: expected records on both sides, found {len(records)} in all")
    held = set(np.random.default_rng(0).permutation(len(records))[:count].tolist())
    return (
        [record for i, record in enumerate(records) if i not in held],
        [record for i, record in enumerate(records) if i in held],
    )


def digest(records: Iterable[Record]) -> str:
    """SHA-256 over tokens and weights: equal where two runs would train on the same data in the same order."""
    total = hashlib.sha256()
    for record in records:
        total.update(len(record.tokens).to_bytes(8, "little"))
        total.update(record.tokens.tobytes())
        total.update(record.weights.tobytes())
    return total.hexdigest()


def pack_rows(lengths: Sequence[int], seq_length: int, rng: np.random.Generator) -> list[list[int]]:
    """Indices of segments -> rows of at most `seq_length` tokens, in random order.

    Best-fit decreasing (the fullest row that still has room) within windows of a shuffled order: nearly full rows, and
    other neighbours in every epoch.
    """
    order = rng.permutation(len(lengths)).tolist()
    rows: list[list[int]] = []
    for first in range(0, len(order), _PACKING_WINDOW):
        room: list[tuple[int, int]] = []  # (free tokens, row), sorted
        for index in sorted(order[first : first + _PACKING_WINDOW], key=lambda i: -lengths[i]):
            slot = bisect.bisect_left(room, (lengths[index], -1))
            if slot == len(room):
                free, row = seq_length, len(rows)
                rows.append([])
            else:
                free, row = room.pop(slot)
            rows[row].append(index)
            if free > lengths[index]:
                bisect.insort(room, (free - lengths[index], row))
    return [rows[i] for i in rng.permutation(len(rows))]


class Rows:
    """An endless (or `epochs` long) stream of packed rows, cut into batches.

    Rows of one epoch follow those of the one before, also within a batch: each epoch holds each segment exactly once
    and nothing is left over. Behind the last epoch come empty rows.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        seq_length: int,
        *,
        seed: int = 0,
        pack: bool = True,
        shuffle: bool = True,
        epochs: int | None = None,
    ) -> None:
        if not segments:
            raise UserError("data: expected at least one record with a token to learn, found none")
        self.seq_length = seq_length
        self._segments = segments
        self._lengths = [len(segment.inputs) for segment in segments]
        self._seed, self._pack, self._shuffle, self._epochs = seed, pack, shuffle, epochs
        self._ends: list[int] = []  # rows up to and including each epoch planned so far
        self._plans: dict[int, list[list[int]]] = {}

    @property
    def packed(self) -> bool:
        """Whether a row may hold several segments: where the two shortest do not fit into one, none does."""
        return self._pack and sum(sorted(self._lengths)[:2]) <= self.seq_length and len(self._lengths) > 1

    def epoch(self, epoch: int) -> list[list[int]]:
        """The rows of one epoch, each a list of segment indices."""
        if epoch not in self._plans:
            rng = np.random.default_rng((self._seed, epoch))
            if self._pack:
                rows = pack_rows(self._lengths, self.seq_length, rng)
                rows = rows if self._shuffle else sorted(rows)
            else:
                order = rng.permutation(len(self._segments)) if self._shuffle else range(len(self._segments))
                rows = [[int(i)] for i in order]
            self._plans = {e: plan for e, plan in self._plans.items() if e == epoch - 1} | {epoch: rows}
        return self._plans[epoch]

    def count(self, epochs: int) -> int:
        """How many rows the first `epochs` epochs have."""
        while len(self._ends) < epochs:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + len(self.epoch(len(self._ends))))
        return self._ends[epochs - 1] if epochs else 0

    def steps(self, epochs: int, rows_per_step: int) -> int:
        """How many batches of `rows_per_step` rows cover the first `epochs` epochs."""
        return -(-self.count(epochs) // rows_per_step)

    def batch(self, step: int, shape: tuple[int, ...]) -> Batch:
        """Batch number `step` (from 0) with leading axes `shape`, for instance (accumulation, B)."""
        size = int(np.prod(shape))
        arrays: dict[str, np.ndarray] = {
            name: np.zeros((size, self.seq_length), np.float32 if name == "weights" else np.int32)
            for name in Batch._fields
            if name != "experts"
        }
        for slot, row in enumerate(self._rows(step * size, (step + 1) * size)):
            at = 0
            for number, index in enumerate(row, start=1):
                segment = self._segments[index]
                span = slice(at, at + len(segment.inputs))
                arrays["input_ids"][slot, span] = segment.inputs
                arrays["labels"][slot, span] = segment.labels
                arrays["weights"][slot, span] = segment.weights
                arrays["segment_ids"][slot, span] = number
                arrays["position_ids"][slot, span] = np.arange(len(segment.inputs))
                at = span.stop
        return Batch(**{name: array.reshape(*shape, self.seq_length) for name, array in arrays.items()})

    def _rows(self, start: int, stop: int) -> Iterator[list[int]]:
        epoch = 0
        for row in range(start, stop):
            while self.count(epoch + 1) <= row:
                epoch += 1
                if epoch == self._epochs:
                    return
            yield self.epoch(epoch)[row - self.count(epoch)]


def read_lines(path: pathlib.Path) -> Iterator[tuple[str, Any, int]]:
    """(`FILE:LINE`, parsed JSON, bytes up to its end) of every line that is not blank."""
    if not path.is_file():
        raise UserError(f"{path}: expected a JSONL file, found {'a folder' if path.is_dir() else 'none'}")
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            end += len(line)
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{where}: expected UTF-8, found byte 0x{line[error.start]:02x} at byte {error.start + 1}"
                ) from None
            if not text.strip():
                continue
            try:
                yield where, json.loads(text), end
            except (json.JSONDecodeError, RecursionError) as error:
                raise UserError(f"{where}: expected JSON, found {error}") from None


_Piece = tuple[str | list[int], float]  # text, or tokens, and the loss weight of each token


class _Draft(NamedTuple):
    """A record whose text is not yet encoded. Each piece is encoded on its own: generation, too, meets a prompt that
    was encoded before its answer existed."""

    pieces: list[_Piece]
    splittable: bool = False


def _draft(raw: Any, tokenizer: Any) -> _Draft:
    if not isinstance(raw, dict):
        raise UserError(f"expected a JSON object, found {_kind(raw)}")
    keys = set(raw)
    if "messages" in keys and keys <= {"messages", "tools"}:
        return _draft_chat(raw["messages"], raw.get("tools"), tokenizer)
    end = ([tokenizer.eos_token_id], 1.0)
    if keys == {"prompt", "completion"}:
        prompt, completion = _text(raw, "prompt"), _text(raw, "completion", empty=False)
        return _Draft([(prompt, 0.0), (completion, 1.0), end])
    if keys == {"text"}:
        return _Draft([(_text(raw, "text", empty=False), 1.0), end], splittable=True)
    raise UserError(
        'expected the keys "messages" (and "tools"), "prompt" and "completion", or "text"; '
        f"found {', '.join(json.dumps(key) for key in raw) or 'none'}"
    )


def _draft_chat(messages: Any, tools: Any, tokenizer: Any) -> _Draft:
    _check_messages(messages, tools)
    if not tokenizer.chat_template:
        raise UserError("messages: expected a tokenizer with a chat template, found none")
    pieces: list[_Piece] = []
    if isinstance(tokenizer.chat_template, str) and _GENERATION_TAG.search(tokenizer.chat_template):
        # The template itself says what the assistant generates; transformers turns that into a mask.
        encoded = _apply_template(
            tokenizer, messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        learned = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        pieces = [([token], weight) for token, weight in learned]
    else:
        text, spans = assistant_spans(messages, tools, tokenizer)
        at = 0
        for start, end in spans:
            pieces += [(text[at:start], 0.0), (text[start:end], 1.0)]
            at = end
        pieces.append((text[at:], 0.0))
    if not any(weight and piece for piece, weight in pieces):
        raise UserError("messages: expected an answer to learn, found none behind the chat template")
    return _Draft(pieces)


def _check_messages(messages: Any, tools: Any) -> None:
    if not isinstance(messages, list):
        raise UserError(f"messages: expected a list, found {_kind(messages)}")
    if not messages:
        raise UserError("messages: expected at least one, found none")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f"tools: expected a list of objects, found {_kind(tools)}")
    for number, message in enumerate(messages, start=1):
        where = f"message {number}"
        if not isinstance(message, dict):
            raise UserError(f"{where}: expected an object, found {_kind(message)}")
        if unknown := sorted(set(message) - _MESSAGE_KEYS):
            raise UserError(f"{where}: expected the keys {', '.join(sorted(_MESSAGE_KEYS))}; found {unknown[0]!r}")
        if message.get("role") not in ROLES:
            raise UserError(f"{where}: expected a role of {', '.join(ROLES)}; found {message.get('role')!r}")
        calls = message.get("tool_calls")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise UserError(f"{where}: expected tool_calls to be a list of objects, found {_kind(calls)}")
        for key in ("content", "reasoning_content"):
            optional = key == "reasoning_content" or bool(calls)
            if not (optional and message.get(key) is None):
                _text(message, key, where=f"{where}: ")
        if message["role"] == "assistant" and not message.get("content") and not calls:
            raise UserError(f"{where}: expected an answer, found an empty one")
    if all(message["role"] != "assistant" for message in messages):
        raise UserError("messages: expected at least one of the assistant, found none")


def _text(raw: dict[str, Any], key: str, *, empty: bool = True, where: str = "") -> str:
    value = raw.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where}{key}: expected a string, found {_kind(value)}")
    if not value and not empty:
        raise UserError(f"{where}{key}: expected text, found an empty string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}{key}: expected Unicode text, found a lone surrogate") from None
    return value


def _encode(drafts: Sequence[_Draft], tokenizer: Any) -> Iterator[Record]:
    """The records, their texts encoded in one call, which takes as many cores as there are."""
    texts = [piece for draft in drafts for piece, _ in draft.pieces if piece and isinstance(piece, str)]
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    encoded = iter(tokenizer(texts, **options)["input_ids"] if texts else [])
    for draft in drafts:
        tokens: list[int] = []
        weights: list[float] = []
        for piece, weight in draft.pieces:
            if isinstance(piece, str):
                ids = next(encoded) if piece else []
            else:
                ids = piece
            tokens += ids
            weights += [weight] * len(ids)
        yield Record(np.asarray(tokens, np.int32), np.asarray(weights, np.float32), draft.splittable)


def _render(messages: Sequence[dict[str, Any]], tools: list[Any] | None, tokenizer: Any, **options: Any) -> str:
    return _apply_template(tokenizer, messages, tools=tools, tokenize=False, **options)


def _apply_template(tokenizer: Any, messages: Sequence[dict[str, Any]], **options: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"chat template: expected to render these messages, found {error}") from None


def _kind(value: Any) -> str:
    names = {type(None): "nothing", bool: "true or false", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
