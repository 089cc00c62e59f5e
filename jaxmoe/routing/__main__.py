"""The commands `python -m jaxmoe.routing ab | capture | compare | effects | import | prune | report`."""

from __future__ import annotations

from jaxmoe import stopping

if __name__ == "__main__":
    stopping.watch()  # before the other imports, which take seconds

import argparse
import contextlib
import csv
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from captures import Capture, tokenizer_digest
from captures.format import DEFAULT_KEEP_LOGITS
from jaxmoe.cli.arguments import ArgumentParser, program_name, run, say, whole_number
from jaxmoe.errors import UserError, counted, printable
from jaxmoe.out_of_memory import explained
from jaxmoe.store.files import check_output_file, claimed, output_file


def build_parser() -> ArgumentParser:
    """The commands and their flags."""
    parser = ArgumentParser(description="What the router does: capture it, compare it, change it, report it.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add, text in (
        ("capture", _capture_arguments, "run a model over a text and write the routing of every token"),
        ("compare", _compare_arguments, "compare two captures of one text, or the domains of one capture"),
        ("effects", _effects_arguments, "measure what removing or forcing each expert does to the loss and the output"),
        ("report", _report_arguments, "write an HTML page of figures about captures, each figure also as PNG and CSV"),
        ("import", _import_arguments, "make a capture of the experts that vLLM or SGLang returned, for train --replay"),
        ("prune", _prune_arguments, "write a model with the experts that a text needs most, in Hugging Face form"),
        ("ab", _ab_arguments, "train with two settings, once for each of several seeds, and compare the runs"),
    ):
        description = text[0].upper() + text[1:] + "."
        add(commands.add_parser(name, help=text, description=description, prog=f"{program_name()} {name}"))
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    """Reads the command and runs it: None when done, 128 + the signal's number when a signal ended it early."""
    arguments = build_parser().parse_args(argv)
    if arguments.command == "ab":  # its runs say for themselves what would fit into the memory
        return _ab(arguments)
    commands = {
        "capture": _capture,
        "compare": _compare,
        "effects": _effects,
        "import": _import,
        "prune": _prune,
        "report": _report,
    }
    for name in ("table", "out"):  # files, which are written after hours of work
        path = getattr(arguments, name, None)
        if path is not None and (name == "table" or arguments.command in ("compare", "effects")):
            check_output_file(path)
    with explained(lambda: "use a smaller --batch-size or --seq-length, or --quantize nf4"):
        return commands[arguments.command](arguments)


def _model_arguments(parser: argparse.ArgumentParser, adapter: bool = True) -> None:
    from jaxmoe.data import chat_flags

    add = parser.add_argument
    add("--model", type=pathlib.Path, required=True, metavar="DIR", help="HF folder or converted folder")
    if adapter:
        add("--adapter", type=pathlib.Path, metavar="DIR", help="PEFT folder or converted adapter")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    add("--quantize", choices=("nf4", "fp8"), help="hold projections, dense MLPs and experts in 4 or 8 bits")
    add("--dequantize", action="store_true", help="decode weights in FP8 or NF4 while they are read")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument(
        "--data",
        type=pathlib.Path,
        action="append",
        metavar="FILE",
        help="text or records (docs/data.md); may be repeated",
    )
    add("--split", metavar="NAME", help="part of a folder of datasets or of a data set of the hub (default: train)")
    text.add_argument("--text", type=pathlib.Path, metavar="DIR", help="the text of this capture, token by token")
    add("--seq-length", type=whole_number, default=1024, metavar="N", help="most tokens per context (default: 1024)")
    add("--max-tokens", type=whole_number, metavar="N", help="stop after the record that reaches this many tokens")
    add("--batch-size", type=whole_number, default=8, metavar="N", help="sequences per step (default: 8)")
    chat_flags.add_arguments(parser, "in conversations of --data")


def _mesh_arguments(parser: argparse.ArgumentParser) -> None:
    from jaxmoe.distributed import launch

    text = "GPUs that share model and text: auto, or axes such as expert=8 (default: one)"
    parser.add_argument("--mesh", metavar="MESH", help=text)
    launch.add_arguments(parser)


def _capture_arguments(parser: argparse.ArgumentParser) -> None:
    from jaxmoe.control.interventions import add_arguments

    _model_arguments(parser)
    _mesh_arguments(parser)
    add = parser.add_argument
    add("--out", type=pathlib.Path, required=True, metavar="DIR", help="folder to write, new or empty")
    kept = f"router logits kept per token, the largest ones (default: {DEFAULT_KEEP_LOGITS})"
    add("--top", type=whole_number, default=DEFAULT_KEEP_LOGITS, metavar="N", help=kept)
    add("--full-logits", action="store_true", help="keep the router logits of all experts")
    add("--no-predictions", action="store_true", help="leave out each token's loss and its predicted next token")
    add("--replay", type=pathlib.Path, metavar="DIR", help="use the experts in this capture of the same text")
    add_arguments(parser)


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    captures = "one capture (compares its domains) or two"
    parser.add_argument("captures", type=pathlib.Path, nargs="+", metavar="CAPTURE", help=captures)
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="also write the table to this CSV file")


def _effects_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser)
    _mesh_arguments(parser)
    action = "remove each expert or force it on every token (default: ablate)"
    parser.add_argument("--action", choices=("ablate", "force"), default="ablate", help=action)
    parser.add_argument("--layers", metavar="N,...", help="indices of layers (default: all with experts)")
    parser.add_argument("--experts", metavar="N,...", help="indices of experts (default: all)")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="also write the table to this CSV file")


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    captures = "the first is described; the others are compared with it"
    parser.add_argument("captures", type=pathlib.Path, nargs="+", metavar="CAPTURE", help=captures)
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--tokenizer", type=pathlib.Path, metavar="DIR", help="model folder; shows tokens as text")
    parser.add_argument("--effects", type=pathlib.Path, metavar="FILE", help="also show this CSV file of `effects`")


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    from jaxmoe.data import chat_flags

    add = parser.add_argument
    add("responses", type=pathlib.Path, metavar="FILE", help="the server's responses as JSON (docs/routing.md)")
    add("--model", type=pathlib.Path, required=True, metavar="DIR", help="folder of the model that the server ran")
    data = "records that training will read, one for each response, in their order; other token ids are refused"
    add("--data", type=pathlib.Path, action="append", metavar="FILE", help=data)
    add("--split", metavar="NAME", help="part of a folder of datasets or of a data set of the hub (default: train)")
    add("--seq-length", type=whole_number, default=1024, metavar="N", help="most tokens per context (default: 1024)")
    chat_flags.add_arguments(parser, "in conversations of --data")
    add("--out", type=pathlib.Path, required=True, metavar="DIR", help="folder to write, new or empty")


def _prune_arguments(parser: argparse.ArgumentParser) -> None:
    from jaxmoe.routing.pruning import METHODS

    _model_arguments(parser, adapter=False)
    _mesh_arguments(parser)
    add = parser.add_argument
    add("--keep", type=whole_number, required=True, metavar="N", help="experts that stay in each MoE layer")
    method = (
        "what decides. reap: an expert's mean weight times the norm of its output, over the tokens that use it; "
        "frequency: how many tokens use it; effect: how far the layer's output moves without it (default: reap)"
    )
    add("--method", choices=METHODS, default="reap", help=method)
    add("--out", type=pathlib.Path, required=True, metavar="DIR", help="folder to write, new or empty")
    add("--table", type=pathlib.Path, metavar="FILE", help="also write each expert's saliency to this CSV file")


def _ab_arguments(parser: argparse.ArgumentParser) -> None:
    settings = "settings of a training run, as for --config of jaxmoe.train; seed and output are not used"
    for name in ("a", "b"):
        parser.add_argument(name, type=pathlib.Path, metavar=f"{name.upper()}.toml", help=settings)
    seeds = "pairs of runs, with the seeds 0, 1, ... (default: 5)"
    parser.add_argument("--seeds", type=whole_number, default=5, metavar="N", help=seeds)
    folder = "folder for the runs, differences.csv and differences.html; the same command continues there"
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help=folder)


def _loaded(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(model, labelled text) that the flags name."""
    from jaxmoe.cli.progress import reading_weights
    from jaxmoe.config import Qwen3MoeConfig
    from jaxmoe.data.chat import AS_WRITTEN, load_tokenizer
    from jaxmoe.data.chat_flags import chat_settings, notices
    from jaxmoe.distributed import launch
    from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM
    from jaxmoe.model.mesh_flag import Inputs, inference_mesh
    from jaxmoe.model.opening import open_checkpoint
    from jaxmoe.routing.text import read_text

    _check_at_least_1(arguments, "seq_length", "batch_size", "max_tokens")
    config = Qwen3MoeConfig.from_pretrained(arguments.model)  # before anything else in the folder is read
    if arguments.seq_length > config.max_position_embeddings:
        raise UserError(
            f"seq-length: expected at most the model's max_position_embeddings {config.max_position_embeddings}, "
            f"found {arguments.seq_length}"
        )
    opened = partial(open_checkpoint, arguments.model, arguments.dtype, arguments.quantize, arguments.dequantize)
    shape, about_mesh = inference_mesh(
        arguments.mesh, config, opened, Inputs(arguments.batch_size, arguments.seq_length)
    )
    shape.check_batch(arguments.batch_size)
    shape.check_length(arguments.seq_length)
    tokenizer = load_tokenizer(arguments.model)
    settings = chat_settings(tokenizer, arguments.system, arguments.thinking, arguments.template_arg)
    if arguments.text is not None:
        if settings != AS_WRITTEN:
            raise UserError("system, no-thinking and template-arg: only valid with data, found text")
        if arguments.split is not None:
            raise UserError("split: only valid with data, found text")
        labels = Capture.open(arguments.text).labelled_text()
        if labels.tokenizer != tokenizer_digest(tokenizer):
            raise UserError(f"{arguments.text}: expected a text made with the model's tokenizer, found another")
    else:
        labels = read_text(
            arguments.data,
            tokenizer,
            config.vocab_size,
            arguments.seq_length,
            arguments.max_tokens,
            settings,
            split=arguments.split,
        )
    for line in [*about_mesh, *notices(settings, tokenizer)] if launch.this().is_first else ():
        print(line, file=sys.stderr)
    with reading_weights() as on_layer:
        model = Qwen3MoeForCausalLM.from_pretrained(
            arguments.model,
            arguments.dtype,
            arguments.quantize,
            getattr(arguments, "adapter", None),
            on_layer,
            arguments.dequantize,
            shape,
        )
    if not model.config.sparse_layers:
        raise UserError(f"{arguments.model}: expected a model with mixture-of-experts layers, found none")
    return model, labels


def _check_at_least_1(arguments: argparse.Namespace, *names: str) -> None:
    for name in names:
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"{name.replace('_', '-')}: expected at least 1, found {value}")


@contextlib.contextmanager
def _together(arguments: argparse.Namespace) -> Iterator[bool]:
    """Joins the other processes of the command, if there are any; yields whether this one writes and prints."""
    from jaxmoe.cli import progress
    from jaxmoe.distributed import ending, launch
    from jaxmoe.distributed.agreement import check_same_command

    process = launch.start(arguments)
    with ending.together(), progress.shown(process.is_first):
        check_same_command(vars(arguments))
        yield process.is_first


def _capture(arguments: argparse.Namespace) -> None:
    with _together(arguments) as is_first, claimed(arguments.out) if is_first else contextlib.nullcontext():
        _capture_claimed(arguments)


def _capture_claimed(arguments: argparse.Namespace) -> None:
    from jaxmoe.control.interventions import intervention
    from jaxmoe.routing.capture import capture

    model, labels = _loaded(arguments)
    changes = intervention(arguments, model.config)
    started = time.perf_counter()
    found = capture(
        model,
        labels,
        arguments.out,
        batch_size=arguments.batch_size,
        keep_logits=model.config.num_experts if arguments.full_logits else arguments.top,
        predictions=not arguments.no_predictions,
        control=changes.control(model.config),
        replay=Capture.open(arguments.replay) if arguments.replay else None,
        description=changes.describe(),
        source={"model": str(arguments.model), "adapter": str(arguments.adapter) if arguments.adapter else None},
    )
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in found.folder.iterdir())
    say(
        f"{arguments.out}: {counted(found.tokens, 'token')}, {counted(len(found.text['domains']), 'domain')}, "
        f"{counted(len(found.model.layers), 'MoE layer')}, {size / 1e6:,.1f} MB in {seconds:.1f} s"
    )


def _compare(arguments: argparse.Namespace) -> None:
    from jaxmoe.routing.compare import compare, compare_domains

    captures = [Capture.open(folder) for folder in arguments.captures]
    if len(captures) > 2:
        raise UserError(f"compare: expected one capture or two, found {len(captures)}")
    if len(captures) == 1:
        drifts = compare_domains(captures[0])
        header = "layer first second divergence low high floor correlation expert share_first share_second".split()
        body: list[list[Any]] = [[*drift[:3], *drift.divergence, *drift[4:]] for drift in drifts]
        say(f"{captures[0].folder}: {captures[0].tokens:,} tokens; how far the domains' expert loads differ, in nats")
    else:
        found = compare(*captures)
        header, body = found.table()
        any_layer = found.flipped_tokens
        say(f"{found.a.folder} against {found.b.folder}: {found.tokens:,} tokens")
        say(
            f"{any_layer.value:.3%} of tokens [{any_layer.low:.3%}, {any_layer.high:.3%}] use different experts "
            "in at least one layer"
        )
        say(
            f"mean over layers: flips {found.pooled('flip_rate'):.4%}, overlap {found.pooled('overlap'):.4%}, "
            f"divergence {found.pooled('divergence'):.3g} nats"
        )
        if found.loss_change is not None:
            change = found.loss_change
            say(f"loss {found.loss_a:.4f} nats, change {change.value:+.5f} [{change.low:+.5f}, {change.high:+.5f}]")
        if len(found.first_margins):
            say(
                f"margin (in probability) of a token's first flip: median {_median(found.first_margins):.2g}, "
                f"largest {found.first_margins.max():.2g}"
            )
    _print_table(header, body)
    if arguments.out is not None:
        _write_csv(arguments.out, header, body)


def _effects(arguments: argparse.Namespace) -> None:
    with _together(arguments) as is_first:
        _measure_effects(arguments, is_first)


def _measure_effects(arguments: argparse.Namespace, is_first: bool) -> None:
    from jaxmoe.routing.effects import effects, write_effects

    model, labels = _loaded(arguments)
    layers = _numbers("layers", arguments.layers, model.config.sparse_layers)
    experts = _numbers("experts", arguments.experts, range(model.config.num_experts))
    found = effects(
        model,
        labels,
        action=arguments.action,
        experts=[(layer, expert) for layer in layers for expert in experts],
        batch_size=arguments.batch_size,
    )
    worst = sorted(found, key=lambda effect: -effect.change)
    _print_table(list(worst[0]._fields), [list(effect) for effect in worst[:20]])
    if arguments.out is not None and is_first:
        write_effects(found, arguments.out)
        say(f"{arguments.out}: {len(found)} experts")


def _ab(arguments: argparse.Namespace) -> int | None:
    from jaxmoe.cli.arguments import flag_kinds
    from jaxmoe.cli.config_file import read_settings
    from jaxmoe.runs.paired import HEADER, PAGE_FILE
    from jaxmoe.train.paired import run_pairs
    from jaxmoe.train.settings import TrainConfig

    if arguments.seeds < 1:
        raise UserError(f"seeds: expected at least 1, found {arguments.seeds}")
    sides = {name: read_settings(getattr(arguments, name.lower()), flag_kinds(TrainConfig)) for name in "AB"}
    found, stopped_by = run_pairs(sides, arguments.seeds, arguments.out)
    if found:
        _print_table(HEADER, [list(difference) for difference in found])
        say(f"wrote {arguments.out / PAGE_FILE}: {found[0].pairs} of {arguments.seeds} pairs")
    if stopped_by is None:
        return None
    print("stopped: the same command continues from here", file=sys.stderr)
    return 128 + stopped_by


def _report(arguments: argparse.Namespace) -> None:
    from jaxmoe.routing.report import write_report

    tokenizer = None
    if arguments.tokenizer is not None:
        from jaxmoe.data.chat import load_tokenizer

        tokenizer = load_tokenizer(arguments.tokenizer)
    captures = [Capture.open(folder) for folder in arguments.captures]
    figures = write_report(captures, arguments.out, tokenizer=tokenizer, effects=arguments.effects)
    say(f"{arguments.out}/index.html: {figures} figures, each also as PNG and CSV")


def _import(arguments: argparse.Namespace) -> None:
    from jaxmoe.config import Qwen3MoeConfig
    from jaxmoe.data.chat import AS_WRITTEN, load_tokenizer
    from jaxmoe.data.chat_flags import chat_settings
    from jaxmoe.routing.imported import import_experts
    from jaxmoe.routing.text import read_text

    _check_at_least_1(arguments, "seq_length")
    config, tokenizer = Qwen3MoeConfig.from_pretrained(arguments.model), load_tokenizer(arguments.model)
    if not config.sparse_layers:
        raise UserError(f"{arguments.model}: expected a model with mixture-of-experts layers, found none")
    text, settings = None, chat_settings(tokenizer, arguments.system, arguments.thinking, arguments.template_arg)
    if arguments.data is None and (settings != AS_WRITTEN or arguments.split is not None):
        raise UserError("system, no-thinking, template-arg and split: only valid with data, found none")
    if arguments.data is not None:
        size, length = config.vocab_size, arguments.seq_length
        text = read_text(arguments.data, tokenizer, size, length, settings=settings, split=arguments.split)
    found = import_experts(arguments.responses, arguments.out, config, tokenizer_digest(tokenizer), text)
    sequences = len(found.read_text().contexts())
    say(f"{arguments.out}: {counted(found.tokens, 'token')} of {counted(sequences, 'sequence')}")


def _prune(arguments: argparse.Namespace) -> None:
    with _together(arguments) as is_first, claimed(arguments.out) if is_first else contextlib.nullcontext():
        _check_prune(arguments)
        pruning = _pruning(arguments)
        if is_first:
            _write_pruned(arguments, *pruning)


def _write_pruned(
    arguments: argparse.Namespace,
    measured: tuple[list[str], list[list[Any]]],
    kept: Any,
    files: dict[str, bytes],
) -> None:
    from convert.pruned import write_pruned
    from jaxmoe.model.opening import open_checkpoint

    # Only the measurement may be in 4 bits or another dtype: what stays keeps the checkpoint's own bytes.
    source = open_checkpoint(arguments.model, dequantize=arguments.dequantize)[1]
    write_pruned(arguments.out, source, kept, files)
    if arguments.table is not None:
        _write_csv(arguments.table, *measured)
        say(f"{arguments.table}: {len(measured[1])} experts")
    say(f"{arguments.out}: {arguments.keep} of {source.config.num_experts} experts in each of {len(kept)} MoE layers")


def _check_prune(arguments: argparse.Namespace) -> None:
    """Refuses what can be refused before weights are read."""
    from jaxmoe.config import Qwen3MoeConfig
    from jaxmoe.model.opening import open_checkpoint
    from jaxmoe.routing.pruning import check_keep

    check_keep(Qwen3MoeConfig.from_pretrained(arguments.model), arguments.keep)
    source = open_checkpoint(arguments.model, dequantize=arguments.dequantize)[1]
    if source.quantization is not None:
        found = f"{source.quantization.form.upper()} (--dequantize decodes them)"
        raise UserError(f"{arguments.model}: expected weights in 16 or 32 bits, found {found}")


def _pruning(arguments: argparse.Namespace) -> tuple[tuple[list[str], list[list[Any]]], Any, dict[str, bytes]]:
    """((header, one line per expert) of its saliency, the experts that stay, the files that tell of it)."""
    from jaxmoe.routing import pruning

    model, labels = _loaded(arguments)
    config = model.config
    found = pruning.measure(model, labels, batch_size=arguments.batch_size)
    kept = pruning.kept_experts(config, found.scores(arguments.method), arguments.keep)
    header = ["layer", "expert", *pruning.METHODS, "kept"]
    scores = [found.scores(method) for method in pruning.METHODS]
    lines = [
        [layer, expert, *(float(score[slot, expert]) for score in scores), int(expert in kept[layer])]
        for slot, layer in enumerate(config.sparse_layers)
        for expert in range(config.num_experts)
    ]
    about = pruning.record(config, kept, labels, arguments.method, arguments.model.resolve().name)
    files = {
        "pruning.json": (json.dumps(about, indent=1) + "\n").encode(),
        "README.md": pruning.card(about).encode(),
    }
    return (header, lines), kept, files


def _numbers(name: str, text: str | None, known: Sequence[int]) -> list[int]:
    if text is None:
        return list(known)
    try:
        found = [int(item) for item in text.split(",")]
    except ValueError:
        raise UserError(f"{name}: expected numbers separated by commas, found {text!r}") from None
    if wrong := [number for number in found if number not in known]:
        raise UserError(f"{name}: expected numbers among {_ranges(known)}, found {wrong[0]}")
    return found


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in words: 0 to 3, 5, 7 to 9."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts)


def _print_table(header: Sequence[str], body: Sequence[Sequence[Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=box.SIMPLE_HEAD)
    for line in body:
        texts = (f"{value:.4g}" if isinstance(value, float) else printable(str(value)) for value in line)
        table.add_row(*map(Text, texts))  # a plain string would be read as rich's markup
    console = Console()
    # A wide table is not cut to the terminal's width, and a pipe has no width.
    Console(width=max(console.width, 20 * len(header))).print(table)


def _write_csv(path: pathlib.Path, header: Sequence[str], body: Sequence[Sequence[Any]]) -> None:
    with output_file(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *body])


def _median(values: Any) -> float:
    import numpy as np

    return float(np.median(values))


if __name__ == "__main__":
    run(main)
