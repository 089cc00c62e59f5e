"""Reads a capture from disk, in pieces, and checks everything that it reads."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32, Integer
from safetensors import SafetensorError, safe_open

from captures.format import (
    CODES,
    FORMAT,
    MANIFEST,
    PREDICTIONS,
    VERSION,
    Chunk,
    LabelledText,
    Model,
    Text,
    layout,
    token_axis,
)
from jaxmoe.errors import UserError, check_integer, shown
from jaxmoe.json_text import read_json
from jaxmoe.store.files import check_links, named_in


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
            name: pieces[0][name]
            if len(pieces) == 1
            else np.concatenate([p[name] for p in pieces], axis=token_axis(name))
            for name in pieces[0]
        }
        text = Text(**{name: joined.pop(name) for name in Text._fields})
        self._check_text(text)
        for name in ("experts", "top_experts") if self.keep_logits else ("experts",):
            self._check_range(name, joined[name], 0, self.model.num_experts)
        predictions = {name: joined.pop(name, None) for name in PREDICTIONS}
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
                name: shard.get_slice(name)[(layers, part)] if token_axis(name) else shard.get_slice(name)[part]
                for name in names
                if name != "probability_sums"
            }

    def _same_layout(self, file: str, shard: Any, tokens: int) -> list[str]:
        found = set(shard.keys())
        expected = layout(self.model, self.keep_logits, tokens, "loss" in found)
        if found != set(expected):
            odd = sorted(found ^ set(expected))[0]
            raise UserError(f"{self.folder / file}: {odd}: {'unexpected' if odd in found else 'missing'}")
        for name, (dtype, shape) in expected.items():
            found_slice = shard.get_slice(name)
            actual, code = found_slice.get_shape(), found_slice.get_dtype()
            if tuple(actual) != shape:
                raise UserError(f"{self.folder / file}: {name}: expected shape {list(shape)}, found {actual}")
            if code != CODES[dtype]:
                raise UserError(f"{self.folder / file}: {name}: expected {CODES[dtype]}, found {code}")
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
