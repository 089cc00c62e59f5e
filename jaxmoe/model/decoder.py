"""The forward pass: from token ids to hidden states.

Letters: B batch, T query length, D model width, N query heads, K key/value heads, H head width, M = B*T tokens, E
experts, k experts per token, L layers (Ls sparse).

A pure function over a flat dictionary of stacked parameters (`jaxmoe.parameters` lists them). `layer` is one layer's
view of them. How the layers are iterated, what is recomputed and how weights are stored is decided elsewhere
(`jaxmoe.model.layer_loop`, `jaxmoe.model.layer`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.distributed.chunks import whole_sequences
from jaxmoe.model.adapted import low_rank_factors, weights_of
from jaxmoe.model.interface import DecoderOutput, Options, Params, RouterStats, Tokens
from jaxmoe.model.layer import Layer
from jaxmoe.model.layer_loop import run_layers
from jaxmoe.ops.attention import causal_attention
from jaxmoe.ops.cached_attention import Heads, Rotation
from jaxmoe.ops.contraction import product
from jaxmoe.ops.dense_router import straight_through
from jaxmoe.ops.embedding import embed
from jaxmoe.ops.experts import routed_outputs, sorted_experts
from jaxmoe.ops.kept import ATTENTION_UPDATE, PROJECTED
from jaxmoe.ops.linear import linears, logits_of_few
from jaxmoe.ops.low_rank import DropoutKeys
from jaxmoe.ops.norm import rms_norm
from jaxmoe.ops.norm_rotary import norm_and_rotate
from jaxmoe.ops.rotary import rotary_tables
from jaxmoe.ops.router import (
    CapturedRouting,
    Routing,
    RoutingControl,
    captured_routing,
    choose_experts,
    expert_counts,
    no_routing,
    route,
)
from jaxmoe.ops.saliency import ExpertSums, candidates, expert_sums
from jaxmoe.ops.swiglu import swiglu

# (query [B, T, N, H], key and value [B, T, K, H], layer index, cache) -> (the heads' output [B, T, N, H], cache)
Attend = Callable[[Array, Array, Array, Array, Any], tuple[Array, Any]]
# (what is projected, norms and rotation, layer index, cache) -> as `Attend`
AttendCached = Callable[[Heads, Rotation, Array, Any], tuple[Array, Any]]


class Context(NamedTuple):
    """What is the same for every layer of one forward pass."""

    config: Qwen3MoeConfig
    options: Options
    tables: tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]  # cosine and sine of the positions' angles
    valid: Bool[Array, " M"]  # which tokens are not padding
    attend: Callable[..., tuple[Array, Any]]  # an `Attend`, or for decoding an `AttendCached`
    control: RoutingControl | None
    dropout_keys: DropoutKeys | None = None
    decoding: bool = False  # new tokens attend over a cache, and nothing can be differentiated


class RoutingRecord(NamedTuple):
    """What one layer records of its routing; zeros for a dense layer."""

    counts: Int[Array, " E"]
    prob_sums: Float[Array, " E"]
    logits: Float[Array, "M E"] | None
    captured: CapturedRouting | None
    saliency: ExpertSums | None = None


def forward(
    params: Params,
    adapters: Params,
    tokens: Tokens,
    *,
    config: Qwen3MoeConfig,
    options: Options = Options(),  # noqa: B008 - frozen
    control: RoutingControl | None = None,
    dropout_keys: DropoutKeys | None = None,
) -> DecoderOutput:
    """The decoder over whole sequences, a pure function: jit it with `config` and `options` static.

    Products run in the dtype of `embed_tokens`; the residual stream is float32. `control` imposes routing. With
    `dropout_keys`, one per sequence, inputs of adapters are dropped with the probability in the adapter's config.
    """
    input_ids, position_ids, segment_ids = tokens
    segments = whole_sequences(segment_ids, options.mesh["context"]) if options.packed else None

    def attend(query: Array, key: Array, value: Array, layer: Array, cache: Any) -> tuple[Array, Any]:
        return causal_attention(query, key, value, segments, config.sliding_window, options.mesh), cache

    tables = rotary_tables(position_ids, config.rope_parameters, config.head_dim)
    valid = segment_ids.reshape(-1) > 0
    context = Context(config, options, tables, valid, attend, control, dropout_keys)
    hidden, _, records, layer_inputs = run_decoder(params, adapters, input_ids, context, cache=None)

    sparse = np.asarray(config.sparse_layers, np.int32)
    stats = RouterStats(records.counts[sparse], records.prob_sums[sparse], jnp.sum(valid))
    logits = None
    if records.logits is not None:
        logits = _of_sparse(records.logits, config)
        logits = logits.reshape(len(sparse), *input_ids.shape, config.num_experts)
    captured = captured_of_layers(records, config, input_ids.shape)
    saliency = records.saliency and ExpertSums(*(sums[sparse] for sums in records.saliency))
    return DecoderOutput(hidden, stats, logits, layer_inputs, captured, saliency)


def run_decoder(
    params: Params, adapters: Params, input_ids: Int[Array, "B T"], context: Context, cache: Any
) -> tuple[Float[Array, "B T D"], Any, RoutingRecord, Float[Array, "L B T D"] | None]:
    """Embeds, runs all layers, normalises: (hidden states, cache, records [L, ...], the layers' inputs or None)."""
    config = context.config
    params = weights_of(params, adapters, context.options.lora)
    adapters = low_rank_factors(adapters)
    with jax.default_matmul_precision("highest"):
        # The residual stream is float32: each of its 2 L sums would round it again, which in bfloat16 is half of the
        # error of a model's logits.
        h = embed(params["embed_tokens"], input_ids)
        step = lambda h, cache, layer: decoder_layer(h, cache, layer.dropping(context.dropout_keys), context)
        last = _until_router(context) if context.options.until_last_router else None
        h, cache, records, inputs = run_layers(step, h, cache, params, adapters, config, context.options, last)
        hidden = rms_norm(h, params["norm"], config.rms_norm_eps).astype(params["embed_tokens"].dtype)
    return hidden, cache, records, inputs


def decoder_layer(
    h: Float[Array, "B T D"], cache: Any, layer: Layer, context: Context
) -> tuple[Float[Array, "B T D"], Any, RoutingRecord]:
    """Attention, then the MLP of the layer's kind; each is normalised first and added to the residual stream."""
    h, x = _add_and_norm(h, None, "attention.input_layernorm", layer)
    update, cache = attention(x, cache, layer, context)
    h, x = _add_and_norm(h, update, "attention.post_attention_layernorm", layer)
    update, record = mlp(x.reshape(-1, x.shape[-1]), layer, context)
    return h + update.reshape(h.shape), cache, record


def _until_router(context: Context) -> Callable[..., tuple[Array, Any, RoutingRecord]]:
    """As `decoder_layer`, but of the MLP only the router runs."""

    def step(h: Array, cache: Any, layer: Layer) -> tuple[Array, Any, RoutingRecord]:
        h, x = _add_and_norm(h, None, "attention.input_layernorm", layer)
        update, cache = attention(x, cache, layer, context)
        h, x = _add_and_norm(h, update, "attention.post_attention_layernorm", layer)
        return h, cache, routed(x.reshape(-1, x.shape[-1]), layer, context)[1]

    return step


def _add_and_norm(
    h: Float[Array, "B T D"], update: Float[Array, "B T D"] | None, path: str, layer: Layer
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """(the residual stream with the update, what the norm `path` makes of it)."""
    h = h if update is None else h + update
    return h, rms_norm(h, layer.weight(path), layer.eps).astype(layer.dtype)


def attention(
    x: Float[Array, "B T D"], cache: Any, layer: Layer, context: Context
) -> tuple[Float[Array, "B T D"], Any]:
    """Grouped-query attention with normalised queries and keys."""
    B, T, _ = x.shape
    with jax.named_scope("attention"):
        query, key, value = (
            checkpoint_name(y, PROJECTED).reshape(B, T, -1, context.config.head_dim)
            for y in linears(x, *layer.linear_maps("attention.q_proj", "attention.k_proj", "attention.v_proj"))
        )
        if context.decoding:
            norms = map(layer.stacked_norm, ("attention.q_norm", "attention.k_norm"))
            rotation = Rotation(*norms, tables=context.tables)
            heads, cache = context.attend(Heads(query, key, value), rotation, layer.index, cache)
        else:
            query = norm_and_rotate(query, *layer.norm("attention.q_norm"), context.tables)
            key = norm_and_rotate(key, *layer.norm("attention.k_norm"), context.tables)
            heads, cache = context.attend(query, key, value, layer.index, cache)
        (update,) = linears(heads.reshape(B, T, -1), *layer.linear_maps("attention.o_proj"))
        return checkpoint_name(update, ATTENTION_UPDATE), cache


def mlp(x: Float[Array, "M D"], layer: Layer, context: Context) -> tuple[Float[Array, "M D"], RoutingRecord]:
    """The mixture of experts or the dense MLP, float32; in a model with both kinds each is compiled once."""
    sparse = lambda x: sparse_mlp(x, layer, context)
    dense = lambda x: dense_mlp(x, layer, context)
    if not context.config.dense_layers:
        return sparse(x)
    if not context.config.sparse_layers:
        return dense(x)
    return jax.lax.cond(layer.is_sparse, sparse, dense, x)


def sparse_mlp(x: Float[Array, "M D"], layer: Layer, context: Context) -> tuple[Float[Array, "M D"], RoutingRecord]:
    """Routes each token to k of E experts and sums their outputs by the router's weights."""
    config, options = context.config, context.options
    routing, record = routed(x, layer, context)
    with jax.named_scope("experts"):
        adapters = layer.adapter("sparse.gate_up_proj"), layer.adapter("sparse.down_proj")
        if options.saliency:
            experts = candidates(routing)
            outputs = routed_outputs(x, experts, config.num_experts, layer.experts(), *adapters, mesh=options.mesh)
            y, sums = expert_sums(routing, experts, outputs, context.valid, config.norm_topk_prob)
            return y, record._replace(saliency=sums)
        how = {"in_scan": not options.unroll, "one_by_one": options.remat == "offload", "mesh": options.mesh}
        out = sorted_experts(x, routing, layer.experts(), *adapters, **how)
    if options.dense_router:
        norm = config.norm_topk_prob
        out += straight_through(x, routing, layer.experts(), *adapters, norm_topk_prob=norm, mesh=options.mesh)
    return out, record


def routed(x: Float[Array, "M D"], layer: Layer, context: Context) -> tuple[Routing, RoutingRecord]:
    """(which experts each token goes to, what is recorded of it)."""
    config, options = context.config, context.options
    with jax.named_scope("router"):
        routing = _route(x, layer, context)
        return routing, RoutingRecord(
            expert_counts(routing.experts, context.valid, config.num_experts),
            jnp.sum(jnp.where(context.valid[:, None], routing.probabilities, 0), axis=0),
            routing.logits if options.router_logits else None,
            captured_routing(routing, options.keep_logits) if options.keep_logits else None,
        )


def _route(x: Float[Array, "M D"], layer: Layer, context: Context) -> Routing:
    config = context.config
    adapter = layer.adapter("sparse.gate")
    control = context.control and context.control.layer(layer.slot)
    if context.decoding and adapter is None and control is None:
        logits = logits_of_few(x, *layer.stacked("sparse.gate"))
        return choose_experts(logits, config.num_experts_per_tok, config.norm_topk_prob)
    return route(
        x,
        layer.weight("sparse.gate"),
        num_experts_per_tok=config.num_experts_per_tok,
        norm_topk_prob=config.norm_topk_prob,
        adapter=adapter,
        control=control,
    )


def dense_mlp(x: Float[Array, "M D"], layer: Layer, context: Context) -> tuple[Float[Array, "M D"], RoutingRecord]:
    """SwiGLU between two linear maps."""
    with jax.named_scope("dense_mlp"):
        (gate,) = linears(x, *layer.linear_maps("dense.gate_proj"))
        (up,) = linears(x, *layer.linear_maps("dense.up_proj"))
        (y,) = linears(swiglu(gate, up), *layer.linear_maps("dense.down_proj"))
        y = y.astype(jnp.float32)  # as the experts return it
    options = context.options
    nothing = no_routing(x.shape[0], context.config.num_experts, context.config.num_experts_per_tok)
    return y, RoutingRecord(
        jnp.zeros(context.config.num_experts, jnp.int32),
        jnp.zeros(context.config.num_experts, jnp.float32),
        nothing.logits if options.router_logits else None,
        captured_routing(nothing, options.keep_logits) if options.keep_logits else None,
        ExpertSums(nothing.logits[0], nothing.logits[0]) if options.saliency else None,
    )


def captured_of_layers(
    records: RoutingRecord, config: Qwen3MoeConfig, shape: tuple[int, ...]
) -> CapturedRouting | None:
    """The captured routing of the MoE layers as [Ls, B, T, ...], for sequences of `shape` [B, T]."""
    if records.captured is None:
        return None
    sparse = (_of_sparse(a, config) for a in records.captured)
    return CapturedRouting(*(a.reshape(len(a), *shape, *a.shape[2:]) for a in sparse))


def _of_sparse(records: Array, config: Qwen3MoeConfig) -> Array:
    """The MoE layers' part of records [L, ...]."""
    every = len(config.sparse_layers) == config.num_hidden_layers  # the usual case: no copy
    return records if every else records[np.asarray(config.sparse_layers, np.int32)]


def head_weight(params: Params) -> Float[Array, "V D"]:
    """The output projection: `lm_head`, or the embedding when they are tied.

    `params` are the weights that the adapter leaves (`jaxmoe.model.adapted.weights_of`).
    """
    return params.get("lm_head", params["embed_tokens"])


def logits_of(hidden: Float[Array, "*batch D"], head: Float[Array, "V D"]) -> Float[Array, "*batch V"]:
    """Logits in float32 (transformers rounds them to the model's dtype)."""
    with jax.named_scope("head"):
        return product("...d,vd->...v", hidden, head)
