"""The fixed suites of `make parity` and `make parity-gpu`: their cases, their models, and the report.

python -m tests.parity.suite demo  --device cpu|gpu --out DIR    the checkpoint in this repository
python -m tests.parity.suite deep  --checkpoint DIR --device cpu|gpu --out DIR    `examples/pretrain/run.sh deep`
python -m tests.parity.suite large --checkpoint DIR --device gpu --out DIR    a checkpoint of `tests.parity.large`
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys
from dataclasses import replace
from typing import Any

from jaxmoe.config import Qwen3MoeConfig
from tests.parity import cases, engine
from tests.parity.batches import CHECKPOINT
from tests.parity.large import first_layers
from tests.parity.plan import Case, Device, Plan, write_batch
from tests.parity.results import finish
from tests.tolerances import TOLERANCES


def _flip_bound(name: str, dtype: str) -> str | None:
    entry = f"flip_margin_{name}_{dtype}"
    return entry if entry in TOLERANCES else None


def trained_cases(
    name: str, checkpoint: pathlib.Path, folder: pathlib.Path, rows: int = 4, faults: bool = False
) -> list[Case]:
    """A trained checkpoint in 32 and 16 bits, NF4 and FP8, with and without a random adapter, on Python's text."""
    text = cases.text_batch(checkpoint, rows)
    batch = write_batch(folder / f"{name}.batch", text)
    model_faults = cases.faults_of(Qwen3MoeConfig.from_pretrained(checkpoint), text, adapter=False)
    quantized, fp8 = str(folder / f"{name}-nf4"), str(folder / f"{name}-fp8")
    adapter = str(cases.write_random_adapter(folder / f"{name}-adapter", checkpoint))

    def case(label: str, dtype: str, **options: Any) -> Case:
        bound = _flip_bound(f"{name}-adapter" if "adapter" in options else name, dtype)
        planted = options.pop("faults", ())
        return Case(
            f"{name}-{label}",
            str(checkpoint),
            dtype,
            str(batch),
            flip_bound=bound,
            pinned_kl="parity_pinned_kl",
            faults=planted if faults else (),
            **options,
        )

    return [
        case("fp32", "float32", faults=model_faults),
        case("bf16", "bfloat16"),
        case("nf4-fp32", "float32", quantized=quantized, runs=("free",), faults=("NF4 nibbles swapped",)),
        case("nf4-bf16", "bfloat16", quantized=quantized),
        case("fp8-fp32", "float32", quantized=fp8, runs=("free",), faults=("FP8 scale off by one block",)),
        case("fp8-bf16", "bfloat16", quantized=fp8),
        case(
            "fp8-rows-fp32",
            "float32",
            quantized=fp8,
            runs=("free",),
            rows_in_fp8=True,
            faults=("FP8 scale off by one block",),
        ),
        case(
            "adapter-fp32",
            "float32",
            adapter=adapter,
            runs=("free", "gradients"),
            faults=("adapter scaled by 1 over r",),
        ),
        case("adapter-bf16", "bfloat16", adapter=adapter, runs=("pinned", "gradients"), draws=4),
        case("nf4-adapter-fp32", "float32", quantized=quantized, adapter=adapter, runs=("free", "gradients")),
        case(
            "nf4-adapter-bf16",
            "bfloat16",
            quantized=quantized,
            adapter=adapter,
            runs=("pinned", "gradients"),
            draws=4,
        ),
        case("fp8-adapter-bf16", "bfloat16", quantized=fp8, adapter=adapter, runs=("pinned", "gradients"), draws=4),
    ]


def large_cases(checkpoint: pathlib.Path, folder: pathlib.Path, layers: int, length: int) -> list[Case]:
    """All layers in bfloat16; the first `layers` in NF4, and with a random adapter on attention and experts."""
    config = Qwen3MoeConfig.from_pretrained(checkpoint)
    short = first_layers(checkpoint, folder / "first-layers", layers)
    batch = str(write_batch(folder / "large.batch", cases.random_batch(config, rows=1, length=length)))
    adapter = cases.write_random_adapter(folder / "large-adapter", short, ("attention", "experts"), r=8)
    every = ("pinned", "gradients")
    bound = _flip_bound("large", "bfloat16")
    return [
        Case(f"{config.num_hidden_layers}-layers-bf16", str(checkpoint), "bfloat16", batch, flip_bound=bound),
        Case(
            f"{layers}-layers-nf4", str(short), "bfloat16", batch, quantized=str(folder / "large-nf4"), flip_bound=bound
        ),
        Case(
            f"{layers}-layers-adapter",
            str(short),
            "bfloat16",
            batch,
            adapter=str(adapter),
            runs=every,
            flip_bound=bound,
            draws=4,
        ),
    ]


def quantize(selected: list[Case], device: Device) -> None:
    """Writes the NF4 and FP8 folders that the cases name."""
    pairs = {case.quantized: case.checkpoint for case in selected if case.quantized is not None}
    in_fp8 = {target for target in pairs if target.endswith("fp8")}
    if in_nf4 := [(pairs[target], target) for target in pairs if target not in in_fp8]:
        engine.quantize(in_nf4, "bfloat16", device)
    for target in in_fp8:
        cases.write_fp8(pairs[target], target)


def main() -> int:
    """Parses the command line, runs a suite and writes its report; returns 1 if a check failed."""
    parser = argparse.ArgumentParser(description="Runs one of the fixed parity suites.")
    parser.add_argument("suite", choices=("demo", "deep", "large"))
    parser.add_argument("--checkpoint", type=pathlib.Path, help="checkpoint of the deep or the large model")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a new folder")
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        help="processes at the same time; more than three share the cases of jaxmoe (default: 1)",
    )
    parser.add_argument(
        "--layers", type=int, default=12, help="layers of the large model in NF4 and with an adapter (default: 12)"
    )
    parser.add_argument(
        "--bisect",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="find the operation that makes a check fail",
    )
    devices = "devices that jaxmoe runs on, such as context=2,expert=2; on a CPU they are virtual"
    parser.add_argument("--mesh", default="data=1", help=f"{devices} (default: one)")
    parser.add_argument("--length", type=int, default=cases.LENGTH, help="tokens of the large model's prompt")
    args = parser.parse_args()
    for flag, least in (("length", cases.SHORTEST), ("parallel", 1), ("layers", 1)):
        if getattr(args, flag) < least:
            parser.error(f"--{flag}: expected at least {least}, found {getattr(args, flag)}")
    checkpoint: pathlib.Path | None = args.checkpoint or (CHECKPOINT if args.suite == "demo" else None)
    if checkpoint is None:
        parser.error(f"{args.suite} needs --checkpoint")
    args.out.mkdir(parents=True)
    on_cpu = args.device == "cpu"
    if args.suite == "large":
        selected = large_cases(checkpoint, args.out, args.layers, args.length)
    else:
        selected = trained_cases(
            args.suite, checkpoint, args.out, rows=2 if on_cpu else 4, faults=on_cpu or args.suite == "demo"
        )
    selected = [replace(case, mesh=args.mesh) for case in selected]
    quantize(selected, args.device)
    command = f"python -m tests.parity.suite {shlex.join(sys.argv[1:])}"
    plan = Plan(args.out, args.device, tuple(selected), command)
    engine.run(plan, args.parallel)
    return finish(plan, f"Parity: {args.suite}", args.bisect)


if __name__ == "__main__":
    sys.exit(main())
