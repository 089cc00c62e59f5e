"""Which experts a text needs: their saliency in one pass over the text, the experts to keep, and the record of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Float64, Int64

from captures import LabelledText
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.control.provenance import versions
from jaxmoe.distributed.collectives import sum_over_devices
from jaxmoe.distributed.mesh import SEQUENCE_AXES
from jaxmoe.distributed.placement import Placement
from jaxmoe.errors import UserError
from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM
from jaxmoe.model.decoder import forward
from jaxmoe.model.interface import Options, Tokens
from jaxmoe.routing.capture import pack_in_order

Method = Literal["reap", "frequency", "effect"]
METHODS: tuple[Method, ...] = get_args(Method)
Kept = dict[int, tuple[int, ...]]  # index of a layer in the model -> the experts that stay, ascending


@dataclass(frozen=True)
class Saliency:
    """What one pass over a text found out about every expert of every MoE layer; sums over the text's tokens.

    `counts` are the tokens that use the expert; the other two are those of `jaxmoe.ops.saliency.ExpertSums`.
    """

    tokens: int
    counts: Int64[np.ndarray, "Ls E"]
    weighted_norms: Float64[np.ndarray, "Ls E"]
    changes: Float64[np.ndarray, "Ls E"]

    def scores(self, method: Method) -> Float64[np.ndarray, "Ls E"]:
        """How much each expert matters; higher is more.

        reap: the mean, over the tokens that use the expert, of its weight times the norm of its output; 0 if no token
        does (REAP: Lasby et al. 2025, arXiv 2510.13999). frequency: the share of tokens that use it. effect: how
        far the layer's output moves, averaged over all tokens, if the expert is removed and the tokens that use it use
        their next most probable expert instead.
        """
        match method:
            case "reap":
                return self.weighted_norms / np.maximum(self.counts, 1)
            case "frequency":
                return self.counts / self.tokens
            case "effect":
                return self.changes / self.tokens


@partial(jax.jit, static_argnames=("config", "options"))
def _step(params, adapters, tokens: Tokens, *, config, options: Options):
    """(tokens per expert, sums over tokens) of one batch, [Ls, E] each; the devices of the mesh share its tokens."""

    def of_share(params, adapters, tokens):
        out = forward(params, adapters, tokens, config=config, options=options)
        return sum_over_devices((out.stats.counts, out.saliency), options.mesh)

    placement = Placement(options.mesh, config, options.lora)
    held = placement.specs(params), placement.specs(adapters)
    of_tokens = placement.spec("batch", "sequence")
    run = placement.run_in_order(of_share, (*held, of_tokens), PartitionSpec())
    return placement.readable(run(params, adapters, tokens))


def measure(
    model: Qwen3MoeForCausalLM,
    labels: LabelledText,
    *,
    batch_size: int = 8,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> Saliency:
    """Runs the text once through the model and sums up, expert by expert, what `Saliency` holds.

    Args:
        model: any Qwen3-MoE, with adapter or quantised, with more experts than a token uses.
        labels: the text.
        batch_size: sequences of `labels.seq_length` tokens per step.
        on_batch: called with the number of tokens done so far.

    Raises:
        UserError: every token uses all experts; a token that the model does not know; outputs that are not finite; a
            batch or a length that the devices of the model's mesh cannot share evenly.
    """
    config, mesh = model.config, model.mesh
    mesh.check_batch(batch_size)
    mesh.check_length(labels.seq_length)
    check_keep(config, config.num_experts_per_tok)
    if (largest := int(labels.text.token.max())) >= config.vocab_size:
        raise UserError(f"data: expected token ids below the model's vocab_size {config.vocab_size}, found {largest}")
    options = Options(lora=model.lora_config, saliency=True, mesh=mesh)
    step = partial(_step, model.params, model.adapters, config=config, options=options)
    shape = len(config.sparse_layers), config.num_experts
    counts = np.zeros(shape, np.int64)
    norms, changes = np.zeros(shape), np.zeros(shape)
    for batch in pack_in_order(labels, batch_size, mesh.product(SEQUENCE_AXES)):
        found, sums = step(Tokens(*batch[:3]))
        counts += np.asarray(found)
        norms += np.asarray(sums.weighted_norms, np.float64)
        changes += np.asarray(sums.changes, np.float64)
        on_batch(batch.part.stop)
    if len(broken := np.flatnonzero(~np.isfinite(norms + changes).all(axis=1))):
        raise UserError(
            f"model: layer {config.sparse_layers[broken[0]]}: expected finite outputs of the experts, found NaN or "
            "infinity; a weight is NaN, or the dtype is too narrow for the model"
        )
    return Saliency(len(labels.text.token), counts, norms, changes)


def check_keep(config: Qwen3MoeConfig, keep: int) -> None:
    """Raises UserError unless a model can be pruned to `keep` experts a layer."""
    k, E = config.num_experts_per_tok, config.num_experts
    if not config.sparse_layers:
        raise UserError("model: expected one with mixture-of-experts layers, found none")
    if k >= E:
        raise UserError(f"model: expected more experts than a token uses, found {E} of {E} (num_experts_per_tok)")
    if not k <= keep < E:
        raise UserError(
            f"keep: expected {k} (num_experts_per_tok, the experts that each token uses) to {E - 1}, found {keep}"
        )


def kept_experts(config: Qwen3MoeConfig, scores: np.ndarray, keep: int) -> Kept:
    """The `keep` experts of each MoE layer with the highest scores [Ls, E]; ties stay in favour of the lower index.

    Raises:
        UserError: too few or too many experts.
    """
    check_keep(config, keep)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :keep]
    return {layer: tuple(sorted(row.tolist())) for layer, row in zip(config.sparse_layers, order, strict=True)}


def text_digest(labels: LabelledText) -> str:
    """SHA-256 over the tokens and contexts of a text, as a capture of it has in its manifest."""
    text = labels.text
    stream = np.stack([text.token, text.document, text.position, text.next], axis=1).astype(np.int32)
    return hashlib.sha256(stream.tobytes()).hexdigest()


def record(
    config: Qwen3MoeConfig, kept: Mapping[int, tuple[int, ...]], labels: LabelledText, method: str, model: str
) -> dict[str, Any]:
    """What `pruning.json` says: which experts stayed, by which method, and the text and the model behind it."""
    return {
        "model": model,
        "method": method,
        "num_experts_before": config.num_experts,
        "num_experts": len(next(iter(kept.values()))),
        "experts": {str(layer): list(experts) for layer, experts in kept.items()},
        "text": {
            "digest": text_digest(labels),
            "tokens": len(labels.text.token),
            "domains": list(labels.domains),
            "seq_length": labels.seq_length,
        },
        "versions": versions(),
    }


def card(about: Mapping[str, Any]) -> str:
    """The model card of a pruned model, Markdown, from its `record`; it holds names, no paths."""
    before, left, text = about["num_experts_before"], about["num_experts"], about["text"]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: {json.dumps(['jaxmoe', 'qwen3_moe', 'pruned'])}",
        "---",
        "",
        f"# {about['model']} with {left} of {before} experts",
        "",
        f"Each mixture-of-experts layer keeps the {left} experts with the highest saliency; all other weights are those"
        " of the original model. No weight was trained after the pruning.",
        "",
        "| | |",
        "|---|---|",
        f"| original model | {about['model']} |",
        f"| experts per layer | {left} of {before} |",
        f"| saliency | {about['method']} |",
        f"| text | {text['tokens']:,} tokens of {', '.join(text['domains'])} |",
        f"| digest of the text | {text['digest']} |",
        "",
        "`pruning.json` lists the experts that stayed, by their index in the original model.",
        "",
    ]
    return "\n".join(lines)
