"""`python -m jaxmoe.train`: trains a model."""

from __future__ import annotations

from jaxmoe.cli.arguments import run
from jaxmoe.train.loop import main

if __name__ == "__main__":
    run(main)
