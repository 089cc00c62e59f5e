"""Attention over sequences that devices share, against attention with a mask for every pair of tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxmoe.distributed import chunks
from jaxmoe.distributed.mesh import MeshShape
from jaxmoe.distributed.placement import devices_of
from jaxmoe.ops import attention, attention_context, attention_context_cudnn, attention_masked
from jaxmoe.ops.attention_masked import attention_mask
from tests.test_cudnn import replace_calls
from tests.tolerances import bound

B, N, K, H = 2, 4, 2, 8


def packed_segments(rng: np.random.Generator, length: int) -> np.ndarray:
    """Segment ids [B, length] of two documents and padding."""
    first, end = np.sort(rng.integers(1, length + 1, (B, 2)), axis=1).T[:, :, None]
    place = np.arange(length)
    return np.where(place < first, 1, np.where(place < end, 2, 0)).astype(np.int32)


def error(devices: int, length: int, window: int | None, packed: bool = True) -> float:
    """The largest relative L2 error of output and gradients."""
    rng = np.random.default_rng(length)
    query, key, value, d_out = (rng.standard_normal((B, length, n, H), np.float32) for n in (N, K, K, N))
    segments = jnp.asarray(packed_segments(rng, length) if packed else np.ones((B, length), np.int32))
    valid = np.asarray(segments > 0)[..., None, None]
    place = jnp.broadcast_to(jnp.arange(length), segments.shape)
    mask = attention_mask(place, place, segments, segments, window)

    def run(attend: Any, arguments: tuple[Any, ...]) -> list[Any]:
        def results(query: Any, key: Any, value: Any, d_out: Any) -> Any:
            out, pull = jax.vjp(attend, query, key, value)
            return out, *pull(d_out)

        return jax.tree.map(np.asarray, jax.jit(results)(*arguments))

    def on_a_device(query: Any, key: Any, value: Any, segments: Any) -> Any:
        whole = chunks.whole_sequences(segments, devices) if packed else None
        return attention.causal_attention(query, key, value, whole, window, MeshShape(context=devices))

    mesh, split = devices_of(MeshShape(context=devices)), PartitionSpec(None, "context")
    spread = jax.shard_map(on_a_device, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    dealt = chunks.order(length, devices)
    arrays = query, key, value, d_out * valid
    expected = run(lambda query, key, value: attention_masked.attention(query, key, value, mask), arrays)
    shares = tuple(each[:, dealt] for each in arrays)
    found = run(lambda query, key, value: spread(query, key, value, segments[:, dealt]), shares)
    pairs = [(a * valid[:, dealt], (b * valid)[:, dealt]) for a, b in zip(found, expected, strict=True)]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


@pytest.mark.parametrize(
    ("devices", "length", "window", "tile", "packed"),
    [
        (4, 48, None, 512, True),
        (2, 28, 5, 3, True),  # chunks of 7 in tiles of 3, 3 and 1
        pytest.param(2, 64, 20, 4, True, marks=pytest.mark.wide),
        pytest.param(8, 16, None, 512, True, marks=pytest.mark.wide),
        pytest.param(2, 20, 2, 512, False, marks=pytest.mark.wide),
        pytest.param(4, 40, 100, 2, False, marks=pytest.mark.wide),
    ],
)
def test_devices_together_attend_as_one(
    devices: int, length: int, window: int | None, tile: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_context, "LONGEST", tile)
    assert error(devices, length, window, packed) <= bound("mesh_fp32")


@pytest.mark.wide
@pytest.mark.parametrize(("devices", "length", "packed"), [(4, 48, True), (8, 32, True), (2, 20, False)])
def test_devices_together_attend_as_one_by_cudnn(
    devices: int, length: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pairs of chunks, with a stand-in for its calls."""
    replace_calls(monkeypatch)
    monkeypatch.setattr(attention, "choose", lambda *_: SimpleNamespace(value=attention_context_cudnn.PAIRS))
    assert error(devices, length, None, packed) <= bound("mesh_fp32")


def left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys, values and segments of the first chunk are missing."""
    right = chunks.gather_chunks

    def wrong(share: Any, devices: int) -> Any:
        whole = right(share, devices)
        return whole.at[: len(whole) // (2 * devices)].set(0)

    monkeypatch.setattr(chunks, "gather_chunks", wrong)


def swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device takes its early chunk of queries for the late one."""
    right = chunks.own
    monkeypatch.setattr(chunks, "own", lambda devices: right(devices)[::-1])


def contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunks lie in the order of the devices that sent them."""
    monkeypatch.setattr(chunks, "gather_chunks", lambda share, devices: chunks.gather(share, 0, over="context"))


def not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device's keys have the gradient of its own queries alone."""
    right = chunks.gather

    @jax.custom_vjp
    def wrong(share: Any) -> Any:
        return right(share, 0, over="context")

    def backward(size: int, d_whole: Any) -> tuple[Any]:
        return (jax.lax.dynamic_slice_in_dim(d_whole, jax.lax.axis_index("context") * size, size),)

    wrong.defvjp(lambda share: (wrong(share), len(share)), backward)
    monkeypatch.setattr(chunks, "gather", lambda share, axis, over: wrong(share))


@pytest.mark.parametrize(
    "fault", [swapped, not_summed, *(pytest.param(each, marks=pytest.mark.wide) for each in (left_out, contiguous))]
)
def test_a_planted_fault_is_noticed(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    assert error(4, 48, None) > bound("mesh_fp32")
