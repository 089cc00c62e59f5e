"""All steps on one small checkpoint, with the commands that a user would type: `python -m examples.demo`.

A Qwen3-MoE that was trained on Python's standard library learns to describe a function from its signature. The steps
are: convert, generate, fine-tune with LoRA, generate again, export, reload with transformers and PEFT. Every command
is printed before it runs. The demo needs no network and no GPU.
"""

from __future__ import annotations

import json
import pathlib
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHECKPOINT = pathlib.Path("tests/checkpoints/qwen3-moe-stdlib")
OUTPUT = pathlib.Path("demo-output")
QUESTIONS = 3

TRAINING = (
    *("--lora-targets", "attention,experts", "--lora-r", "8", "--lora-alpha", "16"),
    *("--seq-length", "256", "--batch-size", "8", "--epochs", "1", "--learning-rate", "3e-3"),
)


class Demo:
    """Runs commands one after the other from the repository's root, and measures the time."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self.started = time.perf_counter()

    def step(self, title: str, module: str, *arguments: object) -> None:
        """Prints and runs `python -m MODULE ARGUMENTS...`.

        Raises:
            UserError: the command failed; its own output says why.
        """
        self._done += 1
        words = ["-m", module, *map(str, arguments)]
        print(f"\n[{self._done}/{self._total}] {title}\n$ {shlex.join(['python', *words])}", flush=True)
        done = subprocess.run([sys.executable, *words], cwd=ROOT, check=False)
        if done.returncode:
            raise UserError(f"demo: FAILED at step {self._done}, {title}: exit code {done.returncode}")

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started


def examples(data: pathlib.Path, count: int) -> dict[str, str]:
    """`count` questions and their answers from a JSONL file of chats, evenly spaced."""
    with data.open(encoding="utf-8") as file:
        chats = [[message["content"] for message in json.loads(line)["messages"]] for line in file]
    return dict(chats[len(chats) // (2 * count) :: len(chats) // count][:count])


def held_out_losses(metrics: pathlib.Path) -> tuple[float, float]:
    """The held-out loss (before, after) training, from the run's metrics."""
    with metrics.open(encoding="utf-8") as file:
        losses = [row["eval_loss"] for row in map(json.loads, file) if row.get("eval_loss") is not None]
    return losses[0], losses[-1]


def peak_memory() -> int:
    """Peak memory of the largest command so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit


def clear(output: pathlib.Path) -> None:
    """Makes `output` an empty folder; deletes only what an earlier demo wrote.

    Raises:
        UserError: the folder has other files in it.
    """
    marker = output / ".demo"
    if output.exists() and any(output.iterdir()):
        if not marker.exists():
            raise UserError(f"{output}: expected an empty folder or an earlier demo's, found one with other files")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    marker.touch()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all steps and prints the result."""
    parser = ArgumentParser(description="Convert, fine-tune, generate, export and reload a small Qwen3-MoE.")
    parser.add_argument(
        "--checkpoint",
        type=pathlib.Path,
        default=CHECKPOINT,
        metavar="DIR",
        help="HF folder of the model (default: the demo checkpoint)",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=OUTPUT,
        metavar="DIR",
        help="folder to write; an earlier demo is replaced",
    )
    arguments = parser.parse_args(argv)
    checkpoint, output = arguments.checkpoint, arguments.output
    clear(ROOT / output)
    corpus, converted, adapter, merged = (output / name for name in ("corpus", "converted", "lora", "merged"))
    train, held_out = corpus / "docstrings.jsonl", corpus / "docstrings.heldout.jsonl"
    logits, picture = output / "logits.npz", output / "expert-load.png"

    demo = Demo(total=8)
    demo.step("Make training data: signature -> docstring", "examples.stdlib_corpus", corpus)
    asked = examples(ROOT / held_out, QUESTIONS)
    speak = ("--chat", *(word for prompt in asked for word in ("--prompt", prompt)), "--max-new-tokens", 40)
    demo.step("Convert the checkpoint to JAX", "convert", "hf2jax", checkpoint, converted, "--dtype", "float32")
    demo.step("Ask the model, before training", "jaxmoe.generate", "--model", converted, *speak)
    files = ("--model", converted, "--data", train, "--eval-data", held_out, "--output", adapter)
    demo.step("Fine-tune with LoRA on attention and experts", "jaxmoe.train", *files, *TRAINING)
    demo.step("Ask the model again", "jaxmoe.generate", "--model", converted, "--adapter", adapter, *speak)
    print(
        "The answers in the library itself:", *(f"--- {prompt}\n{answer}" for prompt, answer in asked.items()), sep="\n"
    )
    demo.step("Merge and export to Hugging Face", "convert", "jax2hf", converted, merged, "--adapter", adapter)
    capture = ("--adapter", adapter, "--data", held_out, "--logits", logits, "--picture", picture)
    demo.step(
        "Save jaxmoe's logits and draw the load of the experts", "examples.capture", "--model", converted, *capture
    )
    exported = ("--base", checkpoint, "--adapter", adapter, "--merged", merged)
    demo.step("Reload with transformers and PEFT", "examples.verify_export", "--logits", logits, *exported)

    before, after = held_out_losses(ROOT / adapter / "metrics.jsonl")
    if not after < before:
        raise UserError(f"demo: FAILED: expected the held-out loss to fall, found {before:.3f} -> {after:.3f}")
    print(
        f"\nLook at {output}: {adapter.name}/report.html (the page of the run: losses, load of the experts), "
        f"{adapter.name}/ (PEFT adapter, metrics, TensorBoard), {merged.name}/ (HF model), {picture.name}\n"
        f"demo: PASSED in {demo.seconds():.0f} s, peak memory {peak_memory() / 2**30:.1f} GiB; "
        f"held-out loss {before:.3f} -> {after:.3f}; transformers and PEFT give the same logits"
    )


if __name__ == "__main__":
    run(main)
