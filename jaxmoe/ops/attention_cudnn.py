"""Causal attention by cuDNN's flash attention, forward and backward, also for packed sequences.

cuDNN has no segment ids. It has a packed layout instead: the offset and the length of each part of a sequence. Segments
here are contiguous, so a sequence is a list of pieces of equal ids, and each piece becomes one of cuDNN's parts. Pieces
of padding (segment 0) are parts as well: all tokens are then covered, nothing is left unwritten, and no token of
another segment sees them.

A call has a fixed number of parts per sequence (`MAX_PIECES`). Its log-sum-exp has that many lines of length T for each
sequence, most of them unused. So pieces are handled `MAX_PIECES` at a time, in a loop as long as the batch needs, and
the log-sum-exp is gathered into [B, N, T]. Sequences that are one piece, the usual case of long contexts, use cuDNN's
plain causal attention.

`jax.nn.dot_product_attention` does not expose the offsets; the functions used here are private to JAX
(jax/_src/cudnn/fused_attention_stablehlo.py), and neither JAX nor cuDNN promises much about the packed layout. So
packed sequences are only used where a small case, run once in a process, agrees with the oracle in values and gradients
(`packed_error`).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxmoe.ops.attention_masked import attention, attention_mask
from jaxmoe.ops.kept import ATTENTION_LOG_SUM, ATTENTION_OUT
from jaxmoe.ops.small_case import relative_error, why_not

fused: Any = fused_attention_stablehlo  # untyped

# The backward pass has a float32 workspace of length T for each part: 4.0 GiB at 2 x 4096 with 16 parts. Every step
# holds it, because the compiler cannot know that its sequences will be single pieces.
MAX_PIECES = 4

_LAYOUT = fused.AttentionLayout.BTNH.value
_SEED, _DROPOUT, _BIAS = 42, 0.0, (False, False)  # constants of the private functions' signatures
# Before this version JAX scaled the offsets of the keys by the number of query heads.
_GROUPED_PACKING = jax.__version_info__ >= (0, 11, 2)
# From jax 0.12 on the private functions also take a function that changes the logits, and its arguments.
_SCORE_MOD = "score_mod" in inspect.signature(fused._dot_product_attention_bwd_rule).parameters
_DETERMINISTIC = ("xla_gpu_deterministic_ops", "xla_gpu_exclude_nondeterministic_ops")
_call_config = fused.create_dot_product_attention_backend_config_base


def _deterministic() -> bool:
    """Whether XLA_FLAGS demands deterministic operations."""
    flags = (flag.lstrip("-").partition("=") for flag in os.environ.get("XLA_FLAGS", "").split())
    values = {name: value.lower() for name, _, value in flags}
    return any(values.get(name) in ("", "1", "true") for name in _DETERMINISTIC)


def _deterministic_call_config(*args: Any, **named: Any) -> dict[str, Any]:
    """JAX's description of a call for XLA, which also says whether the call has to be deterministic.

    XLA adds this itself, but to the first of several equal gradients of a program only. It does not find what it
    compiled for the others, and ends the process with std::out_of_range (https://github.com/openxla/xla/pull/46500).
    Unrolled layers are equal, and on an `fsdp` axis XLA takes one layer out of the loop over layers.
    """
    config = _call_config(*args, **named)
    if _deterministic():
        config["cudnn_fmha_backend_config"]["force_deterministic"] = True
    return config


fused.create_dot_product_attention_backend_config_base = _deterministic_call_config


def unsupported(query: Any, key: Any, segments: Array | None = None) -> str | None:
    """Why cuDNN cannot run on these operands, or None; on a GPU, the first call with `segments` runs a small case."""
    if query.dtype not in (jnp.bfloat16, jnp.float16) or key.dtype != query.dtype:
        return f"needs 16-bit floats, found {query.dtype}"
    if query.shape[-1] > 128 or query.shape[-1] % 8:
        return f"needs a head size of at most 128 that is a multiple of 8, found {query.shape[-1]}"
    try:
        fused.check_cudnn_version()
    except RuntimeError:
        return "needs cuDNN, found none"
    if segments is None or jax.default_backend() == "cpu":
        return None
    return _packed_unsupported(query.shape[2] // key.shape[2], query.shape[3], query.dtype.name)


@cache
def _packed_unsupported(groups: int, head_dim: int, dtype: str) -> str | None:
    return why_not(partial(packed_error, groups, head_dim, dtype), "packed sequences")


def packed_error(groups: int, head_dim: int, dtype: str = "bfloat16") -> float:
    """`error` on packed sequences.

    One sequence has more pieces than one call can handle; the other has two documents between padding.
    """
    index = jnp.arange(4 * MAX_PIECES)
    padding = (index < 5) | (index > len(index) - 9)
    segments = jnp.stack([index // 3 + 1, jnp.where(padding, 0, index // 40 + 1)])
    return error(partial(causal_attention, window=None), segments, (2 * groups, 2, head_dim), dtype)


def error(attend: Callable[..., Array], segments: Int[Array, "B T"], shape: tuple[int, int, int], dtype: str) -> float:
    """The largest relative L2 error of output and gradients of `attend(query, key, value, segments)`, against masked
    attention in float32, with heads of the `shape` (N, K, H)."""
    N, K, H = shape
    index = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, cotangent = (
        jax.random.normal(k, (*segments.shape, heads, H), dtype) for k, heads in zip(keys, (N, K, K, N), strict=True)
    )
    valid = (segments > 0)[..., None, None]

    def masked(query: Array, key: Array, value: Array) -> Array:
        return attention(query, key, value, attention_mask(index, index, segments, segments, None))

    def run(function: Any, *operands: Array) -> tuple[Array, ...]:
        out, pull = jax.vjp(lambda *args: jnp.where(valid, function(*args), 0), *operands[:3])
        return out, *pull(operands[3])

    found = jax.jit(partial(run, lambda *operands: attend(*operands, segments)))(query, key, value, cotangent)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(partial(run, masked))(*(a.astype(jnp.float32) for a in (query, key, value, cotangent)))
    return float(jnp.max(jnp.stack([relative_error(a, b) for a, b in zip(found, exact, strict=True)])))


class _Group(NamedTuple):
    """`MAX_PIECES` pieces of each sequence in the form for cuDNN, and which tokens they cover."""

    lengths: Int[Array, "B pieces"]  # -1 where a sequence has fewer pieces
    offsets: Int[Array, "B pieces+1"]
    covered: Array  # [B, T]
    part: Int[Array, "B T"]  # which of cuDNN's parts, counted over the batch, a covered token belongs to
    place: Int[Array, "B T"]  # its place in that part


def piece_index(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Which piece of equal ids each token belongs to, counted from 0 in each sequence."""
    changes = segments[:, 1:] != segments[:, :-1]
    return jnp.cumsum(jnp.pad(changes, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)


def _group(piece: Int[Array, "B T"], number: Array | int, size: int) -> _Group:
    """The pieces number * size, ..., of each sequence."""
    rank = number * size + jnp.arange(size + 1)
    starts = jnp.sum(piece[:, :, None] < rank, axis=1, dtype=jnp.int32)
    lengths = starts[:, 1:] - starts[:, :-1]
    exists = lengths > 0
    # JAX moves the parts that exist to the front, those of all sequences together.
    count = jnp.sum(exists, axis=1)
    first = jnp.cumsum(count) - count
    local = piece - number * size
    covered = (local >= 0) & (local < size)
    local = jnp.clip(local, 0, size - 1)
    place = jnp.arange(piece.shape[1]) - jnp.take_along_axis(starts, local, axis=1)
    none = jnp.full((piece.shape[0], 1), -1, jnp.int32)
    return _Group(
        jnp.where(exists, lengths, -1),
        jnp.concatenate([jnp.where(exists, starts[:, :-1], -1), none], axis=1),
        covered,
        jnp.where(covered, first[:, None] + local, 0),
        jnp.where(covered, place, 0),
    )


class Lengths(NamedTuple):
    """How many tokens of each sequence there are, the first ones."""

    query: Int[Array, " B"]
    key: Int[Array, " B"]


def _operands(query: Array, key: Array, value: Array, parts: _Group | Lengths | None) -> tuple[Any, ...]:
    """The operands of a call: no bias, lengths and offsets if there are any, no page table, no score_mod."""
    unused = jnp.zeros(0, query.dtype)
    both: tuple[Array, ...] = (unused,) * 4
    if isinstance(parts, _Group):
        both = parts.lengths, parts.lengths, parts.offsets, parts.offsets
    elif parts is not None:
        both = *parts, unused, unused
    return query, key, value, unused, *both, unused, unused, *[()] * _SCORE_MOD


def _static(query: Array, window: int | None, mask: Any = fused.MaskType.CAUSAL) -> tuple[Any, ...]:
    scale = query.shape[-1] ** -0.5
    version = fused.check_cudnn_version()
    no_score_mod = [None] * _SCORE_MOD
    return scale, _SEED, _DROPOUT, _BIAS, mask, _LAYOUT, window, *no_score_mod, version, True


def _forward(query: Array, key: Array, value: Array, group: _Group | None, window: int | None) -> tuple[Array, Array]:
    """(output, log-sum-exp) as cuDNN returns them: of a group only what it covers, the log-sum-exp by part."""
    out, log_sum = fused._dot_product_attention(*_operands(query, key, value, group), *_static(query, window))
    return out, log_sum


def _backward(
    query: Array,
    key: Array,
    value: Array,
    group: _Group | None,
    window: int | None,
    log_sum: Array,
    out: Array,
    d_out: Array,
) -> tuple[Array, Array, Array]:
    residuals = (*_operands(query, key, value, group), log_sum, out)
    d_query, d_key, d_value, *_ = fused._dot_product_attention_bwd_rule(
        *_static(query, window), residuals, (d_out, log_sum)
    )
    return d_query, d_key, d_value


def rectangle(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    lengths: Lengths | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """(output, log-sum-exp) where every query sees every key, with `lengths` the first ones of both; what else there is
    of the results is undefined."""
    out, log_sum = fused._dot_product_attention(
        *_operands(query, key, value, lengths), *_static(query, None, _of_rectangle(lengths))
    )
    return out, log_sum


def rectangle_gradients(
    query: Array, key: Array, value: Array, lengths: Lengths | None, log_sum: Array, out: Array, d_out: Array
) -> tuple[Array, Array, Array]:
    """The gradients of what a `rectangle` has added to a softmax over more keys, given all of its output and its
    log-sum-exp; what lies after the lengths is undefined."""
    residuals = (*_operands(query, key, value, lengths), log_sum, out)
    d_query, d_key, d_value, *_ = fused._dot_product_attention_bwd_rule(
        *_static(query, None, _of_rectangle(lengths)), residuals, (d_out, log_sum)
    )
    return d_query, d_key, d_value


def _of_rectangle(lengths: Lengths | None) -> Any:
    return fused.MaskType.NO_MASK if lengths is None else fused.MaskType.PADDING


def _max_pieces(length: int) -> int:
    return max(2, min(MAX_PIECES, length))  # JAX treats one piece as the plain layout


def _by_head(key: Array, query: Array) -> Array:
    """Keys or values for the packed layout: repeated for each query head if JAX does not support groups there."""
    return key if _GROUPED_PACKING else jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)


def _of_group(d_key: Array, key: Array) -> Array:
    """The gradient of the operand of `_by_head`."""
    if d_key.shape == key.shape:
        return d_key
    B, T, K, H = key.shape
    return jnp.sum(d_key.reshape(B, T, K, -1, H), axis=3, dtype=jnp.float32).astype(key.dtype)


def _where_covered(group: _Group, new: Array, old: Array) -> Array:
    return jnp.where(group.covered[:, :, None, None], new, old)


def _fold_groups(piece: Array, step: Any, start: Any) -> Any:
    """Folds `step(group, carry)` over as many groups as the sequence with the most pieces needs."""
    size = _max_pieces(piece.shape[1])
    groups = jnp.max(piece[:, -1]) // size + 1
    return jax.lax.fori_loop(0, groups, lambda number, carry: step(_group(piece, number, size), carry), start)


def _packed_forward(query: Array, key: Array, value: Array, piece: Array, window: int | None) -> tuple[Array, Array]:
    key, value = _by_head(key, query), _by_head(value, query)

    def step(group: _Group, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        out, by_part = _forward(query, key, value, group, window)
        log_sum = by_part[group.part, :, group.place]  # [B, T, N]
        log_sum = jnp.where(group.covered[:, None], log_sum.swapaxes(1, 2), carry[1])
        return _where_covered(group, out, carry[0]), log_sum

    B, T, N, _ = query.shape
    return _fold_groups(piece, step, (jnp.zeros_like(query), jnp.zeros((B, N, T), jnp.float32)))


def _packed_backward(
    query: Array, key: Array, value: Array, piece: Array, window: int | None, log_sum: Array, out: Array, d_out: Array
) -> tuple[Array, Array, Array]:
    B, T, N, _ = query.shape
    size = _max_pieces(T)
    keys, values = _by_head(key, query), _by_head(value, query)

    def step(group: _Group, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        # The inverse of the gather above; a token that is not covered is written nowhere.
        part = jnp.where(group.covered, group.part, B * size)
        by_part = jnp.zeros((B * size, N, T), jnp.float32)
        by_part = by_part.at[part, :, group.place].set(log_sum.swapaxes(1, 2), mode="drop", unique_indices=False)
        gradients = _backward(query, keys, values, group, window, by_part, out, d_out)
        gradients = gradients[0], _of_group(gradients[1], key), _of_group(gradients[2], value)
        d_query, d_key, d_value = (_where_covered(group, *pair) for pair in zip(gradients, carry, strict=True))
        return d_query, d_key, d_value

    return _fold_groups(piece, step, (jnp.zeros_like(query), jnp.zeros_like(key), jnp.zeros_like(value)))


def causal_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None,
    window: int | None,
) -> Float[Array, "B T N H"]:
    """As `jaxmoe.ops.attention.causal_attention`; a token of segment 0 attends to those of its own piece of padding."""
    piece = None if segments is None else piece_index(segments)
    return _attend(query, key, value, piece, window)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query: Array, key: Array, value: Array, piece: Array | None, window: int | None) -> Array:
    return _attend_forward(query, key, value, piece, window)[0]


def with_log_sum(
    query: Array, key: Array, value: Array, piece: Array | None, window: int | None
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """(output, log-sum-exp) of causal attention within the pieces of each sequence, which are counted from 0."""
    plain = partial(_forward, query, key, value, None, window)
    if piece is None:
        return plain()
    packed = partial(_packed_forward, query, key, value, piece, window)
    return jax.lax.cond(jnp.max(piece) == 0, plain, packed)


def gradients(
    query: Array,
    key: Array,
    value: Array,
    piece: Array | None,
    window: int | None,
    log_sum: Array,
    out: Array,
    d_out: Array,
) -> tuple[Array, Array, Array]:
    """Those of `with_log_sum`, given its results, or those of a softmax over more keys."""
    plain = partial(_backward, query, key, value, None, window, log_sum, out, d_out)
    if piece is None:
        return plain()
    packed = partial(_packed_backward, query, key, value, piece, window, log_sum, out, d_out)
    return jax.lax.cond(jnp.max(piece) == 0, plain, packed)


def _attend_forward(query: Array, key: Array, value: Array, piece: Array | None, window: int | None):
    out, log_sum = with_log_sum(query, key, value, piece, window)
    out, log_sum = checkpoint_name(out, ATTENTION_OUT), checkpoint_name(log_sum, ATTENTION_LOG_SUM)
    return out, (query, key, value, piece, out, log_sum)


def _attend_backward(window: int | None, residuals: tuple[Any, ...], d_out: Array):
    query, key, value, piece, out, log_sum = residuals
    return *gradients(query, key, value, piece, window, log_sum, out, d_out), None


_attend.defvjp(_attend_forward, _attend_backward)


class Cudnn:
    """The implementation "cudnn" of attention."""

    def unsupported(self, query: Any, key: Any, segments: Any = None) -> str | None:
        """As the function `unsupported`."""
        return unsupported(query, key, segments)

    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
        segments: Int[Array, "B T"] | None,
        window: int | None,
    ) -> Float[Array, "B T N H"]:
        """As the function `causal_attention`."""
        return causal_attention(query, key, value, segments, window)


CUDNN = Cudnn()
