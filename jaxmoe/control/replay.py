"""Routing replay in training: a batch gets the experts that an earlier run chose for its tokens.

Training then differentiates through the experts that generation used, however the router has moved or rounded since.
Source: rollout routing replay (Ma et al. 2025, arXiv 2510.11370).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int16, Int32

from captures import Capture, tokenizer_digest
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.data.packing import Batch, Document
from jaxmoe.errors import UserError


class Replay:
    """The captured experts by text: a context of the batch is found by its tokens, wherever it was packed.

    A context of a batch matches a captured one that begins with the same tokens, since a causal model's routing does
    not depend on what follows. Holds all captured experts, Ls k bytes a token.
    """

    def __init__(self, capture: Capture, config: Qwen3MoeConfig, tokenizer: Any) -> None:
        """Raises UserError when the capture is another model's or another tokenizer's."""
        found = capture.model
        expected = (tuple(config.sparse_layers), config.num_experts, config.num_experts_per_tok)
        if (found.layers, found.num_experts, found.num_experts_per_tok) != expected:
            raise UserError(
                f"replay: expected {len(expected[0])} MoE layers with {expected[2]} of {expected[1]} experts, "
                f"found {len(found.layers)} with {found.num_experts_per_tok} of {found.num_experts} in {capture.folder}"
            )
        if capture.text["tokenizer"] != tokenizer_digest(tokenizer):
            raise UserError(f"replay: expected a capture made with the model's tokenizer, found {capture.folder}")
        self._folder = capture.folder
        self.digest: str = capture.text["digest"]
        self._experts = capture.read_experts()
        text = capture.read_text()
        # Big-endian bytes: sorted, the contexts that begin with given tokens lie next to each other.
        self._contexts = sorted((_key(text.token[part]), part.start) for part in text.contexts())

    def check(self, segments: Iterable[Document]) -> None:
        """Raises UserError unless every segment was captured, before training starts."""
        missing = [segment for segment in segments if self._find(segment.inputs) is None]
        if missing:
            first = missing[0].inputs[:8].tolist()
            raise UserError(
                f"replay: expected all training data in {self._folder}, {len(missing)} segments are missing; the first "
                f"begins with the tokens {first} (was the capture made with the same --seq-length?)"
            )

    def on(self, batch: Batch) -> Batch:
        """The batch with the captured experts; padding stays the model's choice."""
        layers, _, k = self._experts.shape
        ids, segments = (a.reshape(-1, a.shape[-1]) for a in (batch.input_ids, batch.segment_ids))
        experts: Int16[np.ndarray, "B T Ls k"] = np.full((*ids.shape, layers, k), -1, np.int16)
        for row, numbers in enumerate(segments):
            for number in range(1, int(numbers.max()) + 1):
                place = np.flatnonzero(numbers == number)
                start = self._find(ids[row, place])
                assert start is not None, "check() has seen every segment"
                experts[row, place] = self._experts[:, start : start + len(place)].swapaxes(0, 1)
        return batch._replace(experts=experts.reshape(*batch.input_ids.shape, layers, k))

    def _find(self, tokens: Int32[np.ndarray, " n"]) -> int | None:
        """Where in the captured stream a context begins with these tokens."""
        key = _key(tokens)
        at = bisect_left(self._contexts, (key, -1))
        if at < len(self._contexts) and self._contexts[at][0].startswith(key):
            return self._contexts[at][1]
        return None


def _key(tokens: np.ndarray) -> bytes:
    return tokens.astype(">i4").tobytes()
