"""Changing what the router does, and what that does to the model: removed, forced and biased experts, by layer.

An intervention names layers by their index in the model. `effects` measures one expert after the other: a program that
is compiled once takes the control as an argument.
"""

from __future__ import annotations

import argparse
import csv
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from captures import LabelledText
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.errors import UserError
from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM
from jaxmoe.model.decoder import forward, head_weight
from jaxmoe.model.interface import Options, Tokens
from jaxmoe.ops.contraction import PRECISION
from jaxmoe.ops.router import RoutingControl
from jaxmoe.routing import metrics
from jaxmoe.routing.capture import PackedRows, pack_in_order

Action = Literal["ablate", "force"]


@dataclass(frozen=True)
class Intervention:
    """Which experts of which layers (model's index) are removed, forced into the k of every token, or biased.

    A removed expert keeps its router probability, it is only not chosen: removing one that no token uses changes
    nothing. `ablate` and `force` map a layer to experts, `bias` a layer to {expert: what is added to its router logit}.
    """

    ablate: dict[int, tuple[int, ...]]
    force: dict[int, tuple[int, ...]]
    bias: dict[int, dict[int, float]]

    def control(self, config: Qwen3MoeConfig) -> RoutingControl | None:
        """The control of the forward pass; None where nothing is changed.

        Raises:
            UserError: a layer without experts, an expert that does not exist or is both removed and forced, too many.
        """
        E, k = config.num_experts, config.num_experts_per_tok
        slots = {layer: slot for slot, layer in enumerate(config.sparse_layers)}
        bias = np.zeros((len(slots), E), np.float32)
        selection = np.zeros((len(slots), E), np.int32)
        for name, layers in (("ablate", self.ablate), ("force", self.force), ("bias", self.bias)):
            for layer, experts in layers.items():
                if layer not in slots:
                    raise UserError(f"{name}: expected a layer with experts, found layer {layer}")
                if wrong := [expert for expert in experts if not 0 <= expert < E]:
                    raise UserError(f"{name}: expected an expert below {E}, found {wrong[0]} in layer {layer}")
        for layer, experts in self.bias.items():
            for expert, value in experts.items():
                bias[slots[layer], expert] += value
        for layer, experts in self.ablate.items():
            selection[slots[layer], list(experts)] = -1
            if E - len(set(experts)) < k:
                raise UserError(f"ablate: expected at least {k} experts to be left in layer {layer}, found fewer")
        for layer, experts in self.force.items():
            if both := sorted(set(experts) & set(self.ablate.get(layer, ()))):
                raise UserError(
                    f"force: expected experts that are not removed, found {both[0]} in layer {layer} in both"
                )
            selection[slots[layer], list(experts)] = 1
            if len(set(experts)) > k:
                raise UserError(f"force: expected at most {k} experts in layer {layer}, found {len(set(experts))}")
        if not (bias.any() or selection.any()):
            return None
        given = lambda array: jnp.asarray(array) if array.any() else None
        return RoutingControl(logit_bias=given(bias), selection=given(selection))

    def describe(self) -> dict[str, Any]:
        """What a manifest says: only what is there."""
        parts = {"ablate": self.ablate, "force": self.force, "bias": self.bias}
        return {
            name: {
                str(layer): list(e) if isinstance(e, tuple) else {str(i): v for i, v in e.items()}
                for layer, e in part.items()
            }
            for name, part in parts.items()
            if part
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags `--ablate`, `--force` and `--bias`; `intervention` reads what they parsed."""
    where = "LAYER is a number, a range such as 3-5, or all"
    parser.add_argument("--ablate", action="append", default=[], metavar="LAYER:E,...", help=f"remove experts; {where}")
    parser.add_argument(
        "--force", action="append", default=[], metavar="LAYER:E,...", help="put experts among the k of every token"
    )
    parser.add_argument(
        "--bias", action="append", default=[], metavar="LAYER:E=X,...", help="add X to experts' router logits"
    )


def intervention(arguments: argparse.Namespace, config: Qwen3MoeConfig) -> Intervention:
    """What the flags say; each may be given several times.

    Raises:
        UserError: text that does not follow the flag's form.
    """
    ablate: dict[int, tuple[int, ...]] = {}
    force: dict[int, tuple[int, ...]] = {}
    for flag, texts, into in (("ablate", arguments.ablate, ablate), ("force", arguments.force, force)):
        for text in texts:
            layers, rest = _layers(flag, text, config)
            if not re.fullmatch(r"\d+(,\d+)*", rest):
                raise UserError(f"{flag}: expected LAYER:EXPERT,..., found {text!r}")
            for layer in layers:
                into[layer] = (*into.get(layer, ()), *map(int, rest.split(",")))
    bias: dict[int, dict[int, float]] = {}
    for text in arguments.bias:
        layers, rest = _layers("bias", text, config)
        try:
            values = {int(e): float(x) for e, x in (item.split("=") for item in rest.split(","))}
        except ValueError:
            raise UserError(f"bias: expected LAYER:EXPERT=NUMBER,..., found {text!r}") from None
        if not all(map(math.isfinite, values.values())):
            raise UserError(f"bias: expected finite numbers (--ablate removes an expert), found {text!r}")
        for layer in layers:
            bias.setdefault(layer, {}).update(values)
    return Intervention(ablate, force, bias)


def _layers(flag: str, text: str, config: Qwen3MoeConfig) -> tuple[Sequence[int], str]:
    where, colon, rest = text.partition(":")
    if colon and where == "all":
        return tuple(config.sparse_layers), rest
    if colon and (match := re.fullmatch(r"(\d+)(?:-(\d+))?", where)):
        first, last = int(match[1]), int(match[2] or match[1])
        if first <= last:
            return range(first, last + 1), rest
    raise UserError(f"{flag}: expected LAYER:EXPERT,... with a layer, a range of layers, or all; found {text!r}")


class Effect(NamedTuple):
    """What one expert's removal (or being forced) does to a text: the share of tokens that used it before, the mean
    loss (nats), its change with a 95 % bootstrap interval over blocks of text, the mean KL divergence of the next-token
    distribution from the unchanged model's, and the share of tokens whose most probable next token stays."""

    layer: int
    expert: int
    load: float
    loss: float
    change: float
    low: float
    high: float
    kl: float
    same_prediction: float


@partial(jax.jit, static_argnames=("config", "lora"))
def _run(params, adapters, input_ids, position_ids, segment_ids, control, *, config, lora):
    tokens = Tokens(input_ids, position_ids, segment_ids)
    out = forward(params, adapters, tokens, config=config, options=Options(lora=lora), control=control)
    return out.hidden.reshape(-1, out.hidden.shape[-1]), out.stats.counts


@jax.jit
def _outcome(
    hidden: Float[Array, "M D"], reference: Float[Array, "M D"], head: Float[Array, "V D"], labels: Int[Array, " M"]
) -> tuple[Float[Array, " M"], Float[Array, " M"], Array]:
    """Per token: loss (NaN without a label), KL(reference || changed) in nats, whether the best token stays."""

    def piece(part: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        rows, before, wanted = part
        product = partial(jnp.einsum, "md,vd->mv", precision=PRECISION, preferred_element_type=jnp.float32)
        log_q, log_p = (jax.nn.log_softmax(product(x, head), axis=-1) for x in (rows, before))
        loss = -jnp.take_along_axis(log_q, jnp.maximum(wanted, 0)[:, None], axis=1)[:, 0]
        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        return jnp.where(wanted < 0, jnp.nan, loss), kl, jnp.argmax(log_p, -1) == jnp.argmax(log_q, -1)

    chunk = min(1024, hidden.shape[0])
    pad = -hidden.shape[0] % chunk
    split = lambda a, fill: jnp.pad(a, ((0, pad), *[(0, 0)] * (a.ndim - 1)), constant_values=fill).reshape(
        -1, chunk, *a.shape[1:]
    )
    results = jax.lax.map(piece, (split(hidden, 0), split(reference, 0), split(labels, -1)))
    loss, kl, same = (a.reshape(-1)[: hidden.shape[0]] for a in results)
    return loss, kl, same


def effects(
    model: Qwen3MoeForCausalLM,
    labels: LabelledText,
    *,
    action: Action = "ablate",
    experts: Iterable[tuple[int, int]] | None = None,
    batch_size: int = 8,
    on_expert: Callable[[Effect], None] = lambda effect: None,
) -> list[Effect]:
    """One row for each (layer, expert), by default every one: the text again with that expert removed or forced.

    The unchanged model's hidden states are kept (tokens x D numbers on the device), its logits are formed again in
    chunks. An expert that no token of the text uses changes nothing when it is removed, to the last bit.
    """
    config = model.config
    if experts is None:
        experts = [(layer, expert) for layer in config.sparse_layers for expert in range(config.num_experts)]
    params, adapters = model.params, model.adapters
    head = head_weight(params, config)
    run = partial(_run, params, adapters, config=config, lora=model.lora_config)
    batches: list[tuple[PackedRows, np.ndarray, Array]] = []
    base: list[tuple[np.ndarray, ...]] = []
    load = np.zeros((len(config.sparse_layers), config.num_experts), np.int64)
    nothing = RoutingControl(selection=jnp.zeros(load.shape, jnp.int32))
    for rows in pack_in_order(labels, batch_size):
        wanted = np.where(rows.valid, rows.next.reshape(-1), -1).astype(np.int32)
        hidden, counts = run(*rows[:3], nothing)
        batches.append((rows, wanted, hidden))
        base.append(_valid(_outcome(hidden, hidden, head, wanted), rows))
        load += np.asarray(counts)
    before = np.concatenate([part[0] for part in base])
    blocks = metrics.blocks(labels.text.document, labels.text.position)
    known = ~np.isnan(before)
    result = []
    for layer, expert in experts:
        change = Intervention({layer: (expert,)} if action == "ablate" else {}, {}, {})
        if action == "force":
            change = Intervention({}, {layer: (expert,)}, {})
        control = change.control(config)
        assert control is not None
        parts = []
        for rows, wanted, reference in batches:
            hidden, _ = run(*rows[:3], control)
            parts.append(_valid(_outcome(hidden, reference, head, wanted), rows))
        loss, kl, same = (np.concatenate(column) for column in zip(*parts, strict=True))
        sums = np.stack([(loss - before)[known], np.ones(known.sum())], axis=1)
        clusters = metrics.cluster_sums(sums, blocks[known], int(blocks[-1]) + 1)
        interval = metrics.bootstrap(clusters[clusters[:, 1] > 0], lambda s: s[0] / s[1])
        slot = config.sparse_layers.index(layer)
        effect = Effect(
            layer,
            expert,
            float(load[slot, expert] / len(labels.text.token)),
            float(loss[known].mean(dtype=np.float64)),
            *interval,
            float(kl.mean(dtype=np.float64)),
            float(same.mean()),
        )
        result.append(effect)
        on_expert(effect)
    return result


def write_effects(rows: Sequence[Effect], path: pathlib.Path) -> None:
    """The table as CSV, one line an expert."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Effect._fields)
        writer.writerows(rows)


def _valid(outcome: tuple[Array, ...], rows: PackedRows) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(a)[rows.valid] for a in outcome)
