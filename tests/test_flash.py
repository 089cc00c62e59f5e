"""Flash attention by mma.sync against masked attention in float64: output and gradients.

On a GPU the kernels run compiled; elsewhere as in `tests.test_ampere`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxmoe.ops.attention_masked import attention, attention_mask
from tests.parity import relative_error
from tests.test_ampere import path  # noqa: F401 - a fixture
from tests.test_kernels import needs_kernels, on_gpu
from tests.tolerances import bound


@pytest.fixture
def interpret(path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: F811
    """As `path`, with plain operations also for what only this kernel uses."""
    if not on_gpu:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        from jaxmoe.ops.kernels.flash import block

        language: Any = plgpu
        monkeypatch.setattr(
            language, "broadcasted_iota", lambda dtype, shape, axis, layout: lax.broadcasted_iota(dtype, shape, axis)
        )
        monkeypatch.setattr(block, "as_left", lambda values: values)
    return path


# (tokens, query heads, key heads, width, lengths of the documents or None, window)
CASES: dict[str, tuple[int, int, int, int, list[int] | None, int | None]] = {
    "odd length, odd head": (100, 2, 2, 48, None, None),
    "packed, window": (130, 2, 1, 64, [5, 65, 60], 33),
}
if on_gpu:
    CASES |= {
        "packed": (192, 2, 1, 64, [5, 64, 80, 30, 13], None),
        "plain": (128, 2, 1, 64, None, None),
        "window": (192, 2, 1, 64, None, 40),
        "wide": (1024, 32, 4, 128, None, None),
        "wide, packed": (2048, 8, 4, 128, [3, 700, 64, 128, 1000, 153], None),
        "wide, window": (1000, 8, 4, 128, None, 257),
    }


def errors(name: str, interpret: Any, shift: int = 0) -> list[float]:
    """Relative errors of output and gradients; `shift` is a planted fault: segments that begin too late."""
    from jaxmoe.ops.kernels.flash.attention import causal_attention

    T, N, K, H, documents, window = CASES[name]
    keys = jax.random.split(jax.random.key(T), 4)
    operands = [jax.random.normal(k, (1, T, n, H), jnp.bfloat16) for k, n in zip(keys, (N, K, K, N), strict=True)]
    segments = None
    if documents is not None:
        assert sum(documents) == T
        segments = jnp.asarray(np.repeat(np.arange(1, len(documents) + 1), documents))[None]
    index = jnp.arange(T)[None]
    every = jnp.ones_like(index) if segments is None else segments

    def exact(query: Any, key: Any, value: Any) -> Any:
        return attention(query, key, value, attention_mask(index, index, every, every, window))

    ours = None if segments is None else jnp.roll(segments, shift, axis=1)
    run = partial(causal_attention, segments=ours, window=window, interpret=interpret)

    def all_of(function: Any, query: Any, key: Any, value: Any, d_out: Any) -> Any:
        out, pull = jax.vjp(function, query, key, value)
        return out, *pull(d_out)

    found = all_of(run, *operands)
    with jax.default_matmul_precision("highest"):
        expected = all_of(exact, *(array.astype(jnp.float32) for array in operands))
    return [
        float(relative_error(np.asarray(a, np.float64), np.asarray(b, np.float64)))
        for a, b in zip(found, expected, strict=True)
    ]


@needs_kernels
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_masked_attention(name: str, interpret: Any) -> None:
    assert max(errors(name, interpret)) <= bound("kernel_bf16")


@needs_kernels
def test_the_small_case_that_a_process_runs_first(interpret: Any) -> None:
    from jaxmoe.ops.kernels.flash.attention import small_error

    for dtype in ("bfloat16", "float16"):
        assert small_error(64, dtype, interpret=interpret) <= bound("kernel_bf16")


@needs_kernels
def test_a_segment_in_the_wrong_place_is_seen(interpret: Any) -> None:
    assert min(errors("packed, window", interpret, shift=1)) > 10 * bound("kernel_bf16")


@pytest.mark.parametrize("width", [64, 128])
def test_tiles_fit_every_card(width: int) -> None:
    from jaxmoe.ops.kernels.ampere import BLOCK_RESERVE, CARDS
    from jaxmoe.ops.kernels.flash.tiles import BLOCKS, UNIT, default_tiles

    for capability, card in CARDS.items():
        tiles = default_tiles(width, capability)
        assert BLOCKS * (tiles.shared_bytes(width) + BLOCK_RESERVE) <= card.shared
        assert all(UNIT % size == 0 for each in tiles for size in (each.rows, each.walked))
