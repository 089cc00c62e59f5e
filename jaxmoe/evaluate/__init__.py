"""Evaluation with EleutherAI's harness: `python -m jaxmoe.evaluate --help`."""
