"""Routing replay: tokens get the experts that an earlier run chose for them.

In training, `Replay` adds the captured experts to each batch. Training then differentiates through the experts that
generation used, even if the router has since changed or rounds differently. In generation, `experts_by_position`
returns the captured experts of each prompt.

Source: rollout routing replay (Ma et al. 2025, arXiv 2510.11370).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int16, Int32

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


class Replay:
    """Looks up captured experts by text: a context in a batch is found by its tokens, wherever it was packed.

    A context of a batch matches a captured context that begins with the same tokens, since a causal model's routing
    does not depend on what follows. All captured experts are held in memory: Ls k bytes per token.
    """

    def __init__(self, capture: Capture, config: Qwen3MoeConfig, tokenizer: Any) -> None:
        """Raises UserError if the capture was made with another model or another tokenizer."""
        check_experts(capture, config)
        if capture.text["tokenizer"] != tokenizer_digest(tokenizer):
            raise UserError(f"replay: expected a capture made with the model's tokenizer, found {capture.folder}")
        self._folder = capture.folder
        self.digest: str = capture.text["digest"]
        self._experts = capture.read_experts()
        text = capture.read_text()
        # Big-endian bytes: after sorting, contexts that begin with the same tokens are neighbours.
        self._contexts = sorted((_key(text.token[part]), part.start) for part in text.contexts())

    def check(self, documents: Iterable[Document]) -> None:
        """Raises UserError unless every document was captured; called before training starts."""
        missing = [document for document in documents if self._find(document.inputs) is None]
        if missing:
            first = missing[0].inputs[:8].tolist()
            raise UserError(
                f"replay: expected all training data in {self._folder}, {len(missing)} documents are missing; the "
                f"first begins with the tokens {first} (was the capture made with the same --seq-length?)"
            )

    def on(self, batch: Batch) -> Batch:
        """The batch with the captured experts; at padding they are -1 (the model chooses)."""
        layers, _, k = self._experts.shape
        ids, segments = (a.reshape(-1, a.shape[-1]) for a in (batch.input_ids, batch.segment_ids))
        experts: Int16[np.ndarray, "B T Ls k"] = np.full((*ids.shape, layers, k), -1, np.int16)
        for sequence, numbers in enumerate(segments):
            for number in range(1, int(numbers.max()) + 1):
                place = np.flatnonzero(numbers == number)
                start = self._find(ids[sequence, place])
                assert start is not None, "check() has seen every document"
                experts[sequence, place] = self._experts[:, start : start + len(place)].swapaxes(0, 1)
        return batch._replace(experts=experts.reshape(*batch.input_ids.shape, layers, k))

    def _find(self, tokens: Int32[np.ndarray, " n"]) -> int | None:
        """Where in the captured stream a context begins with these tokens."""
        key = _key(tokens)
        at = bisect_left(self._contexts, (key, -1))
        if at < len(self._contexts) and self._contexts[at][0].startswith(key):
            return self._contexts[at][1]
        return None


def experts_by_position(
    capture: Capture, prompts: Sequence[Sequence[int]], config: Qwen3MoeConfig
) -> Int32[np.ndarray, "Ls B S k"]:
    """The captured experts of each prompt's sequence by position; -1 after the end of its captured context.

    Raises:
        UserError: a capture of another model, or one whose contexts do not begin with the prompts, in their order.
    """
    check_experts(capture, config)
    text, experts = capture.read_text(), capture.read_experts()
    contexts = text.contexts()
    if len(contexts) != len(prompts):
        raise UserError(
            f"{capture.folder}: expected one context for each of {len(prompts)} prompts, found {len(contexts)}"
        )
    longest = max(context.stop - context.start for context in contexts)
    found = np.full((experts.shape[0], len(prompts), longest, experts.shape[2]), -1, np.int32)
    for sequence, (prompt, context) in enumerate(zip(prompts, contexts, strict=True)):
        n = context.stop - context.start
        shared = min(len(prompt), n)
        if not np.array_equal(text.token[context][:shared], np.asarray(prompt[:shared])):
            raise UserError(
                f"{capture.folder}: expected context {sequence} to begin with prompt {sequence}, found other tokens"
            )
        found[:, sequence, :n] = experts[:, context]
    return found


def _key(tokens: np.ndarray) -> bytes:
    return tokens.astype(">i4").tobytes()
