"""A pytest plugin for the tests of other projects: patches transformers if asked to, and writes down what passed.

It is loaded by its file name, since those projects have a package `tests` of their own.
"""

from __future__ import annotations

import json
import os
import random
import sys
from typing import Any

import numpy as np
import torch
from peft.utils import constants

_outcomes: dict[str, str] = {}


def pytest_configure(config: Any) -> None:
    """Lets PEFT's defaults for Qwen3 hold for Qwen3-MoE; installs torch_ref's forwards if the environment says so."""
    for table in vars(constants).values():
        if isinstance(table, dict) and "qwen3" in table:
            table.setdefault("qwen3_moe", table["qwen3"])
    if os.environ["PEER_CLASSES"] == "patched":
        from torch_ref import FastQwen3MoeModel

        FastQwen3MoeModel.pre_patch()


def pytest_runtest_setup(item: Any) -> None:
    """Gives every test the same random numbers in both runs."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the tests draw from the global generator
    torch.manual_seed(0)
    for name in ("tests.test_modeling_common", "tests.generation.test_utils"):
        generator = getattr(sys.modules.get(name), "global_rng", None)
        if generator is not None:
            generator.seed(0)


def pytest_runtest_logreport(report: Any) -> None:
    """Keeps the outcome of a test: passed, failed or skipped; an error before or after it counts as failed."""
    if report.when == "call" or report.outcome != "passed":
        worst = _outcomes.get(report.nodeid) == "failed"
        _outcomes[report.nodeid] = "failed" if worst else report.outcome


def pytest_sessionfinish(session: Any) -> None:
    """Writes the outcomes."""
    with open(os.environ["PEER_OUTCOMES"], "w", encoding="utf-8") as file:
        json.dump(_outcomes, file, indent=1)
