"""Ends the generation of a batch when every sequence has met a text that stops it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class AllStopped(Exception):
    """Every sequence has ended."""


class StopTexts:
    """Receives the tokens of a batch and raises `AllStopped` once each sequence has a stop token or a stop text.

    The engine knows stop tokens only: a sequence that has met a text goes on until the others have ended, too. What it
    adds is not kept. `outputs` holds the tokens of each sequence up to its end.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], stop_tokens: Sequence[int], sequences: int) -> None:
        self.outputs: list[list[int]] = [[] for _ in range(sequences)]
        self._tokenizer = tokenizer
        self._texts = [text for text in texts if text]
        self._stop_tokens = frozenset(stop_tokens)
        # A token that is part of a text has at least one of its bytes; the first one may have a part of it only.
        self._window = max((len(text.encode()) for text in self._texts), default=0) + 1
        self._running = set(range(sequences))

    def __call__(self, sequence: int, token: int) -> None:
        """Takes the next token of a sequence."""
        if sequence not in self._running:
            return
        tokens = self.outputs[sequence]
        tokens.append(token)
        if token in self._stop_tokens or self._has_stopped(tokens):
            self._running.remove(sequence)
            if not self._running:
                raise AllStopped

    def _has_stopped(self, tokens: list[int]) -> bool:
        if not self._texts:
            return False
        end = self._tokenizer.decode(tokens[-self._window :], skip_special_tokens=False)
        return any(text in end for text in self._texts)
