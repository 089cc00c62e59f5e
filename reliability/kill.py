"""Kills at random moments: `python -m reliability.kill --number 100 --seed 0 --jobs 4`.

Each trial starts a command that writes, sends kill -9, SIGTERM or SIGINT after a random time, and checks what is left.
Then it runs the command again (training with --resume), whose result must have the bits of an undisturbed run. The
killed command compiles its programs; the next one takes them from the cache. SIGNALS=INT,TERM in the environment
chooses the signals.
"""

from __future__ import annotations

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

from reliability.commands import ROOT, command, environment, prepare, prepared, result, run, stray
from reliability.trials import Outcome, run_trials

_START = 0.15  # seconds: before, the interpreter itself starts
_LIMIT = 300.0


def trial(own: pathlib.Path, shared: pathlib.Path, index: int, rng: random.Random) -> Outcome:
    """Kills one command, runs it again, compares."""
    kinds = prepared(shared)
    kind = kinds[index % len(kinds)]
    number = rng.choice(_signals())
    name, output = f"{kind}, {number.name}", own / "out"
    moment = _moment(rng, kind, shared)
    code, stderr, finished = _killed(kind, shared, own, number, moment)
    while finished and abs(moment) > _START:  # it ended before: again, and earlier
        shutil.rmtree(output)
        shutil.rmtree(own / "cache", ignore_errors=True)
        moment *= 0.6
        code, stderr, finished = _killed(kind, shared, own, number, moment)
    if not finished and number != signal.SIGKILL:
        if code != 128 + number or len(stderr.splitlines()) != 1:
            return Outcome("wrong", name, f"exit code {code}, expected {128 + number}: {stderr}")
        if stray(own):
            return Outcome("wrong", name, f"left behind: {stray(own)}")
    if not (finished or (output.exists() and kind != "train")):
        more = ["--resume"] if output.exists() else []
        done = run(kind, shared, output, *more)
        if done.returncode:
            return Outcome("wrong", name, f"the next run: exit code {done.returncode}: {done.stderr}")
        if stray(own):
            return Outcome("wrong", name, f"left behind by the next run: {stray(own)}")
    if result(kind, output) != result(kind, shared / kind):
        return Outcome("wrong", name, "other bits than an undisturbed run")
    return Outcome("accepted" if finished else "refused", name)


def _signals() -> list[signal.Signals]:
    return [signal.Signals[f"SIG{name}"] for name in (os.environ.get("SIGNALS") or "KILL,TERM,INT").split(",")]


def _moment(rng: random.Random, kind: str, shared: pathlib.Path) -> float:
    """Seconds after which to kill: any time in the command's life. Half of the time for training they count from its
    first checkpoint, and are negative."""
    if kind == "train" and rng.random() < 0.5:
        return -rng.uniform(0.0, 1.0)
    return rng.uniform(_START, float((shared / f"seconds-{kind}").read_text()))


def _killed(
    kind: str, shared: pathlib.Path, own: pathlib.Path, number: signal.Signals, moment: float
) -> tuple[int, str, bool]:
    """(exit code, standard error, whether the command had ended before) of the command that writes `own`/out.

    A negative moment counts from the first checkpoint.
    """
    output = own / "out"
    process = subprocess.Popen(
        command(kind, shared, output),
        cwd=ROOT,
        env=environment(shared) | {"JAX_COMPILATION_CACHE_DIR": str(own / "cache")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    begun = time.monotonic()
    while moment < 0 and process.poll() is None and time.monotonic() - begun < _LIMIT:
        if (output / "checkpoints").exists() and any((output / "checkpoints").iterdir()):
            break
        time.sleep(0.002)
    try:
        process.wait(abs(moment))
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    _, stderr = process.communicate(timeout=_LIMIT)
    return process.returncode, stderr, process.returncode == 0


if __name__ == "__main__":
    sys.exit(run_trials(trial, prepare, description=str(__doc__), number=100))
