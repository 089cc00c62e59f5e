"""Writes and reads captures: folders with `manifest.json` and shards `routing-00000.safetensors`, ...

A capture is a stream of n tokens, divided into shards, so that writers and readers hold one shard at a time:

    token, document, position, domain, role, next [n]   the text (class `Text`)
    experts [Ls, n, k]            the experts that were used, most probable first
    top_experts [Ls, n, t]        the t most probable experts, most probable first
    top_logits [Ls, n, t]         their router logits, float32
    log_sum_exp [Ls, n]           over all E logits: probability of e = exp(logit e - log_sum_exp)
    entropy [Ls, n]               of the router's distribution over all E experts, nats
    probability_sums [Ls, E]      router probabilities summed over the shard's tokens
    predicted, loss [n]           optional: the most probable next token; -log p(next), nats, NaN without a next token

`Chunk` computes everything else (weights, margins) exactly from these. t is 16 by default and at most E. If the routing
was imposed, t is E, because the experts that were used need not be among the most probable. If t is 0, the experts come
from elsewhere (`jaxmoe.routing.imported`): the capture has the arrays of the text and `experts` only.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Integer
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxmoe.errors import UserError, check_integer, shown
from jaxmoe.json_text import read_json
from jaxmoe.store.files import check_links, named_in, os_error, output_folder

FORMAT, VERSION = "jaxmoe-capture", 1
MANIFEST = "manifest.json"
DEFAULT_KEEP_LOGITS = 16

# The roles of tokens that jaxmoe writes: plain text; the parts of a prompt/completion record; who speaks in a chat, and
# what the chat template adds; a model's own output.
ROLES = ("text", "prompt", "completion", "template", "system", "user", "assistant", "tool", "generated")

_TEXT = {name: np.dtype(np.int32) for name in ("token", "document", "position", "domain", "role", "next")}
# The safetensors library's names of the dtypes that a shard holds.
_CODES = {np.dtype(np.int32): "I32", np.dtype(np.float32): "F32", np.dtype(np.uint8): "U8", np.dtype(np.uint16): "U16"}
_PREDICTIONS = {"predicted": np.dtype(np.int32), "loss": np.dtype(np.float32)}


def expert_dtype(num_experts: int) -> np.dtype[Any]:
    """The smallest unsigned integer dtype that holds the index of an expert."""
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)


@dataclass(frozen=True)
class Model:
    """The part of a model's configuration that readers of its routing need; `layers` are indices of MoE layers."""

    layers: tuple[int, ...]
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    vocab_size: int

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_experts_per_tok", "vocab_size"):
            check_integer(name, getattr(self, name), at_least=1)
        if type(self.norm_topk_prob) is not bool:
            raise UserError(f"norm_topk_prob: expected true or false, found {shown(self.norm_topk_prob)}")
        if not self.layers:
            raise UserError("layers: expected a model with mixture-of-experts layers, found none")
        for layer in self.layers:
            check_integer("layers", layer, at_least=0)
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UserError(f"num_experts_per_tok: expected 1 to {self.num_experts}, found {self.num_experts_per_tok}")


class Text(NamedTuple):
    """n tokens with their labels: token id, index of the record, position in its context (0 starts a new context),
    indices of domain and role in the manifest's lists, and the id of the next token (-1: none)."""

    token: Int32[np.ndarray, " n"]
    document: Int32[np.ndarray, " n"]
    position: Int32[np.ndarray, " n"]
    domain: Int32[np.ndarray, " n"]
    role: Int32[np.ndarray, " n"]
    next: Int32[np.ndarray, " n"]

    def contexts(self) -> list[slice]:
        """The slice of the stream for each context, that is for each run of positions 0, 1, 2, ..."""
        starts = np.flatnonzero(self.position == 0).tolist()
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(self.position)], strict=True)]


@dataclass(frozen=True)
class LabelledText:
    """A text as a model reads it: the stream of tokens in contexts of at most `seq_length` tokens, the names of domains
    and roles, and the digest of the tokenizer."""

    text: Text
    domains: tuple[str, ...]
    roles: tuple[str, ...]
    seq_length: int
    tokenizer: str


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of a capture in Ls layers: the arrays of the module's docstring and what they imply."""

    model: Model
    text: Text
    experts: Integer[np.ndarray, "Ls n k"]
    top_experts: Integer[np.ndarray, "Ls n t"]
    top_logits: Float32[np.ndarray, "Ls n t"]
    log_sum_exp: Float32[np.ndarray, "Ls n"]
    entropy: Float32[np.ndarray, "Ls n"]
    predicted: Int32[np.ndarray, " n"] | None
    loss: Float32[np.ndarray, " n"] | None

    def __len__(self) -> int:
        return len(self.text.token)

    @cached_property
    def probabilities(self) -> Float32[np.ndarray, "Ls n t"]:
        """Router probabilities of the t most probable experts."""
        return np.exp(self.top_logits - self.log_sum_exp[..., None])

    @cached_property
    def weights(self) -> Float32[np.ndarray, "Ls n k"]:
        """The weights of the used experts in the sum of their outputs."""
        k = self.model.num_experts_per_tok
        chosen = self.probabilities[..., :k]
        if not np.array_equal(
            self.experts, self.top_experts[..., :k]
        ):  # the routing was imposed, or ties have another order
            match = self.experts[..., :, None] == self.top_experts[..., None, :]
            if not match.any(axis=-1).all():
                raise ValueError("weights: expected the used experts among those whose logits were kept")
            chosen = np.take_along_axis(self.probabilities, match.argmax(axis=-1), axis=-1)
        return chosen / chosen.sum(axis=-1, keepdims=True) if self.model.norm_topk_prob else chosen

    @cached_property
    def margin(self) -> Float32[np.ndarray, "Ls n"]:
        """Probability of the k-th expert minus that of the next: the margin of the choice; 1 if k = E."""
        k = self.model.num_experts_per_tok
        if k == self.model.num_experts:
            return np.ones(self.log_sum_exp.shape, np.float32)
        return self.probabilities[..., k - 1] - self.probabilities[..., k]

    def dense_probabilities(self) -> Float32[np.ndarray, "Ls n E"]:
        """Probabilities of all E experts in the order of their index.

        Raises:
            ValueError: the capture kept only the largest logits.
        """
        E = self.model.num_experts
        if self.top_experts.shape[-1] < E:
            raise ValueError(f"logits: expected all {E} of each token, found the top {self.top_experts.shape[-1]}")
        dense = np.empty_like(self.probabilities)
        np.put_along_axis(dense, self.top_experts.astype(np.intp), self.probabilities, axis=-1)
        return dense


class CaptureWriter:
    """Writes a capture, one shard at a time, in a second thread; the folder appears whole or not at all.

        with CaptureWriter(folder, model, ...) as writer:
            writer.put(text, arrays)   # anything that np.asarray takes; the thread fetches arrays from a device

    `put` waits while two shards are unwritten, so that memory stays bounded.
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        model: Model,
        *,
        labels: LabelledText,
        source: Mapping[str, Any],
        control: Mapping[str, Any] | None = None,
        keep_logits: int = DEFAULT_KEEP_LOGITS,
        experts_alone: bool = False,
    ) -> None:
        """Prepares a capture; nothing is written yet.

        Args:
            folder: the folder to write; must be new or empty.
            model: the model whose routing is captured.
            labels: names of domains and roles, tokenizer, longest context. Its stream of tokens is not used: `put` gets
                the tokens.
            source: what was run: framework, model, dtype, versions.
            control: what was imposed on the routing, if anything.
            keep_logits: how many router logits to keep for each token, the largest ones.
            experts_alone: nothing but the experts is known, so no logits are kept.

        Raises:
            UserError: `keep_logits` is too small for the margin.
        """
        self.model = model
        self.keep_logits = model.num_experts if control else min(max(keep_logits, 1), model.num_experts)
        least = min(model.num_experts_per_tok + 1, model.num_experts)
        if experts_alone:
            self.keep_logits = 0
        elif self.keep_logits < least:
            raise UserError(
                f"top: expected at least {least} logits per token, which the margin needs, found {keep_logits}"
            )
        self._manifest = {
            "format": FORMAT,
            "version": VERSION,
            "model": asdict(model),
            "top": self.keep_logits,
            "source": dict(source),
            "control": control and dict(control),
            "text": {
                "tokenizer": labels.tokenizer,
                "seq_length": labels.seq_length,
                "domains": [*labels.domains],
                "roles": [*labels.roles],
            },
        }
        self._shards: list[dict[str, Any]] = []
        self._digest = hashlib.sha256()
        self._queue: queue.Queue[tuple[Text, Mapping[str, Any], Any] | None] = queue.Queue(maxsize=2)
        self._failure: BaseException | None = None
        self._output = output_folder(folder)

    def __enter__(self) -> CaptureWriter:
        self._folder = self._output.__enter__()
        self._thread = threading.Thread(target=self._work, name="capture-writer", daemon=True)
        self._thread.start()
        return self

    def put(self, text: Text, arrays: Mapping[str, Any], valid: np.ndarray | None = None) -> None:
        """Queues one shard. If the arrays are padded, `valid` (bool, along their tokens) selects the tokens of `text`.

        Raises:
            Exception: the error that stopped the writing of an earlier shard.
        """
        self._check()
        self._queue.put((text, arrays, valid))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool | None:
        self._queue.put(None)
        self._thread.join()
        failure = self._failure if kind is None else None
        if failure is not None:
            self._output.__exit__(type(failure), failure, failure.__traceback__)
            raise failure
        if kind is None:
            try:
                self._write_manifest()
            except BaseException as failure:
                self._output.__exit__(type(failure), failure, failure.__traceback__)
                raise
        return self._output.__exit__(kind, error, trace)

    def _write_manifest(self) -> None:
        tokens = sum(shard["tokens"] for shard in self._shards)
        self._manifest["text"] |= {"tokens": tokens, "digest": self._digest.hexdigest()}
        content = json.dumps(self._manifest | {"shards": self._shards}, indent=1) + "\n"
        (self._folder / MANIFEST).write_text(content, encoding="utf-8")

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._failure is None:  # after a failure the queue is still emptied, so that `put` never blocks
                try:
                    self._write(*item)
                except BaseException as failure:
                    self._failure = failure

    def _write(self, text: Text, arrays: Mapping[str, Any], valid: np.ndarray | None) -> None:
        shard = {name: np.ascontiguousarray(array, np.int32) for name, array in text._asdict().items()}
        # The digest runs over tokens, so that it does not depend on where shards end.
        self._digest.update(np.stack([text.token, text.document, text.position, text.next], axis=1).tobytes())
        for name, array in arrays.items():
            array = np.asarray(array)
            if valid is not None and name != "probability_sums":
                array = array[:, valid] if array.ndim > 1 else array[valid]
            shard[name] = np.ascontiguousarray(array)
        n = len(text.token)
        for name, (dtype, shape) in _layout(self.model, self.keep_logits, n, "loss" in shard).items():
            if shard[name].dtype != dtype or shard[name].shape != shape:
                found = f"{shard[name].dtype} {list(shard[name].shape)}"
                raise ValueError(f"capture {name}: expected {dtype} {list(shape)}, found {found}")
        if (sums := shard.get("log_sum_exp")) is not None and not np.isfinite(sums).all():
            layer = self.model.layers[int(np.flatnonzero(~np.isfinite(sums).all(axis=1))[0])]
            raise UserError(
                f"model: layer {layer}: expected finite router logits, found NaN or infinity; a weight is NaN, or the "
                "dtype is too narrow for the model"
            )
        file = f"routing-{len(self._shards):05d}.safetensors"
        try:
            save_file(shard, self._folder / file)
        except SafetensorError as error:  # the library's form of a full disk
            raise os_error(self._folder / file, str(error)) from error
        self._shards.append({"file": file, "tokens": n})


def _layout(
    model: Model, keep_logits: int, n: int, predictions: bool
) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Dtype and shape of every array in a shard of n tokens."""
    layers, expert, real = len(model.layers), expert_dtype(model.num_experts), np.dtype(np.float32)
    always = {
        **{name: (dtype, (n,)) for name, dtype in (_TEXT | (_PREDICTIONS if predictions else {})).items()},
        "experts": (expert, (layers, n, model.num_experts_per_tok)),
    }
    if keep_logits == 0:
        return always
    return {
        **always,
        "top_experts": (expert, (layers, n, keep_logits)),
        "top_logits": (real, (layers, n, keep_logits)),
        "log_sum_exp": (real, (layers, n)),
        "entropy": (real, (layers, n)),
        "probability_sums": (real, (layers, model.num_experts)),
    }


@dataclass(frozen=True)
class Capture:
    """A capture on disk. Arrays are read on demand; `chunks` reads all of them in pieces."""

    folder: pathlib.Path
    model: Model
    keep_logits: int
    source: Mapping[str, Any]
    control: Mapping[str, Any] | None
    text: Mapping[str, Any] = field(repr=False)
    shards: tuple[tuple[str, int], ...] = field(repr=False)

    @classmethod
    def open(cls, folder: str | pathlib.Path) -> Capture:
        """Opens a capture: reads and checks its manifest.

        Raises:
            UserError: no capture, another version, a broken manifest, or a link that leads out of the folder.
        """
        folder = pathlib.Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise UserError(f"{folder}: expected a capture (a folder with {MANIFEST}), found none")
        check_links(folder)
        raw = read_json(path)
        try:
            if (raw["format"], raw["version"]) != (FORMAT, VERSION):
                raise UserError(f"{path}: expected {FORMAT} {VERSION}, found {raw['format']} {raw['version']}")
            model = Model(**raw["model"] | {"layers": tuple(raw["model"]["layers"])})
            shards = tuple(
                (str(shard["file"]), check_integer("tokens", shard["tokens"], at_least=1)) for shard in raw["shards"]
            )
            keep_logits = check_integer("top", raw["top"], at_least=0)
            text = _checked_text(raw["text"])
            known = (
                _checked_object("source", raw["source"]),
                raw["control"] and _checked_object("control", raw["control"]),
            )
        except UserError as error:
            raise error if str(error).startswith(str(path)) else UserError(f"{path}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{path}: expected the manifest of a capture, found a broken one ({reason})") from None
        try:
            for file, _ in shards:
                named_in(folder, file, by=MANIFEST)
        except UserError:
            raise UserError(f"{path}: shards: expected files in the same folder, found a path") from None
        total = sum(tokens for _, tokens in shards)
        if text["tokens"] != total or not shards:
            raise UserError(f"{path}: expected {text['tokens']} tokens, found {total} in {len(shards)} shards")
        return cls(folder, model, keep_logits, *known, text, shards)

    @property
    def tokens(self) -> int:
        """The number of tokens in the capture."""
        return self.text["tokens"]

    @property
    def name(self) -> str:
        """The name of the folder, which figures use for the capture."""
        return self.folder.resolve().name

    @property
    def predictions(self) -> bool:
        """Whether the capture holds predicted tokens and losses."""
        with self._file(self.shards[0][0]) as shard:
            return "loss" in shard.keys()  # noqa: SIM118 - a safetensors file, no dictionary

    def check_logits(self) -> None:
        """Raises UserError for a capture that knows the experts only, not the router's logits."""
        if not self.keep_logits:
            raise UserError(
                f"{self.folder}: expected a capture with router logits, found experts alone; python -m jaxmoe.routing "
                f"capture --text {self.folder} --replay {self.folder} computes the logits"
            )

    def chunks(self, size: int | None = None, layers: slice = slice(None)) -> Iterator[Chunk]:
        """The whole stream in pieces of `size` tokens (None: one piece per shard), for the MoE layers in `layers`.

        For a given size, two captures of the same text have the same pieces, however they are sharded.
        """
        step = size or max(tokens for _, tokens in self.shards)
        if size is None:
            start = 0
            for _, tokens in self.shards:
                yield self.read(start, start + tokens, layers)
                start += tokens
            return
        for start in range(0, self.tokens, step):
            yield self.read(start, min(start + step, self.tokens), layers)

    def read(self, start: int, stop: int, layers: slice = slice(None)) -> Chunk:
        """The tokens `start` to `stop` of the stream, for the MoE layers in `layers`.

        Raises:
            UserError: a shard is missing or broken, or differs from what the manifest says.
        """
        pieces, at = [], 0
        for file, tokens in self.shards:
            a, b = max(start - at, 0), min(stop - at, tokens)
            if a < b:
                pieces.append(self._arrays(file, tokens, slice(a, b), layers))
            at += tokens
        if not pieces:
            raise ValueError(f"tokens: expected a range within 0 to {self.tokens}, found {start} to {stop}")
        joined = {
            name: pieces[0][name] if len(pieces) == 1 else np.concatenate([p[name] for p in pieces], axis=_axis(name))
            for name in pieces[0]
        }
        text = Text(**{name: joined.pop(name) for name in Text._fields})
        self._check_text(text)
        for name in ("experts", "top_experts") if self.keep_logits else ("experts",):
            self._check_range(name, joined[name], 0, self.model.num_experts)
        predictions = {name: joined.pop(name, None) for name in _PREDICTIONS}
        if not self.keep_logits:
            shape = joined["experts"].shape[:2]
            joined |= {"top_experts": joined["experts"][..., :0], "top_logits": np.zeros((*shape, 0), np.float32)}
            joined |= dict.fromkeys(("log_sum_exp", "entropy"), np.full(shape, np.nan, np.float32))
        return Chunk(self.model, text, **joined, **predictions)

    def read_experts(self) -> Integer[np.ndarray, "Ls n k"]:
        """The used experts of all tokens: Ls * k bytes per token, twice that for more than 256 experts."""
        parts = []
        for file, tokens in self.shards:
            with self._file(file) as shard:
                self._same_layout(file, shard, tokens)
                parts.append(shard.get_tensor("experts"))
                self._check_range("experts", parts[-1], 0, self.model.num_experts)
        return np.concatenate(parts, axis=1)

    def labelled_text(self) -> LabelledText:
        """The whole text with its labels, 24 bytes per token: the input for another capture of the same text."""
        t = self.text
        return LabelledText(self.read_text(), tuple(t["domains"]), tuple(t["roles"]), t["seq_length"], t["tokenizer"])

    def read_text(self) -> Text:
        """The tokens of the whole stream and their labels."""
        parts = []
        for file, tokens in self.shards:
            with self._file(file) as shard:
                self._same_layout(file, shard, tokens)
                parts.append(Text(*(shard.get_tensor(name) for name in Text._fields)))
        text = Text(*map(np.concatenate, zip(*parts, strict=True)))
        self._check_text(text)
        return text

    def _check_text(self, text: Text) -> None:
        """Raises UserError for a label that the manifest's lists do not have, or a token beyond the vocabulary."""
        vocabulary = self.model.vocab_size
        self._check_range("token", text.token, 0, vocabulary)
        self._check_range("next", text.next, -1, vocabulary)
        self._check_range("document", text.document, 0, 2**31)
        self._check_range("position", text.position, 0, self.text["seq_length"])
        self._check_range("domain", text.domain, 0, len(self.text["domains"]))
        self._check_range("role", text.role, 0, len(self.text["roles"]))

    def _check_range(self, name: str, array: np.ndarray, least: int, end: int) -> None:
        low, high = int(array.min()), int(array.max())
        if low < least or high >= end:
            found = low if low < least else high
            raise UserError(f"{self.folder}: {name}: expected values from {least} to {end - 1}, found {found}")

    def probability_sums(self) -> Float32[np.ndarray, "Ls E"]:
        """Router probabilities summed over all tokens; UserError for a capture without logits."""
        self.check_logits()
        total = np.zeros((len(self.model.layers), self.model.num_experts), np.float64)
        for file, tokens in self.shards:
            with self._file(file) as shard:
                self._same_layout(file, shard, tokens)
                total += shard.get_tensor("probability_sums")
        return total.astype(np.float32)

    def _arrays(self, file: str, tokens: int, part: slice, layers: slice) -> dict[str, np.ndarray]:
        with self._file(file) as shard:
            names = self._same_layout(file, shard, tokens)
            return {
                name: shard.get_slice(name)[(layers, part)] if _axis(name) else shard.get_slice(name)[part]
                for name in names
                if name != "probability_sums"
            }

    def _same_layout(self, file: str, shard: Any, tokens: int) -> list[str]:
        found = set(shard.keys())
        expected = _layout(self.model, self.keep_logits, tokens, "loss" in found)
        if found != set(expected):
            odd = sorted(found ^ set(expected))[0]
            raise UserError(f"{self.folder / file}: {odd}: {'unexpected' if odd in found else 'missing'}")
        for name, (dtype, shape) in expected.items():
            found_slice = shard.get_slice(name)
            actual, code = found_slice.get_shape(), found_slice.get_dtype()
            if tuple(actual) != shape:
                raise UserError(f"{self.folder / file}: {name}: expected shape {list(shape)}, found {actual}")
            if code != _CODES[dtype]:
                raise UserError(f"{self.folder / file}: {name}: expected {_CODES[dtype]}, found {code}")
        return list(expected)

    def _file(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, framework="numpy")
        except FileNotFoundError:
            raise UserError(f"file not found: {self.folder / file} (a shard of the capture)") from None
        except SafetensorError as error:
            raise UserError(f"{self.folder / file}: expected a safetensors file, found {error}") from None


def _checked_object(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{name}: expected an object, found {shown(value)}")
    return value


def _checked_text(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says about the text, with the types that readers rely on."""
    text = {name: raw[name] for name in ("tokenizer", "digest", "domains", "roles", "seq_length", "tokens")}
    for name in ("seq_length", "tokens"):
        check_integer(name, text[name], at_least=1)
    for name in ("tokenizer", "digest"):
        if not isinstance(text[name], str):
            raise UserError(f"{name}: expected a text, found {shown(text[name])}")
    for name in ("domains", "roles"):
        if not isinstance(text[name], list) or not text[name] or not all(isinstance(one, str) for one in text[name]):
            raise UserError(f"{name}: expected a list of names, found {shown(text[name])}")
    return text


def _axis(name: str) -> Literal[0, 1]:
    """The axis of an array along which tokens lie."""
    return 0 if name in _TEXT or name in _PREDICTIONS else 1


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 over the vocabulary (token, id) of a `transformers` tokenizer: equal if ids mean the same tokens."""
    content = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.sha256(content.encode()).hexdigest()
