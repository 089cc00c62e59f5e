"""The router logits that a capture holds, for a loss that compares a model in training with the captured one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float32

from captures import Capture
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.control.captured_text import CapturedText
from jaxmoe.data.packing import Batch, Document
from jaxmoe.errors import UserError

_SETTING = "routing_base"


class BaseLogits:
    """Adds the captured router logits to each batch; they are read from the capture when a batch needs them."""

    def __init__(self, capture: Capture, config: Qwen3MoeConfig, tokenizer: Any) -> None:
        """
        Raises:
            UserError: a capture made with another model or tokenizer, one without the logits of all experts, or one
                whose routing was imposed.
        """
        self._text = CapturedText(capture, config, tokenizer, _SETTING)
        if capture.keep_logits < config.num_experts:
            raise UserError(
                f"{_SETTING}: expected the router logits of all {config.num_experts} experts (python -m jaxmoe.routing "
                f"capture --full-logits), found {capture.keep_logits} in {capture.folder}"
            )
        if capture.control:
            names = ", ".join(capture.control)
            raise UserError(f"{_SETTING}: expected a model's own routing, found {names} imposed in {capture.folder}")
        self._capture = capture
        # Of the text, and of the router's probabilities summed over it: another model's capture has other sums.
        content = self._text.digest.encode() + capture.probability_sums().tobytes()
        self.digest = hashlib.sha256(content).hexdigest()

    def check(self, documents: Iterable[Document]) -> None:
        """Raises UserError unless every document was captured; called before training starts."""
        self._text.check(documents)

    def on(self, batch: Batch) -> Batch:
        """The batch with the captured logits, 0 at padding."""
        model = self._capture.model
        lines, length = batch.input_ids.size // batch.input_ids.shape[-1], batch.input_ids.shape[-1]
        shape = lines, length, len(model.layers), model.num_experts
        logits: Float32[np.ndarray, "B T Ls E"] = np.zeros(shape, np.float32)
        for line, place, where in self._text.places(batch):
            chunk = self._capture.read(where.start, where.stop)
            found = np.empty((len(model.layers), len(place), model.num_experts), np.float32)
            np.put_along_axis(found, chunk.top_experts.astype(np.intp), chunk.top_logits, axis=-1)
            logits[line, place] = found.swapaxes(0, 1)
        return batch._replace(base_logits=logits.reshape(*batch.input_ids.shape, *shape[2:]))
