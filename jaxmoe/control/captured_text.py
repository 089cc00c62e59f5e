"""Finds the documents of a batch in a capture, by their tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Int32, Int64

from captures import Capture, tokenizer_digest
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.data.packing import Batch, Document
from jaxmoe.errors import UserError


def check_experts(capture: Capture, config: Qwen3MoeConfig, setting: str = "replay") -> None:
    """Raises UserError, which names the setting, unless the capture's model has the MoE layers and experts of
    `config`."""
    found, layers = capture.model, tuple(config.sparse_layers)
    expected = (len(layers), config.num_experts, config.num_experts_per_tok)
    if (len(found.layers), found.num_experts, found.num_experts_per_tok) != expected:
        raise UserError(
            f"{setting}: expected {expected[0]} MoE layers with {expected[2]} of {expected[1]} experts, "
            f"found {len(found.layers)} with {found.num_experts_per_tok} of {found.num_experts} in {capture.folder}"
        )
    if found.layers != layers:
        raise UserError(f"{setting}: expected the MoE layers {layers}, found {found.layers} in {capture.folder}")


class CapturedText:
    """The contexts of a capture, looked up by their tokens, wherever a batch has them.

    A document of a batch matches a captured context that begins with the same tokens, since a causal model's routing
    does not depend on what follows. The tokens are held in memory.
    """

    def __init__(self, capture: Capture, config: Qwen3MoeConfig, tokenizer: object, setting: str) -> None:
        """Raises UserError, which names the setting, if the capture was made with another model or tokenizer."""
        check_experts(capture, config, setting)
        if capture.text["tokenizer"] != tokenizer_digest(tokenizer):
            raise UserError(f"{setting}: expected a capture made with the model's tokenizer, found {capture.folder}")
        self._folder, self._setting = capture.folder, setting
        self.digest: str = capture.text["digest"]
        text = capture.read_text()
        # Big-endian bytes: after sorting, contexts that begin with the same tokens are neighbours.
        self._contexts = sorted((_key(text.token[part]), part.start) for part in text.contexts())

    def check(self, documents: Iterable[Document]) -> None:
        """Raises UserError unless every document was captured; called before training starts."""
        missing = [document for document in documents if self._find(document.inputs) is None]
        if missing:
            first = missing[0].inputs[:8].tolist()
            raise UserError(
                f"{self._setting}: expected all training data in {self._folder}, missing documents: {len(missing)}; "
                f"the first begins with the tokens {first} (was the capture made with the same --seq-length?)"
            )

    def places(self, batch: Batch) -> Iterator[tuple[int, Int64[np.ndarray, " n"], slice]]:
        """For each document of a batch: its line, with all leading axes taken together; the places of its tokens in the
        line; and where they stand in the captured stream."""
        ids, segments = (array.reshape(-1, array.shape[-1]) for array in (batch.input_ids, batch.segment_ids))
        for line, numbers in enumerate(segments):
            for number in range(1, int(numbers.max()) + 1):
                place = np.flatnonzero(numbers == number)
                start = self._find(ids[line, place])
                assert start is not None, "check() has seen every document"
                yield line, place, slice(start, start + len(place))

    def _find(self, tokens: Int32[np.ndarray, " n"]) -> int | None:
        """Where in the captured stream a context begins with these tokens."""
        key = _key(tokens)
        at = bisect_left(self._contexts, (key, -1))
        if at < len(self._contexts) and self._contexts[at][0].startswith(key):
            return self._contexts[at][1]
        return None


def _key(tokens: np.ndarray) -> bytes:
    return tokens.astype(">i4").tobytes()
