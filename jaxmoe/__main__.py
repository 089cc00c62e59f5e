"""`python -m jaxmoe`: the command `jaxmoe` where its console script is not on the path."""

from __future__ import annotations

from jaxmoe.cli import umbrella

if __name__ == "__main__":
    umbrella.start()
