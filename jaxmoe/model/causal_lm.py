"""The model as an object: named parameters, loading, and a call like transformers'."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial, reduce
from operator import getitem
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxmoe.config import LoraConfig, Qwen3MoeConfig
from jaxmoe.distributed.collectives import sum_over_devices
from jaxmoe.distributed.mesh import ONE_DEVICE, MeshShape
from jaxmoe.distributed.placement import Placement
from jaxmoe.model.adapted import weights_of
from jaxmoe.model.decoder import forward, head_weight, logits_of
from jaxmoe.model.init import init_parameters
from jaxmoe.model.interface import DecoderOutput, Options, Params, Tokens, control_specs
from jaxmoe.model.opening import load_adapter, open_checkpoint
from jaxmoe.ops.frozen import instantiated, is_perturbed, values_of
from jaxmoe.ops.router import RoutingControl, load_balancing_loss
from jaxmoe.parameters import ParameterSpec, Quantization, lora_specs, quantized_paths, stored_specs
from jaxmoe.store.loading import OnLayer, load_stacks

TokenArray = Int[Array, "B T"] | Int[np.ndarray, "B T"]


class CausalLMOutput(NamedTuple):
    """What transformers' `MoeCausalLMOutputWithPast` holds: router_logits has one [B, T, E] per MoE layer, in layer
    order, dense layers skipped."""

    logits: Float[Array, "B T V"]
    router_logits: tuple[Float[Array, "B T E"], ...] | None
    aux_loss: Float[Array, ""] | None
    hidden_states: tuple[Float[Array, "B T D"], ...] | None


class Qwen3MoeForCausalLM(nnx.Module):
    """The model as an object: named parameters with logical axes, loading, and a call like transformers'.

    `weights` and `lora_weights` are nested `nnx.Dict`s of `nnx.Param` and `nnx.LoRAParam`. `params` and `adapters` are
    the same arrays as flat dictionaries, which the pure functions expect. Hot loops use those, never the object.

    `nnx.grad` of a loss that calls the model returns the gradient of every parameter that it is asked for. Parameters
    named by `freeze` and quantised weights are frozen: asking for their gradient is an error.
    """

    def __init__(
        self,
        config: Qwen3MoeConfig,
        params: Mapping[str, Array],
        lora_config: LoraConfig | None = None,
        adapters: Mapping[str, Array] | None = None,
        mesh: MeshShape = ONE_DEVICE,
    ):
        """The arrays are put where they lie on the mesh, unless they lie there.

        Raises:
            ValueError: an array is missing, unexpected or of another shape than `stored_specs` says.
            UserError: the mesh needs more devices than there are, or they cannot share the experts evenly.
        """
        self.config = nnx.static(config)
        self.lora_config = nnx.static(lora_config)
        self.quantization = nnx.static(Quantization.of(params))
        self.frozen = nnx.static(frozenset())
        self.mesh = nnx.static(mesh)
        place = Placement(mesh, config, lora_config).place
        self.weights = _nest(params, stored_specs(config, self.quantization), nnx.Param, place)
        self.lora_weights = _nest(adapters or {}, self._lora_specs(), nnx.LoRAParam, place)

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

    def freeze(self, *names: str) -> None:
        """Freezes parameters: asking for their gradient is an error until `unfreeze`.

        Args:
            names: paths in this object or beginnings of them: "weights", "weights.attention", "weights.sparse.gate",
                "lora_weights".

        Raises:
            ValueError: a name that no parameter has.
        """
        self.frozen = nnx.static(self.frozen | self._paths(names))

    def unfreeze(self, *names: str) -> None:
        """Undoes `freeze`, for all parameters if no name is given; names and errors are the same."""
        self.frozen = nnx.static(self.frozen - self._paths(names or ("weights", "lora_weights")))

    def _paths(self, names: Iterable[str]) -> frozenset[str]:
        known = [f"weights.{path}" for path in stored_specs(self.config, self.quantization)]
        known += [f"lora_weights.{path}" for path in self._lora_specs()]
        found: set[str] = set()
        for name in names:
            matching = {path for path in known if path == name or path.startswith(f"{name}.")}
            if not matching and name != "lora_weights":
                raise ValueError(
                    f"parameters: expected a path in the model such as 'weights.attention', found {name!r}"
                )
            found |= matching
        return frozenset(found)

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
        dequantize: bool = False,
        mesh: str | MeshShape = ONE_DEVICE,
    ) -> Qwen3MoeForCausalLM:
        """Loads a Hugging Face folder or one written by `python -m convert hf2jax`, layer by layer.

        Args:
            path: the model's folder.
            dtype: "float32", "bfloat16" or "float16"; None keeps the checkpoint's.
            quantize: "nf4" holds projections, dense MLPs and experts in NF4 with double quantisation, "fp8" in e4m3
                with a scale for each 128 x 128 block; None keeps the checkpoint's form. Weights that are in that form
                already keep their bytes.
            adapter: a PEFT adapter's folder or a converted one.
            on_layer: called after each layer, with the number of layers read so far and the total.
            dequantize: decodes weights in FP8 to the dtype in config.json, and weights in NF4 to the dtype that they
                had before quantisation, or both to `dtype`.
            mesh: the devices that share the model and its inputs, such as "expert=4"; by default one.

        Raises:
            UserError: a broken or unsuitable folder; the message names the file, what was expected and what was found.
                Also a mesh that the devices or the model do not allow.
        """
        mesh = MeshShape.parse(mesh) if isinstance(mesh, str) else mesh
        config, source = open_checkpoint(path, dtype, quantize, dequantize)
        params = load_stacks(config, source, on_layer=on_layer, placement=Placement(mesh, config, None))
        adapted = (None, None) if adapter is None else load_adapter(adapter, config, source)
        return cls(config, params, *adapted, mesh)

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
            segment_ids: for packed sequences: 0 for padding, 1, 2, ... for documents; excludes `attention_mask`.
            output_router_logits: also return router logits and the load-balancing loss over unpadded tokens.
            output_hidden_states: also return each layer's input and, last, the normed output, as transformers does.
            routing_control: replays recorded experts ([Ls, B, T, k]) or biases the router logits ([Ls, E]).

        Raises:
            ValueError: both `attention_mask` and `segment_ids`, or a document in several pieces. Also, while
                differentiating, if the gradient of a frozen parameter is asked for.
            UserError: sequences or tokens that the devices of the model's mesh cannot share evenly.
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
        self.mesh.check_batch(input_ids.shape[0])
        self.mesh.check_length(input_ids.shape[1])
        tokens = Tokens(input_ids, jnp.asarray(position_ids, jnp.int32), jnp.asarray(segment_ids, jnp.int32))
        options = Options(
            lora=self.lora_config,
            packed=packed,
            mesh=self.mesh,
            router_logits=output_router_logits,
            layer_inputs=output_hidden_states,
        )
        call = _Call(self.config, options, self.frozen)
        results: Any = _run(call, self.params, self.adapters, routing_control, tokens)
        (logits, out), (counts, valid_tokens) = results
        router = hidden = aux = None
        if output_router_logits:
            router = tuple(out.router_logits)
            aux = load_balancing_loss(counts, out.prob_sums, valid_tokens) if router else None
        if output_hidden_states:
            hidden = (*out.layer_inputs, out.hidden)
        return CausalLMOutput(logits, router, aux, hidden)


def _packed(segments: np.ndarray) -> bool:
    """Whether some sequence is more than one document with padding after it.

    Raises:
        ValueError: a segment in several pieces, which attention would treat as several segments.
    """
    packed = False
    for row, ids in enumerate(segments):
        starts = ids[np.flatnonzero(np.diff(ids, prepend=-1))]
        documents = starts[starts > 0]
        if len(np.unique(documents)) < len(documents):
            raise ValueError(
                f"sequence {row}: expected each document, or all unpadded tokens, in one piece, found more"
            )
        packed |= len(documents) > 1 or (len(documents) == 1 and bool(starts[0] == 0))
    return packed


class _Call(NamedTuple):
    """What is static in a call."""

    config: Qwen3MoeConfig
    options: Options
    frozen: frozenset[str]


class _Differentiable(NamedTuple):
    """The results of a call, besides the logits, that have a gradient."""

    hidden: Array
    prob_sums: Array
    router_logits: Array | None
    layer_inputs: Array | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(
    call: _Call, params: Params, adapters: Params, control: RoutingControl | None, tokens: Tokens
) -> tuple[tuple[Array, _Differentiable], tuple[Array, Array]]:
    """((logits, other results with a gradient), (rows per expert, valid tokens)).

    The gradient rule sees which gradients are asked for and runs the forward pass that computes exactly those. If none
    is asked for, weights stay in their stacks and nothing is saved.
    """
    return _jitted(params, adapters, control, tokens, config=call.config, options=call.options)


def _run_forward(call: _Call, params: Any, adapters: Any, control: Any, tokens: Any) -> tuple[Any, Any]:
    trained = {path: values_of(array) for path, array in params.items() if is_perturbed(array)}
    asked = {f"weights.{path}" for path in trained}
    asked |= {f"lora_weights.{path}" for path, array in adapters.items() if is_perturbed(array)}
    if frozen := sorted(asked & call.frozen):
        raise ValueError(f"{frozen[0]}: frozen, but its gradient was asked for")
    params, adapters, control, tokens = map(values_of, (params, adapters, control, tokens))
    quantized = quantized_paths(params)
    for path in sorted(trained):
        if (weight := path.rpartition(".")[0]) in quantized:
            form = "FP8" if f"{weight}.scales" in params else "NF4"
            raise ValueError(f"weights.{path}: frozen ({form}), but its gradient was asked for")
    held = call.options.lora.trained_in_layers if call.options.lora else frozenset()
    asked_of_held = {path for path in held if f"lora_weights.{path}" in asked}
    options = replace(call.options, trainable=frozenset(trained) | asked_of_held)

    def run(trained: Params, adapters: Params, control: RoutingControl | None) -> Any:
        return _jitted(params | trained, adapters, control, tokens, config=call.config, options=options)

    results, pull, counted = jax.vjp(run, trained, adapters, control, has_aux=True)
    return (results, counted), (pull, dict.fromkeys(params))


def _run_backward(call: _Call, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    pull, no_gradients = residuals
    d_trained, d_adapters, d_control = pull(instantiated(cotangents[0]))
    return no_gradients | d_trained, d_adapters, d_control, None


_run.defvjp(_run_forward, _run_backward, symbolic_zeros=True)


@partial(jax.jit, static_argnames=("config", "options"))
def _jitted(params, adapters, control, tokens, *, config, options):
    def on_a_device(params, adapters, control, tokens):
        out: DecoderOutput = forward(params, adapters, tokens, config=config, options=options, control=control)
        logits = logits_of(out.hidden, head_weight(weights_of(params, adapters, options.lora)))
        stats = sum_over_devices(out.stats, options.mesh)
        differentiable = _Differentiable(out.hidden, stats.prob_sums, out.router_logits, out.layer_inputs)
        return (logits, differentiable), (stats.counts, stats.tokens)

    placement = Placement(options.mesh, config, options.lora)
    held = placement.specs(params), placement.specs(adapters)
    of_tokens, of_layers = placement.spec("batch", "sequence"), placement.spec(None, "batch", "sequence")
    differentiable = _Differentiable._make([of_tokens, PartitionSpec(), of_layers, of_layers])
    results = (of_tokens, differentiable), PartitionSpec()
    run = placement.run_in_order(on_a_device, (*held, control_specs(control, placement), of_tokens), results)
    return run(params, adapters, control, tokens)


def _nest(
    arrays: Mapping[str, Array],
    specs: Mapping[str, ParameterSpec],
    kind: type[nnx.Param],
    place: Callable[[Mapping[str, Array]], dict[str, Any]],
) -> nnx.Dict:
    """Dotted paths -> nested `nnx.Dict`s of variables that carry their logical axes; shapes are checked, then the
    arrays are put in their places."""
    root = nnx.Dict({})
    for path in sorted(set(specs) | set(arrays)):
        if path not in arrays or path not in specs:
            raise ValueError(f"parameter {path}: {'unexpected' if path in arrays else 'missing'}")
        if arrays[path].shape != specs[path].shape:
            raise ValueError(f"parameter {path}: expected shape {specs[path].shape}, found {arrays[path].shape}")
    for path, array in sorted(place(arrays).items()):
        *parents, name = path.split(".")
        node = root
        for parent in parents:
            if parent not in node:
                node[parent] = nnx.Dict({})
            node = node[parent]
        # The axes are only recorded here; nothing acts on them.
        node[name] = kind(array, out_sharding=specs[path].axes, eager_sharding=False)
    return root


def _flatten(root: nnx.Dict, specs: Mapping[str, ParameterSpec]) -> Params:
    return {path: reduce(getitem, path.split("."), root)[...] for path in specs}
