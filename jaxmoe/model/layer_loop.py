"""The loop over layers, as a scan or unrolled, and which results each layer saves for the backward pass.

One scan runs over all layers. Its body picks each layer's weights by index, so each kind of layer is compiled once,
whatever the depth. Unrolling trades that for speed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.memory import Remat
from jaxmoe.model.interface import Options, Params
from jaxmoe.model.layer import Layer, LayerIndex, ModelStacks
from jaxmoe.ops import kept
from jaxmoe.ops.linear import layer_slice

# (residual stream, cache, layer) -> (residual stream, cache, what to return from the layer)
Step = Callable[[Array, Any, Layer], tuple[Array, Any, Any]]

# The results that each recomputation policy saves in a layer, besides the layer's input; "offload" saves the input
# itself in the host's memory. The backward pass computes the rest again. A layer's slice of a frozen weight is never
# saved, since that would hold the model twice. Elementwise results (norms, rotary, SwiGLU) are not worth their memory.
_BALANCED = frozenset(
    {
        kept.ATTENTION_UPDATE,
        kept.PROJECTED,
        kept.ATTENTION_OUT,
        kept.ATTENTION_LOG_SUM,
        kept.ROUTING,
        kept.SCHEDULE,
    }
)
_KEPT: dict[Remat, frozenset[str]] = {
    "fast": _BALANCED | {kept.GATE_UP},
    "balanced": _BALANCED,
    "low-memory": frozenset(),
}


def run_layers(
    step: Step,
    h: Float[Array, "B T D"],
    cache: Any,
    params: Params,
    adapters: Params,
    config: Qwen3MoeConfig,
    options: Options,
    last_step: Step | None = None,
) -> tuple[Float[Array, "B T D"], Any, Any, Float[Array, "L B T D"] | None]:
    """Runs `step` for every layer: (residual stream, cache, what it returned stacked [L, ...], the layers' inputs).

    The layers' inputs are None unless `options.layer_inputs`. With `last_step` it runs for the last MoE layer, and
    nothing after it.
    """
    stacks = ModelStacks.of(params, adapters, config, options)

    def body(carry: tuple[Array, Any], xs: Any, step: Step = step) -> tuple[tuple[Array, Any], Any]:
        h, cache = carry
        h = checkpoint_name(h, kept.LAYER_INPUT)
        out, cache, record = step(h, cache, stacks.layer(*xs))
        return (out, cache), (record, h if options.layer_inputs else None)

    if options.trainable != "none":
        # A scan keeps the two passes apart; in one long program XLA would merge recomputation and first computation.
        body = jax.checkpoint(body, policy=_policy(options.remat), prevent_cse=options.unroll)
    xs = (LayerIndex.of(config), stacks.weights.sliced, stacks.adapters.sliced)
    loop = _unrolled if options.unroll else jax.lax.scan
    if last_step is None:
        (h, cache), (records, inputs) = loop(body, (h, cache), xs)
        return h, cache, records, inputs
    assert options.trainable == "none" and config.sparse_layers
    end = config.sparse_layers[-1]
    before, last = (jax.tree.map(lambda a, at=at: a[at], xs) for at in (slice(end), slice(end, end + 1)))
    (h, cache), found = loop(body, (h, cache), before) if end else ((h, cache), None)
    (h, cache), at_end = _unrolled(partial(body, step=last_step), (h, cache), last)
    found = at_end if found is None else jax.tree.map(lambda *each: jnp.concatenate(each), found, at_end)
    return h, cache, *found


def _policy(remat: Remat) -> Callable[..., Any]:
    if remat == "offload":
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[kept.LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    names = _KEPT[remat]

    def keep(primitive: Any, *_: Any, **parameters: Any) -> bool:
        return primitive.name == "name" and parameters["name"] in names

    return keep


def _unrolled(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any) -> tuple[Any, Any]:
    """Like `jax.lax.scan`, but one layer after the other in one program.

    A scan copies a layer's saved results into a stack, and out of it again; here they stay in place.
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
    """Indices hidden from constant folding: with constants, each layer's slice would be its own kernel."""
    return jax.lax.optimization_barrier([jnp.asarray(value) for value in values])


@jax.custom_vjp
def _unstack(stack: Array, indices: list[Array]) -> list[Array]:
    """The layers of a stack. Their gradients are stacked once; differentiating each slice would form a whole stack."""
    return [layer_slice(stack, index) for index in indices]


def _unstack_forward(stack: Array, indices: list[Array]) -> tuple[list[Array], None]:
    return _unstack(stack, indices), None


def _unstack_backward(_: None, gradients: list[Array]) -> tuple[Array, None]:
    return jnp.stack(gradients), None


_unstack.defvjp(_unstack_forward, _unstack_backward)
