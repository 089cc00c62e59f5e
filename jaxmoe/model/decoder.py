"""Qwen3-MoE: the decoder layer, the scan over layers, the KV cache, and the Flax NNX shell around them.

The forward pass is a pure function over a flat dictionary of stacked parameters (`jaxmoe.parameters` lists them). One
scan runs over all layers; its body picks each layer's weights by index, so a kind of layer is compiled once whatever
the depth (`unroll` trades that for speed).
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from operator import getitem
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.config import LoraConfig, Qwen3MoeConfig
from jaxmoe.lora import LORA_TARGETS
from jaxmoe.memory import Remat
from jaxmoe.nf4.recode import quantized
from jaxmoe.nf4.stack import NF4Stack, frozen_product
from jaxmoe.ops import attention_cudnn as cudnn
from jaxmoe.ops import implementations, projections
from jaxmoe.ops.attention import causal_attention
from jaxmoe.ops.attention import implementation as attention_implementation
from jaxmoe.ops.experts import GATE_UP, SCHEDULE, ExpertWeights, sorted_experts
from jaxmoe.ops.experts import implementation as experts_implementation
from jaxmoe.ops.implementations import Choice, choose
from jaxmoe.ops.kernels.norm_rotary import norm_rotary, norm_rotary_obstacle
from jaxmoe.ops.linear import (
    ATTENDED,
    LAYER_INPUT,
    PROJECTED,
    Adapter,
    apply_rotary,
    attention,
    attention_mask,
    finish_linear,
    layer_slice,
    linear,
    rms_norm,
    rotary_tables,
    swiglu,
)
from jaxmoe.ops.router import (
    ROUTING,
    CapturedRouting,
    Routing,
    RoutingControl,
    captured_routing,
    expert_counts,
    load_balancing_loss,
    route,
)
from jaxmoe.parameters import ParameterSpec, Quantization, lora_specs, parameter_specs, stored_specs
from jaxmoe.store.adapter import is_adapter, read_adapter
from jaxmoe.store.checkpoint import Checkpoint
from jaxmoe.store.converted import is_converted, read_converted
from jaxmoe.store.loading import OnLayer, load_stacks

Params = dict[str, Array]
Stacks = dict[str, Array | NF4Stack]
Trainable = Literal["none", "adapters", "all"]
TokenArray = Int[Array, "B T"] | Int[np.ndarray, "B T"]
# (query, key, value, layer index) -> (heads' output, cache); the cached form takes the cache first
Attend = Callable[[Array, Array, Array, Array], tuple[Array, Any]]
CachedAttend = Callable[[Any, Array, Array, Array, Array], tuple[Array, Any]]

EXPERT_STACKS = ("sparse.gate_up_proj", "sparse.down_proj")


class RouterStats(NamedTuple):
    """Per MoE layer: routed rows per expert, and router probabilities summed over the valid (non-padding) tokens."""

    counts: Int[Array, "Ls E"]
    prob_sums: Float[Array, "Ls E"]
    tokens: Int[Array, ""]


class ForwardOutput(NamedTuple):
    """Hidden states after the final norm, router statistics, and what was asked to be captured; the layers' inputs are
    float32."""

    hidden: Float[Array, "B T D"]
    stats: RouterStats
    router_logits: Float[Array, "Ls B T E"] | None
    layer_inputs: Float[Array, "L B T D"] | None
    routing: CapturedRouting | None = None


class KVCache(NamedTuple):
    """Keys (after norm and rotation) and values of every layer; slot s of a row holds its position s."""

    key: Float[Array, "L B S K H"]
    value: Float[Array, "L B S K H"]


class CausalLMOutput(NamedTuple):
    """What transformers' `MoeCausalLMOutputWithPast` holds: router_logits has one [B, T, E] per MoE layer, in layer
    order, dense layers skipped."""

    logits: Float[Array, "B T V"]
    router_logits: tuple[Float[Array, "B T E"], ...] | None
    aux_loss: Float[Array, ""] | None
    hidden_states: tuple[Float[Array, "B T D"], ...] | None


class _Scanned(NamedTuple):
    """Stacks as the scan sees them: `sliced` ones hold one layer in the body, `whole` ones are indexed there."""

    sliced: Params
    whole: Stacks

    def pick(self, path: str, slot: Array) -> Array:
        if path in self.sliced:
            return self.sliced[path]
        stack = self.whole[path]
        return stack[slot] if isinstance(stack, NF4Stack) else layer_slice(stack, slot)

    def __contains__(self, path: object) -> bool:
        return path in self.sliced or path in self.whole


@dataclass(frozen=True)
class _Layer:
    """One layer's view of the stacked parameters, by dotted path; built inside the scan's body."""

    config: Qwen3MoeConfig
    weights: _Scanned
    adapters: _Scanned
    scales: Mapping[str, float]
    experts_of_all: Stacks  # frozen expert stacks as [layers * E, out, in]; empty when the experts are trained
    control: RoutingControl | None
    scanned: bool
    dtype: Any  # of the operands of products; the residual stream between them is float32
    layer: Array
    mlp_slot: Array

    def _slot(self, path: str) -> Array:
        return self.layer if path.startswith("attention.") else self.mlp_slot

    def weight(self, path: str) -> Array:
        return self.weights.pick(path, self._slot(path))

    def norm(self, h: Array, path: str) -> Array:
        """The residual stream, normalised, as an operand of products."""
        return rms_norm(h, self.weight(path), self.config.rms_norm_eps).astype(self.dtype)

    def bias(self, path: str) -> Array | None:
        return self.weight(f"{path}_bias") if f"{path}_bias" in self.weights else None

    def adapter(self, path: str) -> Adapter | None:
        if path not in self.scales:
            return None
        a, b = (self.adapters.pick(f"{path}.lora_{x}", self._slot(path)) for x in "AB")
        return Adapter(a, b, self.scales[path])

    def project(self, x: Array, path: str) -> Array:
        return self.project_each(x, path)[0]

    def project_each(self, x: Array, *paths: str) -> list[Array]:
        """Projections of one input; they share a backward pass where the kernel takes them all."""
        stacks = [self.weights.whole.get(path) for path in paths]
        arrays = [s for s in stacks if s is not None and not isinstance(s, NF4Stack) and projections.takes(x, s)]
        if len(arrays) == len(paths):
            biases, adapters = [self.bias(path) for path in paths], [self.adapter(path) for path in paths]
            return projections.frozen_linears(x, arrays, self._slot(paths[0]), biases, adapters)
        if len(paths) != 1:
            return [self.project(x, path) for path in paths]
        path, stack = paths[0], stacks[0]
        if isinstance(stack, NF4Stack):
            y: Array = frozen_product(x, stack, self._slot(path))
            return [finish_linear(y, x, self.bias(path), self.adapter(path))]
        return [linear(x, self.weight(path), self.bias(path), self.adapter(path))]

    def experts(self) -> ExpertWeights:
        pair = EXPERT_STACKS
        if self.experts_of_all:
            gate_up, down = (self.experts_of_all[path] for path in pair)
            return ExpertWeights(gate_up, down, self.mlp_slot * self.config.num_experts, trainable=False)
        gate_up, down = (self.weights.sliced[path] for path in pair)
        return ExpertWeights(gate_up, down, 0, trainable=True)


class _RoutingRecord(NamedTuple):
    counts: Int[Array, " E"]
    prob_sums: Float[Array, " E"]
    logits: Float[Array, "M E"] | None
    captured: CapturedRouting | None


class _Wanted(NamedTuple):
    """What a forward pass keeps of each layer: all router logits, the routing with the `top` largest ones (0: none)."""

    logits: bool = False
    top: int = 0


_NOTHING = _Wanted()


def _norm_rotary(x: Array, layer: _Layer, path: str, tables: tuple[Array, Array]) -> Array:
    """Queries or keys, normalised by head and rotated, rounded once; the one-pass kernel is for frozen norms.

    Rounded between the two as well, gradients of a bfloat16 model were 7 % further from float64 (docs/log.md).
    """
    weight, eps = layer.weight(path), layer.config.rms_norm_eps
    if path in layer.weights.whole and choose("norm_rotary", {"triton": norm_rotary_obstacle(x)}).name == "triton":
        return norm_rotary(x, weight, *tables, eps)
    return apply_rotary(rms_norm(x.astype(jnp.float32), weight, eps), *tables).astype(x.dtype)


def _attention_block(h: Array, layer: _Layer, tables: tuple[Array, Array], attend: Attend) -> tuple[Array, Any]:
    """Pre-norm attention with q/k norm, and its residual; `attend(q, k, v)` gives the heads' output and the cache."""
    config = layer.config
    B, T, _ = h.shape
    with jax.named_scope("attention"):
        x = layer.norm(h, "attention.input_layernorm")
        query, key, value = (
            checkpoint_name(y, PROJECTED).reshape(B, T, -1, config.head_dim)
            for y in layer.project_each(x, "attention.q_proj", "attention.k_proj", "attention.v_proj")
        )
        query = _norm_rotary(query, layer, "attention.q_norm", tables)
        key = _norm_rotary(key, layer, "attention.k_norm", tables)
        heads, cache = attend(query, key, value, layer.layer)
        return h + checkpoint_name(layer.project(heads.reshape(B, T, -1), "attention.o_proj"), ATTENDED), cache


def _sparse_mlp(x: Array, layer: _Layer, valid: Array, wanted: _Wanted) -> tuple[Array, _RoutingRecord]:
    config = layer.config
    with jax.named_scope("router"):
        routing = route(
            x,
            layer.weight("sparse.gate"),
            num_experts_per_tok=config.num_experts_per_tok,
            norm_topk_prob=config.norm_topk_prob,
            adapter=layer.adapter("sparse.gate"),
            control=layer.control and layer.control.layer(layer.mlp_slot),
        )
        record = _RoutingRecord(
            expert_counts(routing.experts, valid, config.num_experts),
            jnp.sum(jnp.where(valid[:, None], routing.probabilities, 0), axis=0),
            routing.logits if wanted.logits else None,
            captured_routing(routing, wanted.top) if wanted.top else None,
        )
    with jax.named_scope("experts"):
        gate_up, down = (layer.adapter(path) for path in EXPERT_STACKS)
        return sorted_experts(x, routing, layer.experts(), gate_up, down, scanned=layer.scanned), record


def _dense_mlp(x: Array, layer: _Layer, wanted: _Wanted) -> tuple[Array, _RoutingRecord]:
    M, E, k = x.shape[0], layer.config.num_experts, layer.config.num_experts_per_tok
    with jax.named_scope("dense_mlp"):
        hidden = swiglu(layer.project(x, "dense.gate_proj"), layer.project(x, "dense.up_proj"))
        y = layer.project(hidden, "dense.down_proj").astype(jnp.float32)  # as the experts give it
    logits = jnp.zeros((M, E), jnp.float32)
    nobody = Routing(logits, logits, jnp.zeros((M, k), jnp.int32), logits[:, :k])
    return y, _RoutingRecord(
        jnp.zeros(E, jnp.int32),
        jnp.zeros(E, jnp.float32),
        logits if wanted.logits else None,
        captured_routing(nobody, wanted.top) if wanted.top else None,
    )


def _decoder_layer(
    h: Array,
    layer: _Layer,
    is_sparse: Array,
    tables: tuple[Array, Array],
    attend: Attend,
    valid: Array,
    wanted: _Wanted,
) -> tuple[Array, Any, _RoutingRecord]:
    """One decoder layer: attention, then the MLP of the layer's kind, each with its residual."""
    config = layer.config
    h, cache = _attention_block(h, layer, tables, attend)
    x = layer.norm(h, "attention.post_attention_layernorm").reshape(-1, h.shape[-1])
    sparse = partial(_sparse_mlp, layer=layer, valid=valid, wanted=wanted)
    dense = partial(_dense_mlp, layer=layer, wanted=wanted)
    if not config.dense_layers:
        y, record = sparse(x)
    elif not config.sparse_layers:
        y, record = dense(x)
    else:  # both kinds: one branch each is compiled, whatever the pattern of layers
        y, record = jax.lax.cond(is_sparse, sparse, dense, x)
    return h + y.reshape(h.shape), cache, record


def _layer_indices(config: Qwen3MoeConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each layer: its index, its slot in the stack of its MLP kind, whether it is sparse."""
    sparse, dense = config.sparse_layers, config.dense_layers
    layers = range(config.num_hidden_layers)
    slots = [sparse.index(i) if i in sparse else dense.index(i) for i in layers]
    return np.arange(len(layers)), np.asarray(slots), np.asarray([i in sparse for i in layers])


def _layer_stacks(params: Params, config: Qwen3MoeConfig) -> Stacks:
    """The parameters of the layers: as they are, or as one `NF4Stack` for the arrays of a quantised weight."""
    quantization = Quantization.of(params)
    if quantization is None:
        return {path: stack for path, stack in params.items() if "." in path}
    stacks: Stacks = {}
    for path, spec in parameter_specs(config).items():
        if path in quantization.paths:
            *lead, out, inner = spec.shape
            stacks[path] = NF4Stack.of(params, path, (math.prod(lead), out, inner), params["embed_tokens"].dtype)
        elif "." in path:
            stacks[path] = params[path]
    return stacks


def _split(stacks: Mapping[str, Any], config: Qwen3MoeConfig, differentiated: bool) -> _Scanned:
    """Arrays with a gradient are scanned over, so each layer's gradient is written once; frozen ones stay whole."""
    if not differentiated:
        return _Scanned({}, dict(stacks))
    if not (config.sparse_layers and config.dense_layers):
        return _Scanned(dict(stacks), {})
    # Mixed kinds: a layer of the other kind carries an unused slot, whose gradient is zero.
    layers, slots, is_sparse = _layer_indices(config)
    slot_of = {"attention": layers, "sparse": np.where(is_sparse, slots, 0), "dense": np.where(is_sparse, 0, slots)}
    return _Scanned({path: stack[slot_of[path.split(".")[0]]] for path, stack in stacks.items()}, {})


@dataclass(frozen=True)
class _Run:
    """What is the same for all layers of one forward pass."""

    config: Qwen3MoeConfig
    lora: LoraConfig | None
    tables: tuple[Array, Array]
    valid: Bool[Array, " M"]
    trainable: Trainable = "none"
    remat: Remat = "low-memory"
    unroll: bool = False
    wanted: _Wanted = _NOTHING
    capture_hidden: bool = False
    control: RoutingControl | None = None


# What each recomputation policy keeps of a layer beside its input, by the names that `checkpoint_name` gave; "offload"
# keeps the input itself in the host's memory. The backward pass computes the rest again. Never kept is a layer's slice
# of a frozen weight, which would hold the model twice; elementwise results (norms, rotary, SwiGLU) are never worth
# their memory.
_KEPT: dict[Remat, frozenset[str]] = {
    "fast": frozenset({ATTENDED, PROJECTED, cudnn.OUT, cudnn.LOG_SUM, ROUTING, SCHEDULE, GATE_UP}),
    "balanced": frozenset({ATTENDED, PROJECTED, cudnn.OUT, cudnn.LOG_SUM, ROUTING, SCHEDULE}),
    "low-memory": frozenset(),
}


def _policy(remat: Remat) -> Callable[..., Any]:
    if remat == "offload":
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    kept = _KEPT[remat]

    def keep(primitive: Any, *_: Any, **parameters: Any) -> bool:
        return primitive.name == "name" and parameters["name"] in kept

    return keep


def _run_layers(
    run: _Run, h: Array, params: Params, adapters: Params, attend: CachedAttend, cache: Any
) -> tuple[Array, Any, _RoutingRecord, Array | None]:
    """All decoder layers: (hidden states, cache, stacked routing records, stacked layer inputs or None)."""
    config = run.config
    weights = _split(_layer_stacks(params, config), config, run.trainable == "all")
    lora_weights = _split(adapters, config, run.trainable != "none")
    experts_of_all = {
        path: stack if isinstance(stack, NF4Stack) else stack.reshape(-1, *stack.shape[2:])
        for path in EXPERT_STACKS
        if (stack := weights.whole.get(path)) is not None
    }
    scales = {LORA_TARGETS[target].path: run.lora.scale(target) for target in run.lora.targets} if run.lora else {}

    def body(carry, xs):
        h, cache = carry
        h = checkpoint_name(h, LAYER_INPUT)
        (index, mlp_slot, is_sparse), sliced, sliced_lora = xs
        layer = _Layer(
            config,
            weights._replace(sliced=sliced),
            lora_weights._replace(sliced=sliced_lora),
            scales,
            experts_of_all,
            run.control,
            not run.unroll,
            params["embed_tokens"].dtype,
            index,
            mlp_slot,
        )
        out, new_cache, record = _decoder_layer(
            h, layer, is_sparse, run.tables, partial(attend, cache), run.valid, run.wanted
        )
        return (out, new_cache), (record, h if run.capture_hidden else None)

    if run.trainable != "none":
        # A scan keeps the two passes apart; in one long program what is recomputed would be merged with what was there.
        body = jax.checkpoint(body, policy=_policy(run.remat), prevent_cse=run.unroll)
    xs = (_layer_indices(config), weights.sliced, lora_weights.sliced)
    (h, cache), (records, inputs) = (_unrolled if run.unroll else jax.lax.scan)(body, (h, cache), xs)
    return h, cache, records, inputs


def _unrolled(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any) -> tuple[Any, Any]:
    """As `jax.lax.scan`, one layer behind the other in one program.

    A scan copies what a layer keeps for its backward pass into a stack, and out of it again; here it stays where it is.
    """
    leaves, structure = jax.tree.flatten(xs)
    indices = _hidden_constants(np.arange(len(leaves[0])))
    layers = zip(
        *(_hidden_constants(leaf) if isinstance(leaf, np.ndarray) else _unstack(leaf, indices) for leaf in leaves),
        strict=True,
    )
    body = jax.jit(body)  # traced once, not for every layer
    results = []
    for layer in layers:
        carry, result = body(carry, jax.tree.unflatten(structure, layer))
        results.append(result)
    return carry, jax.tree.map(lambda *each: jnp.stack(each), *results)


def _hidden_constants(values: np.ndarray) -> list[Array]:
    """Numbers that XLA does not see: with a constant for its layer every slice would be a kernel to compile."""
    return jax.lax.optimization_barrier([jnp.asarray(value) for value in values])


@jax.custom_vjp
def _unstack(stack: Array, indices: list[Array]) -> list[Array]:
    """The layers of a stack; their gradients are put together once, where each slice's would be a whole stack."""
    return [layer_slice(stack, index) for index in indices]


def _unstack_forward(stack: Array, indices: list[Array]) -> tuple[list[Array], None]:
    return _unstack(stack, indices), None


def _unstack_backward(_: None, gradients: list[Array]) -> tuple[Array, None]:
    return jnp.stack(gradients), None


_unstack.defvjp(_unstack_forward, _unstack_backward)


def _embed(params: Params, input_ids: Array) -> Array:
    """The residual stream's beginning. It stays float32: each of the 2 L sums would round it again, which in bfloat16
    is half of what a model's logits are off by (docs/log.md)."""
    return jnp.take(params["embed_tokens"], input_ids, axis=0).astype(jnp.float32)


def _final_norm(h: Array, params: Params, config: Qwen3MoeConfig) -> Array:
    return rms_norm(h, params["norm"], config.rms_norm_eps).astype(params["embed_tokens"].dtype)


def forward(
    params: Params,
    adapters: Params,
    input_ids: Int[Array, "B T"],
    position_ids: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    config: Qwen3MoeConfig,
    lora: LoraConfig | None = None,
    trainable: Trainable = "none",
    remat: Remat = "low-memory",
    unroll: bool = False,
    capture_router_logits: bool = False,
    capture_hidden: bool = False,
    capture_routing: int = 0,
    routing_control: RoutingControl | None = None,
    packed: bool = True,
) -> ForwardOutput:
    """The decoder over whole sequences, a pure function: jit it with the keyword arguments static.

    `segment_ids` are 0 for padding and 1, 2, ... for the documents packed into a row; a token attends to earlier tokens
    of its own segment. `packed` False promises that each row is one document, with padding behind it or none: causality
    alone then keeps them apart, and the GPU need not ask at every layer. Products run in the dtype of `embed_tokens`,
    the residual stream is float32. `trainable` says which parameters will be differentiated; `remat` what the backward
    pass recomputes: "low-memory" keeps one [B, T, D] per layer, "offload" keeps that in the host's memory, "fast" all
    that is dear to compute, "balanced" the same but the experts' products (never a copy of a frozen weight). `unroll`
    compiles the layers one by one instead of one for all, and saves what a scan copies; for a frozen model, whose
    weights need no slice. `routing_control` replays or biases the routing; `capture_routing` > 0 keeps the routing of
    each token with so many of its largest router logits.
    """
    with jax.default_matmul_precision("highest"):
        h = _embed(params, input_ids)
        tables = rotary_tables(position_ids, config.rope_parameters, config.head_dim)

        def attend(cache, query, key, value, layer):
            return causal_attention(query, key, value, segment_ids if packed else None, config.sliding_window), cache

        valid = segment_ids.reshape(-1) > 0
        wanted = _Wanted(capture_router_logits, capture_routing)
        run = _Run(config, lora, tables, valid, trainable, remat, unroll, wanted, capture_hidden, routing_control)
        h, _, records, inputs = _run_layers(run, h, params, adapters, attend, None)
        hidden = _final_norm(h, params, config)
    sparse = np.asarray(config.sparse_layers, np.int32)
    stats = RouterStats(records.counts[sparse], records.prob_sums[sparse], jnp.sum(valid))
    logits = None
    if records.logits is not None:
        logits = records.logits[sparse].reshape(len(sparse), *input_ids.shape, config.num_experts)
    return ForwardOutput(hidden, stats, logits, inputs, _captured(records, config, input_ids.shape))


def _captured(records: _RoutingRecord, config: Qwen3MoeConfig, shape: tuple[int, ...]) -> CapturedRouting | None:
    """The captured routing of the MoE layers as [Ls, B, T, ...]."""
    if records.captured is None:
        return None
    sparse = np.asarray(config.sparse_layers, np.int32)
    every = len(sparse) == config.num_hidden_layers  # the usual case: no copy
    return CapturedRouting(
        *((a if every else a[sparse]).reshape(len(sparse), *shape, *a.shape[2:]) for a in records.captured)
    )


def forward_cached(
    params: Params,
    adapters: Params,
    input_ids: Int[Array, "B T"],
    start: Int[Array, " B"] | None,
    length: Int[Array, " B"],
    cache: KVCache,
    *,
    config: Qwen3MoeConfig,
    lora: LoraConfig | None = None,
    capture_routing: int = 0,
    routing_control: RoutingControl | None = None,
) -> tuple[Float[Array, "B T D"], KVCache, CapturedRouting | None]:
    """The decoder over T new tokens a row, at positions start .. start + T - 1, against and into the cache.

    Without `start` the rows begin here, at position 0: the tokens then attend to each other by `causal_attention`, and
    the cache is only written. The first `length` of a row's T tokens are real; what the others write lies past the
    row's end, where no query looks before a later call has overwritten it. Positions must stay below the cache's S.
    Routing is captured, replayed or biased as in `forward`.
    """
    B, T = input_ids.shape
    S = cache.key.shape[2]
    with jax.default_matmul_precision("highest"):
        positions = jnp.broadcast_to(jnp.arange(T), (B, T)) if start is None else start[:, None] + jnp.arange(T)
        tables = rotary_tables(positions, config.rope_parameters, config.head_dim)
        slots = jnp.broadcast_to(jnp.arange(S), (B, S))
        # One segment: a slot beyond the row's own position is excluded by causality alone.
        ones = partial(jnp.ones, dtype=jnp.int32)
        mask = attention_mask(positions, slots, ones((B, T)), ones((B, S)), config.sliding_window)
        rows = jnp.arange(B)[:, None]

        def whole_rows(stack, new, layer):
            return jax.lax.dynamic_update_slice(stack, new[None, :, :S].astype(stack.dtype), (layer, 0, 0, 0, 0))

        def attend(cache, query, key, value, layer):
            if start is None:
                # What lies behind a row's end comes after every real token: causality alone excludes it.
                out = causal_attention(query, key, value, None, config.sliding_window)
                return out, KVCache(*(whole_rows(*pair, layer) for pair in ((cache.key, key), (cache.value, value))))
            # Out-of-range writes (a bucket's padding past S) are dropped, never clamped onto the last slot.
            keys = cache.key.at[layer, rows, positions].set(key.astype(cache.key.dtype), mode="drop")
            values = cache.value.at[layer, rows, positions].set(value.astype(cache.value.dtype), mode="drop")
            here = partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
            return attention(query, here(keys), here(values), mask), KVCache(keys, values)

        valid = (jnp.arange(T) < length[:, None]).reshape(-1)
        h = _embed(params, input_ids)
        run = _Run(config, lora, tables, valid, wanted=_Wanted(top=capture_routing), control=routing_control)
        h, cache, records, _ = _run_layers(run, h, params, adapters, attend, cache)
        hidden = _final_norm(h, params, config)
        return hidden, cache, _captured(records, config, input_ids.shape)


def taken_implementations(config: Qwen3MoeConfig, dtype: str) -> dict[Literal["attention", "experts"], Any]:
    """What attention and the experts' products of this model run on, on the default device (`jaxmoe.memory` asks)."""
    attention, experts = _choices(config, dtype)
    return {"attention": attention.name, "experts": experts.name}


def slow_implementations(config: Qwen3MoeConfig, dtype: str) -> list[str]:
    """A line for each of the two that is not by a kernel, and why, where the default device is a GPU; else nothing."""
    if implementations.default_device().platform != "gpu":
        return []
    attention, experts = _choices(config, dtype)
    taken = [("attention", attention, "blocks")]
    if config.sparse_layers:
        taken.append(("experts", experts, "tiled"))
    return [f"{what} without a kernel, slowly: {choice.reason}" for what, choice, slow in taken if choice.name == slow]


def _choices(config: Qwen3MoeConfig, dtype: str) -> tuple[Choice, Choice]:
    """How attention and the experts' products of this model run."""
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    experts = experts_implementation(dtype, config.hidden_size, config.moe_intermediate_size)
    return attention_implementation(dtype, *heads), experts


def empty_cache(config: Qwen3MoeConfig, batch: int, slots: int, dtype: Any) -> KVCache:
    """A cache of zeros for `batch` rows of up to `slots` positions."""
    shape = (config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def head_weight(params: Params, config: Qwen3MoeConfig) -> Float[Array, "V D"]:
    """The output projection: `lm_head`, or the embedding when they are tied."""
    return params["embed_tokens"] if config.tie_word_embeddings else params["lm_head"]


def logits_of(hidden: Float[Array, "*batch D"], head: Float[Array, "V D"]) -> Float[Array, "*batch V"]:
    """Logits in float32 (transformers rounds them to the model's dtype)."""
    with jax.named_scope("head"):
        precision = jax.lax.Precision.HIGHEST
        return jnp.einsum("...d,vd->...v", hidden, head, precision=precision, preferred_element_type=jnp.float32)


def _draw(spec: ParameterSpec, key: Array, dtype: Any, std: float) -> Array:
    if spec.init == "ones":
        return jnp.ones(spec.shape, dtype)
    if spec.init == "zeros":
        return jnp.zeros(spec.shape, dtype)
    if spec.axes[0] == "layers":
        # Layer by layer: the random bits of a whole stack would take twice the memory of the stack itself.
        layer = ParameterSpec(spec.shape[1:], spec.axes[1:], spec.init)
        return jax.lax.map(lambda k: _draw(layer, k, dtype, std), jax.random.split(key, spec.shape[0]))
    if spec.init == "uniform":  # Kaiming with a = sqrt(5): bound 1 / sqrt(fan in), as PEFT draws lora_A
        bound = 1 / math.sqrt(spec.shape[-1])
        return jax.random.uniform(key, spec.shape, dtype, -bound, bound)
    return (std * jax.random.normal(key, spec.shape, dtype)).astype(dtype)


def _draw_all(specs: Mapping[str, ParameterSpec], key: Array, dtype: Any, std: float) -> Params:
    keys = jax.random.split(key, len(specs))
    return {path: _draw(spec, k, dtype, std) for (path, spec), k in zip(specs.items(), keys, strict=True)}


def init_parameters(config: Qwen3MoeConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Fresh weights: normal with `initializer_range`, norms one, biases zero, as transformers initialises."""
    return _draw_all(parameter_specs(config), key, dtype, config.initializer_range)


def init_adapters(config: Qwen3MoeConfig, lora: LoraConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Fresh adapters: A uniform, B zero, so that the adapted model starts as the base."""
    return _draw_all(lora_specs(config, lora), key, dtype, 0.0)


def _nest(arrays: Mapping[str, Array], specs: Mapping[str, ParameterSpec], kind: type[nnx.Param]) -> nnx.Dict:
    """Dotted paths -> nested `nnx.Dict`s of variables that carry their logical axes; shapes are checked."""
    root = nnx.Dict({})
    for path in sorted(set(specs) | set(arrays)):
        if path not in arrays or path not in specs:
            raise ValueError(f"parameter {path}: {'unexpected' if path in arrays else 'missing'}")
        if arrays[path].shape != specs[path].shape:
            raise ValueError(f"parameter {path}: expected shape {specs[path].shape}, found {arrays[path].shape}")
        *parents, name = path.split(".")
        node = root
        for parent in parents:
            if parent not in node:
                node[parent] = nnx.Dict({})
            node = node[parent]
        # Placement is decided by jaxmoe.sharding; here the axes are a record, not an instruction.
        node[name] = kind(arrays[path], out_sharding=specs[path].axes, eager_sharding=False)
    return root


def _flatten(root: nnx.Dict, specs: Mapping[str, ParameterSpec]) -> Params:
    return {path: reduce(getitem, path.split("."), root)[...] for path in specs}


def open_checkpoint(
    path: str | pathlib.Path, dtype: str | None = None, quantize: str | None = None
) -> tuple[Qwen3MoeConfig, Checkpoint]:
    """The checkpoint in a folder, HF form or converted, its weights not yet read; arguments and errors as of
    `Qwen3MoeForCausalLM.from_pretrained`."""
    from convert.hf2jax import read_hf

    source = read_converted(path, dtype) if is_converted(path) else read_hf(path, dtype)
    if quantize is not None:
        source = quantized(source, quantize)
    return source.config if dtype is None else source.config.replace(dtype=dtype), source


def load_adapter(path: str | pathlib.Path, config: Qwen3MoeConfig) -> tuple[LoraConfig, Params]:
    """The adapter in a folder, PEFT's form or converted, in float32.

    Raises:
        UserError: a broken adapter, or one of another model.
    """
    from convert.adapters import read_peft

    lora, arrays = read_adapter(path, config)[1:] if is_adapter(path) else read_peft(path, config)
    return lora, {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}


class Qwen3MoeForCausalLM(nnx.Module):
    """The model as an object: named parameters with logical axes, loading, and a call like transformers'.

    `weights` and `lora_weights` are nested `nnx.Dict`s of `nnx.Param` and `nnx.LoRAParam`; `params` and `adapters` give
    the flat dictionaries of arrays that the pure functions take. Hot loops use those, never the object.
    """

    def __init__(
        self,
        config: Qwen3MoeConfig,
        params: Mapping[str, Array],
        lora_config: LoraConfig | None = None,
        adapters: Mapping[str, Array] | None = None,
    ):
        """Raises ValueError when an array is missing, unexpected or of another shape than `stored_specs` says."""
        self.config = nnx.static(config)
        self.lora_config = nnx.static(lora_config)
        self.quantization = nnx.static(Quantization.of(params))
        self.weights = _nest(params, stored_specs(config, self.quantization), nnx.Param)
        self.lora_weights = _nest(adapters or {}, self._lora_specs(), nnx.LoRAParam)

    def _lora_specs(self) -> dict[str, ParameterSpec]:
        return lora_specs(self.config, self.lora_config) if self.lora_config else {}

    @property
    def params(self) -> Params:
        """Flat dictionary of the base parameters: dotted path -> array."""
        return _flatten(self.weights, stored_specs(self.config, self.quantization))

    @property
    def adapters(self) -> Params:
        """Flat dictionary of the adapters: dotted path -> array; empty without LoRA."""
        return _flatten(self.lora_weights, self._lora_specs())

    @classmethod
    def from_config(cls, config: Qwen3MoeConfig, seed: int = 0, dtype: Any = jnp.float32) -> Qwen3MoeForCausalLM:
        """A model with fresh random weights."""
        draw = jax.jit(init_parameters, static_argnums=(0, 2))
        return cls(config, draw(config, jax.random.key(seed), jnp.dtype(dtype)))

    @classmethod
    def from_pretrained(
        cls,
        path: str | pathlib.Path,
        dtype: str | None = None,
        quantize: str | None = None,
        adapter: str | pathlib.Path | None = None,
        on_layer: OnLayer = lambda *_: None,
    ) -> Qwen3MoeForCausalLM:
        """Loads a Hugging Face folder or one written by `python -m convert hf2jax`, layer by layer.

        Args:
            path: the model's folder.
            dtype: "float32", "bfloat16" or "float16"; None keeps the checkpoint's.
            quantize: "nf4" holds projections, dense MLPs and experts in NF4 with double quantisation; None keeps the
                checkpoint's form. Weights that are in NF4 already keep their bytes.
            adapter: a PEFT adapter's folder or a converted one.
            on_layer: called behind each layer, with the number of layers read and that of all.

        Raises:
            UserError: a broken or unfitting folder; the message names the file, what was expected and what was found.
        """
        config, source = open_checkpoint(path, dtype, quantize)
        params = load_stacks(config, source, on_layer=on_layer)
        return cls(config, params) if adapter is None else cls(config, params, *load_adapter(adapter, config))

    def __call__(
        self,
        input_ids: TokenArray,
        attention_mask: TokenArray | None = None,
        position_ids: TokenArray | None = None,
        segment_ids: TokenArray | None = None,
        output_router_logits: bool = False,
        output_hidden_states: bool = False,
        routing_control: RoutingControl | None = None,
    ) -> CausalLMOutput:
        """Logits (float32) for whole sequences.

        Args:
            input_ids: token ids.
            attention_mask: 1 for tokens, 0 for padding; on either side.
            position_ids: by default 0, 1, ... (transformers' default: padding on the left counts).
            segment_ids: packed rows: 0 padding, 1, 2, ... documents; excludes `attention_mask`.
            output_router_logits: also give router logits and the load-balancing loss over unpadded tokens.
            output_hidden_states: also give each layer's input and, last, the normed output, as transformers does.
            routing_control: replays recorded experts ([Ls, B, T, k]) or biases the router logits ([Ls, E]).

        Raises:
            ValueError: both `attention_mask` and `segment_ids`, or a document in several pieces.
        """
        input_ids = jnp.asarray(input_ids, jnp.int32)
        if segment_ids is not None and attention_mask is not None:
            raise ValueError("segment_ids and attention_mask: expected at most one, found both")
        if segment_ids is None:
            segment_ids = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        packed = True
        if not isinstance(segment_ids, Tracer):
            packed = _packed(np.asarray(segment_ids))
        if position_ids is None:
            position_ids = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        logits, out = _logits(
            self.params,
            self.adapters,
            input_ids,
            jnp.asarray(position_ids, jnp.int32),
            jnp.asarray(segment_ids, jnp.int32),
            config=self.config,
            lora=self.lora_config,
            capture_router_logits=output_router_logits,
            capture_hidden=output_hidden_states,
            routing_control=routing_control,
            packed=packed,
        )
        router = hidden = aux = None
        if output_router_logits:
            router = tuple(out.router_logits)
            aux = load_balancing_loss(*out.stats) if router else None
        if output_hidden_states:
            hidden = (*out.layer_inputs, out.hidden)
        return CausalLMOutput(logits, router, aux, hidden)


def _packed(segments: np.ndarray) -> bool:
    """Whether some row is more than one document with padding behind it.

    Raises:
        ValueError: a segment that is not one run of its row: attention takes runs for segments (`jaxmoe.ops.attention_cudnn`).
    """
    packed = False
    for row, ids in enumerate(segments):
        starts = ids[np.flatnonzero(np.diff(ids, prepend=-1))]
        documents = starts[starts > 0]
        if len(np.unique(documents)) < len(documents):
            raise ValueError(f"row {row}: expected each document, or all unpadded tokens, in one piece, found several")
        packed |= len(documents) > 1 or (len(documents) == 1 and bool(starts[0] == 0))
    return packed


@partial(jax.jit, static_argnames=("config", "lora", "capture_router_logits", "capture_hidden", "packed"))
def _logits(params, adapters, input_ids, position_ids, segment_ids, *, config, **options):
    out = forward(params, adapters, input_ids, position_ids, segment_ids, config=config, **options)
    return logits_of(out.hidden, head_weight(params, config)), out
