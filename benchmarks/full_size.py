"""Qwen3-30B-A3B's full shape on one GPU, random weights: `python -m benchmarks.full_size`.

Prints time, tokens/s and peak device memory of a forward pass and of one LoRA step (forward, backward, AdamW), with the
forecast of `jaxmoe.memory` beside the measured peak, and checks that loss and gradients are finite.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.cli import ArgumentParser, run
from jaxmoe.config import LoraConfig, expand_targets
from jaxmoe.data import Batch
from jaxmoe.memory import Remat, human, training_forecast
from jaxmoe.model import init_adapters, init_parameters
from jaxmoe.presets import PRESETS
from jaxmoe.step import Model, adamw, initial_state, learning_rate, make_eval_step, make_train_step


def _batch(vocab_size: int, rows: int, length: int) -> Batch:
    ids = np.random.default_rng(0).integers(0, vocab_size, (rows, length + 1), dtype=np.int32)
    position = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    ones = np.ones((rows, length), np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones, position)


def _timed(function: Callable[..., Any], *arguments: Any, repeat: int) -> tuple[Any, float, float]:
    """(result, seconds of the first call with compilation, median seconds of the others)."""
    seconds = []
    result = None
    for _ in range(1 + repeat):
        start = time.perf_counter()
        result = jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
    return result, seconds[0], float(np.median(seconds[1:]))


def main() -> None:
    """Measures and prints; exits with an assertion when a number is not finite."""
    parser = ArgumentParser(description="Forward pass and LoRA step at a published model's full shape, random weights.")
    parser.add_argument("--preset", default="qwen3-30b-a3b", choices=sorted(PRESETS), metavar="NAME")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer layers than the preset's")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N")
    parser.add_argument("--seq-length", type=int, default=2048, metavar="N")
    parser.add_argument("--lora-targets", default="attention,experts", metavar="TEXT,...")
    parser.add_argument("--lora-r", type=int, default=16, metavar="N")
    parser.add_argument("--repeat", type=int, default=3, metavar="N")
    parser.add_argument("--remat", default="fast", choices=get_args(Remat))
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()

    config = PRESETS[args.preset]
    if args.layers:
        config = config.replace(num_hidden_layers=args.layers)
    lora = LoraConfig(r=args.lora_r, targets=expand_targets(args.lora_targets.split(",")))
    model = Model(config, lora, "bfloat16", args.remat)
    device = jax.devices()[0]
    tokens = args.batch_size * args.seq_length

    start = time.perf_counter()
    draw = jax.jit(init_parameters, static_argnums=(0, 2))
    params = jax.block_until_ready(draw(config, jax.random.key(0), jnp.bfloat16))
    adapters = jax.jit(init_adapters, static_argnums=(0, 1))(config, lora, jax.random.key(1))
    print(
        f"{device.device_kind}: {args.preset}, {config.num_hidden_layers} layers, {args.batch_size} x {args.seq_length}"
    )
    print(f"weights made in {time.perf_counter() - start:.1f} s: {human(sum(a.nbytes for a in params.values()))}")

    batch = jax.device_put(_batch(config.vocab_size, args.batch_size, args.seq_length))
    (summed, weight), first, forward = _timed(
        jax.jit(make_eval_step(model)), params, adapters, batch, repeat=args.repeat
    )
    loss = float(summed / weight)
    print(f"forward: first call {first:.1f} s, then {forward:.3f} s, {tokens / forward:,.0f} tokens/s, loss {loss:.4f}")

    rate = learning_rate("constant", 1e-4, 0, 1)
    optimizer = adamw(rate, model, max_grad_norm=1.0, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-8)
    step = jax.jit(make_train_step(model, optimizer, rate, config.router_aux_loss_coef))
    stacked = jax.tree.map(lambda a: a[None], batch)
    state = initial_state(adapters, optimizer)
    (state, metrics), first, seconds = _timed(step, params, state, stacked, repeat=args.repeat)
    metrics = jax.device_get(metrics)
    load = metrics.expert_counts.max(-1) / metrics.expert_counts.mean(-1)
    print(f"LoRA step: first call {first:.1f} s, then {seconds:.3f} s, {tokens / seconds:,.0f} tokens/s")
    print(f"loss {metrics.loss:.4f}, gradient norm {metrics.grad_norm:.4f}, max/mean expert load {load.mean():.2f}")

    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    forecast = training_forecast(config, lora, batch_size=args.batch_size, seq_length=args.seq_length, dtype="bfloat16")
    print(f"peak device memory {human(peak) if peak else 'not reported'}; forecast {human(forecast.total)}")
    assert np.isfinite(loss) and np.isfinite(metrics.loss) and np.isfinite(metrics.grad_norm) and metrics.grad_norm > 0
    if args.json:
        record = {"device": device.device_kind, "forward_s": forward, "step_s": seconds, "tokens": tokens}
        record |= {"loss": float(metrics.loss), "peak_bytes": peak, "forecast_bytes": forecast.total}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
