"""Decodes token ids into text as they arrive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class TextStream:
    """Writes the text of a growing list of tokens, and waits for bytes that do not yet form a character."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        self._tokenizer, self._write = tokenizer, write
        self._tokens: list[int] = []
        self._written = 0

    def put(self, token: int) -> None:
        """Adds the next token and writes the characters that are now complete."""
        self._tokens.append(token)
        text = self._text()
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._write(text[self._written :])
            self._written = len(text)

    def end(self) -> None:
        """Writes the rest, complete or not."""
        self._write(self._text()[self._written :])

    def _text(self) -> str:
        return self._tokenizer.decode(self._tokens, skip_special_tokens=True)
