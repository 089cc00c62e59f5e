"""What training the router, and watching it, costs in speed and memory: `python -m benchmarks.routing_lab`.

All steps are LoRA steps of one model with random weights of a published shape, with one document per sequence; each is
compared with the one that it changes. The programs of a part are compiled at the same time, then timed, then the next
part's. XLA's account of a program's memory is compared, since one process runs them all. The probe of `--watch-routing`
has 64 documents of 512 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
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
    penalty, whether the base's router logits come with the batch, whether routers learn as in DenseMixer, and the step
    that it is compared with."""

    targets: str = "attention"
    experts: int = 0
    penalty: float = 0.0
    captured: bool = False
    dense: bool = False
    before: str | None = "attention"


class Measurement(NamedTuple):
    """A measurement of the probe: how many of its documents lie in a sequence, and the tokens of a batch as a multiple
    of a step's. The base's routing lies on the host, as in a run."""

    packed: int
    steps: int = 1


PARTS: dict[str, dict[str, Variant | Measurement]] = {
    "watch": {
        "attention": Variant(before=None),
        "watch, packed as the training data": Measurement(8),
        "watch, one document per sequence": Measurement(1),
        "the same, in one batch": Measurement(1, steps=4),
    },
    "experts": {
        "attention,experts": Variant("attention,experts", before=None),
        "--lora-experts top:16": Variant("attention,experts", experts=16, before="attention,experts"),
    },
    "penalty": {
        "--routing-penalty": Variant(penalty=0.1),
        "--routing-base": Variant(penalty=0.1, captured=True),
    },
    "dense-mixer": {"--dense-mixer": Variant(dense=True)},
}


class Program(NamedTuple):
    """A compiled program, and a function that calls it once with these weights and waits."""

    compiled: Any
    call: Callable[[Any], None]

    @property
    def bytes(self) -> int:
        """What it holds at its peak, the weights included, by XLA's account."""
        memory = self.compiled.memory_analysis()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return held + memory.temp_size_in_bytes


def most_used(config: Qwen3MoeConfig, count: int) -> tuple[tuple[int, ...], ...]:
    """The experts of each layer that the random routers choose most: those with the longest vectors."""
    lengths = np.linalg.norm(random_model.routers(config), axis=-1)
    return tuple(tuple(sorted(np.argsort(-layer)[:count].tolist())) for layer in lengths)


def random_batch(config: Qwen3MoeConfig, shape: tuple[int, ...], document: int) -> Any:
    """A batch [..., T] of random documents of one length."""
    from jaxmoe.data.packing import Batch

    ids = random_model.token_ids(config, 1, int(np.prod(shape)), 0)[0].astype(np.int32)
    place = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    learned = np.asarray(place % document < document - 1, np.float32)
    return Batch(ids[:-1].reshape(shape), ids[1:].reshape(shape), learned, place // document + 1, place % document)


def training(variant: Variant, config: Qwen3MoeConfig, shape: tuple[int, int], frozen: Any) -> Program:
    """A training step over sequences [B, T], compiled; `frozen` are shapes or weights."""
    import jax

    from jaxmoe.model.init import init_adapters
    from jaxmoe.train.loss import Term, next_token_objective
    from jaxmoe.train.optimizers import adamw, learning_rate
    from jaxmoe.train.router_losses import RoutingPenalty
    from jaxmoe.train.step import Model, initial_state, make_train_step

    chosen = most_used(config, variant.experts) if variant.experts else ()
    lora = LoraConfig(r=16, targets=expand_targets(variant.targets.split(",")), adapted_experts=chosen)
    asks = variant.penalty > 0
    model = Model(config, lora, "bfloat16", "fast", packed=False, router_logits=asks, dense_router=variant.dense)
    model = model._replace(base_router=asks and not variant.captured)
    rate = learning_rate("constant", LEARNING_RATE, 0, 1)
    optimizer = adamw(rate, model, max_grad_norm=1.0, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-8)
    objective = next_token_objective() + ((Term(RoutingPenalty(), variant.penalty),) if asks else ())
    batch = random_batch(config, (1, *shape), shape[1])
    if variant.captured:
        routers = len(config.sparse_layers), config.num_experts
        batch = batch._replace(base_logits=np.zeros((1, *shape, *routers), np.float32))
    draw = jax.jit(lambda: initial_state(init_adapters(config, lora, jax.random.key(1)), optimizer))
    step = jax.jit(make_train_step(model, optimizer, rate, objective), donate_argnums=1)
    compiled = step.lower(frozen, jax.eval_shape(draw), batch).compile()
    held: list[Any] = []

    def call(weights: Any) -> None:
        state, metrics = compiled(weights, held.pop() if held else draw(), batch)
        assert np.isfinite(float(metrics.loss))
        held.append(state)

    return Program(compiled, call)


def watching(how: Measurement, config: Qwen3MoeConfig, tokens: int, frozen: Any) -> Program:
    """One measurement of the probe in batches of `tokens` times the measurement's multiple, compiled."""
    import jax

    from jaxmoe.model.init import init_adapters
    from jaxmoe.train.step import Model, ProbeRouting
    from jaxmoe.train.watch import make_comparing_step, make_routing_step

    lora = LoraConfig(r=16, targets=expand_targets(["attention"]))
    model = Model(config, lora, "bfloat16", "fast", packed=how.packed > 1)
    length = how.packed * DOCUMENT
    shape = max(how.steps * tokens // length, 1), length
    batch, adapters = random_batch(config, shape, DOCUMENT), init_adapters(config, lora, jax.random.key(1))
    sparse = (len(config.sparse_layers), *shape)
    logits = np.zeros((*sparse, config.num_experts), np.float32)
    base = ProbeRouting(logits, np.zeros((*sparse, config.num_experts_per_tok), np.uint8))
    compiled = jax.jit(make_routing_step(model)).lower(frozen, adapters, batch).compile()
    compare = jax.jit(make_comparing_step(model)).lower(base, base, batch.segment_ids).compile()
    count = max(DOCUMENTS * DOCUMENT // int(np.prod(shape)), 1)

    def call(weights: Any) -> None:
        sums = []
        for _ in range(count):
            sent, known = jax.device_put((batch, base))  # before the pass, as in a run
            sums.append(compare(compiled(weights, adapters, sent), known, sent.segment_ids))
            jax.block_until_ready(sums[-2:-1])
        jax.device_get(sums)

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
    """Prints a line for each program as soon as it is timed."""
    parser = ArgumentParser(description="What training and watching the router costs.")
    shapes.add_arguments(parser)
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="sequences of a step (default: 2)")
    parser.add_argument("--length", type=int, default=4096, metavar="N", help="tokens per sequence (default: 4096)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="timed calls (default: 5)")
    add_memory_limit(parser)
    args = parser.parse_args()
    from jaxmoe.cli import xla

    xla.configure(args.memory_limit)
    import jax

    config = shapes.config_of(args)
    device = jax.devices()[0].device_kind
    size = f"{config.num_hidden_layers} layers, {args.batch} x {args.length} tokens"
    print(f"{args.preset}, {size}, {device}", flush=True)
    weights = random_model.jax_parameters(config)
    record: dict[str, Any] = {}
    for part in args.part or PARTS:
        for name, program in compiled_part(part, args, config, weights):
            record[name] = _measured(program, weights, args.steps)
            print(f"{name:36} {_in_words(record, name, _of(part, name))}", flush=True)
            shapes.write_json(args.json, record)


def compiled_part(
    part: str, args: argparse.Namespace, config: Qwen3MoeConfig, weights: Any
) -> list[tuple[str, Callable[[], Program]]]:
    """The names of a part's programs, and functions that return them or raise what failed."""
    frozen, shape = {path: _shape(array) for path, array in weights.items()}, (args.batch, args.length)

    def compiled(what: Variant | Measurement) -> Program:
        if isinstance(what, Variant):
            return training(what, config, shape, frozen)
        return watching(what, config, args.batch * args.length, frozen)

    start = time.perf_counter()
    with ThreadPoolExecutor(len(PARTS[part])) as pool:
        programs = [(name, pool.submit(compiled, what)) for name, what in PARTS[part].items()]
    print(f"({part}: {len(programs)} programs compiled in {time.perf_counter() - start:.0f} s)", flush=True)
    return [(name, program.result) for name, program in programs]


def _shape(array: Any) -> Any:
    import jax

    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _of(part: str, name: str) -> str | None:
    """The step that a program is compared with."""
    what = PARTS[part][name]
    return what.before if isinstance(what, Variant) else "attention"


def _measured(program: Callable[[], Program], weights: Any, repeats: int) -> dict[str, Any]:
    """Seconds and bytes of a program, or why there are none: the others count all the same."""
    try:
        found = program()
        return {"bytes": found.bytes, "seconds": seconds_of(found, weights, repeats)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def _in_words(record: dict[str, dict[str, Any]], name: str, before: str | None) -> str:
    found, other = record[name], record.get(before or "", {})
    if "failed" in found:
        return found["failed"]
    words = f"{1e3 * found['seconds']:8.1f} ms  {format_bytes(found['bytes']):>9}"
    if "seconds" not in other:
        return words
    if name in PARTS["watch"]:
        found["share"] = found["seconds"] / (EVERY * other["seconds"])
        return f"{words}  {found['share']:.2%} of the training, every {EVERY} steps"
    return f"{words}  {found['seconds'] / other['seconds'] - 1:+6.1%} time, {format_bytes(other['bytes'])} without"


if __name__ == "__main__":
    run(main)
