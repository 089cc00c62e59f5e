"""The commands `python -m jaxmoe.routing ab | capture | compare | effects | import | prune | report`."""

from __future__ import annotations

from jaxmoe import stopping

if __name__ == "__main__":
    stopping.watch()  # before the other imports, which take seconds

from collections.abc import Sequence

from jaxmoe.cli.arguments import ArgumentParser, program_name, run
from jaxmoe.cli.notices import shown_notices
from jaxmoe.out_of_memory import explained
from jaxmoe.routing.commands import ab, capture, compare, effects, importing, prune, report

# name -> the command, and what it does
COMMANDS = {
    "capture": (capture, "run a model over a text and write the routing of every token"),
    "compare": (compare, "compare two captures of one text, or the domains of one capture"),
    "effects": (effects, "measure what removing or forcing each expert does to the loss and the output"),
    "report": (report, "write an HTML page of figures about captures, each figure also as PNG and CSV"),
    "import": (importing, "make a capture of the experts that vLLM or SGLang returned, for train --replay"),
    "prune": (prune, "write a model with the experts that a text needs most, in Hugging Face form"),
    "ab": (ab, "train with two settings, once for each of several seeds, and compare the runs"),
}


def build_parser() -> ArgumentParser:
    """The commands and their flags."""
    parser = ArgumentParser(description="What the router does: capture it, compare it, change it, report it.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (command, text) in COMMANDS.items():
        description = text[0].upper() + text[1:] + "."
        command.add_arguments(
            commands.add_parser(name, help=text, description=description, prog=f"{program_name()} {name}")
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    """Reads the command and runs it: None when done, 128 + the signal's number when a signal ended it early."""
    arguments = build_parser().parse_args(argv)
    command, _ = COMMANDS[arguments.command]
    if command is ab:  # its runs show their notices, and say for themselves what would fit into the memory
        return ab.run(arguments)
    with (
        shown_notices(on_stderr=True),
        explained(lambda: "use a smaller --batch-size or --seq-length, or --quantize nf4"),
    ):
        return command.run(arguments)


if __name__ == "__main__":
    run(main)
