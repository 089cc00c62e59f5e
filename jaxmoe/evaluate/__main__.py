"""Evaluation with EleutherAI's harness: `python -m jaxmoe.evaluate --model jaxmoe --model_args pretrained=DIR ...`.

The harness finds models only in a table of its own. So this command registers the model `jaxmoe` and hands everything
to the harness's own command, `lm_eval`, whose flags and models it therefore has.
"""

from __future__ import annotations

from jaxmoe import stopping

if __name__ == "__main__":
    stopping.watch()  # before the other imports, which take seconds

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Sequence

from jaxmoe.cli import xla
from jaxmoe.cli.arguments import ArgumentParser, program_name, run
from jaxmoe.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """The harness's flags, for the completion of shells; none where it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        return ArgumentParser()
    from lm_eval._cli import HarnessCLI  # pyright: ignore[reportMissingImports] - an extra

    return HarnessCLI()._parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the harness's command with the model `jaxmoe` registered."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm_eval: not installed; pip install 'jaxmoe[eval]'")
    xla.configure()
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports] - an extra

    import jaxmoe.evaluate.harness  # noqa: F401 - registers the model

    # The harness forks to format tables and to estimate errors; what it forks never calls JAX.
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called")
    # The harness's parser reads sys.argv alone.
    before = sys.argv
    sys.argv = [program_name(), *(before[1:] if argv is None else argv)]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


if __name__ == "__main__":
    run(main)
