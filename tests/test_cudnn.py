"""How packed rows are handed to cuDNN: its two calls are replaced by a slow reading of the same packed layout.

The stand-in finds the sequences from lengths and offsets alone, keeps the log-sum-exp by sequence as cuDNN does, and
leaves NaN wherever cuDNN would write nothing.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe import cudnn
from jaxmoe.layers import attention, attention_mask
from tests.tolerances import bound

B, N, K, H = 2, 4, 2, 16


def _sequences(group, length):
    """[(row, first token, tokens)] of the sequences, in the order in which JAX hands them to cuDNN."""
    lengths, offsets = np.asarray(group.lengths), np.asarray(group.offsets)
    assert offsets.shape == (lengths.shape[0], lengths.shape[1] + 1)
    assert (offsets[:, -1] == -1).all()
    assert ((lengths > 0) == (offsets[:, :-1] >= 0)).all()
    found = [(b, o, n) for b in range(len(lengths)) for o, n in zip(offsets[b], lengths[b], strict=False) if n > 0]
    assert all(o + n <= length for _, o, n in found)
    return found


def _dense(query, key, value, window):
    """Output and log-sum-exp [N, t] of one sequence."""
    t, heads = query.shape[0], query.shape[1]
    key, value = (jnp.repeat(a, heads // a.shape[1], axis=1) for a in (key, value))
    logits = jnp.einsum("tnh,snh->nts", query, key, precision="highest") * H**-0.5
    distance = jnp.arange(t)[:, None] - jnp.arange(t)
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    logits = jnp.where(seen, logits, -jnp.inf)
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    return jnp.einsum("nts,snh->tnh", jnp.exp(logits - log_sum[..., None]), value, precision="highest"), log_sum


def forward(query, key, value, group, window):
    T = query.shape[1]
    if group is None:
        pairs = [_dense(query[b], key[b], value[b], window) for b in range(B)]
        return jnp.stack([out for out, _ in pairs]), jnp.stack([log_sum for _, log_sum in pairs])

    def packed(query, key, value, lengths, offsets):
        out = np.full(query.shape, np.nan, np.float32)
        log_sums = np.full((lengths.size, N, T), np.nan, np.float32)
        group = cudnn._Group(lengths, offsets, None, None, None)  # pyright: ignore[reportArgumentType]
        for s, (b, first, count) in enumerate(_sequences(group, T)):
            here = slice(first, first + count)
            out[b, here], log_sums[s, :, :count] = _dense(query[b, here], key[b, here], value[b, here], window)
        return out, log_sums

    shapes = (
        jax.ShapeDtypeStruct(query.shape, jnp.float32),
        jax.ShapeDtypeStruct((group.lengths.size, N, T), jnp.float32),
    )
    return jax.pure_callback(packed, shapes, query, key, value, group.lengths, group.offsets)


def backward(query, key, value, group, window, log_sum, out, d_out):
    T = query.shape[1]

    def packed(query, key, value, lengths, offsets, log_sum, out, d_out):
        gradients = [np.full(a.shape, np.nan, np.float32) for a in (query, key, value)]
        group = cudnn._Group(lengths, offsets, None, None, None)  # pyright: ignore[reportArgumentType]
        for s, (b, first, count) in enumerate(_sequences(group, T)):
            here = slice(first, first + count)
            (found, sums), pull = jax.vjp(partial(_dense, window=window), query[b, here], key[b, here], value[b, here])
            # What was saved is what belongs to this sequence.
            np.testing.assert_allclose(out[b, here], found, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(log_sum[s, :, :count], sums, rtol=1e-5, atol=1e-6)
            for total, part in zip(gradients, pull((d_out[b, here], jnp.zeros_like(sums))), strict=True):
                total[b, here] = part
        return tuple(gradients)

    if group is None:
        lengths = jnp.full((B, 1), T, jnp.int32)
        offsets = jnp.asarray([[0, -1]] * B, jnp.int32)
    else:
        lengths, offsets = group.lengths, group.offsets
    shapes = tuple(jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in (query, key, value))
    return jax.pure_callback(packed, shapes, query, key, value, lengths, offsets, log_sum, out, d_out)


CASES = {
    "one document": [[1] * 60] * 2,
    "documents": [[1] * 20 + [2] * 33 + [3] * 7, [1] * 59 + [2]],
    "padding": [[0] * 11 + [1] * 20 + [0] * 29, [1] * 40 + [2] * 15 + [0] * 5],
    "a row of padding": [[0] * 60, [1, 2] * 30],
    "many documents": [list(range(1, 61)), [1] * 30 + [2] * 30],
    "as many as one call takes": [[i // 15 + 1 for i in range(60)], [1] * 60],
}


def errors(segments, window, repeated, monkeypatch):
    monkeypatch.setattr(cudnn, "_forward", forward)
    monkeypatch.setattr(cudnn, "_backward", backward)
    monkeypatch.setattr(cudnn, "_GROUPED_PACKING", not repeated)
    monkeypatch.setattr(cudnn, "MAX_RUNS", 4)
    segments = jnp.asarray(segments, jnp.int32)
    T = segments.shape[1]
    rng = np.random.default_rng(0)
    query, key, value, cotangent = (
        jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K, N)
    )
    valid = (segments > 0)[..., None, None]

    def masked(query, key, value):
        index = jnp.broadcast_to(jnp.arange(T), (B, T))
        with jax.default_matmul_precision("highest"):
            return attention(query, key, value, attention_mask(index, index, segments, segments, window))

    def run(function):
        out, pull = jax.vjp(lambda *args: jnp.where(valid, function(*args), 0), query, key, value)
        return out, *pull(cotangent)

    found = run(lambda *args: cudnn.causal_attention(*args, segments, window))
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, run(masked), strict=True)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("window", [None, 9])
def test_packed_rows_equal_masked_attention(name, window, monkeypatch):
    assert max(errors(CASES[name], window, False, monkeypatch)) <= bound("attention_fp32")


def test_keys_repeated_for_each_query_head(monkeypatch):
    assert max(errors(CASES["documents"], None, True, monkeypatch)) <= bound("attention_fp32")


def test_the_comparison_sees_a_planted_fault(monkeypatch):
    original = cudnn._run_index
    monkeypatch.setattr(cudnn, "_run_index", lambda segments: original(jnp.roll(segments, 1, axis=1)))
    assert max(errors(CASES["documents"], None, False, monkeypatch)) > 1e-2


def test_each_group_covers_its_own_runs():
    segments = jnp.asarray(CASES["many documents"], jnp.int32)
    run = cudnn._run_index(segments)
    covered = [np.asarray(cudnn._group(run, number, 4).covered) for number in range(15)]
    assert (np.sum(covered, axis=0) == 1).all()


@pytest.mark.parametrize(
    ("dtype", "heads", "what"),
    [(jnp.float32, 64, "takes 16-bit"), (jnp.bfloat16, 160, "heads of up to"), (jnp.bfloat16, 20, "steps of 8")],
)
def test_what_cudnn_does_not_take(dtype, heads, what):
    query = jnp.zeros((1, 4, 2, heads), dtype)
    assert what in str(cudnn.obstacle(query, query))
