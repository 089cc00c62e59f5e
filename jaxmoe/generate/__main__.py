"""The command `python -m jaxmoe.generate`: prints the continuation of each prompt."""

from __future__ import annotations

from jaxmoe import stopping

if __name__ == "__main__":
    stopping.watch()  # before the other imports, which take seconds

import argparse
import pathlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from captures import Capture, tokenizer_digest
from jaxmoe.cli import xla
from jaxmoe.cli.arguments import ArgumentParser, finite_number, run, whole_number
from jaxmoe.cli.progress import reading_weights
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.control import interventions
from jaxmoe.data.chat import load_tokenizer, render_chat, text_field
from jaxmoe.errors import UserError
from jaxmoe.generate.capture import capture_generation
from jaxmoe.generate.engine import Generator
from jaxmoe.generate.sampling import Sampling, generation_defaults
from jaxmoe.generate.stream import TextStream
from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description="Generate text with a Qwen3-MoE checkpoint.")
    add = parser.add_argument
    add("--model", type=pathlib.Path, required=True, metavar="DIR", help="HF folder or converted folder")
    add("--adapter", type=pathlib.Path, metavar="DIR", help="PEFT folder or converted adapter")
    add("--prompt", action="append", required=True, metavar="TEXT", help="text to continue; may be repeated")
    add("--chat", action="store_true", help="put each prompt into the checkpoint's chat template")
    add(
        "--max-new-tokens",
        type=whole_number,
        default=256,
        metavar="N",
        help="largest number of new tokens (default: 256)",
    )
    add("--temperature", type=finite_number, metavar="X", help="0 is greedy (default: from generation_config.json)")
    add("--top-k", type=whole_number, metavar="N", help="0 means no limit (default: from generation_config.json)")
    add("--top-p", type=finite_number, metavar="X", help="1 means no limit (default: from generation_config.json)")
    add("--seed", type=whole_number, default=0, metavar="N", help="seed of the random draws (default: 0)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    add("--quantize", choices=("nf4",), help="hold projections, dense MLPs and experts in 4 bits")
    add("--dequantize", action="store_true", help="decode weights in FP8 or NF4 while they are read; FP8 needs it")
    add("--capture", type=pathlib.Path, metavar="DIR", help="write the routing of every token to this new folder")
    add("--replay", type=pathlib.Path, metavar="DIR", help="use the experts in this capture of the same prompts")
    interventions.add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Prints each prompt's continuation; a single one is printed token by token."""
    args = _parser().parse_args(argv)
    xla.configure()
    Qwen3MoeConfig.from_pretrained(args.model)  # before anything else in the folder is read
    tokenizer = load_tokenizer(args.model)
    sampling, stop = generation_defaults(args.model)
    stop = tuple({*stop, tokenizer.eos_token_id})
    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    sampling = replace(sampling, **{name: value for name, value in given.items() if value is not None})

    prompts = [_encode(tokenizer, text, args.chat) for text in args.prompt]
    with reading_weights(on_stderr=True) as on_layer:
        model = Qwen3MoeForCausalLM.from_pretrained(
            args.model, args.dtype, args.quantize, args.adapter, on_layer, args.dequantize
        )
    generator = Generator(model)
    if args.capture or args.replay or args.ablate or args.force or args.bias:
        outputs = _generate_with_routing(generator, prompts, sampling, stop, args, tokenizer)
    elif len(prompts) == 1:
        stream = TextStream(tokenizer, lambda text: print(text, end="", flush=True))
        generator.generate(prompts, args.max_new_tokens, sampling, stop, lambda _, token: stream.put(token))
        stream.end()
        print()
        return
    else:
        outputs = generator.generate(prompts, args.max_new_tokens, sampling, stop)
    for text, tokens in zip(args.prompt, outputs, strict=True):
        print(f"--- {text}\n{tokenizer.decode(tokens, skip_special_tokens=True)}")


def _generate_with_routing(
    generator: Generator,
    prompts: list[list[int]],
    sampling: Sampling,
    stop: Sequence[int],
    args: argparse.Namespace,
    tokenizer: Any,
) -> list[list[int]]:
    """The continuations, with the routing captured, replayed or changed as the flags say."""
    changes = interventions.intervention(args, generator.config)
    return capture_generation(
        generator,
        prompts,
        args.max_new_tokens,
        args.capture,
        tokenizer=tokenizer_digest(tokenizer),
        sampling=sampling,
        stop_tokens=stop,
        control=changes.control(generator.config),
        replay=Capture.open(args.replay) if args.replay else None,
        description=changes.describe(),
        source={"model": str(args.model), "adapter": str(args.adapter) if args.adapter else None},
    )


def _encode(tokenizer: Any, text: str, chat: bool) -> list[int]:
    text_field({"prompt": text}, "prompt")
    if not chat:
        return tokenizer(text)["input_ids"]
    if not tokenizer.chat_template:
        raise UserError("chat: expected a tokenizer with a chat template, found none")
    message = [{"role": "user", "content": text}]
    rendered = render_chat(tokenizer, message, add_generation_prompt=True)
    return tokenizer(rendered.text, add_special_tokens=False)["input_ids"]


if __name__ == "__main__":
    run(main)
