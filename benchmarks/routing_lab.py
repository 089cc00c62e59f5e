"""What training the router, and watching it, costs in speed and memory: `python -m benchmarks.routing_lab`.

All steps are LoRA steps of one model with random weights of a published shape; each is compared with the one that it
changes. All programs are compiled first, several at a time; XLA's forecast of a program's memory is compared, since one
process runs them all. The probe of `--watch-routing` has 64 documents of 512 tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from benchmarks import random_model, shapes
from benchmarks.jaxmoe_step import LEARNING_RATE
from jaxmoe.cli.arguments import ArgumentParser, add_memory_limit, run
from jaxmoe.config import LoraConfig, Qwen3MoeConfig, expand_targets
from jaxmoe.memory import format_bytes

DOCUMENTS, DOCUMENT, EVERY = 64, 512, 50


class Variant(NamedTuple):
    """A training step: its adapters' targets, how many experts of a layer have one (0: all), the weight of the routing
    penalty, whether the base's router logits come with the batch, and whether routers learn as in DenseMixer."""

    targets: str
    experts: int = 0
    penalty: float = 0.0
    captured: bool = False
    dense: bool = False


# name -> the variant, and the one that it is compared with
VARIANTS: dict[str, tuple[Variant, str | None]] = {
    "attention": (Variant("attention"), None),
    "--routing-penalty": (Variant("attention", penalty=0.1), "attention"),
    "--routing-base": (Variant("attention", penalty=0.1, captured=True), "attention"),
    "--dense-mixer": (Variant("attention", dense=True), "attention"),
    "attention,experts": (Variant("attention,experts"), None),
    "--lora-experts top:16": (Variant("attention,experts", experts=16), "attention,experts"),
}


class Program(NamedTuple):
    """A compiled program, and a function that calls it once with these weights and waits."""

    compiled: Any
    call: Callable[[Any], None]

    @property
    def bytes(self) -> int:
        """What it holds at its peak, the weights included, by XLA's own forecast."""
        memory = self.compiled.memory_analysis()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return held + memory.temp_size_in_bytes


def most_used(config: Qwen3MoeConfig, count: int) -> tuple[tuple[int, ...], ...]:
    """The experts of each layer that the random routers choose most: those with the longest vectors."""
    lengths = np.linalg.norm(random_model.routers(config), axis=-1)
    return tuple(tuple(sorted(np.argsort(-layer)[:count].tolist())) for layer in lengths)


def packed(config: Qwen3MoeConfig, shape: tuple[int, ...], document: int, *, logits: bool = False) -> Any:
    """A batch [..., T] of random documents of one length, with captured logits if asked for."""
    from jaxmoe.data.packing import Batch

    tokens = int(np.prod(shape))
    ids = random_model.token_ids(config, 1, tokens, 0)[0].astype(np.int32)
    place = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    batch = Batch(
        ids[:-1].reshape(shape),
        ids[1:].reshape(shape),
        np.asarray(place % document < document - 1, np.float32),
        place // document + 1,
        place % document,
    )
    if not logits:
        return batch
    routers = len(config.sparse_layers), config.num_experts
    return batch._replace(base_logits=np.zeros((*shape, *routers), np.float32))


def training(variant: Variant, config: Qwen3MoeConfig, shape: tuple[int, int], frozen: Any) -> Program:
    """A training step over sequences [B, T], compiled; `frozen` are shapes or weights."""
    import jax

    from jaxmoe.model.init import init_adapters
    from jaxmoe.train.loss import Term, next_token_objective
    from jaxmoe.train.router_losses import RoutingPenalty
    from jaxmoe.train.step import Model, adamw, initial_state, learning_rate, make_train_step

    chosen = most_used(config, variant.experts) if variant.experts else ()
    lora = LoraConfig(r=16, targets=expand_targets(variant.targets.split(",")), adapted_experts=chosen)
    asks = variant.penalty > 0
    model = Model(config, lora, "bfloat16", "fast", router_logits=asks, dense_router=variant.dense)
    model = model._replace(base_router=asks and not variant.captured)
    rate = learning_rate("constant", LEARNING_RATE, 0, 1)
    optimizer = adamw(rate, model, max_grad_norm=1.0, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-8)
    objective = next_token_objective() + ((Term(RoutingPenalty(), variant.penalty),) if asks else ())
    batch = packed(config, (1, *shape), min(DOCUMENT, shape[1]), logits=variant.captured)
    draw = jax.jit(lambda: initial_state(init_adapters(config, lora, jax.random.key(1)), optimizer))
    step = jax.jit(make_train_step(model, optimizer, rate, objective), donate_argnums=1)
    compiled = step.lower(frozen, jax.eval_shape(draw), batch).compile()
    held: list[Any] = []

    def call(weights: Any) -> None:
        state, metrics = compiled(weights, held.pop() if held else draw(), batch)
        held.append(state)
        assert np.isfinite(float(metrics.loss))

    return Program(compiled, call)


def watching(config: Qwen3MoeConfig, shape: tuple[int, int], frozen: Any) -> Program:
    """One measurement of the probe in batches [B, T], compiled; the base's routing lies on the host, as in a run."""
    import jax

    from jaxmoe.model.init import init_adapters
    from jaxmoe.train.step import Model, ProbeRouting
    from jaxmoe.train.watch import make_watch_step

    lora = LoraConfig(r=16, targets=expand_targets(["attention"]))
    step = jax.jit(make_watch_step(Model(config, lora, "bfloat16", "fast")))
    batch = packed(config, shape, min(DOCUMENT, shape[1]))
    sparse, adapters = (len(config.sparse_layers), *shape), init_adapters(config, lora, jax.random.key(1))
    logits = np.zeros((*sparse, config.num_experts), np.float32)
    base = ProbeRouting(logits, np.zeros((*sparse, config.num_experts_per_tok), np.int32))
    compiled = step.lower(frozen, adapters, batch, base).compile()
    count = max(DOCUMENTS * DOCUMENT // int(np.prod(shape)), 1)

    def call(weights: Any) -> None:
        jax.device_get([compiled(weights, adapters, batch, base) for _ in range(count)])

    return Program(compiled, call)


def seconds_of(program: Program, weights: Any, repeats: int) -> float:
    """The median of some calls after two."""
    found = []
    for index in range(2 + repeats):
        start = time.perf_counter()
        program.call(weights)
        if index > 1:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def main() -> None:
    """Prints the table."""
    parser = ArgumentParser(description="What training and watching the router costs.")
    shapes.add_arguments(parser)
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="sequences of a step (default: 2)")
    parser.add_argument("--length", type=int, default=4096, metavar="N", help="tokens per sequence (default: 4096)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="timed calls (default: 5)")
    add_memory_limit(parser)
    args = parser.parse_args()
    from jaxmoe.cli import xla

    xla.configure(args.memory_limit)
    import jax

    from jaxmoe.parameters import parameter_specs

    config, shape = shapes.config_of(args), (args.batch, args.length)
    specs = parameter_specs(config)
    frozen = {path: jax.ShapeDtypeStruct(spec.shape, "bfloat16") for path, spec in specs.items()}
    short = (args.batch * args.length // DOCUMENT, DOCUMENT) if args.length > DOCUMENT else shape
    start = time.perf_counter()
    with ThreadPoolExecutor(len(VARIANTS) + 2) as pool:
        steps = {name: pool.submit(training, each, config, shape, frozen) for name, (each, _) in VARIANTS.items()}
        watches = {size: pool.submit(watching, config, size, frozen) for size in dict.fromkeys((shape, short))}
    print(f"{len(steps) + len(watches)} programs compiled in {time.perf_counter() - start:.0f} s", flush=True)
    weights = jax.block_until_ready(random_model.jax_parameters(config))
    device = jax.devices()[0].device_kind
    print(f"{args.preset}, {config.num_hidden_layers} layers, {args.batch} x {args.length} tokens, {device}")
    record: dict[str, Any] = {}
    for name, (_, before) in VARIANTS.items():
        record[name] = _measured(steps[name].result, weights, args.steps)
        print(f"{name:26} {_in_words(record, name, before)}", flush=True)
    for size, watch in watches.items():
        name = f"watch, {size[0]} x {size[1]}"
        record[name] = _measured(watch.result, weights, args.steps)
        if "seconds" in record[name] and "seconds" in record["attention"]:
            record[name]["share"] = record[name]["seconds"] / (EVERY * record["attention"]["seconds"])
        print(f"{name:26} {_in_words(record, name, None)}", flush=True)
    shapes.write_json(args.json, record)


def _measured(program: Callable[[], Program], weights: Any, repeats: int) -> dict[str, Any]:
    """Seconds and bytes of a program, or why there are none: the others count all the same."""
    try:
        found = program()
        return {"bytes": found.bytes, "seconds": seconds_of(found, weights, repeats)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def _in_words(record: Mapping[str, Mapping[str, Any]], name: str, before: str | None) -> str:
    found, other = record[name], record.get(before or "", {})
    if "failed" in found:
        return found["failed"]
    words = f"{1e3 * found['seconds']:8.1f} ms  {format_bytes(found['bytes']):>9}"
    if "seconds" in other:
        words += f"  {found['seconds'] / other['seconds'] - 1:+6.1%} time, {format_bytes(other['bytes'])} without"
    return words + (f"  {found['share']:.2%} of the training, every {EVERY} steps" if "share" in found else "")


if __name__ == "__main__":
    run(main)
