"""Measures what removing or forcing each expert does to the loss and the output."""

from __future__ import annotations

import argparse
import pathlib

from jaxmoe.cli.arguments import say
from jaxmoe.routing.commands.inputs import add_mesh, add_model, loaded, together
from jaxmoe.routing.commands.tables import numbers, print_table
from jaxmoe.store.files import check_output_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add_model(parser)
    add_mesh(parser)
    action = "remove each expert or force it on every token (default: ablate)"
    parser.add_argument("--action", choices=("ablate", "force"), default="ablate", help=action)
    parser.add_argument("--layers", metavar="N,...", help="indices of layers (default: all with experts)")
    parser.add_argument("--experts", metavar="N,...", help="indices of experts (default: all)")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="also write the table to this CSV file")


def run(arguments: argparse.Namespace) -> None:
    """Does what the flags say."""
    if arguments.out is not None:
        check_output_file(arguments.out)
    with together(arguments) as is_first:
        _measure(arguments, is_first)


def _measure(arguments: argparse.Namespace, is_first: bool) -> None:
    from jaxmoe.routing.effects import effects, write_effects

    model, labels = loaded(arguments)
    layers = numbers("layers", arguments.layers, model.config.sparse_layers)
    experts = numbers("experts", arguments.experts, range(model.config.num_experts))
    found = effects(
        model,
        labels,
        action=arguments.action,
        experts=[(layer, expert) for layer in layers for expert in experts],
        batch_size=arguments.batch_size,
    )
    worst = sorted(found, key=lambda effect: -effect.change)
    print_table(list(worst[0]._fields), [list(effect) for effect in worst[:20]])
    if arguments.out is not None and is_first:
        write_effects(found, arguments.out)
        say(f"{arguments.out}: {len(found)} experts")
