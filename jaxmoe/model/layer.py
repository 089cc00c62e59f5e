"""One layer's view of the stacked parameters, by dotted path, whatever the form in which they are stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.distributed.collectives import gather
from jaxmoe.distributed.sharding import gathered_axes
from jaxmoe.fp8.codec import FP8
from jaxmoe.fp8.stack import FP8Stack
from jaxmoe.lora import LORA_TARGETS, LoraConfig
from jaxmoe.model.interface import Options, Params
from jaxmoe.nf4.codec import NF4
from jaxmoe.nf4.stack import NF4Stack
from jaxmoe.ops.experts import ExpertWeights
from jaxmoe.ops.linear import LinearMap, layer_slice
from jaxmoe.ops.low_rank import Adapter, Dropout, DropoutKeys
from jaxmoe.ops.norm import StackedNorm
from jaxmoe.parameters import NESTED_QUANT_MAP, parameter_specs, quantized_paths
from jaxmoe.quantized_stack import QuantizedStack

_EXPERTS = ("sparse.gate_up_proj", "sparse.down_proj")
# The weights whose adapters may have dropout, in the order in which a layer numbers its draws.
_DROPPING = tuple(target.path for target in LORA_TARGETS.values() if target.allows_dropout)


class Stacks(NamedTuple):
    """Stacked arrays by path. `sliced` ones already hold one layer inside the loop; `whole` ones are indexed there."""

    sliced: Params
    whole: Mapping[str, Array | QuantizedStack]

    def pick(self, path: str, slot: Any) -> Array:
        """One layer's array."""
        if path in self.sliced:
            return self.sliced[path]
        stack = self.whole[path]
        return stack[slot] if isinstance(stack, QuantizedStack) else layer_slice(stack, slot)

    def __contains__(self, path: object) -> bool:
        return path in self.sliced or path in self.whole


class LayerIndex(NamedTuple):
    """For each layer (or one): its index, its slot in the stack of its MLP's kind, whether it is sparse."""

    layer: Any
    slot: Any
    is_sparse: Any

    @classmethod
    def of(cls, config: Qwen3MoeConfig) -> LayerIndex:
        """The indices of all layers, NumPy arrays [L]."""
        sparse, dense = config.sparse_layers, config.dense_layers
        layers = range(config.num_hidden_layers)
        slots = [sparse.index(i) if i in sparse else dense.index(i) for i in layers]
        return cls(np.arange(len(layers)), np.asarray(slots), np.asarray([i in sparse for i in layers]))


class ModelStacks(NamedTuple):
    """The parameters and adapters of all layers, in the form that the loop over layers needs."""

    config: Qwen3MoeConfig
    weights: Stacks
    adapters: Stacks
    scales: Mapping[str, float | Array]  # an adapter's path -> the factor on its product, or one per layer
    dropout: float  # of the adapters' inputs, in training
    devices: int  # that share the tokens of a sequence
    experts: Mapping[str, Array | QuantizedStack]  # frozen ones, [layers * E, out, in]; empty if they are trained
    experts_here: int  # experts of a layer on this device
    adapted: Int[np.ndarray, "Ls n"] | None  # the experts of each place of the experts' adapters; None: place = expert
    params: Params  # as they are stored
    shared: Mapping[str, int]  # path of an array that devices share with fsdp -> which axis of one layer's
    dtype: Any  # of the operands of products

    @classmethod
    def of(cls, params: Params, adapters: Params, config: Qwen3MoeConfig, options: Options) -> ModelStacks:
        """Decides which arrays the loop scans over.

        Arrays with a gradient are scanned over, so that each layer's gradient is written once; frozen ones stay whole.
        The experts' two stacks are always treated alike.

        Raises:
            ValueError: a quantised weight is to be trained, or one of the experts' stacks while the other is quantised.
        """
        trained = {path for path in params if "." in path and options.trains(path)}
        if trained & set(_EXPERTS):
            trained |= set(_EXPERTS)
        stacks = _layer_stacks(params, config)
        for path in sorted(trained):
            if isinstance(stack := stacks[path], QuantizedStack):
                raise ValueError(f"{path}: frozen ({stack.form}), but it or the experts' other stack is to be trained")
        weights = _split(stacks, config, trained)
        experts = {path: _by_expert(stack) for path in _EXPERTS if (stack := weights.whole.get(path)) is not None}
        scales = _scales(options.lora)
        adapters = _only_trained_parts(adapters, options.lora)
        adapter_stacks = _split(adapters, config, set(adapters) if options.trainable != "none" else set())
        dropout = options.lora.dropout if options.lora else 0.0
        here = config.num_experts // options.mesh["expert"]
        shared = gathered_axes(config, options.lora, [*params, *adapters], options.mesh)
        dtype = params["embed_tokens"].dtype
        devices = options.mesh["context"]
        adapted = _adapted(options.lora, config.num_experts)
        return cls(
            config, weights, adapter_stacks, scales, dropout, devices, experts, here, adapted, params, shared, dtype
        )

    @property
    def first_expert(self) -> Array | int:
        """The index of this device's first expert in its layer."""
        whole = self.experts_here == self.config.num_experts
        return 0 if whole else jax.lax.axis_index("expert") * self.experts_here

    def layer(self, index: LayerIndex, sliced: Params, sliced_adapters: Params) -> Layer:
        """The layer `index`, given its slices of the scanned arrays."""
        stacks = self._replace(
            weights=self.weights._replace(sliced=sliced), adapters=self.adapters._replace(sliced=sliced_adapters)
        )
        return Layer(stacks, *index)


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its index, its slot in the stack of its MLP's kind, and its parameters by path."""

    stacks: ModelStacks
    index: Array
    slot: Array
    is_sparse: Array
    dropout_keys: DropoutKeys | None = None  # one per sequence, the same for every layer

    def dropping(self, keys: DropoutKeys | None) -> Layer:
        """The layer with dropout on the inputs of its adapters; without keys there is none."""
        return replace(self, dropout_keys=keys)

    @property
    def dtype(self) -> Any:
        """The dtype of the operands of products; the residual stream between them is float32."""
        return self.stacks.dtype

    @property
    def eps(self) -> float:
        """What a norm adds to the mean square."""
        return self.stacks.config.rms_norm_eps

    def weight(self, path: str) -> Array:
        """The layer's own array."""
        return self._whole(path, self.stacks.weights.pick(path, self._slot(path)))

    def norm(self, path: str) -> tuple[Array, float, bool]:
        """(a norm's weight, its eps, whether it is frozen)."""
        return self.weight(path), self.eps, path in self.stacks.weights.whole

    def stacked_norm(self, path: str) -> StackedNorm:
        """A norm whose weight a kernel reads in place."""
        return StackedNorm(*self.stacked(path), self.eps)

    def stacked(self, path: str) -> tuple[Array, Array | int]:
        """(a stack that holds the array `path` of this layer, its place in it): the whole stack if it is frozen."""
        if path in self.stacks.weights.whole and not self._is_shared(path):
            stack = self.stacks.weights.whole[path]
            assert not isinstance(stack, QuantizedStack)
            return stack, self._slot(path)
        return self.weight(path)[None], 0

    def linear_maps(self, *paths: str) -> list[LinearMap]:
        """Linear maps with bias and adapter; a frozen weight is passed as its whole stack, and read in place.

        Where devices share one of the stacks, all maps have stacks of this layer alone.
        """
        alone = any(map(self._is_shared, paths))
        return [self._linear_map(path, alone) for path in paths]

    def adapter(self, path: str) -> Adapter | None:
        """The adapter on the parameter `path`, if there is one."""
        if path not in self.stacks.scales:
            return None
        names = f"{path}.lora_A", f"{path}.lora_B"
        a, b = (self._whole(name, self.stacks.adapters.pick(name, self._slot(path))) for name in names)
        chosen = None
        if path in _EXPERTS and self.stacks.adapted is not None:
            experts = layer_slice(jnp.asarray(self.stacks.adapted), self.slot)
            arrays = a, b, jnp.ones(experts.shape, bool)
            a, b, chosen = (by_expert(x, experts, self.stacks.experts_here, self.stacks.first_expert) for x in arrays)
        scale = self.stacks.scales[path]
        own = scale if isinstance(scale, int | float) else scale[self._slot(path)]
        return Adapter(a, b, own, self._dropout(path), chosen)

    def _dropout(self, path: str) -> Dropout | None:
        if self.dropout_keys is None or path not in _DROPPING:
            return None
        draw = self.index * len(_DROPPING) + _DROPPING.index(path)
        keys = jax.vmap(lambda key: jax.random.fold_in(key, draw))(self.dropout_keys)
        return Dropout(keys, self.stacks.dropout, self.stacks.devices)

    def experts(self) -> ExpertWeights:
        """The fused experts: the whole stack and this layer's offset in it, or this layer's slice if it is trained."""
        if self.stacks.experts and any(map(self._is_shared, _EXPERTS)):
            gate_up, down = (_by_expert(self._alone(path)) for path in _EXPERTS)
            return ExpertWeights(gate_up, down, 0, trainable=False)
        if self.stacks.experts:
            gate_up, down = (self.stacks.experts[path] for path in _EXPERTS)
            return ExpertWeights(gate_up, down, self.slot * self.stacks.experts_here, trainable=False)
        gate_up, down = (self._whole(path, self.stacks.weights.sliced[path]) for path in _EXPERTS)
        return ExpertWeights(gate_up, down, 0, trainable=True)

    def _slot(self, path: str) -> Array:
        return self.index if path.startswith("attention.") else self.slot

    def _is_shared(self, path: str) -> bool:
        """Whether devices share some array of the weight `path`."""
        return any(name in self.stacks.shared for name in _stored(path))

    def _whole(self, path: str, share: Array) -> Array:
        """One layer's array, put together if devices share it."""
        return share if path not in self.stacks.shared else gather(share, self.stacks.shared[path])

    def _alone(self, path: str) -> Array | QuantizedStack:
        """A frozen weight's stack with this layer alone, put together from the shares: its bytes if it is quantised."""
        params, slot = self.stacks.params, self._slot(path)
        at = dict.fromkeys(_stored(path), slot)
        own = {}
        if (places := params.get(f"{path}.places")) is not None:
            # Both forms are read, since one loop runs over all layers; the place says which one counts.
            place = layer_slice(places, slot)
            at = dict.fromkeys(at, jnp.maximum(place, 0)) | {f"{path}.weight": jnp.maximum(-1 - place, 0)}
            own = {f"{path}.places": jnp.minimum(place, 0).clip(-1)[None]}
        for name in at.keys() & params.keys() - own.keys():
            own[name] = self._whole(name, layer_slice(params[name], at[name]))[None]
        if NESTED_QUANT_MAP in params:
            own[NESTED_QUANT_MAP] = params[NESTED_QUANT_MAP]
        return _stack(own, path, (1, *parameter_specs(self.stacks.config)[path].shape[1:]), self.dtype)

    def _linear_map(self, path: str, alone: bool) -> LinearMap:
        weights = self.stacks.weights
        bias = self.weight(f"{path}_bias") if f"{path}_bias" in weights else None
        if path in weights.sliced:
            return LinearMap(self._whole(path, weights.sliced[path]), None, bias, self.adapter(path))
        if alone:
            return LinearMap(self._alone(path), self.index * 0, bias, self.adapter(path))
        return LinearMap(weights.whole[path], self._slot(path), bias, self.adapter(path))


def _scales(lora: LoraConfig | None) -> dict[str, float | Array]:
    """An adapter's path -> the factor on its product, or float32 factors [layers of the stack] where they differ."""
    scales: dict[str, float | Array] = {}
    if lora is None:
        return scales
    for target in lora.targets:
        each = lora.scales(target)
        scales[LORA_TARGETS[target].path] = jnp.asarray(each, jnp.float32) if isinstance(each, tuple) else each
    return scales


def _adapted(lora: LoraConfig | None, num_experts: int) -> Int[np.ndarray, "Ls n"] | None:
    """The experts of each place of the experts' adapters; for an unused place one that does not exist."""
    if lora is None or not lora.adapted_experts:
        return None
    places = max(map(len, lora.adapted_experts))
    unused = [num_experts + place for place in range(places)]
    return np.asarray([[*experts, *unused[len(experts) :]] for experts in lora.adapted_experts], np.int32)


def by_expert(
    array: Shaped[Array, "n ..."], experts: Int[Array, " n"], here: int, first: Array | int
) -> Shaped[Array, "here ..."]:
    """Puts the adapter of each place where its expert lies among the `here` experts from `first` on; others get zeros.

    The gradient is read back from the same places, so what the optimizer holds is as small as `array`.
    """
    place = experts - first
    outside = here + jnp.arange(len(experts))  # indices stay unique, and those beyond the end are dropped
    place = jnp.where((place < 0) | (place >= here), outside, place)
    empty = jnp.zeros((here, *array.shape[1:]), array.dtype)
    return empty.at[place].set(array, mode="drop", unique_indices=True)


def _only_trained_parts(adapters: Params, lora: LoraConfig | None) -> Params:
    """Where only gate or only up has an adapter, B is multiplied by zero in the other half, so it has no gradient."""
    if lora is None or not lora.gate_up_parts:
        return adapters
    path = f"{LORA_TARGETS['experts.gate_up_proj'].path}.lora_B"
    halves = np.asarray([[part != "up", part != "gate"] for part in lora.gate_up_parts], np.float32)
    rows = np.repeat(halves, adapters[path].shape[-2] // 2, axis=1)
    return {**adapters, path: adapters[path] * rows[:, None, :, None]}


def _layer_stacks(params: Params, config: Qwen3MoeConfig) -> dict[str, Array | QuantizedStack]:
    """The parameters of the layers: as they are, or one `QuantizedStack` in place of several arrays."""
    if not quantized_paths(params):
        return {path: stack for path, stack in params.items() if "." in path}
    dtype = params["embed_tokens"].dtype
    return {
        path: _stack(params, path, spec.shape, dtype) for path, spec in parameter_specs(config).items() if "." in path
    }


def _stack(params: Params, path: str, shape: tuple[int, ...], dtype: Any) -> Array | QuantizedStack:
    """The weight `path` of a flat dictionary, as it is or quantised; `shape` counts the experts of the whole model."""
    if (codes := params.get(f"{path}.codes")) is None:
        return params[path]
    experts = codes.shape[1:-2]  # those of this device
    kind = FP8Stack if f"{path}.scales" in params else NF4Stack
    return kind.of(params, path, (shape[0] * math.prod(experts), *shape[-2:]), dtype)


def _stored(path: str) -> tuple[str, ...]:
    """The arrays that may hold the weight `path`, without the places of a mixed stack."""
    return (path, *(f"{path}.{field}" for field in (*NF4._fields, *FP8._fields, "weight")))


def _by_expert(stack: Array | QuantizedStack) -> Array | QuantizedStack:
    """A stack of experts with one leading axis for layers and experts."""
    return stack if isinstance(stack, QuantizedStack) else stack.reshape(-1, *stack.shape[2:])


def _split(stacks: Mapping[str, Any], config: Qwen3MoeConfig, sliced: set[str]) -> Stacks:
    """The stacks named by `sliced` get one entry per layer along their first axis; the others stay as they are."""
    whole = {path: stack for path, stack in stacks.items() if path not in sliced}
    if not (config.sparse_layers and config.dense_layers):
        return Stacks({path: stacks[path] for path in stacks if path in sliced}, whole)
    # In a model with both kinds of MLP, a layer of the other kind carries an unused slot, whose gradient is zero.
    layers, slots, is_sparse = LayerIndex.of(config)
    slot_of = {"attention": layers, "sparse": np.where(is_sparse, slots, 0), "dense": np.where(is_sparse, 0, slots)}
    return Stacks({path: stacks[path][slot_of[path.split(".")[0]]] for path in stacks if path in sliced}, whole)
