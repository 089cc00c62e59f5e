"""The commands that write, on a tiny model, as other processes: for trials that kill them or fill their disk."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping
from types import MappingProxyType

from jaxmoe.store.lock import SUFFIX
from peers.make_checkpoint import TINY, make_checkpoint

ROOT = pathlib.Path(__file__).resolve().parent.parent
KINDS = ("train", "hf2jax", "jax2hf", "capture", "report", "generate", "torch-capture")


def prepare(shared: pathlib.Path) -> None:
    """Makes what all commands read, the undisturbed result of each, and the cache of compiled programs."""
    make_checkpoint(shared / "hf", TINY.replace(num_hidden_layers=2, router_aux_loss_coef=0.01))
    records = (json.dumps({"prompt": f"{i} + 1 = ", "completion": str(i + 1)}) + "\n" for i in range(24))
    (shared / "data.jsonl").write_text("".join(records), encoding="utf-8")
    (shared / "text.txt").write_text("a rose is a rose is a rose\n" * 8, encoding="utf-8")
    for kind in KINDS:
        begun = time.monotonic()
        done = run(kind, shared, shared / kind)
        (shared / f"seconds-{kind}").write_text(str(time.monotonic() - begun))
        if done.returncode:
            raise RuntimeError(f"{kind}: exit code {done.returncode}: {done.stderr}")


def prepared(shared: pathlib.Path) -> list[str]:
    """The commands whose undisturbed results are in `shared`."""
    return [kind for kind in KINDS if (shared / kind).exists()]


def command(kind: str, shared: pathlib.Path, output: pathlib.Path, *more: str) -> list[str]:
    """The command line of the command that writes `output`."""
    flags = {
        "train": f"jaxmoe.train --model {shared}/hf --data {shared}/data.jsonl --output {output} --max-steps 6"
        " --save-every 1 --log-every 1 --batch-size 2 --seq-length 48 --lora-r 2 --no-tensorboard",
        "hf2jax": f"convert hf2jax {shared}/hf {output}",
        "jax2hf": f"convert jax2hf {shared}/hf2jax {output}",
        "capture": f"jaxmoe.routing capture --model {shared}/hf --data {shared}/text.txt --out {output} --seq-length 32"
        " --batch-size 2",
        "report": f"jaxmoe.routing report {shared}/capture --out {output}",
        "generate": f"jaxmoe.generate --model {shared}/hf --prompt a --max-new-tokens 8 --capture {output}",
        "torch-capture": f"torch_ref.capture --model {shared}/hf --text {shared}/capture --out {output}",
    }
    return [sys.executable, "-m", *flags[kind].split(), *more]


def run(
    kind: str,
    shared: pathlib.Path,
    output: pathlib.Path,
    *more: str,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.CompletedProcess[str]:
    """Runs the command that writes `output` to its end; `settings` are added to its environment."""
    return subprocess.run(
        command(kind, shared, output, *more),
        cwd=ROOT,
        env=environment(shared) | dict(settings),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def environment(shared: pathlib.Path) -> dict[str, str]:
    """The environment of the commands: compiled programs are cached and cheap to make."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_COMPILATION_CACHE_DIR": str(shared / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def result(kind: str, output: pathlib.Path) -> Mapping[str, str]:
    """File -> SHA-256 of what a command wrote, without what differs between equal runs."""
    if kind == "train":
        numbers = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        steps = [{name: n for name, n in row.items() if name != "tokens_per_second"} for row in numbers]
        adapter = (output / "adapter_model.safetensors").read_bytes()
        return {"metrics": json.dumps(steps), "adapter": hashlib.sha256(adapter).hexdigest()}
    files = [file for file in sorted(output.rglob("*")) if file.is_file()]
    if kind == "hf2jax":  # Orbax writes times; the manifest has the checksums of all arrays
        files = [output / "manifest.json", output / "config.json"]
    if kind == "report":  # pictures may name a version or a time
        files = [file for file in files if file.suffix == ".csv"]
    if kind in ("capture", "generate", "torch-capture"):
        files = [file for file in files if file.suffix == ".safetensors"]
    return {str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def stray(folder: pathlib.Path) -> list[str]:
    """Temporary folders and locks that were left below `folder`."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return [name for name in names if "jaxmoe-unfinished" in name or SUFFIX in name or "orbax-checkpoint-tmp" in name]
