"""`python -m jaxmoe.generate`: generates text."""

from __future__ import annotations

from jaxmoe.cli.arguments import run
from jaxmoe.generate.engine import main

if __name__ == "__main__":
    run(main)
