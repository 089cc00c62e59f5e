"""Routing replay: tokens get the experts that an earlier run chose for them.

In training, `Replay` adds the captured experts to each batch. Training then differentiates through the experts that
generation used, even if the router has since changed or rounds differently. In generation, `experts_by_position`
returns the captured experts of each prompt.

Source: rollout routing replay (Ma et al. 2025, arXiv 2510.11370).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int16, Int32

from captures import Capture
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.control.captured_text import CapturedText, check_experts
from jaxmoe.data.packing import Batch, Document
from jaxmoe.errors import UserError


class Replay:
    """Adds the captured experts to each batch (`jaxmoe.control.captured_text` finds them).

    All captured experts are held in memory: Ls k bytes per token.
    """

    def __init__(self, capture: Capture, config: Qwen3MoeConfig, tokenizer: Any) -> None:
        """Raises UserError if the capture was made with another model or another tokenizer."""
        self._text = CapturedText(capture, config, tokenizer, "replay")
        self.digest: str = self._text.digest
        self._experts = capture.read_experts()

    def check(self, documents: Iterable[Document]) -> None:
        """Raises UserError unless every document was captured; called before training starts."""
        self._text.check(documents)

    def on(self, batch: Batch) -> Batch:
        """The batch with the captured experts; at padding they are -1 (the model chooses)."""
        layers, _, k = self._experts.shape
        lines, length = batch.input_ids.size // batch.input_ids.shape[-1], batch.input_ids.shape[-1]
        experts: Int16[np.ndarray, "B T Ls k"] = np.full((lines, length, layers, k), -1, np.int16)
        for line, place, where in self._text.places(batch):
            experts[line, place] = self._experts[:, where].swapaxes(0, 1)
        return batch._replace(experts=experts.reshape(*batch.input_ids.shape, layers, k))


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
