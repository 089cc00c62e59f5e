"""cuDNN's attention on the GPU against the masked oracle in float32: value and gradients, packing and padding."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops import attention_context_cudnn as context
from jaxmoe.ops import attention_cudnn as cudnn
from jaxmoe.ops.attention import causal_attention
from jaxmoe.ops.attention_masked import attention, attention_mask
from jaxmoe.ops.implementations import choose, forced
from tests.tolerances import bound

pytestmark = pytest.mark.gpu


def pieces(length, lengths, left=0, right=0):
    """The segment ids of one sequence: documents of about `lengths` tokens, padding on the left and on the right."""
    rng = np.random.default_rng(length)
    row = np.zeros(length, np.int32)
    at, number = left, 1
    while at < length - right:
        size = min(int(rng.integers(lengths // 2, 2 * lengths)), length - right - at)
        row[at : at + size] = number
        at, number = at + size, number + 1
    return row


# segment ids of each sequence, window
CASES = {
    "plain": (np.ones((2, 1024), np.int32), None),
    "odd length": (np.ones((2, 333), np.int32), None),
    "two documents": (np.stack([pieces(1024, 400), pieces(1024, 700)]), None),
    "more documents than one call takes": (np.stack([pieces(1024, 20), pieces(1024, 300)]), None),
    "padding on both sides": (np.stack([pieces(777, 90, left=100), pieces(777, 2000, right=301)]), None),
    "a row of padding": (np.stack([pieces(512, 100), np.zeros(512, np.int32)]), None),
    "window": (np.ones((2, 1024), np.int32), 100),
    "window and documents": (np.stack([pieces(1024, 300), pieces(1024, 40)]), 100),
    "a few tokens": (np.stack([pieces(17, 3), pieces(17, 40)]), None),
}


def errors(segments, window, implementation="cudnn", shape=(32, 4, 128)):
    """Relative L2 errors of the output and of the gradients of query, key and value, in bfloat16."""
    N, K, H = shape
    B, T = segments.shape
    keys = jax.random.split(jax.random.key(T), 4)
    query, key, value, cotangent = (
        jax.random.normal(k, (B, T, heads, H), jnp.bfloat16) for k, heads in zip(keys, (N, K, K, N), strict=True)
    )
    valid = (segments > 0)[..., None, None]

    def fast(query, key, value, segments):
        return causal_attention(query, key, value, segments, window)

    def masked(query, key, value, segments):
        index = jnp.broadcast_to(jnp.arange(T), (B, T))
        mask = attention_mask(index, index, segments, segments, window)
        return attention(query, key, value, mask)

    @partial(jax.jit, static_argnums=0)
    def run(function, query, key, value, cotangent, segments):
        out, pull = jax.vjp(lambda *args: jnp.where(valid, function(*args, segments), 0), query, key, value)
        return out, *pull(cotangent)

    with forced(attention=implementation):
        found = run(fast, query, key, value, cotangent, segments)
    exact = (a.astype(jnp.float32) for a in (query, key, value, cotangent))
    with jax.default_matmul_precision("highest"):
        expected = run(masked, *exact, segments)
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(found, expected, strict=True)]
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]


@pytest.mark.parametrize("name", CASES)
def test_equals_masked_attention(name):
    found = errors(*CASES[name])
    assert max(found) <= bound("gpu_attention_bf16"), found


@pytest.mark.parametrize("shape", [(4, 4, 64), (6, 2, 40), (8, 1, 128)], ids=str)
def test_other_heads(shape):
    assert max(errors(*CASES["two documents"], shape=shape)) <= bound("gpu_attention_bf16")


def test_keys_repeated_for_each_head_give_the_same(monkeypatch):
    """What JAX before 0.11.2 needs for packed sequences."""
    monkeypatch.setattr(cudnn, "_GROUPED_PACKING", False)
    assert max(errors(*CASES["more documents than one call takes"])) <= bound("gpu_attention_bf16")


def test_blocks_in_bfloat16():
    assert max(errors(*CASES["two documents"], implementation="blocks")) <= bound("gpu_attention_bf16")


def test_the_comparison_sees_a_planted_fault(monkeypatch):
    # First without the fault: once per process cuDNN is tried on a small case, which would fail with the fault.
    assert max(errors(*CASES["two documents"])) <= bound("gpu_attention_bf16")
    original = cudnn.piece_index
    monkeypatch.setattr(cudnn, "piece_index", lambda segments: original(jnp.roll(segments, 1, axis=1)))
    assert max(errors(*CASES["two documents"])) > 10 * bound("gpu_attention_bf16")


def test_is_taken_for_bfloat16_only():
    half, full = (jnp.zeros((1, 64, 4, 64), dtype) for dtype in (jnp.bfloat16, jnp.float32))
    assert choose("attention", half, half).name == "cudnn"
    assert choose("attention", full, full).name == "blocks"


@pytest.mark.parametrize(("groups", "head_dim"), [(8, 128), (2, 32)])
def test_the_small_case_passes(groups, head_dim):
    assert cudnn.packed_error(groups, head_dim) <= bound("gpu_attention_bf16")


@pytest.mark.parametrize(("groups", "head_dim"), [(8, 128), (2, 32)])
def test_devices_that_share_sequences_attend_as_one(groups, head_dim):
    """Their pairs of chunks, run by one device: packed sequences, and whole ones of 512 tokens."""
    assert context.packed_error(groups, head_dim) <= bound("gpu_attention_bf16")
    attend = lambda query, key, value, segments: context.attend_whole(query, key, value, None, 4)
    assert cudnn.error(attend, jnp.ones((2, 512), jnp.int32), (2 * groups, 2, head_dim), "bfloat16") <= bound(
        "gpu_attention_bf16"
    )


def test_without_segments():
    query = jax.random.normal(jax.random.key(0), (2, 256, 8, 64), jnp.bfloat16)
    key = query[:, :, :2]
    ones = jnp.ones((2, 256), jnp.int32)
    assert (causal_attention(query, key, key) == causal_attention(query, key, key, ones)).all()
