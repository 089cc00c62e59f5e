"""The kernels of a decoding step beside the products of few rows, against XLA: attention over the cache.

Without a GPU they run in Pallas' interpreter. On a GPU the real widths are tested as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.cached_attention import MASKED, CacheStacks, Heads, Rotation
from jaxmoe.ops.few_rows import GATHERED, Rows
from jaxmoe.ops.kernels import cached_attention, few_rows
from jaxmoe.ops.norm import StackedNorm
from tests.parity import relative_error
from tests.row_kernels import INTERPRETED, draw
from tests.tolerances import bound

LAYERS, LAYER = 3, 1
BFLOAT16, FLOAT32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


def rounded(key: int, *shape: int) -> jax.Array:
    return draw(key, *shape).astype(jnp.bfloat16)


def arguments_of(positions: list[int], slots: int, heads: tuple[int, int, int]) -> Any:
    """The arguments of attention over the cache, but for the window, for N, K, H = `heads`."""
    N, K, H = heads
    B = len(positions)
    new = Heads(rounded(0, B, 1, N, H), rounded(1, B, 1, K, H), rounded(2, B, 1, K, H))
    cache = CacheStacks(*(rounded(key, LAYERS, B, slots, K, H) for key in (3, 4)))
    at = jnp.asarray(positions, jnp.int32)[:, None]
    angles = 0.01 * at[..., None] * jnp.arange(H // 2)
    norms = [StackedNorm(1 + rounded(key, LAYERS, H) / 4, LAYER, 1e-6) for key in (5, 6)]
    rotation = Rotation(*norms, tables=(jnp.cos(angles), jnp.sin(angles)))
    return new, rotation, cache, jnp.asarray(LAYER, jnp.int32), at


def attention_of(positions: list[int], slots: int, heads: tuple[int, int, int]) -> tuple[Callable[..., Any], Any]:
    """(the kernel as a function of the window, its other arguments) for N, K, H = `heads`."""
    arguments = arguments_of(positions, slots, heads)
    return lambda window: cached_attention.attend(*arguments, sliding_window=window, interpret=INTERPRETED), arguments


@pytest.mark.parametrize(
    ("positions", "slots", "window"),
    [([0, 5, 31, 40], 32, None), ([1023, 700], 1024, 100)],
    ids=["first, last and past the end", "two parts and a window"],
)
def test_attention_over_the_cache(positions: list[int], slots: int, window: int | None) -> None:
    """A position past the end writes nothing, and nobody reads what it attends to. The control: another window."""
    run, arguments = attention_of(positions, slots, (4, 2, 32))
    found, expected, before = run(window), MASKED(*arguments, sliding_window=window), arguments[2]
    real = jnp.asarray(positions) < slots
    near = bound("cached_attention_bf16")
    assert relative_error(found[0][real], expected[0][real]) <= near
    assert relative_error(MASKED(*arguments, sliding_window=(window or 32) - 1)[0][real], expected[0][real]) > near
    for stack, wanted, old in zip(found[1], expected[1], before, strict=True):
        assert relative_error(stack, wanted) <= bound("cached_attention_written_bf16")
        changed = np.asarray(jnp.any(stack != old, axis=(3, 4)))
        places = [(LAYER, b, position) for b, position in enumerate(positions) if position < slots]
        assert sorted(map(tuple, np.argwhere(changed).tolist())) == places


@pytest.mark.parametrize(
    ("query", "cache", "word"),
    [
        (((1, 2, 4, 32), BFLOAT16), ((1, 1, 64, 2, 32), BFLOAT16), "found 2"),
        (((1, 1, 4, 32), FLOAT32), ((1, 1, 64, 2, 32), FLOAT32), "found float32"),
        (((1, 1, 4, 48), BFLOAT16), ((1, 1, 64, 2, 48), BFLOAT16), "found 48"),
        (((1, 1, 64, 32), BFLOAT16), ((1, 1, 64, 2, 32), BFLOAT16), "found 32"),
        (((1, 1, 4, 32), BFLOAT16), ((1, 1, 96, 2, 32), BFLOAT16), "found 96"),
    ],
)
def test_what_attention_over_the_cache_refuses(query: Any, cache: Any, word: str) -> None:
    arrays = [jax.ShapeDtypeStruct(*each) for each in (query, cache)]
    assert word in str(cached_attention.unsupported(*arrays))


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [256, 4096])
def test_attention_over_the_cache_at_the_real_width(slots: int) -> None:
    run, arguments = attention_of([slots - 1, 0, slots // 2 + 3], slots, (32, 4, 128))
    found, expected = run(None), MASKED(*arguments, sliding_window=None)
    assert relative_error(found[0], expected[0]) <= bound("cached_attention_bf16")
    assert relative_error(found[1].key, expected[1].key) <= bound("cached_attention_written_bf16")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16])
def test_products_of_few_rows_at_the_real_width(tokens: int) -> None:
    """Gate and up, with SwiGLU, of 128 experts."""
    x, stack = rounded(0, tokens, 2048), rounded(1, 128, 1536, 2048)
    experts = jax.lax.top_k(draw(2, tokens, 128), 8)[1]
    rows = Rows.of_experts(experts, 0)
    (found,) = few_rows.products(x, [stack], rows, BFLOAT16, swiglu=True)
    (expected,) = GATHERED.products(x, [stack], rows, BFLOAT16, swiglu=True)
    assert relative_error(found, expected) <= bound("few_rows_bf16")
