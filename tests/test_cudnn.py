"""How packed sequences are passed to cuDNN: its two calls are replaced by a slow reading of the same packed layout.

The stand-in finds the sequences from lengths and offsets alone, keeps the log-sum-exp by sequence as cuDNN does, and
leaves NaN wherever cuDNN would write nothing.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops import attention_context_cudnn as context
from jaxmoe.ops import attention_cudnn as cudnn
from jaxmoe.ops.attention_masked import attention, attention_mask
from tests.tolerances import bound

B, N, K, H = 2, 4, 2, 16


def _sequences(lengths, offsets, total):
    """[(line of the batch, its tokens)] of the documents, in the order in which JAX passes them to cuDNN."""
    lengths, offsets = np.asarray(lengths), np.asarray(offsets)
    assert offsets.shape == (lengths.shape[0], lengths.shape[1] + 1)
    assert (offsets[:, -1] == -1).all()
    assert ((lengths > 0) == (offsets[:, :-1] >= 0)).all()
    assert (offsets[:, :-1] + lengths <= total).all()
    return [
        (b, slice(offset, offset + count))
        for b in range(len(lengths))
        for offset, count in zip(offsets[b], lengths[b], strict=False)
        if count > 0
    ]


def _dense(query, key, value, window):
    """Output, log-sum-exp [N, t] and probabilities [N, t, s] of one sequence, in float64."""
    query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
    key, value = (np.repeat(a, query.shape[1] // a.shape[1], axis=1) for a in (key, value))
    logits = np.einsum("tnh,snh->nts", query, key) * H**-0.5
    distance = np.arange(len(query))[:, None] - np.arange(len(query))
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    log_sum = np.log(np.sum(np.exp(logits) * seen, axis=-1))
    weights = np.exp(logits - log_sum[..., None]) * seen
    return np.einsum("nts,snh->tnh", weights, value), log_sum, weights


def _dense_backward(query, key, value, out, weights, d_out):
    query, key, value, out, d_out = (np.asarray(a, np.float64) for a in (query, key, value, out, d_out))
    heads = key.shape[1]
    wide = [np.repeat(a, query.shape[1] // heads, axis=1) for a in (key, value)]
    shared = np.sum(d_out * out, axis=-1).T[..., None]
    d_logits = weights * (np.einsum("tnh,snh->nts", d_out, wide[1]) - shared) * H**-0.5
    d_key, d_value = np.einsum("nts,tnh->snh", d_logits, query), np.einsum("nts,tnh->snh", weights, d_out)
    by_group = [a.reshape(len(a), heads, -1, H).sum(2) for a in (d_key, d_value)]
    return np.einsum("nts,snh->tnh", d_logits, wide[0]), *by_group


def _whole_rows(length):
    return np.full((B, 1), length, np.int32), np.asarray([[0, -1]] * B, np.int32)


def forward(query, key, value, group, window):
    T = query.shape[1]
    lengths, offsets = _whole_rows(T) if group is None else (group.lengths, group.offsets)

    def packed(query, key, value, lengths, offsets):
        out = np.full(query.shape, np.nan, np.float32)
        log_sums = np.full((lengths.size, N, T), np.nan, np.float32)
        for s, (b, here) in enumerate(_sequences(lengths, offsets, T)):
            out[b, here], log_sums[s, :, : here.stop - here.start], _ = _dense(
                query[b, here], key[b, here], value[b, here], window
            )
        return out, log_sums

    shapes = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (query.shape, (lengths.size, N, T)))
    out, log_sums = jax.pure_callback(packed, shapes, query, key, value, lengths, offsets)
    return out.astype(query.dtype), log_sums


def backward(query, key, value, group, window, log_sum, out, d_out):
    T = query.shape[1]
    lengths, offsets = _whole_rows(T) if group is None else (group.lengths, group.offsets)

    def packed(query, key, value, lengths, offsets, log_sum, out, d_out):
        gradients = [np.full(a.shape, np.nan, np.float32) for a in (query, key, value)]
        for s, (b, here) in enumerate(_sequences(lengths, offsets, T)):
            operands = query[b, here], key[b, here], value[b, here]
            found, sums, weights = _dense(*operands, window)
            # What was saved belongs to this sequence.
            limit = bound("attention_saved_fp32" if out.dtype == np.float32 else "attention_saved_bf16")
            np.testing.assert_allclose(np.float64(out[b, here]), found, rtol=limit, atol=limit)
            limit = bound("attention_saved_fp32")
            np.testing.assert_allclose(log_sum[s, :, : here.stop - here.start], sums, rtol=limit, atol=limit)
            parts = _dense_backward(*operands, out[b, here], weights, d_out[b, here])
            for total, part in zip(gradients, parts, strict=True):
                total[b, here] = part
        return tuple(gradients)

    shapes = tuple(jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in (query, key, value))
    gradients = jax.pure_callback(packed, shapes, query, key, value, lengths, offsets, log_sum, out, d_out)
    return tuple(a.astype(query.dtype) for a in gradients)


CASES = {
    "one document": [[1] * 60] * 2,
    "documents": [[1] * 20 + [2] * 33 + [3] * 7, [1] * 59 + [2]],
    "padding": [[0] * 11 + [1] * 20 + [0] * 29, [1] * 40 + [2] * 15 + [0] * 5],
    "a row of padding": [[0] * 60, list(range(1, 13)) + [13] * 48],
    "many documents": [list(range(1, 61)), [1] * 30 + [2] * 30],
    "as many as one call takes": [[i // 15 + 1 for i in range(60)], [1] * 60],
}


@partial(jax.jit, static_argnames=("window", "variant"))
def values_and_gradients(query, key, value, cotangent, segments, window, variant):
    """Results of cuDNN's path and of the masked oracle; compiled once for all cases of a window and a `variant`."""
    valid = (segments > 0)[..., None, None]

    def masked(query, key, value):
        index = jnp.broadcast_to(jnp.arange(query.shape[1]), segments.shape)
        with jax.default_matmul_precision("highest"):
            return attention(query, key, value, attention_mask(index, index, segments, segments, window))

    def run(function):
        out, pull = jax.vjp(lambda *args: jnp.where(valid, function(*args), 0), query, key, value)
        return out, *pull(cotangent)

    return run(lambda q, k, v: cudnn.causal_attention(q, k, v, segments, window)), run(masked)


def errors(segments, window, variant, monkeypatch):
    monkeypatch.setattr(cudnn, "_forward", forward)
    monkeypatch.setattr(cudnn, "_backward", backward)
    monkeypatch.setattr(cudnn, "_GROUPED_PACKING", variant != "repeated")
    monkeypatch.setattr(cudnn, "MAX_PIECES", 4)
    segments = jnp.asarray(segments, jnp.int32)
    T = segments.shape[1]
    rng = np.random.default_rng(0)
    operands = (jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K, N))
    found, expected = values_and_gradients(*operands, segments, window, variant)
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("window", [None, 9])
def test_packed_rows_equal_masked_attention(name, window, monkeypatch):
    assert max(errors(CASES[name], window, "as it is", monkeypatch)) <= bound("attention_fp32")


def test_keys_repeated_for_each_query_head(monkeypatch):
    assert max(errors(CASES["documents"], None, "repeated", monkeypatch)) <= bound("attention_fp32")


def test_the_comparison_sees_a_planted_fault(monkeypatch):
    original = cudnn.piece_index
    monkeypatch.setattr(cudnn, "piece_index", lambda segments: original(jnp.roll(segments, 1, axis=1)))
    assert max(errors(CASES["documents"], None, "planted fault", monkeypatch)) > 1e-2


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose cuDNN is the stand-in."""
    monkeypatch.setattr(cudnn, "_forward", forward)
    monkeypatch.setattr(cudnn, "_backward", backward)
    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn.jax, "default_backend", lambda: "gpu")
    cudnn._packed_unsupported.cache_clear()
    yield monkeypatch
    cudnn._packed_unsupported.cache_clear()


def test_packed_rows_are_tried_before_they_are_taken(gpu):
    """The small case runs while something else is traced. It passes, and fails if a gradient is in the wrong place."""
    query, key = jnp.zeros((B, 8, N, H), jnp.bfloat16), jnp.zeros((B, 8, K, H), jnp.bfloat16)
    ids = jnp.ones((B, 8), jnp.int32)

    def traced(query):
        found.append(cudnn.unsupported(query, key, ids))
        return query

    found = []
    jax.jit(traced)(query)
    assert found == [None]

    def misplaced(*operands):
        d_query, d_key, d_value = backward(*operands)
        return d_query, jnp.roll(d_key, 1, axis=1), d_value

    cudnn._packed_unsupported.cache_clear()
    gpu.setattr(cudnn, "_backward", misplaced)
    assert "expected an error of at most 2e-02" in str(cudnn.unsupported(query, key, ids))
    assert cudnn.unsupported(query, key) is None  # plain sequences are another call

    def fails(*operands):
        raise NotImplementedError("packed layout: no such engine\nand more")

    cudnn._packed_unsupported.cache_clear()
    gpu.setattr(cudnn, "_forward", fails)
    assert cudnn.unsupported(query, key, ids) == "cannot run packed sequences here: packed layout: no such engine"


def test_each_group_covers_its_own_runs():
    segments = jnp.asarray(CASES["many documents"], jnp.int32)
    piece = cudnn.piece_index(segments)
    covered = [np.asarray(cudnn._group(piece, number, 4).covered) for number in range(15)]
    assert (np.sum(covered, axis=0) == 1).all()


@pytest.mark.parametrize(
    ("dtype", "heads", "what"),
    [(jnp.float32, 64, "needs 16-bit"), (jnp.bfloat16, 160, "at most 128"), (jnp.bfloat16, 20, "multiple of 8")],
)
def test_what_cudnn_does_not_take(dtype, heads, what):
    query = jnp.zeros((1, 4, 2, heads), dtype)
    assert what in str(cudnn.unsupported(query, query))


@pytest.mark.parametrize("segments", [None, "packed"])
def test_jax_s_private_functions_are_called_as_they_are_declared(segments, monkeypatch):
    """Traced, not run: so a version of JAX that declares the calls differently is found without a GPU."""
    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn.fused, "check_compute_capability", lambda capability: True)
    query, key = (jax.ShapeDtypeStruct((2, 96, heads, 64), jnp.bfloat16) for heads in (8, 2))
    ids = jax.ShapeDtypeStruct((2, 96), jnp.int32)

    def loss(query, key, value, ids):
        out = cudnn.causal_attention(query, key, value, None if segments is None else ids, 33)
        return jnp.sum(out.astype(jnp.float32))

    gradients = jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2)), query, key, key, ids)
    assert [(g.shape, g.dtype) for g in gradients] == [(a.shape, a.dtype) for a in (query, key, key)]


def _masked_forward(query, key, value, mask):
    """(output, log-sum-exp) by a mask [B, t, s]; NaN where a query sees no key."""
    wide = [jnp.repeat(a.astype(jnp.float32), query.shape[2] // a.shape[2], axis=2) for a in (key, value)]
    logits = jnp.einsum("btnh,bsnh->bnts", query.astype(jnp.float32), wide[0]) * query.shape[-1] ** -0.5
    logits = jnp.where(mask[:, None], logits, -jnp.inf)
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    out = jnp.einsum("bnts,bsnh->btnh", jnp.exp(logits - log_sum[..., None]), wide[1])
    seen = jnp.any(mask, axis=2)
    return jnp.where(seen[..., None, None], out, jnp.nan).astype(query.dtype), jnp.where(
        seen[:, None], log_sum, jnp.nan
    )


def _masked_gradients(query, key, value, mask, log_sum, out, d_out):
    """By the saved log-sum-exp, as flash attention; NaN for tokens that the mask leaves out."""
    *_, N, H = query.shape
    query, out, d_out = (a.astype(jnp.float32) for a in (query, out, d_out))
    wide = [jnp.repeat(a.astype(jnp.float32), N // a.shape[2], axis=2) for a in (key, value)]
    logits = jnp.einsum("btnh,bsnh->bnts", query, wide[0]) * H**-0.5
    weights = jnp.where(mask[:, None], jnp.exp(logits - log_sum[..., None]), 0)
    shared = jnp.einsum("btnh,btnh->bnt", out, d_out)
    d_logits = weights * (jnp.einsum("btnh,bsnh->bnts", d_out, wide[1]) - shared[..., None]) * H**-0.5
    d_logits = jnp.where(mask[:, None], d_logits, 0)
    by_group = lambda a: a.reshape(*key.shape[:3], -1, H).sum(3)
    d_key = by_group(jnp.einsum("bnts,btnh->bsnh", d_logits, query))
    d_value = by_group(jnp.einsum("bnts,btnh->bsnh", weights, d_out))
    d_query = jnp.einsum("bnts,bsnh->btnh", d_logits, wide[0])
    queries, keys = (jnp.any(mask, axis=axis)[..., None, None] for axis in (2, 1))
    return tuple(jnp.where(*pair, jnp.nan) for pair in ((queries, d_query), (keys, d_key), (keys, d_value)))


def _rectangle_mask(query, key, lengths):
    whole = [jnp.full(len(query), a.shape[1]) for a in (query, key)]
    rows, columns = (jnp.arange(a.shape[1]) < n[:, None] for a, n in zip((query, key), lengths or whole, strict=True))
    return rows[:, :, None] & columns[:, None]


def _piece_mask(query, piece):
    place = jnp.arange(query.shape[1])
    piece = jnp.zeros(query.shape[:2], jnp.int32) if piece is None else piece
    return (place[:, None] >= place) & (piece[:, :, None] == piece[:, None])


def replace_calls(monkeypatch):
    """Replaces cuDNN's calls for sequences that devices share by masks; undefined results are NaN."""
    replaced = {
        "rectangle": lambda q, k, v, lengths: _masked_forward(q, k, v, _rectangle_mask(q, k, lengths)),
        "rectangle_gradients": lambda q, k, v, lengths, *saved: _masked_gradients(
            q, k, v, _rectangle_mask(q, k, lengths), *saved
        ),
        "with_log_sum": lambda q, k, v, piece, _: _masked_forward(q, k, v, _piece_mask(q, piece)),
        "gradients": lambda q, k, v, piece, _, *saved: _masked_gradients(q, k, v, _piece_mask(q, piece), *saved),
    }
    for name, function in replaced.items():
        monkeypatch.setattr(cudnn, name, function)


@pytest.fixture
def pairs(monkeypatch):
    replace_calls(monkeypatch)
    return monkeypatch


def shared_error():
    """That of packed sequences which two devices share: documents within a chunk and over several, padding at both
    ends. `tests/mesh/test_context.py` has more of them."""
    place = np.arange(48)
    ids = [1 + (place >= 5) + (place >= 9) + (place >= 40), np.where((place < 3) | (place > 43), 0, 1 + (place >= 24))]
    attend = partial(context.attend_whole, devices=2)
    return cudnn.error(attend, jnp.asarray(ids), (N, K, H), "float32")


def test_devices_that_share_sequences_attend_as_one(pairs):
    assert shared_error() <= bound("attention_fp32")


def test_a_fault_in_shared_sequences_is_noticed(pairs):
    """The last keys of a chunk are not put first."""
    pairs.setattr(context, "_rotated", lambda keys, by: keys)
    assert not shared_error() < 1e-2


def test_the_calls_for_shared_sequences_are_as_jax_declares_them(monkeypatch):
    """Traced, not run."""
    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn.fused, "check_compute_capability", lambda capability: True)
    query, key = (jax.ShapeDtypeStruct((2, 96, heads, 64), jnp.bfloat16) for heads in (8, 2))
    for ids in (None, jax.ShapeDtypeStruct((2, 96), jnp.int32)):
        loss = lambda q, k, v, ids: jnp.sum(context.attend_whole(q, k, v, ids, 2).astype(jnp.float32))
        gradients = jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2)), query, key, key, ids)
        assert [(g.shape, g.dtype) for g in gradients] == [(a.shape, a.dtype) for a in (query, key, key)]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", False),
        ("--xla_gpu_autotune_level=0", False),
        ("--xla_gpu_autotune_level=0 --xla_gpu_deterministic_ops=true", True),
        ("--xla_gpu_deterministic_ops", True),
        ("--xla_gpu_exclude_nondeterministic_ops=1", True),
        ("--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=false", False),
    ],
)
def test_calls_say_that_they_are_deterministic_if_xla_has_to_be(monkeypatch, flags, expected):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", lambda: 92200)
    shapes = [jax.ShapeDtypeStruct((2, 128, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]

    @jax.jit
    @partial(jax.grad, argnums=(0, 1, 2))
    def gradients(query, key, value):
        return cudnn.causal_attention(query, key, value, None, None).astype(jnp.float32).sum()

    text = gradients.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "__cudnn$fmhaSoftmax" in line]
    assert len(calls) == 2 and "__cudnn$fmhaSoftmaxBackward" in calls[1]
    assert [("force_deterministic" in call) for call in calls] == [expected, expected]
