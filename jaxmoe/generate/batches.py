"""Answers many prompts in batches of similar length: `python -m jaxmoe.generate --prompts FILE --out FILE`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jaxmoe.generate.answer_file import ADDED, INDEX, AnswerFile
from jaxmoe.generate.engine import Generator
from jaxmoe.generate.prompt_file import FilePrompt
from jaxmoe.generate.settings import Settings
from jaxmoe.stopping import Postponed

OnBatch = Callable[[int, float], None]  # answers so far, new tokens per second


class _Stopped(Exception):
    """A signal during a batch."""


class Done(NamedTuple):
    """What a run has added: answers, their tokens, the seconds that generating them took, and the signal that ended it
    early, or None."""

    answers: int
    tokens: int
    seconds: float
    stopped_by: int | None


def batches_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of `size`, the longest first, so that a batch that needs too much memory comes first.

    They depend on nothing but the lengths: a run that continues draws the same tokens as one that never stopped.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + size] for start in range(0, len(order), size)]


@dataclass
class Answering:
    """A model that answers prompts, and how."""

    generator: Generator
    tokenizer: Any
    settings: Settings
    batch_size: int

    def check(self, prompts: Sequence[FilePrompt]) -> None:
        """Raises UserError for what `Generator.generate` would refuse, before the first batch."""
        for batch in self._batches(prompts):
            self.generator.check([prompts[index].tokens for index in batch], self.settings.max_new_tokens)

    def run(self, prompts: Sequence[FilePrompt], answers: AnswerFile, on_batch: OnBatch) -> Done:
        """Answers what has no answer yet and appends it, a batch at a time.

        Ctrl-C or SIGTERM drops the batch at work and returns; a second signal ends the process.
        """
        before, tokens, seconds = len(answers.done), 0, 0.0
        with Postponed() as signals:
            for number, batch in enumerate(self._batches(prompts)):
                missing = answers.missing(batch)
                if not missing:
                    continue
                start = time.perf_counter()
                try:
                    outputs = self._generate([prompts[index].tokens for index in batch], number, signals)
                except _Stopped:
                    break
                seconds += time.perf_counter() - start
                new = [
                    self._answer(index, prompts[index], output) for index, output in zip(batch, outputs, strict=True)
                ]
                answers.append([answer for answer in new if answer[INDEX] in missing])
                tokens += sum(map(len, outputs))
                on_batch(len(answers.done), tokens / seconds)
        return Done(len(answers.done) - before, tokens, seconds, signals.received)

    def _batches(self, prompts: Sequence[FilePrompt]) -> list[list[int]]:
        return batches_by_length([len(prompt.tokens) for prompt in prompts], self.batch_size)

    def _generate(self, prompts: list[list[int]], number: int, signals: Postponed) -> list[list[int]]:
        def check(sequence: int, token: int) -> None:
            if signals.received is not None:
                raise _Stopped

        # A draw depends on the seed and the place in the batch: each batch has a seed of its own.
        sampling = replace(self.settings.sampling, seed=self.settings.sampling.seed + number)
        return self.generator.generate(
            prompts, self.settings.max_new_tokens, sampling, self.settings.stop_tokens, check
        )

    def _answer(self, index: int, prompt: FilePrompt, tokens: list[int]) -> dict[str, Any]:
        given = {name: value for name, value in prompt.fields.items() if name not in ADDED}
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        reason = "stop" if tokens[-1] in self.settings.stop_tokens else "length"
        added = {"completion": text, "finish_reason": reason, "new_tokens": len(tokens)}
        return {INDEX: index, **given, **added}
