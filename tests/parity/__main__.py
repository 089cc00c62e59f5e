"""`python -m tests.parity`: any checkpoint through transformers, torch_ref and jaxmoe, compared number by number.

Exit codes: 0 all checks passed; 1 a check failed or a planted fault was not caught; 2 bad input, in one line.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys
from collections.abc import Sequence

from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.cuda import total_bytes
from jaxmoe.distributed.mesh import SEQUENCE_AXES, MeshShape
from jaxmoe.errors import UserError
from jaxmoe.model.opening import load_adapter, open_checkpoint
from tests.parity import cases, engine
from tests.parity.plan import Case, Plan, write_batch
from tests.parity.results import finish
from tests.parity.suite import quantize

_DTYPES = ("float32", "bfloat16", "float16")


def main() -> int:
    """Parses the command line, runs the sides, writes results and report."""
    args = parsed(sys.argv[1:])
    if args.out.exists():
        raise UserError(f"{args.out}: expected a folder that does not exist yet, found one")
    config = checked(args)
    selected = cases_of(args, config)
    command = f"python -m tests.parity {shlex.join(sys.argv[1:])}"
    plan = Plan(args.out, args.device, tuple(selected), command)
    quantize(selected, args.device)
    engine.run(plan, args.parallel)
    return finish(plan, f"Parity of {args.checkpoint.resolve().name}")


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description="Compares transformers, torch_ref and jaxmoe on one checkpoint.")
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True, help="a Hugging Face folder in 16 or 32 bit")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a new folder for arrays, results and report")
    parser.add_argument(
        "--dtype",
        default="float32,bfloat16",
        help="dtypes to compute in, separated by commas (default: float32,bfloat16)",
    )
    parser.add_argument(
        "--quantize",
        choices=("nf4", "fp8", "fp8-rows"),
        help="run all sides on the same bytes in this form; fp8-rows: experts multiply rows in FP8, too",
    )
    parser.add_argument("--adapter", help="a PEFT folder, or 'random'; also compares training")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--prompt", type=pathlib.Path, help="a text file (default: text of Python's library)")
    parser.add_argument(
        "--rows",
        type=int,
        default=2,
        choices=(1, 2, 3, 4),
        help="sequences of Python's library; the last is packed (default: 2)",
    )
    parser.add_argument("--length", type=int, default=cases.LENGTH, help="tokens per sequence")
    parser.add_argument(
        "--faults",
        action="store_true",
        help="also run the negative controls, in float32; on a GPU those of NF4 and FP8 in 16 bit, too",
    )
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        metavar="N",
        help="processes at once; all share the device (default: 1)",
    )
    parser.add_argument(
        "--mesh", default="data=1", help="devices that jaxmoe runs on (expert=2); virtual on a CPU (default: one)"
    )
    return parser.parse_args(arguments)


def checked(args: argparse.Namespace) -> Qwen3MoeConfig:
    """The checkpoint's configuration.

    Raises:
        UserError: a checkpoint, an adapter or a flag that the suite cannot run.
    """
    config = Qwen3MoeConfig.from_pretrained(args.checkpoint)
    if not any(args.checkpoint.glob("*.safetensors")):
        raise UserError(f"{args.checkpoint}: expected a Hugging Face folder with safetensors, found none")
    source = open_checkpoint(args.checkpoint)[1]
    if args.length > config.max_position_embeddings:
        raise UserError(f"--length: expected at most {config.max_position_embeddings}, found {args.length}")
    for flag, least in (("length", cases.SHORTEST), ("parallel", 1)):
        if (found := getattr(args, flag)) < least:
            raise UserError(f"--{flag}: expected at least {least}, found {found}")
    if args.quantize == "fp8-rows" and args.adapter:
        raise UserError("--quantize fp8-rows: expected no --adapter, with which jaxmoe's experts keep rows in 16 bits")
    if source.quantization is not None:
        found = source.quantization.form.upper()
        raise UserError(
            f"{args.checkpoint}: expected weights in 16 or 32 bits (--quantize makes others), found {found}"
        )
    if args.adapter not in (None, "random"):
        load_adapter(args.adapter, config, source)
    if args.device == "gpu" and total_bytes() is None:
        raise UserError("--device gpu: expected an NVIDIA GPU, found none")
    for dtype in args.dtype.split(","):
        if dtype not in _DTYPES:
            raise UserError(f"--dtype: expected names among {', '.join(_DTYPES)}, found {dtype!r}")
    mesh = MeshShape.parse(args.mesh)
    mesh.check_experts(config.num_experts if config.sparse_layers else 0)
    mesh.check_length(args.length)
    if (rows := 1 if args.prompt else args.rows) % (shares := mesh.product(SEQUENCE_AXES)):
        raise UserError(f"--mesh: {mesh}: expected a divisor of the {rows} sequences (--rows), found {shares} devices")
    return config


def cases_of(args: argparse.Namespace, config: Qwen3MoeConfig) -> list[Case]:
    """One case a dtype; their inputs are written into the folder of the results."""
    if args.prompt is None:
        batch = cases.text_batch(args.checkpoint, args.rows, args.length)
    else:
        try:
            prompt = args.prompt.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{args.prompt}: expected UTF-8 text, found other bytes") from None
        batch = cases.prompt_batch(args.checkpoint, prompt)
        if (found := batch.input_ids.shape[1]) < cases.SHORTEST:
            raise UserError(f"{args.prompt}: expected at least {cases.SHORTEST} tokens, found {found}")
        batch = type(batch)(*(array[:, : args.length] for array in batch))
    at = str(write_batch(args.out / "input.batch", batch))
    adapter = args.adapter
    if adapter == "random":
        adapter = str(cases.write_random_adapter(args.out / "random-adapter", args.checkpoint))
    runs = ("free", "pinned", "gradients") if adapter else ("free", "pinned")
    in_rows = args.quantize == "fp8-rows"
    form = "fp8" if in_rows else args.quantize
    quantized = str(args.out / form) if form else None
    out = []
    for dtype in args.dtype.split(","):
        faults: tuple[str, ...] = ()
        if args.faults and dtype == "float32":
            faults = cases.faults_of(config, batch, adapter is not None, form)
        elif args.faults and form and args.device == "gpu":  # kernels that decode run in 16 bit only
            sparse_adapter = adapter is not None and bool(config.sparse_layers)
            faults = cases.QUANTIZED_FAULTS[form]
            faults += ("adapter of another expert",) if sparse_adapter else ()
        name = f"{args.checkpoint.resolve().name}-{dtype}"
        draws = 1 if dtype == "float32" else 4
        options = {"draws": draws, "rows_in_fp8": in_rows, "mesh": args.mesh}
        out.append(Case(name, str(args.checkpoint), dtype, at, quantized, adapter, runs, faults, **options))
    return out


if __name__ == "__main__":
    run(main)
