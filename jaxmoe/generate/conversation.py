"""A conversation that grows: its messages, and the token ids of the next prompt within the model's context."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxmoe.data.chat import ChatSettings, prompt_tokens, text_field
from jaxmoe.errors import UserError


class Turn(NamedTuple):
    """What the model is asked to continue: token ids, the largest number of new ones, and how many of the oldest
    messages were dropped because they no longer fit."""

    tokens: list[int]
    max_new_tokens: int
    dropped: int


class Conversation:
    """The messages of a chat, oldest first, without the system message, which `settings` hold.

    The context of the model, `context` tokens, holds the prompt and the answer. An answer may have `max_new_tokens`
    tokens, and at least a quarter of the context is kept free for it if it may need that much. Where the prompt leaves
    less, the oldest question and its answer are dropped, then the next.
    """

    def __init__(self, tokenizer: Any, settings: ChatSettings, context: int, max_new_tokens: int) -> None:
        self.messages: list[dict[str, str]] = []
        self.settings = settings
        self._tokenizer, self._context, self._max_new_tokens = tokenizer, context, max_new_tokens

    def ask(self, text: str) -> Turn:
        """Adds a question.

        Raises:
            UserError: no Unicode, a question that does not fit the context alone, or what the chat template rejects.
                The conversation is then what it was before.
        """
        text_field({"message": text}, "message")
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            return self._turn()
        except UserError:
            self.messages = before
            raise

    def _turn(self) -> Turn:
        free, dropped = min(self._max_new_tokens, self._context // 4), 0
        while True:
            tokens = prompt_tokens(self.messages, self._tokenizer, self.settings)
            left = self._context - len(tokens)
            if left >= free:
                return Turn(tokens, min(self._max_new_tokens, left), dropped)
            if len(self.messages) == 1:
                room = f"{self._context - free:,} tokens, which leaves {free:,} of the model's context for the answer"
                raise UserError(f"message: expected at most {room}; found {len(tokens):,}")
            del self.messages[:2]
            dropped += 2

    def answer(self, text: str) -> None:
        """Adds the answer to the last question; without an answer the question is dropped, too."""
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()
