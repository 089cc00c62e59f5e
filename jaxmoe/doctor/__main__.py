"""`python -m jaxmoe.doctor`: prints the report."""

from __future__ import annotations

from jaxmoe.cli.arguments import run
from jaxmoe.doctor.report import main

if __name__ == "__main__":
    run(main)
