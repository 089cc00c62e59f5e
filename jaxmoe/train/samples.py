"""What the model in training writes after fixed prompts: `--sample-prompts`, one line of samples.jsonl for each."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.data.chat import ChatSettings, check_template, load_tokenizer, prompt_tokens, turn_end
from jaxmoe.data.chat_flags import chat_settings
from jaxmoe.distributed import launch
from jaxmoe.errors import UserError, shown
from jaxmoe.generate.engine import Generator
from jaxmoe.json_text import parse_json
from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM
from jaxmoe.model.interface import Params
from jaxmoe.ops.router import RoutingControl
from jaxmoe.parameters import CHOICE_BIAS
from jaxmoe.runs.record import Sample
from jaxmoe.tokenizer_files import check_small_file
from jaxmoe.train.settings import TrainConfig
from jaxmoe.train.step import Model, with_gradient

MOST_PROMPTS = 64  # they share a batch, beside the state of the training


class Sampler:
    """Continues the prompts of a file, always with the most probable token."""

    def __init__(self, settings: TrainConfig, path: pathlib.Path, tokenizer_folder: pathlib.Path, model: Model) -> None:
        """Reads the prompts.

        Raises:
            UserError: no prompts, too many or too long ones, or a line that is none; several processes.
        """
        if (count := launch.this().count) > 1:  # the first alone writes the page
            raise UserError(f"sample_prompts: only valid in one process, found {count}")
        self._model, self._most = model, settings.sample_tokens
        self._tokenizer = load_tokenizer(tokenizer_folder)
        chat = chat_settings(self._tokenizer, settings.system, settings.thinking, settings.template_arg)
        self._prompts = _read(path, self._tokenizer, chat)
        self._stop = [self._tokenizer.eos_token_id]
        if (end := turn_end(self._tokenizer)) is not None:
            self._stop.append(end)
        _check_lengths(path, self._prompts, self._most, model.config)

    def __call__(self, step: int, frozen: Params, trainable: Params) -> list[Sample]:
        """What the model with these arrays writes after `step` steps."""
        if self._model.lora is None:
            cast = {path: array.astype(self._model.dtype) for path, array in with_gradient(trainable).items()}
            model = Qwen3MoeForCausalLM(self._model.config, cast, mesh=self._model.mesh)
        else:
            lora = self._model.lora
            model = Qwen3MoeForCausalLM(self._model.config, frozen, lora, trainable, mesh=self._model.mesh)
        bias = trainable.get(CHOICE_BIAS)
        outputs = Generator(model).generate(
            [ids for _, ids in self._prompts],
            self._most,
            stop_tokens=self._stop,
            control=None if bias is None else RoutingControl(choice_bias=bias),
        )
        texts = (self._tokenizer.decode(tokens, skip_special_tokens=True) for tokens in outputs)
        return [Sample(step, prompt, text) for (prompt, _), text in zip(self._prompts, texts, strict=True)]


def _check_lengths(path: pathlib.Path, prompts: list[tuple[str, list[int]]], most: int, config: Qwen3MoeConfig) -> None:
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise UserError(f"{path}: expected 1 to {MOST_PROMPTS} prompts, found {len(prompts)}")
    room = config.max_position_embeddings - most
    for prompt, ids in prompts:
        if not 1 <= len(ids) <= room:
            raise UserError(f"{path}: expected prompts of 1 to {room} tokens, found {len(ids)} in {shown(prompt)}")
        if max(ids) >= config.vocab_size:
            raise UserError(f"{path}: expected token ids below vocab_size {config.vocab_size}, found {max(ids)}")


def _read(path: pathlib.Path, tokenizer: Any, chat: ChatSettings) -> list[tuple[str, list[int]]]:
    """(prompt as it is shown, its token ids) of each line that is not empty."""
    if not path.is_file():
        raise UserError(f"sample_prompts: {path}: expected a file, found none")
    check_small_file(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected text in UTF-8, found {error}") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}:{number}"
            prompts.append(_record(line, where, tokenizer, chat) if path.suffix == ".jsonl" else _text(line, tokenizer))
    return prompts


def _text(text: str, tokenizer: Any) -> tuple[str, list[int]]:
    return text, tokenizer(text)["input_ids"]


def _record(line: str, where: str, tokenizer: Any, chat: ChatSettings) -> tuple[str, list[int]]:
    raw = parse_json(line, where, strict=True)
    if isinstance(raw, dict) and isinstance(raw.get("prompt"), str):
        return _text(raw["prompt"], tokenizer)
    if not isinstance(raw, dict) or not isinstance(messages := raw.get("messages"), list):
        raise UserError(f"{where}: expected an object with prompt or messages, found {shown(raw)}")
    check_template(tokenizer, where, "use prompt")
    last = messages[-1].get("content") if messages and isinstance(messages[-1], dict) else None
    shown_prompt = last if isinstance(last, str) else json.dumps(messages)
    return f"{shown_prompt}\n", prompt_tokens(messages, tokenizer, chat)
