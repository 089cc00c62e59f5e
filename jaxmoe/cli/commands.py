"""Entry points of the console scripts: `jaxmoe-train`, `-generate`, `-convert`, `-doctor` and `-routing`.

They do the same as `python -m jaxmoe.train`, `python -m convert` and so on, and also work in a folder that holds a
module of the same name.
"""

from __future__ import annotations

from jaxmoe import stopping


def train() -> None:
    """`jaxmoe-train`: see `jaxmoe.train`."""
    stopping.watch()
    from jaxmoe.cli.arguments import run
    from jaxmoe.train.__main__ import main

    run(main)


def generate() -> None:
    """`jaxmoe-generate`: see `jaxmoe.generate`."""
    stopping.watch()
    from jaxmoe.cli.arguments import run
    from jaxmoe.generate.__main__ import main

    run(main)


def convert() -> None:
    """`jaxmoe-convert`: see `convert`."""
    stopping.watch()
    from convert.__main__ import main
    from jaxmoe.cli.arguments import run

    run(main)


def doctor() -> None:
    """`jaxmoe-doctor`: see `jaxmoe.doctor`."""
    stopping.watch()
    from jaxmoe.cli.arguments import run
    from jaxmoe.doctor.__main__ import main

    run(main)


def routing() -> None:
    """`jaxmoe-routing`: see `jaxmoe.routing`."""
    stopping.watch()
    from jaxmoe.cli.arguments import run
    from jaxmoe.routing.__main__ import main

    run(main)
