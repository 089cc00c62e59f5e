"""What training does to the router, measured on a fixed probe: `--watch-routing`.

The base is the model without adapters; if all parameters are trained, the model as the run starts. Its routing of the
probe is computed when a run starts, or continues, and kept in the host's memory: the router's logits and the experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.cli.progress import progress
from jaxmoe.data.packing import Batch, Sequences
from jaxmoe.distributed import launch
from jaxmoe.distributed.collectives import sum_over_devices
from jaxmoe.distributed.mesh import SEQUENCE_AXES
from jaxmoe.errors import UserError
from jaxmoe.memory import format_bytes, forward_batches
from jaxmoe.model.interface import Params
from jaxmoe.ops.router import expert_counts
from jaxmoe.routing.metrics import load_cv
from jaxmoe.train.prepare import Plan
from jaxmoe.train.step import Model, ProbeRouting

MOST_BYTES = 2**30  # of the base's routing: 64 sequences of 512 tokens of Qwen3-30B-A3B take 0.8 of it
TILE = 128  # tokens
PASSES = 3.85  # forward passes that take as long as a step: 370 by 96 ms, LoRA, 2 x 4096 (docs/performance.md)
MOST_SHARE = 0.02  # of the training time that measuring may take without a word
CHANGED, DIVERGENCE, LOAD_CV, DEAD = "routing_changed", "routing_divergence", "routing_load_cv", "routing_dead_experts"


class WatchSums(NamedTuple):
    """Sums over the tokens of a batch, for each MoE layer: tokens whose set of experts differs from the base's, the
    Jensen-Shannon divergence of the router's probabilities in nats, and routed rows per expert; and all tokens.

    Arrays are JAX's within a step and NumPy's afterwards."""

    changed: Int[Any, " Ls"]
    divergence: Float[Any, " Ls"]
    counts: Int[Any, "Ls E"]
    tokens: Int[Any, ""]


class Watch:
    """Compares the routing of a probe with the base's."""

    def __init__(self, plan: Plan, probe: Sequences, frozen: Params, trainable: Params) -> None:
        """Computes the base's routing; `trainable` are the trained arrays as the run starts.

        Of a long probe, the first sequences count, whose routing takes at most `MOST_BYTES`.

        Raises:
            UserError: a model without MoE layers, or several processes.
        """
        config, settings = plan.model.config, plan.settings
        if not config.sparse_layers:
            raise UserError("watch_routing: expected a model with mixture-of-experts layers, found none")
        if (count := launch.this().count) > 1:  # each would need the base's routing of all sequences
            raise UserError(f"watch_routing: only valid in one process, found {count}")
        self._plan = plan
        self._probe = probe = shortened(probe, 2 * plan.model.mesh.context)
        most = settings.batch_size * forward_batches(plan.workload) * settings.seq_length // probe.seq_length
        self._size = size = even_batches(probe.count(1), most, plan.model.mesh.product(SEQUENCE_AXES))
        token = len(config.sparse_layers) * (4 * config.num_experts + 2 * config.num_experts_per_tok)
        self._count = min(probe.steps(1, size), max(MOST_BYTES // (token * probe.seq_length * size), 1))
        model = plan.model._replace(packed=probe.packed)
        self._routing = jax.jit(make_routing_step(model))
        self._compared = jax.jit(make_comparing_step(model))
        placement = model.placement
        self._lies = jax.tree.map(placement.sharding, _specs(model)) if model.mesh.size > 1 else None
        self.notices = _notices(plan, probe, size * self._count)
        self.seconds = 0.0  # that measuring took so far
        self._base: list[ProbeRouting] = []
        base = of_base(model, frozen, trainable)
        with progress("routing of the probe by the base model") as show:
            for number, batch in enumerate(self._batches(), start=1):
                arrays, fed = plan.fed(frozen, batch)
                self._base.append(ProbeRouting(*map(np.asarray, self._routing(arrays, base, fed))))
                show(number, self._count, f"{number} of {self._count} batches")

    def _batches(self) -> Iterator[Batch]:
        for number in range(self._count):
            yield self._plan.model.placement.place_batch(self._probe.batch(number, (self._size,)), tokens=2)

    def __call__(self, frozen: Params, trainable: Params) -> dict[str, list[float]]:
        """For each MoE layer the share of the probe's tokens that use other experts than with the base, the mean
        divergence of the router's probabilities from the base's in nats, the coefficient of variation of the experts'
        load, and how many experts no token uses."""
        started, parts = time.perf_counter(), []
        for batch, base in zip(self._batches(), self._base, strict=True):
            arrays, fed = self._plan.fed(frozen, batch)
            # Sent before the pass begins, and copied while it runs: memory of a GPU that is taken later may only be
            # written to when the pass is over.
            fed, base = jax.device_put(fed), jax.device_put(base, self._lies)
            parts.append(self._compared(self._routing(arrays, trainable, fed), base, fed.segment_ids))
            jax.block_until_ready(parts[-2:-1])  # the device holds the routing of two batches at most
        sums = [np.asarray(np.sum(each, axis=0, dtype=np.float64)) for each in zip(*jax.device_get(parts), strict=True)]
        self.seconds += time.perf_counter() - started
        return watched(*sums)


def shortened(probe: Sequences, multiple: int) -> Sequences:
    """The probe's documents in sequences of half the length, a quarter, ..., whichever have the fewest places for
    tokens and are then the shortest: attention takes less time in short sequences, and least with one document in each.

    Kernels want whole tiles, so a length is a multiple of `TILE`, and of `multiple`.
    """
    lengths = [probe.seq_length]
    while lengths[-1] % (2 * math.lcm(TILE, multiple)) == 0:
        lengths.append(lengths[-1] // 2)
    found = [probe.cut_to(length) for length in lengths if length >= probe.longest]
    return min(found, key=lambda each: (each.count(1) * each.seq_length, each.seq_length))


def even_batches(sequences: int, most: int, multiple: int) -> int:
    """The size of batches of at most `most` sequences, a multiple of `multiple`, such that as few batches as possible
    hold all sequences, and as few of their sequences as possible are empty."""
    batches = -(-sequences // most)
    return -(-sequences // (batches * multiple)) * multiple


def _notices(plan: Plan, probe: Sequences, used: int) -> list[str]:
    """What to say about a probe that is too long, or measured so often that training takes noticeably longer; `used`
    sequences of it are measured, empty ones included."""
    settings = plan.settings
    lines = []
    if used < probe.count(1):
        lines.append(
            f"watch_routing: the first {used:,} of {probe.count(1):,} sequences of {probe.seq_length:,} tokens are "
            f"used, since the base's routing may take {format_bytes(MOST_BYTES)}"
        )
    tokens_of_step = settings.accumulation * settings.batch_size * settings.seq_length
    tokens_of_step *= 2 if settings.learns_from_pairs else 1
    steps = used * probe.seq_length / (PASSES * tokens_of_step)
    every = min(settings.watch_every or plan.total_steps, plan.total_steps)
    if steps > MOST_SHARE * every:
        lines.append(
            f"watch_routing: measuring takes about as long as {steps:.1f} steps, {steps / every:.1%} of the training; "
            f"--watch-every {math.ceil(steps / MOST_SHARE)} or a shorter probe would make it {MOST_SHARE:.0%}"
        )
    return lines


def watched(changed: np.ndarray, divergence: np.ndarray, counts: np.ndarray, tokens: Any) -> dict[str, list[float]]:
    """What `Watch` reports, given the sums over all batches, in the order of `WatchSums`."""
    return {
        CHANGED: (changed / tokens).tolist(),
        DIVERGENCE: (divergence / tokens).tolist(),
        LOAD_CV: np.asarray(load_cv(counts)).tolist(),
        DEAD: np.sum(counts == 0, axis=1).tolist(),
    }


def watch_in_words(numbers: Mapping[str, Any]) -> str:
    """One line about the numbers of a watch."""
    changed, divergence, dead = (numbers[name] for name in (CHANGED, DIVERGENCE, DEAD))
    return f"{np.mean(changed):.1%} of the probe's tokens use other experts than with the base model (mean of " + (
        f"{len(changed)} layers), divergence {np.mean(divergence):.2g} nats, {sum(dead):.0f} unused experts"
    )


def of_base(model: Model, frozen: Params, trainable: Params) -> Params:
    """The trainable arrays with which the model routes as without its adapters: B is 0, and weights that the adapter
    holds in full are the base's. If all parameters are trained, the arrays as they are.

    So one program routes base and adapted model. A program without adapters rounds 16-bit numbers elsewhere, and tokens
    would change their experts before anything is trained.
    """
    if model.lora is None:
        return trainable
    zeros = {path: jnp.zeros_like(array) for path, array in trainable.items() if path.endswith(".lora_B")}
    held = {
        path: jax.device_put(frozen[path], trainable[path].sharding).astype(trainable[path].dtype)
        for path in model.lora.saved_paths
        if path in frozen  # a new head routes nothing
    }
    return {**trainable, **zeros, **held}


def make_routing_step(model: Model) -> Callable[[Params, Params, Batch], ProbeRouting]:
    """(frozen, trainable, batch [B, T]) -> the routing of the batch."""
    placement = model.placement

    def step(frozen: Params, trainable: Params, batch: Batch) -> ProbeRouting:
        specs = placement.specs(frozen), placement.specs(trainable), placement.batch_specs(batch, tokens=2)
        return placement.run(model.routing, specs, _specs(model))(frozen, trainable, batch)

    return step


def make_comparing_step(model: Model) -> Callable[[ProbeRouting, ProbeRouting, Array], WatchSums]:
    """(the routing of a batch, the base's routing of it, its segment ids [B, T]) -> sums over its tokens."""
    placement, everywhere = model.placement, PartitionSpec()

    def on_a_device(now: ProbeRouting, base: ProbeRouting, segment_ids: Int[Array, "B T"]) -> WatchSums:
        return sum_over_devices(compared(now, base, segment_ids > 0), model.mesh)

    specs = _specs(model), _specs(model), placement.spec("batch", "sequence")
    return placement.run(on_a_device, specs, WatchSums._make([everywhere] * 4))


def _specs(model: Model) -> ProbeRouting:
    return ProbeRouting._make([model.placement.spec(None, "batch", "sequence")] * 2)


def compared(now: ProbeRouting, base: ProbeRouting, valid: Bool[Array, "B T"]) -> WatchSums:
    """The sums over the valid tokens of a batch."""
    num_experts = now.logits.shape[-1]
    found = jnp.any(now.experts[..., :, None] == base.experts[..., None, :], axis=-1)  # each expert is there once
    rows = now.experts.astype(jnp.int32).reshape(len(now.experts), -1, now.experts.shape[-1])
    counts = jax.vmap(lambda experts: expert_counts(experts, valid.reshape(-1), num_experts))(rows)
    return WatchSums(
        jnp.sum(~jnp.all(found, axis=-1) & valid, axis=(1, 2), dtype=jnp.int32),
        jnp.sum(jnp.where(valid, divergence(now.logits, base.logits), 0), axis=(1, 2)),
        counts,
        jnp.sum(valid, dtype=jnp.int32),
    )


def divergence(logits: Float[Array, "*tokens E"], base: Float[Array, "*tokens E"]) -> Float[Array, "*tokens"]:
    """Jensen-Shannon divergence in nats of softmax(logits) from softmax(base), as
    `jaxmoe.routing.metrics.jensen_shannon`; 0 for equal logits.

    A difference of entropies would lose small divergences in float32. With the roots a and b of the two probabilities
    and c = log b - log a, the divergence is half the sum of (b^2 - a^2) c - (a^2 + b^2) log cosh c, where cosh c is
    1 + (b - a)^2 / (2 a b): rounding errors of a and b cancel to first order. (With d = 2 c, the sum of -a^2 log1p(
    expm1(d) / 2) would be as exact, but XLA for CPUs makes zeros of it in a compiled program.)
    """
    (a, logits, log_sum), (b, base, log_sum_of_base) = _root_of_softmax(logits), _root_of_softmax(base)
    c = ((base - logits) - (log_sum_of_base - log_sum)) / 2
    log_cosh = jnp.log1p(jnp.square(b - a) / (2 * a * b))
    terms = (b - a) * (b + a) * c - (jnp.square(a) + jnp.square(b)) * log_cosh
    return jnp.maximum(jnp.sum(terms, axis=-1) / 2, 0)


def _root_of_softmax(logits: Float[Array, "*tokens E"]) -> tuple[Array, Array, Array]:
    """sqrt(softmax(logits)) [*tokens, E], the logits [*tokens, E] and log(sum(exp(logits))) [*tokens, 1], where logits
    72 below the largest one and less are raised to that."""
    largest = jnp.max(logits, axis=-1, keepdims=True)
    logits = jnp.maximum(logits, largest - 72)
    root = jnp.exp((logits - largest) / 2)
    total = jnp.sum(jnp.square(root), axis=-1, keepdims=True)
    return root * jax.lax.rsqrt(total), logits, largest + jnp.log(total)
