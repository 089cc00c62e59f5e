"""A chat in the terminal: `python -m jaxmoe.generate --interactive`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rich.console import Console

from jaxmoe.data.chat import text_field
from jaxmoe.errors import UserError, counted, printable
from jaxmoe.generate.conversation import Conversation, Turn
from jaxmoe.generate.engine import Generator
from jaxmoe.generate.settings import Settings
from jaxmoe.generate.speed import Speed
from jaxmoe.generate.stream import TextStream
from jaxmoe.out_of_memory import explained
from jaxmoe.stopping import Keyboard

HELP = """\
/reset          forget the conversation; the system message stays
/system TEXT    set the system message; without TEXT, remove it
/help           show this
/quit           end the chat; so does Ctrl-D
Ctrl-C          stop the answer
\"\"\"             start a message of several lines, up to a line that ends with \"\"\""""
_QUOTES = '"""'


class _Stopped(Exception):
    """Ctrl-C during an answer."""


class Chat:
    """Questions from `ask`, one line each, and the model's answers to them, with the conversation so far as context.

    Answers go to `out` as they are generated, everything else to `notes`.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Any,
        conversation: Conversation,
        settings: Settings,
        out: Console | None = None,
        notes: Console | None = None,
    ) -> None:
        self._generator, self._tokenizer = generator, tokenizer
        self._conversation, self._settings = conversation, settings
        self._out = out or Console()
        self._notes = notes or Console(stderr=True)
        self._keyboard = Keyboard()
        self._speed = Speed()
        self._answers = 0

    def run(self, ask: Callable[[str], str] | None = None) -> None:
        """Talks until the user leaves; `ask` receives a prompt and returns a line, as `input` does."""
        ask = ask or _line_reader()
        self._say("/help lists the commands")
        with self._keyboard:
            while (text := self._question(ask)) is not None:
                if text.startswith("/"):
                    if not self._obey(text):
                        break
                elif text.strip():
                    self._reply(text.strip())
        if self._answers:
            self._say(f"{counted(self._answers, 'answer')}, {self._speed}")

    def _question(self, ask: Callable[[str], str]) -> str | None:
        """What the user types next; None at the end of the input."""
        while True:
            try:
                with self._keyboard.asking():
                    return _message(ask)
            except KeyboardInterrupt:
                self._say("\n/quit or Ctrl-D ends the chat")
            except EOFError:
                self._say("")
                return None

    def _obey(self, line: str) -> bool:
        """Runs a command; returns whether the chat goes on."""
        command, _, rest = line.strip().partition(" ")
        if command in ("/quit", "/exit", "/bye"):
            return False
        if command == "/reset":
            self._conversation.messages.clear()
            self._say("the conversation is empty")
        elif command == "/system":
            self._set_system(rest.strip())
        elif command == "/help":
            self._say(HELP)
        else:
            self._say(f"no such command: {command}; /help lists them, and a message that starts with a space is sent")
        return True

    def _set_system(self, text: str) -> None:
        try:
            text_field({"system": text}, "system")
        except UserError as error:
            self._say(str(error))
            return
        self._conversation.settings = replace(self._conversation.settings, system=text or None)
        self._say("the system message is set" if text else "there is no system message")

    def _reply(self, question: str) -> None:
        """Answers a question; what cannot be answered leaves the conversation as it was."""
        try:
            turn = self._conversation.ask(question)
        except UserError as error:
            self._say(str(error))
            return
        if turn.dropped:
            self._say(f"the {turn.dropped} oldest messages no longer fit the model's context and are forgotten")
        answer = ""
        try:
            answer = self._answer(turn)
        except UserError as error:
            self._say(str(error))
        self._conversation.answer(answer)

    def _answer(self, turn: Turn) -> str:
        """The answer, shown while it is generated; what Ctrl-C leaves of it counts as one."""
        tokens: list[int] = []
        stream = TextStream(self._tokenizer, self._show)

        def receive(_: int, token: int) -> None:
            self._speed.count()
            tokens.append(token)
            stream.put(token)
            if self._keyboard.stopped:
                raise _Stopped

        sampling = self._settings.sampling  # asked twice, a question gets another answer
        sampling = replace(sampling, seed=sampling.seed + self._answers)
        self._answers += 1
        self._speed.start()
        stopped = False
        advice = "/reset, --quantize nf4, or a smaller --max-new-tokens"
        try:
            with self._keyboard.answering(), explained(lambda: advice):
                stop = self._settings.stop_tokens
                self._generator.generate([turn.tokens], turn.max_new_tokens, sampling, stop, receive)
        except _Stopped:
            stopped = True
        stream.end()
        self._show("\n")
        self._say(self._about(tokens, turn, stopped))
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _about(self, tokens: list[int], turn: Turn, stopped: bool) -> str:
        """How long an answer was and took, and why it ended if the model did not end it."""
        words = self._speed.of_answer()
        if stopped:
            return f"{words}; stopped"
        if tokens and tokens[-1] in self._settings.stop_tokens:
            return words
        return f"{words}; cut off at {counted(turn.max_new_tokens, 'token')}"

    def _show(self, text: str) -> None:
        """Part of an answer; on a terminal, without what a model could make the terminal do."""
        self._out.out(printable(text) if self._out.is_terminal else text, end="", highlight=False)

    def _say(self, text: str) -> None:
        self._notes.out(printable(text), style="dim", highlight=False)


def _line_reader() -> Callable[[str], str]:
    """`input`, on a terminal with a history and keys for editing; without a terminal it shows no prompt."""
    if not sys.stdin.isatty():
        return lambda prompt: input()
    with contextlib.suppress(ImportError):  # Windows
        import readline  # noqa: F401 - `input` uses it once it is imported
    return input


def _message(ask: Callable[[str], str]) -> str:
    """One line, or the lines between two triple quotes."""
    line = ask("> ")
    if not line.startswith(_QUOTES):
        return line
    lines = [line.removeprefix(_QUOTES)]
    while not lines[-1].rstrip().endswith(_QUOTES):
        lines.append(ask("... "))
    return "\n".join(lines).rstrip().removesuffix(_QUOTES)
