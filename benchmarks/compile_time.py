"""Compile time of the LoRA training step at 4 and at 48 layers: `python -m benchmarks.compile_time`.

Layers run in one scan, so compile time should not depend on depth: the goal is a ratio of at most 1.2, for a plain
model and for one that mixes dense and sparse layers. Each measurement traces, lowers and compiles in a process of its
own, at small widths. Depths alternate, so that a change in the machine's load affects both.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.config import LoraConfig, Qwen3MoeConfig, expand_targets

DEPTHS = (4, 48)
KINDS = {"plain": {}, "mixed dense and sparse": {"decoder_sparse_step": 2}}
GOAL = 1.2


def model(kind: str, depth: int) -> Qwen3MoeConfig:
    """A model of small widths, on which compile time hardly depends."""
    return Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        **KINDS[kind],
    )


def compile_seconds(kind: str, depth: int) -> dict[str, float]:
    """Seconds to trace and lower, and to compile, a training step with adapters on all targets."""
    import jax
    import jax.numpy as jnp

    from jaxmoe.data.packing import Batch
    from jaxmoe.parameters import ParameterSpec, lora_specs, parameter_specs
    from jaxmoe.train.loss import next_token_objective
    from jaxmoe.train.optimizers import adamw, learning_rate
    from jaxmoe.train.step import Model, initial_state, make_train_step

    def shapes(specs: dict[str, ParameterSpec]) -> dict[str, jax.ShapeDtypeStruct]:
        return {path: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for path, spec in specs.items()}

    config = model(kind, depth)
    dense = ["dense"] if config.dense_layers else []
    lora = LoraConfig(r=8, targets=expand_targets(["attention", "router", "experts", *dense]))
    training = Model(config, lora)
    rate = learning_rate("cosine", 1e-4, 10, 100)
    optimizer = adamw(rate, training, max_grad_norm=1.0, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-8)
    integers = jax.ShapeDtypeStruct((1, 2, 128), jnp.int32)
    floats = jax.ShapeDtypeStruct((1, 2, 128), jnp.float32)
    batch = Batch(integers, integers, floats, integers, integers)
    state = jax.eval_shape(lambda trainable: initial_state(trainable, optimizer), shapes(lora_specs(config, lora)))
    step = jax.jit(make_train_step(training, optimizer, rate, next_token_objective(0.01)), donate_argnums=1)
    jax.block_until_ready(jnp.zeros(1) + 1)  # starts the backend before the clock
    start = time.perf_counter()
    lowered = step.lower(shapes(parameter_specs(config)), state, batch)
    middle = time.perf_counter()
    lowered.compile()
    return {"lower": middle - start, "compile": time.perf_counter() - middle}


def main() -> None:
    """Prints the table; with --one a single measurement as JSON."""
    parser = ArgumentParser(description="Compile time of the LoRA training step at 4 and at 48 layers.")
    parser.add_argument(
        "--repeat", type=int, default=3, metavar="N", help="processes per cell, of which the median counts (default: 3)"
    )
    parser.add_argument(
        "--one", nargs=2, metavar=("KIND", "DEPTH"), help="measure only this, in this process, and print JSON"
    )
    args = parser.parse_args()
    # A program found in a cache on disk would not be compiled.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if args.one:
        print(json.dumps(compile_seconds(args.one[0], int(args.one[1]))))
        return

    print(f"{'':24}{'layers':>7}{'trace + lower':>15}{'compile':>9}{'total':>8}")
    for kind in KINDS:
        runs: dict[int, list[dict[str, float]]] = {depth: [] for depth in DEPTHS}
        for _ in range(args.repeat):
            for depth in DEPTHS:
                command = [sys.executable, "-m", "benchmarks.compile_time", "--one", kind, str(depth)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs[depth].append(json.loads(done.stdout))
        totals = {}
        for depth in DEPTHS:
            lower, compiled = (statistics.median(r[part] for r in runs[depth]) for part in ("lower", "compile"))
            totals[depth] = statistics.median(r["lower"] + r["compile"] for r in runs[depth])
            print(f"{kind:24}{depth:7}{lower:13.2f} s{compiled:7.2f} s{totals[depth]:6.2f} s")
        ratio = totals[DEPTHS[1]] / totals[DEPTHS[0]]
        print(f"{'':24}{DEPTHS[1]} layers take {ratio:.2f} times as long as {DEPTHS[0]} (goal: at most {GOAL})")


if __name__ == "__main__":
    run(main)
