"""Causal grouped-query attention over whole sequences; its oracle is `jaxmoe.ops.attention_masked`."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float, Int

from jaxmoe.distributed.mesh import ONE_DEVICE, MeshShape
from jaxmoe.ops.implementations import Choice, choose


def implementation(
    dtype: Any,
    heads: int,
    kv_heads: int,
    head_dim: int,
    sliding_window: int | None = None,
    mesh: MeshShape = ONE_DEVICE,
) -> Choice:
    """How attention of these operands runs on the default device, and why; packing may still rule it out."""
    query, key = (jax.ShapeDtypeStruct((1, 64, n, head_dim), dtype) for n in (heads, kv_heads))
    if mesh.context > 1:
        return choose("context_attention", query, key, None, sliding_window)
    return choose("attention", query, key)


def causal_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segments: Int[Array, "B S"] | None = None,
    sliding_window: int | None = None,
    mesh: MeshShape = ONE_DEVICE,
) -> Float[Array, "B T N H"]:
    """Softmax(q k^T / sqrt(H)) v over earlier tokens of the same segment; logits and softmax in float32.

    A segment is a contiguous run of equal ids. Segment 0 is padding: no token sees it, and its own output is finite and
    meaningless. Without `segments` each sequence is one segment. The backward pass needs the operands, the output and
    the log-sum-exp; the last two have names for recomputation policies (`jaxmoe.ops.kept`). On a mesh with a `context`
    axis the T tokens are this device's, and `segments` those of the whole sequences of S tokens.
    """
    devices = mesh["context"]
    if sliding_window is not None and sliding_window >= query.shape[1] * devices:
        sliding_window = None
    if devices > 1:
        with jax.named_scope("dot_product_attention"):
            shared = choose("context_attention", query, key, segments, sliding_window).value
            return shared.attend(query, key, value, segments, sliding_window, devices)
    selected = choose("attention", query, key, segments)
    with jax.named_scope("dot_product_attention"):
        return selected.value.attend(query, key, value, segments, sliding_window)
