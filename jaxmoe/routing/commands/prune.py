"""Writes a model with the experts that a text needs most."""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
from typing import Any

from jaxmoe.cli.arguments import say, whole_number
from jaxmoe.errors import UserError
from jaxmoe.routing.commands.inputs import add_mesh, add_model, loaded, together
from jaxmoe.routing.commands.tables import write_csv
from jaxmoe.store.files import check_output_file, claimed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    from jaxmoe.routing.pruning import METHODS

    add_model(parser, adapter=False)
    add_mesh(parser)
    add = parser.add_argument
    add("--keep", type=whole_number, required=True, metavar="N", help="experts that stay in each MoE layer")
    method = (
        "what decides. reap: an expert's mean weight times the norm of its output, over the tokens that use it; "
        "frequency: how many tokens use it; effect: how far the layer's output moves without it (default: reap)"
    )
    add("--method", choices=METHODS, default="reap", help=method)
    add("--out", type=pathlib.Path, required=True, metavar="DIR", help="folder to write, new or empty")
    add("--table", type=pathlib.Path, metavar="FILE", help="also write each expert's saliency to this CSV file")


def run(arguments: argparse.Namespace) -> None:
    """Does what the flags say."""
    if arguments.table is not None:
        check_output_file(arguments.table)
    with together(arguments) as is_first, claimed(arguments.out) if is_first else contextlib.nullcontext():
        _check(arguments)
        found = _measured(arguments)
        if is_first:
            _write(arguments, *found)


def _write(
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
        write_csv(arguments.table, *measured)
        say(f"{arguments.table}: {len(measured[1])} experts")
    say(f"{arguments.out}: {arguments.keep} of {source.config.num_experts} experts in each of {len(kept)} MoE layers")


def _check(arguments: argparse.Namespace) -> None:
    """Refuses what can be refused before weights are read."""
    from jaxmoe.config import Qwen3MoeConfig
    from jaxmoe.model.opening import open_checkpoint
    from jaxmoe.routing.pruning import check_keep

    check_keep(Qwen3MoeConfig.from_pretrained(arguments.model), arguments.keep)
    source = open_checkpoint(arguments.model, dequantize=arguments.dequantize)[1]
    if source.quantization is not None:
        found = f"{source.quantization.form.upper()} (--dequantize decodes them)"
        raise UserError(f"{arguments.model}: expected weights in 16 or 32 bits, found {found}")


def _measured(arguments: argparse.Namespace) -> tuple[tuple[list[str], list[list[Any]]], Any, dict[str, bytes]]:
    """((header, one line per expert) of its saliency, the experts that stay, the files that tell of it)."""
    from jaxmoe.routing import pruning

    model, labels = loaded(arguments)
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
