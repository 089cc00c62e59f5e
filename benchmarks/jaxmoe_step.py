"""jaxmoe's training step, on one device or on a mesh: speed, memory and, on request, time by stage.

The steps of `benchmarks.train_step` are measured here, each in its own process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks import limits, random_model, stages
from jaxmoe.config import LoraConfig, Qwen3MoeConfig, expand_targets
from jaxmoe.distributed.mesh import ONE_DEVICE, SEQUENCE_AXES, MeshShape
from jaxmoe.memory import Remat, Workload, embedding_on_host, training_forecast
from jaxmoe.parameters import Quantization, stored_specs

LEARNING_RATE = 1e-4


class Case(NamedTuple):
    """What has adapters (nothing: all parameters are trained), sequences, tokens per sequence, and jaxmoe's
    recomputation policy and micro-batches. On a mesh each device has so many sequences.

    The small cases are for a memory limit.
    """

    targets: str
    batch: int
    length: int
    remat: Remat
    accumulation: int = 1

    def lora(self, rank: int) -> LoraConfig | None:
        """The adapters."""
        return LoraConfig(r=rank, targets=expand_targets(self.targets.split(","))) if self.targets else None

    def sequences(self, mesh: MeshShape = ONE_DEVICE) -> int:
        """Sequences of a step on all devices together."""
        return self.batch * mesh.product(SEQUENCE_AXES)


class Step(NamedTuple):
    """A compiled step: what it is called with, what came of it, and how long tracing and compiling took."""

    compiled: Any
    state: Any
    batch: Callable[[int], Any]  # the batch of a step, where it lies
    fed: Callable[[Any, Any], Any]  # (parameters, batch) -> both, as the step takes them
    model: Any
    on_host: tuple[str, ...]
    seconds: float


def mesh_of(args: argparse.Namespace) -> MeshShape:
    """The mesh that the flags name: one device without `--mesh`."""
    return MeshShape.parse(args.mesh[0]) if args.mesh else ONE_DEVICE


def measure(args: argparse.Namespace, case: Case, config: Qwen3MoeConfig) -> dict[str, Any]:
    """What `benchmarks.train_step` prints of jaxmoe."""
    from jaxmoe import cuda
    from jaxmoe.cli import xla

    xla.configure(args.memory_limit)
    import jax
    import numpy as np

    # Compiled before the weights are made, as in training: XLA tries out products on its own buffers.
    step = compiled_step(args, case, config)
    state, metrics = step.state, None
    devices = jax.local_devices()[: step.model.mesh.size]
    peaks = lambda: [(device.memory_stats() or {}).get("peak_bytes_in_use") or 0 for device in devices]
    params, state = _arrays(args, step, config, state)
    before = max(peaks())

    def run(index: int) -> Any:
        nonlocal state, metrics
        frozen, tokens = step.fed(params, step.batch(index))
        state, metrics = step.compiled(frozen, state, tokens)
        return metrics

    seconds, losses = timed(lambda index: float(run(index).loss), args.warmup, args.steps)
    memory: Any = step.compiled.memory_analysis()
    assert metrics is not None
    found = {
        "seconds": seconds,
        "loss": losses[0],
        "device": devices[0].device_kind,
        "first_s": step.seconds,
        "load": random_model.load_ratio(np.asarray(metrics.expert_counts)),
        "peak": max(peaks()),
        "peaks": peaks(),
        "peak_before": before,
        "temporaries": memory.temp_size_in_bytes,
        "forecast": _forecast(args, case, config),
    }
    on_gpu = devices[0].platform == "gpu"
    if on_gpu:
        found |= {"pool": (devices[0].memory_stats() or {}).get("bytes_limit"), "used": cuda.used_bytes()}
    if args.stages:
        found["profile"] = stages.profile(lambda: run(0), step.compiled, keep=args.trace)
    if on_gpu:
        for array in jax.tree.leaves((params, state)):  # under a memory limit the products have no room beside them
            if isinstance(array, jax.Array):
                array.delete()
        found["flops"] = limits.matmul_flops_per_second()
    return found


def compiled_step(args: argparse.Namespace, case: Case, config: Qwen3MoeConfig) -> Step:
    """The step of a case, compiled for shapes of the weights."""
    import jax
    import numpy as np

    from jaxmoe.data.packing import Batch
    from jaxmoe.distributed.copy_engines import compiler_options
    from jaxmoe.model.init import init_adapters
    from jaxmoe.train.host_memory import EMBEDDING, looked_up
    from jaxmoe.train.loss import next_token_objective
    from jaxmoe.train.optimizers import adamw, learning_rate
    from jaxmoe.train.step import Model, initial_state, make_train_step, state_to_compile

    lora, mesh, remat = case.lora(args.lora_r), mesh_of(args), args.remat or case.remat
    # By default a sequence is one document, as in training when no two fit into one.
    packed = args.documents > 1
    model: Any = Model(config, lora, "bfloat16", remat, packed, args.unroll, mesh=mesh)
    place = model.placement
    rate = learning_rate("constant", LEARNING_RATE, 0, 1)
    optimizer = adamw(rate, model, max_grad_norm=1.0, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-8)
    frozen = place.place(_shapes(args, config)) if lora else {}
    if lora:
        adapters = place.place(jax.jit(init_adapters, static_argnums=(0, 1))(config, lora, jax.random.key(1)))
        state: Any = place.place_state(initial_state(adapters, optimizer), adapters)
    else:
        state = state_to_compile(model, place.place(_shapes(args, config, "float32")), optimizer)
    on_host = (EMBEDDING,) if lora and args.quantize == "nf4" and embedding_on_host(config, lora, remat) else ()
    sequences = case.sequences(mesh)
    shape, document = (case.accumulation, -1, case.length), case.length // args.documents
    token = np.tile(np.arange(case.length, dtype=np.int32), sequences).reshape(shape)
    segments, positions = token // document + 1, token % document
    weights = (positions < document - packed).astype(np.float32)

    def batch(index: int) -> Batch:
        ids = random_model.token_ids(config, sequences, case.length, index)
        whole = Batch(ids[:, :-1].reshape(shape), ids[:, 1:].reshape(shape), weights, segments, positions)
        return place.place_batch(whole, tokens=3)

    start = time.perf_counter()
    step = make_train_step(model, optimizer, rate, next_token_objective())
    step = jax.jit(step, donate_argnums=1, compiler_options=compiler_options(mesh))
    fed: Any = looked_up if on_host else lambda frozen, batch: (frozen, batch)
    compiled = step.lower(*_in_order(fed(frozen, batch(0)), state)).compile()
    return Step(compiled, state, batch, fed, model, on_host, time.perf_counter() - start)


def _in_order(fed: tuple[Any, Any], state: Any) -> tuple[Any, Any, Any]:
    frozen, tokens = fed
    return frozen, state, tokens


def _shapes(args: argparse.Namespace, config: Qwen3MoeConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    import jax

    specs = stored_specs(config, Quantization.default(config, args.quantize) if args.quantize else None)
    return {path: jax.ShapeDtypeStruct(spec.shape, spec.dtype or dtype) for path, spec in specs.items()}


def _arrays(args: argparse.Namespace, step: Step, config: Qwen3MoeConfig, state: Any) -> tuple[Any, Any]:
    """(frozen weights, the state before the first step), on the devices."""
    import jax
    import jax.numpy as jnp

    place = step.model.placement
    if step.model.lora is not None:
        params = random_model.jax_parameters(config, args.quantize, step.on_host, place)
        return jax.block_until_ready(params), state
    params = random_model.jax_parameters(config, placement=place, dtype="float32")
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), state.optimizer)
    return {}, jax.block_until_ready(state._replace(step=jnp.zeros((), jnp.int32), trainable=params, optimizer=zeros))


def _forecast(args: argparse.Namespace, case: Case, config: Qwen3MoeConfig) -> int:
    """Bytes that a device needs, by forecast."""
    from jaxmoe.model.selection import selected_implementations

    selected: Any = selected_implementations(config, "bfloat16")
    lora = case.lora(args.lora_r)
    workload = Workload(
        config, lora, case.batch // case.accumulation, case.length, "bfloat16", case.accumulation, **selected
    )
    remat: Any = args.remat or case.remat
    work = replace(workload, remat=remat, packed=args.documents > 1, quantize=args.quantize, mesh=mesh_of(args))
    return training_forecast(work).total


def timed(one: Callable[[int], float], warmup: int, steps: int) -> tuple[float, list[float]]:
    """(median seconds of a step, the losses), from inputs on the host to the loss on the host."""
    for index in range(warmup):
        one(index)
    seconds, losses = [], []
    for index in range(steps):
        start = time.perf_counter()
        losses.append(one(warmup + index))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), losses


def tokens_per_second(found: Mapping[str, Any], case: Case, mesh: MeshShape = ONE_DEVICE) -> float:
    """Tokens of all devices per second."""
    return case.sequences(mesh) * case.length / found["seconds"]
