# The harness is an optional extra.
# pyright: reportMissingImports=false
"""The model `jaxmoe` of EleutherAI's evaluation harness; importing this module registers it.

It answers the harness's three kinds of requests as the harness's own model `hf` does: log-probabilities of
continuations, of whole texts, and generated texts. Log-softmax and sums are in float32 or wider, whatever the model's
dtype; `hf` rounds them to the model's dtype.
"""

from __future__ import annotations

import contextlib
import json
import logging
import pathlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import lm_eval.models  # noqa: F401 - fills the registry, which the harness itself only does while it is empty
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from jaxmoe.cli.notices import LOGGER
from jaxmoe.cli.progress import reading_weights
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.control import router_bias
from jaxmoe.control.interventions import Intervention
from jaxmoe.data.chat import load_tokenizer, render_chat
from jaxmoe.errors import UserError
from jaxmoe.evaluate.arguments import ModelArguments, sampling_of
from jaxmoe.evaluate.scoring import Request, Score, padded_length, score
from jaxmoe.evaluate.stop_texts import AllStopped, StopTexts
from jaxmoe.generate.engine import Generator
from jaxmoe.generate.settings import generation_defaults
from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM
from jaxmoe.model.mesh_flag import Inputs, inference_mesh
from jaxmoe.model.opening import open_checkpoint
from jaxmoe.out_of_memory import explained

_CONTINUED = "\ue000 "  # marks the end of a message that the model is to continue


@register_model("jaxmoe")
class JaxmoeLM(TemplateLM):
    """A Qwen3-MoE checkpoint; `jaxmoe.evaluate.arguments.ModelArguments` lists the arguments."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = given = ModelArguments.of(arguments)
        folder = pathlib.Path(given.pretrained)
        config = Qwen3MoeConfig.from_pretrained(folder)  # before anything else in the folder is read
        self.tokenizer: Any = load_tokenizer(folder)
        self._defaults = generation_defaults(folder)
        self._max_length = given.max_length or config.max_position_embeddings
        length = padded_length(self._max_length)
        mesh, about_mesh = inference_mesh(
            given.mesh,
            config,
            partial(open_checkpoint, folder, given.dtype, given.quantize, given.dequantize),
            Inputs(given.sequences_of(length), length, more=True),
        )
        mesh.check_sequences_whole()
        for line in about_mesh:
            logging.getLogger(LOGGER).warning(line)  # a level that is shown in any program
        with explained(lambda: "use quantize=nf4"), reading_weights(on_stderr=True) as on_layer:
            model = Qwen3MoeForCausalLM.from_pretrained(
                folder, given.dtype, given.quantize, given.adapter, on_layer, given.dequantize, mesh
            )
        self.generator = Generator(model)
        bias = None if given.router_bias is None else router_bias.read(pathlib.Path(given.router_bias), config)
        self._control = Intervention(choice_bias=bias).control(config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> JaxmoeLM:
        """A model from `--model_args`, which count more than the harness's own flags of the same name."""
        flags = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**flags | arg_dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> JaxmoeLM:
        """As `create_from_arg_obj`, from "name=value,name=value"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end of text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is conditioned on."""
        if self.arguments.prefix_token_id is not None:
            return self.arguments.prefix_token_id
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def max_length(self) -> int:
        """The context in tokens."""
        return self._max_length

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; by default with what the tokenizer adds, unless the text begins with it."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation in the checkpoint's chat template; without a generation prompt its last message is to be
        continued, so that nothing follows it."""
        *before, last = chat_history
        if not add_generation_prompt:
            last = {**last, "content": last["content"] + _CONTINUED}
        variables = self.arguments.template_arguments()
        text = render_chat(
            self.tokenizer, [*before, last], add_generation_prompt=add_generation_prompt, **variables
        ).text
        if add_generation_prompt:
            return text
        start, found, _ = text.rpartition(_CONTINUED.strip())
        if not found:
            raise UserError("chat template: expected it to show the last message, which is to be continued")
        return start if text.startswith(start + _CONTINUED) else start.rstrip()

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, in windows of the model's context."""
        windows, owners = [], []
        for index, (text,) in enumerate(request.args for request in requests):
            pairs = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            found = [(("", ""), *make_disjoint_window(pair)) for pair in pairs]
            windows += found
            owners += [index] * len(found)
        totals = [0.0] * len(requests)
        for owner, each in zip(owners, self._scores(windows, disable_tqdm), strict=True):
            totals[owner] += each.log_probability
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        scores = [(each.log_probability, each.is_greedy) for each in self._scores(requests, disable_tqdm)]
        for (texts, _, _), found in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, found)
        return scores

    def _scores(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool
    ) -> list[Score]:
        """The score of each (texts, context, continuation); a context that is too long loses its beginning."""
        wanted = []
        for texts, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                limits = f"1 to {self.max_length:,} tokens (max_length)"
                raise UserError(f"continuation: expected {limits}, found {len(continuation):,} in {texts[1][:80]!r}")
            tokens = (*context, *continuation)[-(self.max_length + 1) :]
            wanted.append(Request(tokens, len(continuation)))
        with self._progress(len(wanted), "scoring", disable_tqdm) as bar, self._explained():
            return score(self.generator, wanted, self.arguments.sequences_of, bar.update, self._control)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context, up to the first text of `until`."""
        answers = [""] * len(requests)
        with self._progress(len(requests), "generating", disable_tqdm) as bar, self._explained():
            for indices, kwargs in self._alike(requests):
                contexts = [requests[index].args[0] for index in indices]
                for index, answer in zip(indices, self._generate(contexts, kwargs), strict=True):
                    answers[index] = answer
                    self.cache_hook.add_partial("generate_until", requests[index].args, answer)
                bar.update(len(indices))
        return answers

    def _alike(self, requests: Sequence[Instance]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Batches of requests with equal generation arguments and contexts of similar length: (indices, arguments)."""
        asked: list[tuple[Any, ...]] = [request.args for request in requests]
        groups: dict[str, list[int]] = {}
        for index, (_, kwargs) in enumerate(asked):
            groups.setdefault(json.dumps(kwargs, sort_keys=True, default=repr), []).append(index)
        for group in groups.values():
            kwargs = asked[group[0]][1]
            lengths = {index: len(self.tok_encode(asked[index][0])) for index in group}
            group.sort(key=lambda index: -lengths[index])
            while group:
                longest = min(lengths[group[0]] + self._normalized(kwargs)["max_gen_toks"], self.max_length)
                size = self.arguments.sequences_of(padded_length(longest))
                yield group[:size], kwargs
                group = group[size:]

    def _normalized(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**normalize_gen_kwargs(kwargs, self.arguments.max_gen_toks)}

    def _generate(self, contexts: Sequence[str], kwargs: dict[str, Any]) -> list[str]:
        given = self._normalized(kwargs)
        eos = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        until, new_tokens = handle_stop_sequences(given.pop("until"), eos), given.pop("max_gen_toks")
        if not 0 < new_tokens < self.max_length:
            limit = f"a number of new tokens from 1 to {self.max_length - 1:,} (max_length - 1)"
            raise UserError(f"max_gen_toks: expected {limit}, found {new_tokens:,}")
        prompts = [self.tok_encode(context)[-(self.max_length - new_tokens) :] for context in contexts]
        sampling = sampling_of(given, self._defaults.sampling, self.arguments.seed)
        stop_tokens = self._defaults.stop_tokens or (self.eot_token_id,)
        stops = StopTexts(self.tokenizer, until, stop_tokens, len(prompts))
        with contextlib.suppress(AllStopped):
            self.generator.generate(prompts, new_tokens, sampling, stop_tokens, stops, self._control)
        return [self._answer(tokens, until) for tokens in stops.outputs]

    def _answer(self, tokens: list[int], until: list[str]) -> str:
        end = self.arguments.think_end_token
        if isinstance(end, int):
            after = len(tokens) - tokens[::-1].index(end) if end in tokens else 0
            text = self.tokenizer.decode(tokens[after:], skip_special_tokens=True)
            return postprocess_generated_text(text.lstrip() if after else text, until, None)
        return postprocess_generated_text(self.tokenizer.decode(tokens, skip_special_tokens=True), until, end)

    def _progress(self, total: int, words: str, disable: bool) -> Any:
        return tqdm(total=total, desc=words, disable=disable)

    def _explained(self) -> Any:
        return explained(lambda: "use a smaller batch_size or max_length, or quantize=nf4")
