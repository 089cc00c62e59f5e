"""Frozen weights in a quantised form on the device: a stack that is decoded where it is indexed, and only there.

A mixed stack also holds layers that are not quantised. It looks up which kind a layer is while it is indexed, so that
one loop runs over all layers. A stack of one kind has no such lookup.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


class QuantizedStack:
    """Frozen weights [groups, out, in]; `stack[group]` returns them in `dtype`, decoded each time.

    A group is a layer, or an expert of a layer. `shape` and `dtype` are those of the weights.

    In a mixed stack (`jaxmoe.parameters.Quantization`) the arrays of the form hold the quantised layers only, `weight`
    [_, out, in] the groups of the others, and `places` int32 [layers] says where each layer is. Otherwise both are
    None.
    """

    form: str  # what messages call it
    shape: tuple[int, ...]
    dtype: Any
    weight: Any
    places: Any

    def __getitem__(self, group: Any) -> Array:
        """The weights [..., out, in] of one group (a scalar) or several of one layer (an array), in bounds."""
        return self._decoded(group) if self.places is None else self._looked_up(jnp.asarray(group))

    def _looked_up(self, group: Array) -> Array:
        """`self[group]` of a mixed stack."""
        in_layer = self.shape[0] // self.places.shape[0]
        layer = group.reshape(-1)[0] // in_layer
        place = self.places.at[layer].get(mode="promise_in_bounds")
        quantized = place >= 0
        # `at` takes the index inside the arrays of the layer's kind
        at = jnp.where(quantized, place, -1 - place) * in_layer + group % in_layer
        unchanged = lambda at: self.weight.at[at].get(mode="promise_in_bounds").astype(self.dtype)
        return jax.lax.cond(quantized, self._decoded, unchanged, at)

    def _decoded(self, group: Any) -> Array:
        """The weights of quantised groups, by their index in the arrays of the form."""
        raise NotImplementedError
