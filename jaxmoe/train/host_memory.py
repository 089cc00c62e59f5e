"""What the policy "offload" holds in the host's memory besides the layers' inputs: AdamW's moments and the embedding.

A step brings the moments to the device one layer at a time. Of a frozen embedding it gets the vectors of its own tokens
only, which the host looks up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jaxmoe.data.packing import Batch
from jaxmoe.model.interface import Params

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
EMBEDDING = "embed_tokens"


def in_host_memory(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer` with its moments in the host's memory; the same numbers, and a state of the same structure.

    It must treat each element alone, and its state must start with zeros, as AdamW's does. `init` also takes shapes in
    place of arrays.
    """

    def init(params: PyTree) -> PyTree:
        shapes = jax.eval_shape(optimizer.init, params)
        return jax.tree.map(_on_host, shapes, is_leaf=_is_by_path)

    def update(gradients: Params, state: PyTree, params: Params) -> tuple[Params, PyTree]:
        updates, states = {}, {}
        for path, gradient in gradients.items():
            updates[path], states[path] = _update(optimizer, path, gradient, _part(state, path), params[path])
        return updates, _joined(state, states)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _update(
    optimizer: optax.GradientTransformation, path: str, gradient: Array, state: PyTree, params: Array
) -> tuple[Array, PyTree]:
    """One array's updates and the new state, a layer at a time; the updates take the place of the gradients."""
    leaves, structure = jax.tree.flatten(state)
    moments = [leaf for leaf in leaves if leaf.shape == gradient.shape]
    counters = [leaf for leaf in leaves if leaf.shape != gradient.shape]
    stacked = "." in path  # else a weight that the adapter holds in full, without a layer's axis

    def at(stack: Array, layer: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False) if stacked else stack

    def put(stack: Array, value: Array, layer: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0) if stacked else value

    def one(layer: Array, carry: Any) -> Any:
        updates, moments, _ = carry
        here = [jax.device_put(at(stack, layer), _DEVICE) for stack in moments]
        # On a GPU the barriers keep XLA from reading a stack while it writes it, for which it would copy the whole.
        here, own, weights = jax.lax.optimization_barrier((here, at(updates, layer), at(params, layer)))
        old = jax.tree.unflatten(structure, _merged(leaves, gradient, here, counters))
        changes, new = optimizer.update({path: own}, old, {path: weights})
        change, after = jax.lax.optimization_barrier((changes[path], jax.tree.leaves(new)))  # pyright: ignore
        back = (jax.device_put(leaf, _HOST) for leaf in after if leaf.shape == change.shape)
        moments = [put(stack, leaf, layer) for stack, leaf in zip(moments, back, strict=True)]
        return put(updates, change, layer), moments, [leaf for leaf in after if leaf.shape != change.shape]

    carry = gradient, moments, counters
    if stacked:
        carry = jax.lax.fori_loop(0, gradient.shape[0], one, carry)
    else:
        carry = one(jnp.int32(0), carry)
    return carry[0], jax.tree.unflatten(structure, _merged(leaves, gradient, *carry[1:]))


def _merged(leaves: list[Array], gradient: Array, moments: list[Array], counters: list[Array]) -> list[Array]:
    """Moments and counters in the order of `leaves`."""
    of_each = iter(moments), iter(counters)
    return [next(of_each[leaf.shape != gradient.shape]) for leaf in leaves]


def _is_by_path(tree: Any) -> bool:
    return isinstance(tree, dict)


def _on_host(shapes: Any) -> Any:
    """Zeros: moments, which are dictionaries by path, in the host's memory, counters on the device."""
    if not _is_by_path(shapes):
        return jnp.zeros(shapes.shape, shapes.dtype)
    return {path: jax.device_put(np.zeros(leaf.shape, leaf.dtype), _HOST) for path, leaf in shapes.items()}


def _part(state: PyTree, path: str) -> PyTree:
    """The state of one array."""
    pick = lambda tree: {path: tree[path]} if _is_by_path(tree) else tree
    return jax.tree.map(pick, state, is_leaf=_is_by_path)


def _joined(state: PyTree, parts: dict[str, PyTree]) -> PyTree:
    """The inverse of `_part`; counters are the same in every part."""

    def join(old: Any, *each: Any) -> Any:
        return {path: part[path] for path, part in zip(parts, each, strict=True)} if _is_by_path(old) else each[0]

    return jax.tree.map(join, state, *parts.values(), is_leaf=_is_by_path)


def looked_up(frozen: Mapping[str, Any], batch: Batch) -> tuple[dict[str, Any], Batch]:
    """(the frozen arrays with a vector for each token of the batch as embedding, the batch with the tokens' places).

    The embedding [V, D] is a NumPy array, or a shape; the batch then stays as it is.
    """
    table, ids = frozen[EMBEDDING], batch.input_ids
    if isinstance(table, jax.ShapeDtypeStruct):
        tokens = math.prod(ids.shape)
        return {**frozen, EMBEDDING: jax.ShapeDtypeStruct((tokens, table.shape[1]), table.dtype)}, batch
    places = np.arange(ids.size, dtype=np.int32).reshape(ids.shape)
    return {**frozen, EMBEDDING: table[ids.reshape(-1)]}, batch._replace(input_ids=places)
