"""What all trials share: the command line, parallel processes, the table of results, the exit code.

A trial breaks something on purpose and sees what the product does: it refuses, it accepts, or it is wrong. What a
trial does depends only on its number and the seed, so that any trial can be repeated alone with `--only`.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import multiprocessing
import pathlib
import random
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

OUTCOMES = ("refused", "accepted", "wrong")


class Outcome(NamedTuple):
    """What the product did: refused the broken thing, accepted it rightly, or was wrong. `text` says how."""

    verdict: Literal["refused", "accepted", "wrong"]
    kind: str  # what was tried; the table has a line for each kind
    text: str = ""


# (folder of this trial, what was prepared for all, the trial's number, its own random numbers) -> outcome
Trial = Callable[[pathlib.Path, pathlib.Path, int, random.Random], Outcome]


def run_trials(
    trial: Trial,
    prepare: Callable[[pathlib.Path], object],
    *,
    description: str,
    number: int,
    argv: Sequence[str] | None = None,
) -> int:
    """Runs trials in several processes and prints tried, refused, accepted and wrong; returns 1 if any was wrong.

    Args:
        trial: a function of a module, since other processes import it. An exception counts as wrong.
        prepare: called once, with an empty folder; it makes what all trials only read.
        description: what the command says about itself.
        number: how many trials are run by default.
        argv: the command line; by default the process's own.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--number", type=int, default=number, metavar="N", help=f"trials (default: {number})")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all random choices (default: 0)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument("--only", type=int, metavar="I", help="run only the trial with this number")
    arguments = parser.parse_args(argv)
    numbers = range(arguments.number) if arguments.only is None else [arguments.only]
    started = time.monotonic()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="trials-") as folder:
        shared = pathlib.Path(folder) / "shared"
        shared.mkdir()
        prepare(shared)
        tasks = [(trial, shared, index, arguments.seed) for index in numbers]
        if arguments.jobs == 1:
            _collect(map(_one, tasks), outcomes, numbers)
        else:
            # Not forked: JAX has threads, which a fork would lose.
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(arguments.jobs, context) as pool:
                _collect(pool.map(_one, tasks), outcomes, numbers)
    _print_table(outcomes)
    wrong = sum(outcome.verdict == "wrong" for outcome in outcomes)
    print(f"seed {arguments.seed}, {time.monotonic() - started:.0f} s: {'FAILED' if wrong else 'passed'}")
    return 1 if wrong else 0


def _one(task: tuple[Trial, pathlib.Path, int, int]) -> Outcome:
    trial, shared, index, seed = task
    with tempfile.TemporaryDirectory(prefix=f"trial-{index}-", dir=shared.parent, ignore_cleanup_errors=True) as own:
        try:
            return trial(pathlib.Path(own), shared, index, random.Random(f"{seed} {index}"))
        except Exception:
            return Outcome("wrong", "exception", traceback.format_exc())


def _collect(found: Iterable[Outcome], outcomes: list[Outcome], numbers: Sequence[int]) -> None:
    for index, outcome in zip(numbers, found, strict=True):
        outcomes.append(outcome)
        if outcome.verdict == "wrong":
            print(f"trial {index}: WRONG: {outcome.kind}: {outcome.text}", flush=True)


def _print_table(outcomes: Sequence[Outcome]) -> None:
    kinds = sorted({outcome.kind for outcome in outcomes})
    counts = collections.Counter((outcome.kind, outcome.verdict) for outcome in outcomes)
    width = max(map(len, [*kinds, "all"]))
    print(f"{'':<{width}}  {'tried':>8}" + "".join(f"  {name:>8}" for name in OUTCOMES))
    for line, members in [*((kind, [kind]) for kind in kinds), ("all", kinds)]:
        found = [sum(counts[kind, verdict] for kind in members) for verdict in OUTCOMES]
        print(f"{line:<{width}}  {sum(found):>8}" + "".join(f"  {count:>8}" for count in found))
