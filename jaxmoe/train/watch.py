"""What training does to the router, measured on a fixed probe: `--watch-routing`.

The base is the model without adapters; if all parameters are trained, the model as the run starts. Its routing of the
probe is computed when a run starts, or continues, and kept in the host's memory: the router's logits and the experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
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
from jaxmoe.memory import format_bytes
from jaxmoe.model.interface import Params
from jaxmoe.ops.router import expert_counts
from jaxmoe.routing.metrics import load_cv
from jaxmoe.train.prepare import Plan
from jaxmoe.train.step import Model, ProbeRouting

MOST_BYTES = 2**30  # of the base's routing: 64 sequences of 512 tokens of Qwen3-30B-A3B take 0.8 of it
PASSES = 3  # forward passes that take as long as a step: 366 ms by 124 ms, LoRA, 2 x 4096 (docs/performance.md)
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
        config = plan.model.config
        if not config.sparse_layers:
            raise UserError("watch_routing: expected a model with mixture-of-experts layers, found none")
        if (count := launch.this().count) > 1:  # each would need the base's routing of all sequences
            raise UserError(f"watch_routing: only valid in one process, found {count}")
        self._plan = plan
        share = plan.model.mesh.product(SEQUENCE_AXES)
        self._size = size = even_batches(probe.count(1), plan.settings.batch_size, share)
        token = len(config.sparse_layers) * (4 * config.num_experts + 2 * config.num_experts_per_tok)
        self._most = max(MOST_BYTES // (token * plan.settings.seq_length * size), 1)
        model = plan.model._replace(packed=probe.packed)
        base_step = jax.jit(make_base_step(model))
        self._watch_step = jax.jit(make_watch_step(model))
        total = min(probe.steps(1, size), self._most)
        self.notices = _notices(plan, probe.count(1), size, total)
        self.seconds = 0.0  # that measuring took so far
        self._base: list[ProbeRouting] = []
        with progress("routing of the probe by the base model") as show:
            for number, batch in enumerate(plan.probe_batches(size, self._most), start=1):
                arrays, fed = plan.fed(frozen, batch)
                self._base.append(ProbeRouting(*map(np.asarray, base_step(arrays, trainable, fed))))
                show(number, total, f"{number} of {total} batches")

    def __call__(self, frozen: Params, trainable: Params) -> dict[str, list[float]]:
        """For each MoE layer the share of the probe's tokens that use other experts than with the base, the mean
        divergence of the router's probabilities from the base's in nats, the coefficient of variation of the experts'
        load, and how many experts no token uses."""
        started, parts = time.perf_counter(), []
        for batch, base in zip(self._plan.probe_batches(self._size, self._most), self._base, strict=True):
            arrays, fed = self._plan.fed(frozen, batch)
            parts.append(self._watch_step(arrays, trainable, fed, base))
        sums = [np.asarray(np.sum(each, axis=0, dtype=np.float64)) for each in zip(*jax.device_get(parts), strict=True)]
        self.seconds += time.perf_counter() - started
        return watched(*sums)


def even_batches(sequences: int, most: int, multiple: int) -> int:
    """The size of batches of at most `most` sequences, a multiple of `multiple`, such that as few batches as possible
    hold all sequences, and as few of their sequences as possible are empty."""
    batches = -(-sequences // most)
    return -(-sequences // (batches * multiple)) * multiple


def _notices(plan: Plan, sequences: int, size: int, batches: int) -> list[str]:
    """What to say about a probe that is too long, or measured so often that training takes noticeably longer."""
    settings = plan.settings
    lines = []
    if batches * size < sequences:
        lines.append(
            f"watch_routing: the first {batches * size:,} of {sequences:,} sequences are used, since the base's "
            f"routing may take {format_bytes(MOST_BYTES)}"
        )
    steps = batches * size / (PASSES * settings.accumulation * settings.batch_size)
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


def make_base_step(model: Model) -> Callable[[Params, Params, Batch], ProbeRouting]:
    """(frozen, trainable, batch [B, T]) -> the base's routing of the batch."""
    return _on_devices(model, partial(model.routing, adapted=False), _spec_of_routing(model), with_base=False)


def make_watch_step(model: Model) -> Callable[[Params, Params, Batch, ProbeRouting], WatchSums]:
    """(frozen, trainable, batch [B, T], the base's routing of it) -> sums over its tokens."""

    def on_a_device(frozen: Params, trainable: Params, batch: Batch, base: ProbeRouting) -> WatchSums:
        now = model.routing(frozen, trainable, batch, adapted=True)
        return sum_over_devices(compared(now, base, batch.segment_ids > 0), model.mesh)

    return _on_devices(model, on_a_device, WatchSums._make([PartitionSpec()] * 4), with_base=True)


def _spec_of_routing(model: Model) -> ProbeRouting:
    return ProbeRouting._make([model.placement.spec(None, "batch", "sequence")] * 2)


def _on_devices(model: Model, function: Callable[..., Any], out: Any, *, with_base: bool) -> Callable[..., Any]:
    """`function` on every device of the mesh, each with its share of the sequences."""

    def step(frozen: Params, trainable: Params, batch: Batch, *base: ProbeRouting) -> Any:
        placement = model.placement
        lie = placement.specs(frozen), placement.specs(trainable), placement.batch_specs(batch, tokens=2)
        lie += (_spec_of_routing(model),) if with_base else ()
        return placement.run(function, lie, out)(frozen, trainable, batch, *base)

    return step


def compared(now: ProbeRouting, base: ProbeRouting, valid: Bool[Array, "B T"]) -> WatchSums:
    """The sums over the valid tokens of a batch."""
    num_experts = now.logits.shape[-1]
    differs = jnp.any(jnp.sort(now.experts, axis=-1) != jnp.sort(base.experts, axis=-1), axis=-1)
    rows = now.experts.astype(jnp.int32).reshape(len(now.experts), -1, now.experts.shape[-1])
    counts = jax.vmap(lambda experts: expert_counts(experts, valid.reshape(-1), num_experts))(rows)
    return WatchSums(
        jnp.sum(differs & valid, axis=(1, 2), dtype=jnp.int32),
        jnp.sum(jnp.where(valid, divergence(now.logits, base.logits), 0), axis=(1, 2)),
        counts,
        jnp.sum(valid, dtype=jnp.int32),
    )


def divergence(logits: Float[Array, "*tokens E"], base: Float[Array, "*tokens E"]) -> Float[Array, "*tokens"]:
    """Jensen-Shannon divergence in nats of softmax(logits) from softmax(base), as
    `jaxmoe.routing.metrics.jensen_shannon`; 0 for equal logits.

    A difference of entropies would lose small divergences in float32. With d = log q - log p, the divergence is half
    the sum of (q - p) d / 2 - (p + q) log cosh(d / 2), whose two terms are both of the size of the result. (The sum of
    -p log1p(expm1(d) / 2) would be as exact, but XLA for CPUs makes zeros of it in a compiled program.)
    """
    p, q = jax.nn.softmax(logits), jax.nn.softmax(base)
    log_of = lambda each: each - jax.nn.logsumexp(each, axis=-1, keepdims=True)
    d = jnp.clip(log_of(base) - log_of(logits), -80, 80)  # beyond that one of the two is 0 in float32
    log_cosh = jnp.log1p(2 * jnp.square(jnp.sinh(d / 4)))
    return jnp.maximum(jnp.sum((q - p) * d / 2 - (p + q) * log_cosh, axis=-1) / 2, 0)
