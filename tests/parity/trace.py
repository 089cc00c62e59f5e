"""Records every operation of a one-layer model, under the same names in all three implementations.

Arrays are [tokens, features]; `selected` and `weights` are [tokens, k]. Stock modules are hooked. The functions that
torch_ref and jaxmoe call are wrapped instead: torch_ref computes a module with a hook in another way. If one kernel
norms and rotates queries and keys, there is no `q_norm` and no `k_norm`.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

# in the order in which a layer computes them; a layer has either a router or a dense MLP
OPERATIONS = (
    "input_layernorm",
    "q_proj",
    "k_proj",
    "v_proj",
    "q_norm",
    "k_norm",
    "q_rotary",
    "k_rotary",
    "attention",
    "o_proj",
    "post_attention_layernorm",
    "router_logits",
    "selected",
    "weights",
    "mlp",
    "norm",
    "logits",
)


def torch_trace(model: Any, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """Records one forward pass of layer 0, in transformers or torch_ref, whichever this process has loaded."""
    import torch
    from transformers.models.qwen3_moe import modeling_qwen3_moe as hf

    tokens = inputs["input_ids"].numel()
    records: dict[str, np.ndarray] = {}

    def record(name: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        value = value.detach().reshape(tokens, -1)
        records[name] = (value.float() if value.is_floating_point() else value.int()).cpu().numpy()

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layer = base.model.layers[0]
    names = {id(getattr(layer, name)): name for name in ("input_layernorm", "post_attention_layernorm")}
    names |= {id(getattr(layer.self_attn, f"{x}_norm")): f"{x}_norm" for x in "qk"}
    names |= {id(getattr(layer.self_attn, f"{x}_proj")): f"{x}_proj" for x in "qkvo"}
    names[id(base.model.norm)] = "norm"
    patch = sys.modules.get("torch_ref.patch")
    hooks = [
        module.register_forward_hook(lambda m, _, out: record(names[id(m)], out))
        for module in model.modules()
        if id(module) in names and patch is None
    ]
    hooks.append(layer.mlp.register_forward_hook(lambda m, _, out: record("mlp", out)))
    rotary = hf.apply_rotary_pos_emb

    def rotate(*args: Any, **kwargs: Any) -> Any:
        query, key = rotary(*args, **kwargs)
        record("q_rotary", query.transpose(1, 2))
        record("k_rotary", key.transpose(1, 2))
        return query, key

    def route(_: Any, __: Any, output: Any) -> None:
        for name, value in zip(("router_logits", "weights", "selected"), output, strict=True):
            record(name, value)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(hf, "apply_rotary_pos_emb", rotate))
        if patch is None:
            projection = layer.self_attn.o_proj
            hooks.append(projection.register_forward_pre_hook(lambda m, args: record("attention", args[0])))
        routers = [module for module in model.modules() if isinstance(module, hf.Qwen3MoeTopKRouter)]
        hooks += [router.register_forward_hook(route) for router in routers]
        if patch is not None:
            stack.enter_context(_recorded_by_module(patch, "linear", names, record))
            stack.enter_context(_recorded_by_module(patch, "rms_norm", names, record))
            stack.enter_context(mock.patch.object(hf.Qwen3MoeRMSNorm, "forward", patch.rms_norm))
            stack.enter_context(_recorded_in_turn(patch, "norm_and_rotate", ("q_rotary", "k_rotary"), record))
        with torch.no_grad():
            record("logits", model(**inputs).logits)
    for hook in hooks:
        hook.remove()
    return records


@contextlib.contextmanager
def _recorded_by_module(
    owner: Any, function: str, names: dict[int, str], record: Callable[[str, Any], None]
) -> Iterator[None]:
    """torch_ref's `function(module, x)`, with its results recorded under the module's name."""
    original = getattr(owner, function)

    def recording(module: Any, x: Any) -> Any:
        if names.get(id(module)) == "o_proj":
            record("attention", x)
        y = original(module, x)
        if id(module) in names:
            record(names[id(module)], y)
        return y

    with mock.patch.object(owner, function, recording):
        yield


@contextlib.contextmanager
def _recorded_in_turn(
    owner: Any, function: str, results: tuple[str, ...], record: Callable[[str, Any], None]
) -> Iterator[None]:
    """A function whose successive results are `results`, each recorded."""
    original, names = getattr(owner, function), itertools.cycle(results)

    def recording(*args: Any) -> Any:
        y = original(*args)
        record(next(names), y)
        return y

    with mock.patch.object(owner, function, recording):
        yield


# what jaxmoe's layer calls, and the names of the successive results
_CALLS = {
    "decoder.rms_norm": ("input_layernorm", "post_attention_layernorm", "norm"),
    "rotary.rms_norm": ("q_norm", "k_norm"),
    "rotary.apply_rotary": ("q_rotary", "k_rotary"),
    "norm_rotary.norm_rotary": ("q_rotary", "k_rotary"),  # instead of both if its kernel runs
    "decoder.causal_attention": ("attention",),
    "linear.linear": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "linear.finish_linear": ("q_proj", "k_proj", "v_proj", "o_proj"),  # instead of `linear` if a weight is 4-bit
}


def jax_trace(model: Any, batch: Any) -> dict[str, np.ndarray]:
    """Records one forward pass of jaxmoe, from inside the compiled program."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import io_callback

    from jaxmoe.model import decoder
    from jaxmoe.model.interface import Options, Tokens
    from jaxmoe.ops import linear, rotary
    from jaxmoe.ops.kernels import norm_rotary

    records: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    tokens = batch.input_ids.size

    def record(name: str, value: Any) -> None:
        value = value.reshape(tokens, -1)
        value = value.astype(jnp.float32) if jnp.issubdtype(value.dtype, jnp.floating) else value
        io_callback(lambda array: records.__setitem__(name, np.array(array)), None, value, ordered=True)

    def counted(function: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            number = counts[function] = counts.get(function, -1) + 1
            if number < len(_CALLS[function]):  # beyond them are the projections of a dense MLP
                record(_CALLS[function][number], result)
            return result

        return call

    def layer_begins(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts.clear()  # the scan may trace its body more than once
            return original(*args, **kwargs)

        return call

    def mlp(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            record("mlp", result[0])
            return result

        return call

    def route(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            routing = original(*args, **kwargs)
            for name, value in zip(
                ("router_logits", "selected", "weights"),
                (routing.logits, routing.experts, routing.weights),
                strict=True,
            ):
                record(name, value)
            return routing

        return call

    wrappers = {name: lambda f, name=name: counted(name, f) for name in _CALLS}
    layer = {"decoder_layer": layer_begins, "sparse_mlp": mlp, "dense_mlp": mlp, "route": route}
    wrappers |= {f"decoder.{name}": wrap for name, wrap in layer.items()}
    modules = {"decoder": decoder, "rotary": rotary, "norm_rotary": norm_rotary, "linear": linear}
    with contextlib.ExitStack() as stack:
        for name, wrap in wrappers.items():
            owner, _, function = name.partition(".")
            stack.enter_context(mock.patch.object(modules[owner], function, wrap(getattr(modules[owner], function))))

        @jax.jit
        def run(params: Any, adapters: Any, *arrays: Any) -> Any:
            options = Options(lora=model.lora_config)
            out = decoder.forward(params, adapters, Tokens(*arrays), config=model.config, options=options)
            record("logits", decoder.logits_of(out.hidden, decoder.head_weight(params)))
            return out.hidden

        run(model.params, model.adapters, *map(jnp.asarray, batch)).block_until_ready()
        jax.effects_barrier()
    return records
