"""The memory of a compiled training step: `python -m tests.compiled_memory CASE` prints the bytes for Qwen3-30B-A3B.

It is a separate process, so that it compiles with the flags of `python -m jaxmoe.train`. CASE is a JSON list: adapters
on (null: none), sequences, tokens per sequence, recomputation policy, packed, quantised.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax

from jaxmoe.cli import xla
from jaxmoe.config import LoraConfig, Qwen3MoeConfig, expand_targets
from jaxmoe.data.packing import Batch
from jaxmoe.memory import embedding_on_host
from jaxmoe.parameters import Quantization, lora_specs, quantizable, stored_specs
from jaxmoe.presets import PRESETS
from jaxmoe.train.host_memory import looked_up
from jaxmoe.train.loss import next_token_objective
from jaxmoe.train.optimizers import adamw, learning_rate
from jaxmoe.train.step import Model, make_train_step, state_to_compile


def lora_of(targets: str | None) -> LoraConfig | None:
    return LoraConfig(r=16, targets=expand_targets(targets.split(","))) if targets else None


def compiled_memory(case: tuple[Any, ...], config: Qwen3MoeConfig, dtype: str) -> Any:
    """XLA's figures for the compiled training step of a `Case` on this device; no array is allocated."""
    targets, sequences, length, remat, packed, quantize = case
    lora = lora_of(targets)
    struct = jax.ShapeDtypeStruct
    stored = stored_specs(config, Quantization(quantizable(config)) if quantize else None)
    frozen_dtype = dtype if lora else "float32"
    frozen = {path: struct(spec.shape, spec.dtype or frozen_dtype) for path, spec in stored.items()}
    trained = frozen
    if lora:
        trained = {path: struct(spec.shape, "float32") for path, spec in lora_specs(config, lora).items()}
    model = Model(config, lora, dtype, remat, packed)
    rate = learning_rate("constant", 1e-4, 0, 1)
    optimizer = adamw(rate, model, max_grad_norm=1.0, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-8)
    state = state_to_compile(model, trained, optimizer)
    ids, floats = (struct((1, sequences, length), kind) for kind in ("int32", "float32"))
    batch: Any = Batch(input_ids=ids, labels=ids, weights=floats, segment_ids=ids, position_ids=ids)
    if embedding_on_host(config, lora, remat):
        frozen, batch = looked_up(frozen, batch)
    step = jax.jit(make_train_step(model, optimizer, rate, next_token_objective()), donate_argnums=1)
    return step.lower(frozen if lora else {}, state, batch).compile().memory_analysis()


if __name__ == "__main__":
    xla.configure()
    used = compiled_memory(tuple(json.loads(sys.argv[1])), PRESETS["qwen3-30b-a3b"], "bfloat16")
    print(used.argument_size_in_bytes + used.temp_size_in_bytes)
