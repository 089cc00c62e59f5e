"""Qwen3-MoE: the decoder layer, the scan over layers, the KV cache, and the Flax NNX shell around them.

The forward pass is a pure function over a flat dictionary of stacked parameters (`jaxmoe.parameters` lists them). One scan
runs over all layers; its body picks each layer's weights by index, so a kind of layer is compiled once whatever the depth.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmoe.config import DTYPES, LORA_TARGETS, LoraConfig, Qwen3MoeConfig
from jaxmoe.dispatch import ExpertWeights, sorted_experts
from jaxmoe.errors import UserError
from jaxmoe.layers import (
    WEIGHT_SLICE,
    Adapter,
    apply_rotary,
    attention,
    attention_mask,
    layer_slice,
    linear,
    rms_norm,
    rotary_tables,
    swiglu,
)
from jaxmoe.parameters import ParameterSpec, layer_paths, lora_specs, parameter_specs
from jaxmoe.router import expert_counts, load_balancing_loss, route

Params = dict[str, Array]
Trainable = Literal["none", "adapters", "all"]
Remat = Literal["none", "full"]


class RouterStats(NamedTuple):
    """Per MoE layer: routed rows per expert, and router probabilities summed over the valid (non-padding) tokens."""

    counts: Int[Array, "Ls E"]
    prob_sums: Float[Array, "Ls E"]
    tokens: Int[Array, ""]


class ForwardOutput(NamedTuple):
    """Hidden states after the final norm, router statistics, and what was asked to be captured."""

    hidden: Float[Array, "B T D"]
    stats: RouterStats
    router_logits: Float[Array, "Ls B T E"] | None
    layer_inputs: Float[Array, "L B T D"] | None


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


class _Layer(NamedTuple):
    """One layer's view of the parameters: `weight` and `adapter` by parameter name, `experts` for the sparse kind."""

    weight: Callable[[str], Array | None]
    adapter: Callable[[str], Adapter | None]
    experts: Callable[[], ExpertWeights]


def _attention_block(h: Array, layer: _Layer, config: Qwen3MoeConfig, tables: tuple[Array, Array], attend) -> Any:
    """Pre-norm attention with q/k norm and its residual; `attend(q, k, v)` returns the heads' output and a carry."""
    B, T, _ = h.shape

    def project(x: Array, name: str) -> Array:
        path = f"attention.{name}"
        return linear(x, layer.weight(path), layer.weight(f"{path}_bias"), layer.adapter(path))

    with jax.named_scope("attention"):
        x = rms_norm(h, layer.weight("attention.input_layernorm"), config.rms_norm_eps)
        query, key, value = (
            project(x, name).reshape(B, T, -1, config.head_dim) for name in ("q_proj", "k_proj", "v_proj")
        )
        # The norms run over the head's width, so they commute with the split into heads but not with the rotation.
        query = apply_rotary(rms_norm(query, layer.weight("attention.q_norm"), config.rms_norm_eps), *tables)
        key = apply_rotary(rms_norm(key, layer.weight("attention.k_norm"), config.rms_norm_eps), *tables)
        heads, carry = attend(query, key, value)
        return h + project(heads.reshape(B, T, -1), "o_proj"), carry


class _RoutingRecord(NamedTuple):
    counts: Array
    prob_sums: Array
    logits: Array | None


def _sparse_mlp(x: Array, layer: _Layer, config: Qwen3MoeConfig, valid: Array, capture: bool):
    with jax.named_scope("router"):
        routing = route(
            x,
            layer.weight("sparse.gate"),
            num_experts_per_tok=config.num_experts_per_tok,
            norm_topk_prob=config.norm_topk_prob,
            adapter=layer.adapter("sparse.gate"),
        )
        record = _RoutingRecord(
            expert_counts(routing.experts, valid, config.num_experts),
            jnp.sum(jnp.where(valid[:, None], routing.probabilities, 0), axis=0),
            routing.logits if capture else None,
        )
    with jax.named_scope("experts"):
        adapters = (layer.adapter(f"sparse.{name}") for name in ("gate_up_proj", "down_proj"))
        return sorted_experts(x, routing, layer.experts(), *adapters), record


def _dense_mlp(x: Array, layer: _Layer, config: Qwen3MoeConfig, capture: bool):
    def project(x: Array, name: str) -> Array:
        return linear(x, layer.weight(f"dense.{name}"), None, layer.adapter(f"dense.{name}"))

    E = config.num_experts
    with jax.named_scope("dense_mlp"):
        y = project(swiglu(project(x, "gate_proj"), project(x, "up_proj")), "down_proj")
    logits = jnp.zeros((x.shape[0], E), jnp.float32) if capture else None
    return y, _RoutingRecord(jnp.zeros(E, jnp.int32), jnp.zeros(E, jnp.float32), logits)


def _decoder_layer(h, view, index, config, tables, attend, valid, capture):
    """One decoder layer; `view(slot of the mlp kind)` gives the weights, `index` is (layer, mlp slot, is sparse)."""
    _, mlp_slot, is_sparse = index
    layer = view(mlp_slot)
    h, carry = _attention_block(h, layer, config, tables, attend)
    x = rms_norm(h, layer.weight("attention.post_attention_layernorm"), config.rms_norm_eps)
    x = x.reshape(-1, x.shape[-1])

    def sparse(x):
        return _sparse_mlp(x, layer, config, valid, capture)

    def dense(x):
        return _dense_mlp(x, layer, config, capture)

    if not config.dense_layers:
        y, record = sparse(x)
    elif not config.sparse_layers:
        y, record = dense(x)
    else:  # both kinds: one branch each is compiled, whatever the pattern of layers
        y, record = jax.lax.cond(is_sparse, sparse, dense, x)
    return h + y.reshape(h.shape), carry, record


def _layer_indices(config: Qwen3MoeConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each layer: its index, its slot in the stack of its MLP kind, whether it is sparse."""
    sparse, dense = config.sparse_layers, config.dense_layers
    slots = [sparse.index(i) if i in sparse else dense.index(i) for i in range(config.num_hidden_layers)]
    is_sparse = [i in sparse for i in range(config.num_hidden_layers)]
    return np.arange(config.num_hidden_layers), np.asarray(slots), np.asarray(is_sparse)


def _split_scanned(stacks: Params, config: Qwen3MoeConfig, trained: bool) -> tuple[Params, Params]:
    """(scanned, indexed): arrays with a gradient are scanned over, so that each layer's gradient is written once;
    frozen ones stay whole and are indexed in the body."""
    if not trained:
        return {}, dict(stacks)
    sparse, dense = config.sparse_layers, config.dense_layers
    if not (sparse and dense):
        return dict(stacks), {}
    # Mixed kinds: a layer of the other kind carries an unused slot, whose gradient is zero.
    _, slots, is_sparse = _layer_indices(config)
    slot_of = {
        "attention": np.arange(config.num_hidden_layers),
        "sparse": np.where(is_sparse, slots, 0),
        "dense": np.where(is_sparse, 0, slots),
    }
    return {path: stack[slot_of[path.split(".")[0]]] for path, stack in stacks.items()}, {}


def _run_layers(h, params, adapters, *, config, lora, trainable, remat, tables, attend, cache, valid, capture, keep):
    """Scans the decoder layers; returns the hidden states, the cache and the stacked records (and layer inputs)."""
    stacks = {path: a for path, a in params.items() if "." in path}
    scanned, indexed = _split_scanned(stacks, config, trainable == "all")
    scanned_lora, indexed_lora = _split_scanned(adapters, config, trainable in ("adapters", "all"))
    E = config.num_experts
    groups = {
        path: indexed.pop(path).reshape(-1, *stacks[path].shape[2:])
        for path in ("sparse.gate_up_proj", "sparse.down_proj")
        if path in indexed
    }
    scale = {".".join(LORA_TARGETS[target]): lora.scale(target) for target in lora.targets} if lora else {}

    def body(carry, xs):
        h, cache = carry
        index, sliced, sliced_lora = xs

        def view(mlp_slot) -> _Layer:
            def pick(path, sliced, indexed):
                if path in sliced:
                    return sliced[path]
                if path in indexed:
                    return layer_slice(indexed[path], index[0] if path.startswith("attention.") else mlp_slot)
                return None

            def adapter(path: str) -> Adapter | None:
                if path not in scale:
                    return None
                pair = (pick(f"{path}.lora_{x}", sliced_lora, indexed_lora) for x in "AB")
                return Adapter(*pair, scale[path])

            def experts() -> ExpertWeights:
                if groups:
                    return ExpertWeights(groups["sparse.gate_up_proj"], groups["sparse.down_proj"], mlp_slot * E, False)
                return ExpertWeights(sliced["sparse.gate_up_proj"], sliced["sparse.down_proj"], 0, True)

            return _Layer(lambda path: pick(path, sliced, indexed), adapter, experts)

        def attend_here(query, key, value):
            return attend(query, key, value, cache, index[0])

        out, new_cache, record = _decoder_layer(h, view, index, config, tables, attend_here, valid, capture)
        return (out, new_cache), (record, h if keep else None)

    if trainable != "none":
        policy = {
            "full": jax.checkpoint_policies.nothing_saveable,
            "none": jax.checkpoint_policies.save_anything_except_these_names(WEIGHT_SLICE),
        }[remat]
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    xs = (_layer_indices(config), scanned, scanned_lora)
    (h, cache), (records, inputs) = jax.lax.scan(body, (h, cache), xs)
    return h, cache, records, inputs


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
    remat: Remat = "full",
    capture_router_logits: bool = False,
    capture_hidden: bool = False,
) -> ForwardOutput:
    """The decoder over whole sequences, a pure function: jit it with the keyword arguments static.

    `segment_ids` are 0 for padding and 1, 2, ... for the documents packed into a row; a token attends to earlier tokens of
    its own segment. Computation runs in the dtype of `embed_tokens`. `trainable` says which parameters will be
    differentiated; `remat` what the backward pass recomputes: "full" keeps one [B, T, D] per layer, "none" keeps all
    intermediate results (never a copy of a frozen weight).
    """
    with jax.default_matmul_precision("highest"):
        h = jnp.take(params["embed_tokens"], input_ids, axis=0)
        tables = rotary_tables(position_ids, config.rope_parameters, config.head_dim)
        index = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        mask = attention_mask(index, index, segment_ids, segment_ids, config.sliding_window)

        def attend(query, key, value, cache, layer):
            return attention(query, key, value, mask), cache

        valid = segment_ids.reshape(-1) > 0
        h, _, records, inputs = _run_layers(
            h,
            params,
            adapters,
            config=config,
            lora=lora,
            trainable=trainable,
            remat=remat,
            tables=tables,
            attend=attend,
            cache=None,
            valid=valid,
            capture=capture_router_logits,
            keep=capture_hidden,
        )
        hidden = rms_norm(h, params["norm"], config.rms_norm_eps)
    sparse = np.asarray(config.sparse_layers, np.int32)
    stats = RouterStats(records.counts[sparse], records.prob_sums[sparse], jnp.sum(valid))
    logits = None
    if capture_router_logits:
        logits = records.logits[sparse].reshape(len(sparse), *input_ids.shape, config.num_experts)
    return ForwardOutput(hidden, stats, logits, inputs)


def forward_cached(
    params: Params,
    adapters: Params,
    input_ids: Int[Array, "B T"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    cache: KVCache,
    *,
    config: Qwen3MoeConfig,
    lora: LoraConfig | None = None,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """The decoder over T new tokens a row, at positions start .. start + T - 1, against and into the cache.

    The first `length` of a row's T tokens are real; what the others write lies past the row's end, where no query looks
    before a later call has overwritten it. Positions must stay below the cache's S.
    """
    B, T = input_ids.shape
    S = cache.key.shape[2]
    with jax.default_matmul_precision("highest"):
        positions = start[:, None] + jnp.arange(T)
        tables = rotary_tables(positions, config.rope_parameters, config.head_dim)
        slots = jnp.broadcast_to(jnp.arange(S), (B, S))
        # One segment: a slot beyond the row's own position is excluded by causality alone.
        ones = partial(jnp.ones, dtype=jnp.int32)
        mask = attention_mask(positions, slots, ones((B, T)), ones((B, S)), config.sliding_window)
        rows = jnp.arange(B)[:, None]

        def attend(query, key, value, cache, layer):
            # Out-of-range writes (a bucket's padding past S) are dropped, never clamped onto the last slot.
            keys = cache.key.at[layer, rows, positions].set(key.astype(cache.key.dtype), mode="drop")
            values = cache.value.at[layer, rows, positions].set(value.astype(cache.value.dtype), mode="drop")
            here = partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
            return attention(query, here(keys), here(values), mask), KVCache(keys, values)

        h, cache, _, _ = _run_layers(
            jnp.take(params["embed_tokens"], input_ids, axis=0),
            params,
            adapters,
            config=config,
            lora=lora,
            trainable="none",
            remat="full",
            tables=tables,
            attend=attend,
            cache=cache,
            valid=(jnp.arange(T) < length[:, None]).reshape(-1),
            capture=False,
            keep=False,
        )
        return rms_norm(h, params["norm"], config.rms_norm_eps), cache


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
    if spec.init == "uniform":  # Kaiming with a = sqrt(5): bound 1 / sqrt(fan in), as PEFT draws lora_A
        bound = 1 / math.sqrt(spec.shape[-1])
        return jax.random.uniform(key, spec.shape, dtype, -bound, bound)
    return std * jax.random.normal(key, spec.shape, dtype)


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
    def find(path: str) -> nnx.Variable:
        node = root
        for part in path.split("."):
            node = node[part]
        return node

    return {path: find(path)[...] for path in specs}


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
        """Raises ValueError when an array is missing, unexpected or of another shape than `parameter_specs` says."""
        self.config = nnx.static(config)
        self.lora_config = nnx.static(lora_config)
        self.weights = _nest(params, parameter_specs(config), nnx.Param)
        self.lora_weights = _nest(adapters or {}, self._lora_specs(), nnx.LoRAParam)

    def _lora_specs(self) -> dict[str, ParameterSpec]:
        return lora_specs(self.config, self.lora_config) if self.lora_config else {}

    @property
    def params(self) -> Params:
        """Flat dictionary of the base parameters: dotted path -> array."""
        return _flatten(self.weights, parameter_specs(self.config))

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
    ) -> Qwen3MoeForCausalLM:
        """Loads a Hugging Face folder or one written by `python -m convert hf2jax`, layer by layer.

        Args:
            path: the model's folder.
            dtype: "float32", "bfloat16" or "float16"; None keeps the checkpoint's.
            quantize: None; 4-bit weights are not supported by this version.
            adapter: a PEFT adapter's folder or a converted one.

        Raises:
            UserError: a broken or unfitting folder; the message names the file, what was expected and what was found.
        """
        if quantize is not None:
            raise UserError(f"quantize: expected None, found {quantize!r}")
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
        from convert import open_adapter, open_checkpoint

        checkpoint = open_checkpoint(path)
        config = checkpoint.config
        params = _load_stacks(config, checkpoint.blocks(), dtype)
        if adapter is None:
            return cls(config, params)
        lora, adapters = open_adapter(adapter, config)
        return cls(config, params, lora, {p: jnp.asarray(a, jnp.float32) for p, a in adapters.items()})

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"] | None = None,
        position_ids: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        output_router_logits: bool = False,
        output_hidden_states: bool = False,
    ) -> CausalLMOutput:
        """Logits (float32) for whole sequences.

        Args:
            input_ids: token ids.
            attention_mask: 1 for tokens, 0 for padding; on either side.
            position_ids: by default 0, 1, ... (transformers' default: padding on the left counts).
            segment_ids: packed rows: 0 padding, 1, 2, ... documents; excludes `attention_mask`.
            output_router_logits: also give router logits and the load-balancing loss over unpadded tokens.
            output_hidden_states: also give each layer's input and, last, the normed output, as transformers does.
        """
        input_ids = jnp.asarray(input_ids, jnp.int32)
        if segment_ids is not None and attention_mask is not None:
            raise ValueError("segment_ids and attention_mask: expected at most one, found both")
        if segment_ids is None:
            segment_ids = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
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
        )
        router = hidden = aux = None
        if output_router_logits:
            router = tuple(out.router_logits)
            aux = load_balancing_loss(*out.stats) if router else None
        if output_hidden_states:
            hidden = (*out.layer_inputs, out.hidden)
        return CausalLMOutput(logits, router, aux, hidden)


@partial(jax.jit, static_argnames=("config", "lora", "capture_router_logits", "capture_hidden"))
def _logits(params, adapters, input_ids, position_ids, segment_ids, *, config, **options):
    out = forward(params, adapters, input_ids, position_ids, segment_ids, config=config, **options)
    return logits_of(out.hidden, head_weight(params, config)), out


@partial(jax.jit, donate_argnums=0)
def _fill(stack: Array, value: Array, slot: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(stack, value.astype(stack.dtype), slot, 0)


def _load_stacks(config: Qwen3MoeConfig, blocks: Iterable[Any], dtype: str | None) -> Params:
    """Fills preallocated stacks on the device from a stream of layers; the host holds one layer at a time."""
    specs = parameter_specs(config)
    params: Params = {}
    for block in blocks:
        slots = dict(layer_paths(config, block.layer)) if block.layer is not None else {}
        for path, value in block.arrays.items():
            kind = jnp.dtype(dtype or value.dtype)
            if block.layer is None:
                params[path] = jnp.asarray(value).astype(kind)
                continue
            if path not in params:
                params[path] = jnp.zeros(specs[path].shape, kind)
            params[path] = _fill(params[path], value, slots[path])
    return params
