"""What the harness may say about a model: `--model_args NAME=VALUE,...`, `--batch_size`, and `--gen_kwargs`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxmoe.errors import UserError, shown
from jaxmoe.generate.sampling import Sampling

_AUTO_TOKENS = 16384  # of a batch with batch_size=auto, padding included
_KINDS: dict[str, type] = {
    **dict.fromkeys(("pretrained", "adapter", "dtype", "quantize", "router_bias", "mesh"), str),
    **dict.fromkeys(("dequantize", "enable_thinking"), bool),
    **dict.fromkeys(("max_batch_size", "max_length", "max_gen_toks", "prefix_token_id", "seed"), int),
    "chat_template_args": dict,
}


@dataclass(frozen=True)
class ModelArguments:
    """The arguments of the model `jaxmoe`.

    Attributes:
        pretrained: the model's folder, in HF form or converted.
        adapter: a PEFT folder, a converted adapter, or the folder of a training run.
        dtype: float32, bfloat16 or float16; by default the checkpoint's.
        quantize: nf4 holds projections, dense MLPs and experts in 4 bits, fp8 in 8.
        router_bias: the router_bias.json of a training with --router-bias-rate, which the experts are then chosen with.
        dequantize: decodes weights in FP8 or NF4 while they are read.
        mesh: the devices that share the model and the sequences, auto or axes such as expert=8; by default one.
        batch_size: sequences at once, or auto: as many as have 16,384 tokens together.
        max_batch_size: the largest number of sequences with batch_size=auto.
        max_length: the context in tokens; by default max_position_embeddings of the config. Longer texts lose their
            beginning.
        max_gen_toks: new tokens of a task that states no number.
        enable_thinking: passed to the chat template.
        chat_template_args: further arguments of the chat template.
        think_end_token: an answer begins after the last one of these, a text or a token id.
        prefix_token_id: what a text without context is conditioned on; by default the tokenizer's beginning of text, or
            else its end of text.
        seed: of the random draws.

    Raises:
        UserError: an unknown argument, none where one is needed, or a value of another kind.
    """

    pretrained: str
    adapter: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    dequantize: bool = False
    router_bias: str | None = None
    mesh: str | None = None
    batch_size: int | str = 1
    max_batch_size: int = 64
    max_length: int | None = None
    max_gen_toks: int = 256
    enable_thinking: bool | None = None
    chat_template_args: Mapping[str, Any] = field(default_factory=dict)
    think_end_token: str | int | None = None
    prefix_token_id: int | None = None
    seed: int = 0

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> ModelArguments:
        """The arguments as the harness passes them. Those that are None count as not given.

        The harness always passes a device of PyTorch, which is not used: JAX chooses its own.

        Raises:
            UserError: an unknown argument, one of another type, or no `pretrained`.
        """
        given = {name: value for name, value in given.items() if value is not None and name != "device"}
        names = [each.name for each in dataclasses.fields(cls)]
        if unknown := sorted(set(given) - set(names)):
            raise UserError(f"model_args: expected some of {', '.join(names)}; found {unknown[0]}")
        if "pretrained" not in given:
            raise UserError("model_args: expected pretrained=DIR, found none")
        for name, kind in _KINDS.items():
            _check(name, kind, given.get(name))
        size = str(given.get("batch_size", 1))
        if not size.startswith("auto") and not (size.isdecimal() and int(size)):
            raise UserError(f"batch_size: expected auto or a whole number of at least 1, found {shown(size)}")
        return cls(**given)

    @property
    def sequences(self) -> int | None:
        """The batch size as a number; None for auto."""
        return int(self.batch_size) if str(self.batch_size).isdecimal() else None

    def sequences_of(self, length: int) -> int:
        """How many sequences of `length` tokens run at once."""
        if self.sequences is not None:
            return self.sequences
        return max(1, min(self.max_batch_size, _AUTO_TOKENS // length))

    def template_arguments(self) -> dict[str, Any]:
        """The arguments of the chat template."""
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return {**self.chat_template_args, **thinking}


def _check(name: str, kind: type, value: Any) -> None:
    """Raises UserError unless a given value is of its kind; a number must not be negative."""
    if value is not None and (type(value) is not kind or (kind is int and value < 0)):
        words = {str: "a text", bool: "true or false", int: "a whole number of at least 0", dict: "names and values"}
        raise UserError(f"{name}: expected {words[kind]}, found {shown(value)}")


def sampling_of(given: Mapping[str, Any], defaults: Sampling, seed: int) -> Sampling:
    """How tokens are chosen; `given` are the harness's generation arguments without those about where a text ends.

    What they leave out is what the checkpoint says, as in the harness's model `hf`.

    Raises:
        UserError: an argument that is not known, out of range, or a draw without a temperature.
    """
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    if unknown := sorted(set(given) - {*names, "do_sample"}):
        known = ", ".join(("do_sample", *names, "until", "max_gen_toks"))
        raise UserError(f"generation arguments: expected some of {known}; found {unknown[0]}")
    chosen = {name: given[name] for name in names if given.get(name) is not None}
    if not given.get("do_sample"):
        chosen["temperature"] = 0.0
    elif not chosen.get("temperature"):
        raise UserError("temperature: expected a number above 0 with do_sample=True, found none")
    return replace(defaults, seed=seed, **chosen)
