"""Causal attention by cuDNN over sequences that the devices of the `context` axis share.

Each device has two chunks of queries (`jaxmoe.distributed.chunks`) and gathers the keys and values of all. A chunk
meets its own keys causally and those of each earlier chunk as a whole: on every one of n devices these are 2n - 1 pairs
of chunks. The parts of a query's output are averaged, weighted by the sums of their exponentials (Dao et al. 2022, as
in ring attention, Liu et al. 2023). A pair's gradients follow from the output and the log-sum-exp of all parts.

Of packed documents only one can reach from an earlier chunk into a later one: the last of the earlier chunk, which is
the first of the later one. So what a pair sees is a rectangle too: the last keys and the first queries. cuDNN wants the
first of both, so the keys are rotated. Pairs that share no document are left out.

Its oracle is `jaxmoe.ops.attention_masked`. Packed sequences are only used where a small case agrees with it, as in
`jaxmoe.ops.attention_cudnn`.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Shaped

from jaxmoe.distributed import chunks
from jaxmoe.ops import attention_cudnn as cudnn
from jaxmoe.ops.kept import ATTENTION_LOG_SUM, ATTENTION_OUT
from jaxmoe.ops.small_case import why_not

_NOTHING = -1e30  # the log-sum-exp of a query that sees no key; finite


class _Sequences(NamedTuple):
    """The keys' side: the chunks of whole sequences, in their order."""

    key: Float[Array, "all B c K H"]
    value: Float[Array, "all B c K H"]
    piece: Int[Array, "all B c"] | None  # which run of equal segment ids, counted over the sequence; None: all are one


class _Seen(NamedTuple):
    """What a pair of chunks sees: the first queries of the later one, the last keys of the earlier one."""

    queries: Int[Array, " B"]
    keys: Int[Array, " B"]


class _Part(NamedTuple):
    """The output of queries over some of their keys, float32, and its log-sum-exp."""

    out: Float[Array, "*own B c N H"]
    log_sum: Float[Array, "*own B N c"]


def context_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segments: Int[Array, "B S"] | None,
    devices: int,
) -> Float[Array, "B T N H"]:
    """As `jaxmoe.ops.attention_context.context_attention`, without a window."""
    key, value = (chunks.gather_chunks(_cut(share, 2), devices) for share in (key, value))
    own = jnp.stack(chunks.own(devices))
    out: Array = _attend(_cut(query, 2), _Sequences(key, value, _pieces(segments, 2 * devices)), own)
    return _joined(out)


def _cut(array: Shaped[Array, "B T ..."], count: int) -> Shaped[Array, "count B c ..."]:
    return jnp.moveaxis(array.reshape(array.shape[0], count, -1, *array.shape[2:]), 1, 0)


def _joined(parts: Shaped[Array, "count B c ..."]) -> Shaped[Array, "B T ..."]:
    """The inverse of `_cut`."""
    return jnp.moveaxis(parts, 0, 1).reshape(parts.shape[1], -1, *parts.shape[3:])


def _pieces(segments: Int[Array, "B S"] | None, count: int) -> Int[Array, "count B c"] | None:
    return None if segments is None else _cut(cudnn.piece_index(segments), count)


def _flat(own: Shaped[Array, "two B ..."]) -> Shaped[Array, "both ..."]:
    """Two chunks of each sequence as sequences of their own."""
    return own.reshape(-1, *own.shape[2:])


def _causal(sequences: _Sequences, own: Array) -> tuple[Array, Array, Array | None]:
    """(keys, values, pieces counted from 0) of the device's own chunks."""
    piece = None
    if sequences.piece is not None:
        piece = _flat(sequences.piece[own])
        piece = piece - piece[:, :1]
    return _flat(sequences.key[own]), _flat(sequences.value[own]), piece


def _fold_pairs(query: Array, sequences: _Sequences, own: Array, step: Any, start: Any) -> Any:
    """Folds `step(side, other, seen, carry)` over the pairs of the device's chunk `side`, 0 or 1, with an earlier chunk
    `other`; `seen` is None if they see each other as a whole."""

    def meet(number: Array, carry: Any) -> Any:
        # The first chunk, number own[0], meets as many earlier ones.
        side = (number >= own[0]).astype(jnp.int32)
        other = number - side * own[0]
        piece = sequences.piece
        if piece is None:
            return step(side, other, None, carry)
        last = piece[other][:, -1:]
        count = lambda chunk: jnp.sum(piece[chunk] == last, axis=1, dtype=jnp.int32)
        seen = _Seen(count(own[side]), count(other))
        return jax.lax.cond(jnp.any(seen.queries > 0), partial(step, side, other, seen), lambda carry: carry, carry)

    return jax.lax.fori_loop(0, len(sequences.key) - 1, meet, start)


def _rotated(keys: Shaped[Array, "B c K H"], by: Int[Array, " B"]) -> Shaped[Array, "B c K H"]:
    """The last `by` tokens first, then the others."""
    place = (jnp.arange(keys.shape[1]) - by[:, None]) % keys.shape[1]
    return jnp.take_along_axis(keys, place[:, :, None, None], axis=1)


def _first(count: Int[Array, " B"], length: int) -> Array:
    """Which of a chunk's tokens are among the first ones, [B, c, 1, 1]."""
    return (jnp.arange(length) < count[:, None])[:, :, None, None]


def _lengths(seen: _Seen) -> cudnn.Lengths:
    return cudnn.Lengths(jnp.maximum(seen.queries, 1), seen.keys)  # no sequence is empty: of that nothing is used


def _part(query: Array, key: Array, value: Array, seen: _Seen | None) -> _Part:
    """What the queries of a chunk make of the keys of an earlier one."""
    if seen is None:
        out, log_sum = cudnn.rectangle(query, key, value, None)
        return _Part(out.astype(jnp.float32), log_sum)
    key, value = (_rotated(array, seen.keys) for array in (key, value))
    out, log_sum = cudnn.rectangle(query, key, value, _lengths(seen))
    valid = _first(seen.queries, query.shape[1])
    return _Part(jnp.where(valid, out, 0).astype(jnp.float32), jnp.where(valid[:, None, :, 0, 0], log_sum, _NOTHING))


def _together(a: _Part, b: _Part) -> _Part:
    """The output over the keys of both."""
    log_sum = jnp.logaddexp(a.log_sum, b.log_sum)
    share = lambda part: jnp.exp(part.log_sum - log_sum).swapaxes(1, 2)[..., None]
    return _Part(a.out * share(a) + b.out * share(b), log_sum)


@jax.custom_vjp
def _attend(
    query: Float[Array, "two B c N H"], sequences: _Sequences, own: Int[Array, " two"]
) -> Float[Array, "two B c N H"]:
    """The output of the queries of the two chunks `own`."""
    return _attend_forward(query, sequences, own)[0]


def _attend_forward(query: Array, sequences: _Sequences, own: Array):
    out, log_sum = cudnn.with_log_sum(_flat(query), *_causal(sequences, own), None)
    start = _Part(out.reshape(query.shape).astype(jnp.float32), log_sum.reshape(2, -1, *log_sum.shape[1:]))

    def step(side: Array, other: Array, seen: _Seen | None, whole: _Part) -> _Part:
        part = _part(query[side], sequences.key[other], sequences.value[other], seen)
        both = _together(_Part(*(array[side] for array in whole)), part)
        return jax.tree.map(lambda array, new: array.at[side].set(new), whole, both)

    out, log_sum = _fold_pairs(query, sequences, own, step, start)
    out = checkpoint_name(out.astype(query.dtype), ATTENTION_OUT)
    log_sum = checkpoint_name(log_sum, ATTENTION_LOG_SUM)
    return out, (query, sequences, own, out, log_sum)


class _Saved(NamedTuple):
    """Of all parts of an output together: the log-sum-exp, the output, its gradient."""

    log_sum: Array
    out: Array
    d_out: Array


def _part_gradients(
    query: Array, key: Array, value: Array, seen: _Seen | None, saved: _Saved
) -> tuple[Array, Array, Array]:
    """Those of `_part`."""
    if seen is None:
        return cudnn.rectangle_gradients(query, key, value, None, *saved)
    key, value = (_rotated(array, seen.keys) for array in (key, value))
    d_query, d_key, d_value = cudnn.rectangle_gradients(query, key, value, _lengths(seen), *saved)
    length = query.shape[1]
    valid = _first(jnp.where(seen.queries > 0, seen.keys, 0), length)
    back = lambda d: _rotated(jnp.where(valid, d, 0), length - seen.keys)
    return jnp.where(_first(seen.queries, length), d_query, 0), back(d_key), back(d_value)


def _attend_backward(residuals: tuple[Any, ...], d_out: Array):
    query, sequences, own, out, log_sum = residuals
    keys, values, piece = _causal(sequences, own)
    saved = _Saved(log_sum, out, d_out)
    of_own = cudnn.gradients(_flat(query), keys, values, piece, None, *_Saved(*map(_flat, saved)))
    d_query, d_key, d_value = (array.reshape(2, -1, *array.shape[1:]).astype(jnp.float32) for array in of_own)
    every = jnp.zeros(sequences.key.shape, jnp.float32).at[own].set

    def step(side: Array, other: Array, seen: _Seen | None, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        of_side = _Saved(*(array[side] for array in saved))
        found = _part_gradients(query[side], sequences.key[other], sequences.value[other], seen, of_side)
        return tuple(total.at[at].add(d) for total, at, d in zip(sums, (side, other, other), found, strict=True))

    start = d_query, every(d_key), every(d_value)
    d_query, d_key, d_value = (d.astype(query.dtype) for d in _fold_pairs(query, sequences, own, step, start))
    nothing: Any = None
    return d_query, _Sequences(d_key, d_value, nothing), None


_attend.defvjp(_attend_forward, _attend_backward)


def attend_whole(query: Array, key: Array, value: Array, segments: Int[Array, "B S"] | None, devices: int) -> Array:
    """What so many devices compute together, on one: attention over whole sequences [B, S, ...]."""
    query, key, value = (_cut(array, 2 * devices) for array in (query, key, value))
    sequences = _Sequences(key, value, _pieces(segments, 2 * devices))
    out = jnp.zeros_like(query)
    for device in range(devices):
        own = jnp.asarray([device, 2 * devices - 1 - device])
        out = out.at[own].set(_attend(query[own], sequences, own))
    return _joined(out)


def packed_error(groups: int, head_dim: int, dtype: str = "bfloat16") -> float:
    """`jaxmoe.ops.attention_cudnn.error` where two devices share packed sequences, in chunks of 16 tokens.

    One sequence has documents that end within chunks and one over three of them, the other has padding and a document
    that begins with a chunk.
    """
    place = jnp.arange(64)
    segments = jnp.stack(
        [1 + (place >= 5) + (place >= 9) + (place >= 50), jnp.where((place < 3) | (place > 55), 0, 1 + (place >= 32))]
    )
    return cudnn.error(partial(attend_whole, devices=2), segments, (2 * groups, 2, head_dim), dtype)


class Pairs:
    """The implementation "cudnn" of attention over sequences that devices share."""

    def unsupported(self, query: Any, key: Any, segments: Any = None, window: int | None = None) -> str | None:
        """Why it cannot run on these operands, or None; on a GPU, the first call with `segments` runs a small case."""
        if window is not None:
            return f"needs attention without a window, found one of {window} tokens"
        if (why := cudnn.unsupported(query, key)) is not None or segments is None or jax.default_backend() == "cpu":
            return why
        return _packed_unsupported(query.shape[2] // key.shape[2], query.shape[3], query.dtype.name)

    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
        segments: Int[Array, "B S"] | None,
        window: int | None,
        devices: int,
    ) -> Float[Array, "B T N H"]:
        """As the function `context_attention`."""
        assert window is None, window
        return context_attention(query, key, value, segments, devices)


@cache
def _packed_unsupported(groups: int, head_dim: int, dtype: str) -> str | None:
    return why_not(partial(packed_error, groups, head_dim, dtype), "packed sequences that devices share")


PAIRS = Pairs()
