"""The commands by name, and the entry points of the console scripts `jaxmoe-NAME`; that of `jaxmoe` is in
`jaxmoe.cli.umbrella`.

They do the same as `python -m jaxmoe.train`, `python -m convert` and so on, and also work in a folder that holds a
module of the same name. A command's modules are imported when it runs.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from jaxmoe import stopping


class Command(NamedTuple):
    """The module with `main(argv)` and `build_parser()`, and what the command does."""

    module: str
    text: str

    def load(self) -> Any:
        """The module."""
        return importlib.import_module(self.module)


COMMANDS = {
    "train": Command("jaxmoe.train.__main__", "fine-tune a model, or train one from random weights"),
    "generate": Command("jaxmoe.generate.__main__", "continue prompts"),
    "convert": Command("convert.__main__", "convert checkpoints and adapters between HF or PEFT and JAX"),
    "evaluate": Command("jaxmoe.evaluate.__main__", "score a model with EleutherAI's evaluation harness"),
    "routing": Command("jaxmoe.routing.__main__", "capture, compare, change and report what the router does"),
    "data": Command("jaxmoe.data.__main__", "show data as a model sees it"),
    "runs": Command("jaxmoe.runs.__main__", "list training runs, compare them, draw their pages"),
    "doctor": Command("jaxmoe.doctor.__main__", "show this machine, the implementations, and what fits"),
}


def train() -> None:
    """`jaxmoe-train`: see `jaxmoe.train`."""
    _start("train")


def generate() -> None:
    """`jaxmoe-generate`: see `jaxmoe.generate`."""
    _start("generate")


def convert() -> None:
    """`jaxmoe-convert`: see `convert`."""
    _start("convert")


def doctor() -> None:
    """`jaxmoe-doctor`: see `jaxmoe.doctor`."""
    _start("doctor")


def routing() -> None:
    """`jaxmoe-routing`: see `jaxmoe.routing`."""
    _start("routing")


def _start(name: str) -> None:
    stopping.watch()
    from jaxmoe.cli.arguments import run

    run(COMMANDS[name].load().main)
