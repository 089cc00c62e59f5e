"""LoRA fine-tuning or full training of a Qwen3-MoE model: `python -m jaxmoe.train`.

The output folder holds the adapter in PEFT's form (`adapter_model.safetensors`, `adapter_config.json`), or the model in
`model/` if all parameters are trained. It also holds `metrics.jsonl`, `tensorboard/`, `checkpoints/` (Orbax),
`report.html`, `train_config.json`, and `run.toml`, with which `--config` repeats the run. A run that stops, by a signal
or a crash, continues with `--resume` as if it had never stopped; on CPU, bit for bit.
"""

from __future__ import annotations

from jaxmoe import stopping

if __name__ == "__main__":
    stopping.watch()  # before the other imports, which take seconds

import argparse
import math
import signal
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jaxmoe.cli import progress, xla
from jaxmoe.cli.arguments import (
    ArgumentParser,
    add_dataclass_arguments,
    add_memory_limit,
    dataclass_from_arguments,
    flag_kinds,
    run,
)
from jaxmoe.cli.config_file import add_config, given_settings
from jaxmoe.distributed import ending, launch
from jaxmoe.errors import counted
from jaxmoe.runs.report import REPORT_FILE
from jaxmoe.train.loop import train
from jaxmoe.train.settings import TrainConfig


def build_parser(given: Mapping[str, Any] = MappingProxyType({})) -> ArgumentParser:
    """The flags; `given` are the settings in the file of --config."""
    flags = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config(flags)
    add_dataclass_arguments(flags, TrainConfig, given)
    add_memory_limit(flags, given.get("memory_limit"))
    launch.add_arguments(flags)
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m jaxmoe.train`: 0 when done, 128 + the signal's number when a signal ended the run early."""
    given = given_settings(argv, flag_kinds(TrainConfig) | {"memory_limit": float})
    arguments = build_parser(given).parse_args(argv)
    process = launch.start(arguments)
    if not process.is_first:
        progress.hide()
    with ending.together():
        settings = dataclass_from_arguments(TrainConfig, arguments)
        xla.configure(arguments.memory_limit)
        summary = train(settings)
    if process.is_first:
        _report(settings, summary)
    return 0 if summary["stopped_by"] is None else 128 + summary["stopped_by"]


def _report(settings: TrainConfig, summary: dict[str, Any]) -> None:
    if summary["stopped_by"] is not None:
        name = signal.Signals(summary["stopped_by"]).name
        print(
            f"{name}: saved after step {summary['steps']}; the same command with --resume continues from there",
            file=sys.stderr,
        )
        return
    done = counted(summary["steps"], "step")
    print(f"wrote {settings.output}: {done}; this command took {summary['seconds']:.0f} s")
    if summary["eval_loss"] is not None:
        before, after = summary["eval_loss_before"], summary["eval_loss"]
        perplexities = f" (perplexity {_perplexity(before):.2f} -> {_perplexity(after):.2f})"
        print(f"held-out loss {before:.4f} -> {after:.4f}{'' if settings.learns_from_pairs else perplexities}")
    if settings.keep_best and summary["best_step"] is not None:
        print(f"written: step {summary['best_step']}, with the lowest held-out loss, {summary['best_eval_loss']:.4f}")
    print(f"{settings.output / REPORT_FILE} shows the run")


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # beyond that it overflows


if __name__ == "__main__":
    run(main)
