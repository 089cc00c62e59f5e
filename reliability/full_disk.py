"""Full disks: `python -m reliability.full_disk --number 84 --seed 0 --jobs 4`.

Each trial runs a command whose disk is full from some write on: a small library that is loaded before the C library
(`full_disk.c`, built with the system's compiler) lets that write and all later ones fail with "No space left on
device". The command must end with one line that names the file, exit code 2 and no half-written output.
"""

from __future__ import annotations

import pathlib
import random
import shutil
import subprocess
import sys

from reliability import commands
from reliability.trials import Outcome, run_trials

_SOURCE = pathlib.Path(__file__).with_name("full_disk.c")


def prepare(shared: pathlib.Path) -> None:
    """Makes what all commands read, the library, and the number of writes of each command."""
    if reason := unsupported():
        raise SystemExit(f"full_disk: {reason}")
    build(shared)
    commands.prepare(shared)
    for kind in commands.KINDS:
        target = shared / f"counted-{kind}" / "out"
        counts = shared / f"count-{kind}"
        _run(kind, shared, target, {"COUNT_IN": str(counts)})


def unsupported() -> str | None:
    """Why disks cannot be filled here, or None."""
    able = sys.platform == "linux" and shutil.which("cc") is not None
    return None if able else "needs Linux and a C compiler named cc"


def build(shared: pathlib.Path) -> None:
    """Compiles the library."""
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", shared / "full.so", _SOURCE, "-ldl"]
    subprocess.run(command, check=True, capture_output=True)


def _run(
    kind: str, shared: pathlib.Path, output: pathlib.Path, more: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    output.parent.mkdir(exist_ok=True)
    settings = {"LD_PRELOAD": str(shared / "full.so"), "FAIL_IN": str(output.parent)}
    return commands.run(kind, shared, output, settings=settings | more)


def trial(own: pathlib.Path, shared: pathlib.Path, index: int, rng: random.Random) -> Outcome:
    """Runs one command on a disk that is full from one of its writes on."""
    kinds = commands.prepared(shared)
    kind = kinds[index % len(kinds)]
    writes = (shared / f"count-{kind}").stat().st_size
    fails = rng.randint(1, writes)
    output = own / "disk" / "out"
    done = _run(kind, shared, output, {"FAIL_FROM": str(fails)})
    text = f"write {fails} of {writes}: exit code {done.returncode}: {done.stderr}"
    if commands.stray(own):
        return Outcome("wrong", kind, f"{text}left behind: {commands.stray(own)}")
    if done.returncode == 0:  # the failing write was not needed: the name of a lock's owner, for example
        same = commands.result(kind, output) == commands.result(kind, shared / kind)
        return Outcome("accepted" if same else "wrong", kind, text)
    lines = done.stderr.splitlines()
    named = len(lines) == 1 and str(output) in lines[0] and "No space left on device" in lines[0]
    if done.returncode != 2 or not named:
        return Outcome("wrong", kind, text)
    if kind != "train" and output.exists():
        return Outcome("wrong", kind, f"{text}half-written: {sorted(output.rglob('*'))[:3]}")
    if kind == "train":
        resume = ["--resume"] if output.exists() else []
        again = commands.run(kind, shared, output, *resume)
        if again.returncode or commands.result(kind, output) != commands.result(kind, shared / kind):
            return Outcome("wrong", kind, f"{text}then, with room: {again.stderr}")
    return Outcome("refused", kind)


if __name__ == "__main__":
    sys.exit(run_trials(trial, prepare, description=str(__doc__), number=84))
