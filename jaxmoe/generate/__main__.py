"""The command `python -m jaxmoe.generate`: continues prompts, answers a file of them, or chats."""

from __future__ import annotations

from jaxmoe import stopping

if __name__ == "__main__":
    stopping.watch()  # before the other imports, which take seconds

import argparse
import logging
import pathlib
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import jax

from captures import Capture, tokenizer_digest
from jaxmoe.cli import xla
from jaxmoe.cli.arguments import ArgumentParser, add_memory_limit, finite_number, run, say, whole_number
from jaxmoe.cli.notices import LOGGER, shown_notices
from jaxmoe.cli.progress import progress, reading_weights, shown
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.control import interventions
from jaxmoe.data.chat import AS_WRITTEN, ChatSettings, load_tokenizer, turn_end
from jaxmoe.distributed import ending, launch
from jaxmoe.distributed.agreement import check_same_command
from jaxmoe.distributed.mesh import AUTO, named
from jaxmoe.errors import UserError, counted, printable
from jaxmoe.generate import prompts
from jaxmoe.generate.answer_file import answer_file
from jaxmoe.generate.batches import ADDED, Answering
from jaxmoe.generate.capture import capture_generation
from jaxmoe.generate.chat import Chat
from jaxmoe.generate.conversation import Conversation
from jaxmoe.generate.engine import Generator
from jaxmoe.generate.prompt_file import FilePrompt, digest, read_prompts
from jaxmoe.generate.sampling import Sampling
from jaxmoe.generate.settings import Settings, generation_defaults, without_effect
from jaxmoe.generate.stream import TextStream
from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM
from jaxmoe.model.mesh_flag import Inputs, inference_mesh
from jaxmoe.model.opening import open_checkpoint
from jaxmoe.model.selection import jax_without_kernels
from jaxmoe.out_of_memory import explained

_log = logging.getLogger(LOGGER)

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
    add("--quantize", choices=("nf4", "fp8"), help="hold projections, dense MLPs and experts in 4 or 8 bits")
    add("--dequantize", action="store_true", help="decode weights in FP8 or NF4 while they are read")
    add("--mesh", metavar="MESH", help="GPUs that share model and prompts: auto, or axes (expert=8) (default: one)")
    add("--capture", type=pathlib.Path, metavar="DIR", help="write the routing of every token to this new folder")
    add("--replay", type=pathlib.Path, metavar="DIR", help="use the experts in this capture of the same prompts")
    add_memory_limit(parser)
    interventions.add_arguments(parser)
    launch.add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints each prompt's continuation, answers a file, or chats; 0 when done, 128 + the signal's number when a signal
    ended the work on a file early."""
    args = build_parser().parse_args(argv)
    process = launch.start(args)
    if process.count > 1 and (args.prompts or args.interactive):
        given = "--prompts" if args.prompts else "--interactive"
        raise UserError(f"num-processes: several processes generate for --prompt only, found {given}")
    xla.configure(args.memory_limit)
    with ending.together(), shown(process.is_first), shown_notices(on_stderr=True):
        check_same_command(vars(args))
        return _generate(args)


def _generate(args: argparse.Namespace) -> int:
    """What `main` does, together with the other processes if there are any."""
    config = Qwen3MoeConfig.from_pretrained(args.model)  # before anything else in the folder is read
    tokenizer = load_tokenizer(args.model)
    defaults = generation_defaults(args.model, use_file=not args.no_generation_config)
    sampling = _with_flags(defaults.sampling, args)
    max_new_tokens = defaults.max_new_tokens if args.max_new_tokens is None else args.max_new_tokens
    max_new_tokens = _MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens
    stop_tokens = _stop_tokens(defaults.stop_tokens, tokenizer, args.chat or args.interactive)
    settings = Settings(max_new_tokens, sampling, stop_tokens)
    chat_settings, notices = prompts.chat_settings(args, tokenizer)
    if args.mesh not in (None, AUTO):
        named(args.mesh, jax.device_count(), config).check_sequences_whole()
    task = _Task(args, tokenizer, settings, chat_settings, [*defaults.notices, *notices, *_unused(sampling)])
    if args.prompts:
        return _answer_file(task, config)
    if args.interactive:
        _chat(task)
    else:
        _continue(task, config)
    return 0


class _Task(NamedTuple):
    """What every way of generating starts from; `notices` are shown once the weights are read."""

    args: argparse.Namespace
    tokenizer: Any
    settings: Settings
    chat: ChatSettings
    notices: list[str]


def _load(task: _Task, sequences: int, longest: int) -> Generator:
    """The model, for so many prompts at once, the longest of so many tokens."""
    args = task.args
    mesh, about_mesh = inference_mesh(
        args.mesh,
        Qwen3MoeConfig.from_pretrained(args.model),
        partial(open_checkpoint, args.model, args.dtype, args.quantize, args.dequantize),
        Inputs(sequences, longest + task.settings.max_new_tokens, more=True),
    )
    with reading_weights(on_stderr=True) as on_layer:
        model = Qwen3MoeForCausalLM.from_pretrained(
            args.model, args.dtype, args.quantize, args.adapter, on_layer, args.dequantize, mesh
        )
    for line in [*about_mesh, *jax_without_kernels(), *task.notices] if launch.this().is_first else ():
        _log.info(line)
    return Generator(model)


def _continue(task: _Task, config: Qwen3MoeConfig) -> None:
    """Continues every `--prompt` and prints the texts; a single one is printed token by token."""
    args, tokenizer, settings = task.args, task.tokenizer, task.settings
    token_ids = prompts.encode_prompts(args, tokenizer, task.chat)
    for tokens in token_ids:
        prompts.check_context(tokens, config.max_position_embeddings)
    with explained(lambda: "use fewer prompts at once, a smaller --max-new-tokens, or --quantize nf4"):
        generator = _load(task, len(token_ids), max(map(len, token_ids)))
        generator.check(token_ids, settings.max_new_tokens)
        if _with_routing(args):
            outputs = _generate_with_routing(generator, token_ids, settings, args, tokenizer)
            if args.capture is not None and launch.this().is_first:
                print(f"wrote the routing to {args.capture}", file=sys.stderr)
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


def _chat(task: _Task) -> None:
    """Chats until the user leaves."""
    _refuse_routing(task.args, "interactive")
    with explained(lambda: "use --quantize nf4"):
        generator = _load(task, 1, task.settings.max_new_tokens)
    context, most = generator.config.max_position_embeddings, task.settings.max_new_tokens
    generator.check([[0]], most)
    Chat(generator, task.tokenizer, Conversation(task.tokenizer, task.chat, context, most), task.settings).run()


def _answer_file(task: _Task, config: Qwen3MoeConfig) -> int:
    """Answers the prompts of a file; returns the exit code."""
    args, settings = task.args, task.settings
    _refuse_routing(args, "prompts")
    context = config.max_position_embeddings
    given = read_prompts(args.prompts, task.tokenizer, config.vocab_size, args.chat, task.chat, context)
    if args.chat or any("messages" in prompt.fields for prompt in given):
        settings = settings._replace(stop_tokens=_stop_tokens(settings.stop_tokens, task.tokenizer, True))
    elif task.chat != AS_WRITTEN:
        raise UserError(f"{args.prompts}: flags of chats were given: expected --chat, or messages, found neither")
    if lost := [name for name in ADDED if any(name in prompt.fields for prompt in given)]:
        task.notices.append(f"{args.prompts}: fields that the answers have, too, are not copied: {', '.join(lost)}")
    total, batch_size = len(given), args.batch_size or prompts.BATCH_SIZE
    with answer_file(args.out, total, _provenance(args, given, settings, batch_size)) as answers:
        if answers.done:
            _log.info(f"{args.out}: there are {len(answers.done):,} of {counted(total, 'answer')}")
        done = None
        if len(answers.done) < total:
            with explained(lambda: "use a smaller --batch-size or --max-new-tokens, or --quantize nf4"):
                generator = _load(task, batch_size, max(len(prompt.tokens) for prompt in given))
                answering = Answering(generator, task.tokenizer, settings, batch_size)
                answering.check(given)
                with progress("generating", on_stderr=True) as show:
                    words = "{} of {} prompts, {:,.0f} tokens/s".format
                    done = answering.run(given, answers, lambda n, rate: show(n, total, words(n, total, rate)))
        answers.sort()
    if done is not None and done.answers:
        rate = f"{done.tokens / done.seconds:,.1f} tokens/s"
        say(f"{counted(done.answers, 'answer')}: {counted(done.tokens, 'token')} in {done.seconds:.1f} s, {rate}")
    if len(answers.done) < total:
        assert done is not None and done.stopped_by is not None
        name, kept = signal.Signals(done.stopped_by).name, f"{len(answers.done):,} of {counted(total, 'answer')}"
        _log.info(f"{name}: {kept} in {args.out}; the same command continues from there")
        return 128 + done.stopped_by
    say(f"{args.out}: complete, {counted(total, 'answer')}")
    return 0


def _provenance(
    args: argparse.Namespace, given: Sequence[FilePrompt], settings: Settings, batch_size: int
) -> dict[str, Any]:
    """Everything that decides what the answers are."""
    folders = {"model": args.model, "adapter": args.adapter}
    return {
        "prompts": digest(given),
        **{name: None if folder is None else str(folder.resolve()) for name, folder in folders.items()},
        **{name: getattr(args, name) for name in ("dtype", "quantize", "dequantize")},
        "batch_size": batch_size,
        "max_new_tokens": settings.max_new_tokens,
        "stop_tokens": settings.stop_tokens,
        **asdict(settings.sampling),
    }


def _with_routing(args: argparse.Namespace) -> bool:
    changed = args.ablate or args.force or args.bias or args.router_bias
    return bool(args.capture or args.replay or changed)


def _refuse_routing(args: argparse.Namespace, mode: str) -> None:
    if _with_routing(args):
        raise UserError(f"{mode}: expected no flag that captures or changes the routing; these need --prompt")


def _shown(text: str) -> str:
    """The text as it is; on a terminal, without what a model could make the terminal do."""
    return printable(text) if sys.stdout.isatty() else text


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
