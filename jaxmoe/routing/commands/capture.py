"""Runs a model over a text and writes the routing of every token."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import time

from captures import Capture
from captures.format import DEFAULT_KEEP_LOGITS
from jaxmoe.cli.arguments import say, whole_number
from jaxmoe.errors import counted
from jaxmoe.routing.commands.inputs import add_mesh, add_model, loaded, together
from jaxmoe.store.files import claimed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    from jaxmoe.control.interventions import add_arguments

    add_model(parser)
    add_mesh(parser)
    add = parser.add_argument
    add("--out", type=pathlib.Path, required=True, metavar="DIR", help="folder to write, new or empty")
    kept = f"router logits kept per token, the largest ones (default: {DEFAULT_KEEP_LOGITS})"
    add("--top", type=whole_number, default=DEFAULT_KEEP_LOGITS, metavar="N", help=kept)
    add("--full-logits", action="store_true", help="keep the router logits of all experts")
    add("--no-predictions", action="store_true", help="leave out each token's loss and its predicted next token")
    add("--replay", type=pathlib.Path, metavar="DIR", help="use the experts in this capture of the same text")
    add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Does what the flags say."""
    with together(arguments) as is_first, claimed(arguments.out) if is_first else contextlib.nullcontext():
        _capture(arguments)


def _capture(arguments: argparse.Namespace) -> None:
    from jaxmoe.control.interventions import intervention
    from jaxmoe.routing.capture import capture

    model, labels = loaded(arguments)
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
