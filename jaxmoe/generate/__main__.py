"""The command `python -m jaxmoe.generate`: prints the continuation of each prompt."""

from __future__ import annotations

from jaxmoe import stopping

if __name__ == "__main__":
    stopping.watch()  # before the other imports, which take seconds

import argparse
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from captures import Capture, tokenizer_digest
from jaxmoe.cli import xla
from jaxmoe.cli.arguments import ArgumentParser, add_memory_limit, finite_number, run, whole_number
from jaxmoe.cli.progress import reading_weights
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.control import interventions
from jaxmoe.data.chat import load_tokenizer, turn_end
from jaxmoe.errors import printable
from jaxmoe.generate import prompts
from jaxmoe.generate.capture import capture_generation
from jaxmoe.generate.engine import Generator
from jaxmoe.generate.sampling import Sampling
from jaxmoe.generate.settings import generation_defaults, without_effect
from jaxmoe.generate.stream import TextStream
from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM
from jaxmoe.out_of_memory import explained

_MAX_NEW_TOKENS = 256


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = ArgumentParser(description="Generate text with a Qwen3-MoE checkpoint.")
    add = parser.add_argument
    add("--model", type=pathlib.Path, required=True, metavar="DIR", help="HF folder or converted folder")
    add("--adapter", type=pathlib.Path, metavar="DIR", help="PEFT folder or converted adapter")
    prompts.add_arguments(parser)
    own = "(default: from generation_config.json)"
    limit = f"largest number of new tokens (default: from generation_config.json, else {_MAX_NEW_TOKENS})"
    add("--max-new-tokens", type=whole_number, metavar="N", help=limit)
    add("--temperature", type=finite_number, metavar="X", help=f"0 is greedy {own}")
    add("--top-k", type=whole_number, metavar="N", help=f"0 means no limit {own}")
    add("--top-p", type=finite_number, metavar="X", help=f"1 means no limit {own}")
    add("--min-p", type=finite_number, metavar="X", help=f"0 means no limit {own}")
    add("--repetition-penalty", type=finite_number, metavar="X", help=f"1 means none {own}")
    add("--no-generation-config", action="store_true", help="greedy unless flags say otherwise")
    add("--seed", type=whole_number, default=0, metavar="N", help="seed of the random draws (default: 0)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    add("--quantize", choices=("nf4",), help="hold projections, dense MLPs and experts in 4 bits")
    add("--dequantize", action="store_true", help="decode weights in FP8 or NF4 while they are read; FP8 needs it")
    add("--capture", type=pathlib.Path, metavar="DIR", help="write the routing of every token to this new folder")
    add("--replay", type=pathlib.Path, metavar="DIR", help="use the experts in this capture of the same prompts")
    add_memory_limit(parser)
    interventions.add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Prints each prompt's continuation; a single one is printed token by token."""
    args = build_parser().parse_args(argv)
    xla.configure(args.memory_limit)
    Qwen3MoeConfig.from_pretrained(args.model)  # before anything else in the folder is read
    tokenizer = load_tokenizer(args.model)
    defaults = generation_defaults(args.model, use_file=not args.no_generation_config)
    sampling = _with_flags(defaults.sampling, args)
    max_new_tokens = defaults.max_new_tokens if args.max_new_tokens is None else args.max_new_tokens
    settings = Settings(
        _MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens,
        sampling,
        _stop_tokens(defaults.stop_tokens, tokenizer, args.chat),
    )
    token_ids, notices = prompts.encode_prompts(args, tokenizer)
    with explained(lambda: "use fewer prompts at once, a smaller --max-new-tokens, or --quantize nf4"):
        _generate(args, tokenizer, token_ids, settings, [*defaults.notices, *notices, *_unused(sampling)])


def _generate(
    args: argparse.Namespace, tokenizer: Any, token_ids: list[list[int]], settings: Settings, notices: list[str]
) -> None:
    """Loads the model, continues the prompts and prints them."""
    with reading_weights(on_stderr=True) as on_layer:
        model = Qwen3MoeForCausalLM.from_pretrained(
            args.model, args.dtype, args.quantize, args.adapter, on_layer, args.dequantize
        )
    generator = Generator(model)
    generator.check(token_ids, settings.max_new_tokens)
    for line in notices:
        print(line, file=sys.stderr)
    if args.capture or args.replay or args.ablate or args.force or args.bias:
        outputs = _generate_with_routing(generator, token_ids, settings, args, tokenizer)
    elif len(token_ids) == 1:
        stream = TextStream(tokenizer, lambda text: print(_shown(text), end="", flush=True))
        generator.generate(token_ids, *settings, lambda _, token: stream.put(token))
        stream.end()
        print()
        return
    else:
        outputs = generator.generate(token_ids, *settings)
    for text, tokens in zip(args.prompt, outputs, strict=True):
        print(_shown(f"--- {text}\n{tokenizer.decode(tokens, skip_special_tokens=True)}"))


def _shown(text: str) -> str:
    """The text as it is; on a terminal, without what a model could make the terminal do."""
    return printable(text) if sys.stdout.isatty() else text


class Settings(NamedTuple):
    """What every way of generating is told."""

    max_new_tokens: int
    sampling: Sampling
    stop_tokens: tuple[int, ...]


def _with_flags(sampling: Sampling, args: argparse.Namespace) -> Sampling:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    given = {name: getattr(args, name) for name in names}
    return replace(sampling, **{name: value for name, value in given.items() if value is not None})


def _stop_tokens(stated: tuple[int, ...], tokenizer: Any, chat: bool) -> tuple[int, ...]:
    """The checkpoint's stop tokens, or the tokenizer's end of text if it states none; in a chat also the latter, and
    the token that ends a turn."""
    if not chat:
        return stated or (tokenizer.eos_token_id,)
    end = turn_end(tokenizer)
    return tuple(dict.fromkeys((*stated, tokenizer.eos_token_id, *([] if end is None else [end]))))


def _unused(sampling: Sampling) -> list[str]:
    names = ", ".join(without_effect(sampling))
    return [f"without effect at temperature 0 (--temperature X draws tokens): {names}"] if names else []


def _generate_with_routing(
    generator: Generator,
    token_ids: list[list[int]],
    settings: Settings,
    args: argparse.Namespace,
    tokenizer: Any,
) -> list[list[int]]:
    """The continuations, with the routing captured, replayed or changed as the flags say."""
    changes = interventions.intervention(args, generator.config)
    return capture_generation(
        generator,
        token_ids,
        settings.max_new_tokens,
        args.capture,
        tokenizer=tokenizer_digest(tokenizer),
        sampling=settings.sampling,
        stop_tokens=settings.stop_tokens,
        control=changes.control(generator.config),
        replay=Capture.open(args.replay) if args.replay else None,
        description=changes.describe(),
        source={"model": str(args.model), "adapter": str(args.adapter) if args.adapter else None},
    )


if __name__ == "__main__":
    run(main)
