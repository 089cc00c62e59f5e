"""Records what the product computes on the demo checkpoint, and compares two such records array by array.

    python tests/golden/record.py record OUT [--tree DIR]    writes OUT.npz
    python tests/golden/record.py compare OLD NEW            exit code 1 if an array differs in a bit

It uses only commands and `from jaxmoe import Qwen3MoeForCausalLM`, so it also runs on another checkout (`--tree`). On a
CPU, a change that only moves code gives the same bits. The text is the repository's LICENSE, which never changes.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "tests/checkpoints/qwen3-moe-stdlib"
STEPS = 10
# name of the run -> flags of `python -m jaxmoe.train`
RUNS = {
    "attention": ("--dtype", "float32", "--lora-targets", "attention"),
    "all_targets": ("--dtype", "float32", "--lora-targets", "attention,router,experts", "--accumulation", "2"),
    "nf4": ("--dtype", "float32", "--lora-targets", "attention,experts", "--quantize", "nf4"),
    "bfloat16": ("--dtype", "bfloat16", "--lora-targets", "attention,experts"),
}
PROMPT = "Return the number of"


def write_data(path: pathlib.Path) -> None:
    """The paragraphs of the LICENSE: every third as prompt and completion, the others as text."""
    paragraphs = [" ".join(part.split()) for part in (ROOT / "LICENSE").read_text(encoding="utf-8").split("\n\n")]
    records = []
    for index, text in enumerate(part for part in paragraphs if len(part) > 40):
        middle = len(text) // 2
        pair = {"prompt": text[:middle], "completion": text[middle:]}
        records.append(pair if index % 3 == 0 else {"text": text})
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def train(data: pathlib.Path, output: pathlib.Path, flags: tuple[str, ...], tree: pathlib.Path) -> list[float]:
    """Runs ten steps of `python -m jaxmoe.train` and returns their losses."""
    command = [sys.executable, "-m", "jaxmoe.train", "--model", CHECKPOINT, "--data", data, "--output", output]
    command += ["--max-steps", STEPS, "--batch-size", "2", "--seq-length", "128", "--lora-r", "4", "--log-every", "1"]
    command += ["--learning-rate", "2e-3", "--remat", "balanced", "--no-tensorboard", *flags]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    subprocess.run([*map(str, command)], cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def losses(names: Iterable[str] = RUNS, tree: pathlib.Path = ROOT) -> dict[str, list[float]]:
    """The losses of ten LoRA steps by run."""
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder, "data.jsonl")
        write_data(data)
        return {name: train(data, pathlib.Path(folder, name), RUNS[name], tree) for name in names}


def record(tree: pathlib.Path) -> dict[str, Any]:
    """Every recorded array by name."""
    sys.path.insert(0, str(tree))
    from safetensors.numpy import load_file

    from jaxmoe import Qwen3MoeForCausalLM

    arrays: dict[str, Any] = {}
    ids = np.random.default_rng(0).integers(0, 2000, (2, 96))
    mask = np.ones_like(ids)
    mask[1, :17] = 0
    forms: dict[str, dict[str, Any]] = {
        "float32": {"dtype": "float32"},
        "bfloat16": {"dtype": "bfloat16"},
        "nf4": {"dtype": "bfloat16", "quantize": "nf4"},
    }
    for name, options in forms.items():
        model = Qwen3MoeForCausalLM.from_pretrained(str(CHECKPOINT), **options)
        out = model(ids, attention_mask=mask, output_router_logits=True)
        arrays[f"{name}/logits"] = np.asarray(out.logits)
        arrays[f"{name}/router_logits"] = np.stack([np.asarray(layer) for layer in out.router_logits or ()])
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder, "data.jsonl")
        write_data(data)
        for name, flags in RUNS.items():
            output = pathlib.Path(folder, name)
            arrays[f"{name}/losses"] = np.asarray(train(data, output, flags, tree))
            for key, array in load_file(output / "adapter_model.safetensors").items():
                arrays[f"{name}/adapter/{key}"] = array
    command = [sys.executable, "-m", "jaxmoe.generate", "--model", str(CHECKPOINT), "--prompt", PROMPT]
    done = subprocess.run([*command, "--max-new-tokens", "20"], cwd=tree, capture_output=True, check=True)
    arrays["generated"] = np.frombuffer(done.stdout, np.uint8)
    return arrays


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each array that is missing or differs in a bit."""
    lines = [f"{name}: only in one record" for name in sorted(set(old) ^ set(new))]
    for name in sorted(set(old) & set(new)):
        a, b = old[name], new[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            lines.append(f"{name}: {a.dtype} {a.shape} and {b.dtype} {b.shape}")
        elif a.tobytes() != b.tobytes():
            distance = np.linalg.norm((a.astype(np.float64) - b).ravel()) / np.linalg.norm(a.astype(np.float64).ravel())
            lines.append(f"{name}: relative L2 {distance:.1e}")
    return lines


def main() -> int:
    """Runs the command that the module's docstring describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record")
    recorder.add_argument("out", type=pathlib.Path)
    recorder.add_argument("--tree", type=pathlib.Path, default=ROOT)
    comparer = commands.add_parser("compare")
    comparer.add_argument("old", type=pathlib.Path)
    comparer.add_argument("new", type=pathlib.Path)
    arguments = parser.parse_args()
    if arguments.command == "record":
        arrays = record(arguments.tree.resolve())
        np.savez(arguments.out.with_suffix(".npz"), **arrays)
        print(f"{len(arrays)} arrays in {arguments.out.with_suffix('.npz')}")
        return 0
    old, new = (dict(np.load(path.with_suffix(".npz"))) for path in (arguments.old, arguments.new))
    lines = compare(old, new)
    print("\n".join(lines) or f"{len(old)} arrays: the same bits")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
