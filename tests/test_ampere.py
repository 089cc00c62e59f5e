"""The kernels for Ampere and newer cards against float64 products row by row, their tiles against the cards' limits.

On a GPU they run compiled. Elsewhere JAX's interpreter runs their programs; it knows neither mma.sync nor cp.async, so
plain operations stand for these.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.grouped_matmul import LowRankTerm
from tests.parity import relative_error
from tests.test_kernels import CASES as WGMMA_CASES
from tests.test_kernels import by_rows, needs_kernels, normal, on_gpu, scheduled, skewed
from tests.tolerances import bound

# Without a GPU the kernel runs without what adds zeros, so widths are multiples of 32.
CASES = WGMMA_CASES if on_gpu else WGMMA_CASES | {"odd widths": (40, 5, 3, 0, 96, 160)}
KINDS = [(name, transposed, low) for name in CASES for transposed in (True, False) for low in (False, True)]
if not on_gpu:  # the interpreter takes seconds for each
    KINDS = [
        ("wide", False, False),
        ("odd widths", True, True),
        ("odd widths", False, True),
        ("one token", True, False),
        ("two spans", True, False),
    ]


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """None on a GPU; elsewhere plain operations, and the parameters of the interpreter that runs the kernels."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from jaxmoe.ops.kernels.grouped_matmul import ampere_matmul

    jax.clear_caches()
    if on_gpu:
        yield None
    else:

        def copy(source: Any, target: Any, **_: Any) -> None:
            target[...] = source[...]

        language: Any = plgpu
        dot = partial(jnp.dot, preferred_element_type=jnp.float32)
        monkeypatch.setattr(language, "mma", lambda sums, left, right: sums + dot(left, right))
        monkeypatch.setattr(language, "copy_gmem_to_smem", copy)
        monkeypatch.setattr(language, "wait_gmem_to_smem", lambda copies: None)
        monkeypatch.setattr(language, "layout_cast", lambda value, layout: value)
        put = lambda target, value, optimized: copy(value, target)
        monkeypatch.setattr(language, "store", put, raising=False)  # jax 0.11 lacks it
        monkeypatch.setattr(language, "load", lambda ref, layout, optimized=True: ref[...])
        monkeypatch.setattr(ampere_matmul, "HEIGHTS", (32, 128))  # of five, to compile less
        yield language.InterpretGPUParams()
    jax.clear_caches()


def matmul_error(name: str, interpret: Any, transposed: bool, low_rank: bool, shift: int = 0, **options: Any) -> float:
    """Relative error of the kernel over all placed rows; `shift` is a planted fault: the wrong group."""
    from jaxmoe.ops.kernels.ampere import default_capability
    from jaxmoe.ops.kernels.grouped_matmul import ampere as kernel
    from jaxmoe.ops.kernels.grouped_matmul.ampere_tiles import span_rows

    M, E, k, empty, inner, out = CASES[name]
    rng = np.random.default_rng(zlib.crc32(f"{name} {transposed}".encode()))
    limits = (span_rows(options.get("capability", (8, 0) if interpret else default_capability())),)
    schedule = scheduled(jnp.asarray(skewed(M, E, k, 1, empty)), E, kernel.TILE_ROWS, limits)
    P = schedule.source.shape[0]
    x, weight = normal(rng, P, inner), normal(rng, 2 * E, *((out, inner) if transposed else (inner, out)))
    expected, placed = by_rows(x, weight, schedule, transposed, offset=E)
    if low_rank:
        low, low_weight = normal(rng, P, 32), normal(rng, E, *((out, 32) if transposed else (32, out)))
        expected = expected + by_rows(low, low_weight, schedule, transposed)[0]
        options["low"] = LowRankTerm(low, low_weight)
    if options.get("swiglu"):
        gate, up = np.split(np.asarray(jnp.asarray(expected, jnp.bfloat16), np.float64), 2, axis=-1)
        expected = gate / (1 + np.exp(-gate)) * up
    spans = schedule.spans[limits[0]]
    spans = spans._replace(group=(spans.group + shift) % E)
    if interpret is None and "capability" not in options:  # with zeros where a width needs them
        shifted = schedule._replace(spans={limits[0]: spans})
        found = kernel.AMPERE.matmul(x, weight, shifted, E, transposed=transposed, **options)
    else:
        run = partial(kernel.grouped_matmul, transposed=transposed, interpret=interpret, **options)
        found = run(x, weight, spans, jnp.int32(E))
    return float(relative_error(np.asarray(found, np.float64)[placed], expected))


@needs_kernels
@pytest.mark.parametrize(("name", "transposed", "low_rank"), KINDS)
def test_grouped_matmul_equals_the_rows_products(name: str, transposed: bool, low_rank: bool, path: Any) -> None:
    assert matmul_error(name, path, transposed, low_rank) <= bound("kernel_bf16")


@needs_kernels
def test_spans_of_newer_cards(path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxmoe.ops.kernels.grouped_matmul import ampere_matmul

    if not on_gpu:
        monkeypatch.setattr(ampere_matmul, "HEIGHTS", (32, 112, 128))
    assert matmul_error("two spans", path, True, False, capability=(12, 0)) <= bound("kernel_bf16")


@pytest.mark.parametrize("transposed", [True, False])
def test_zeros_are_added_to_widths_that_the_kernel_does_not_support(
    transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jaxmoe.ops.kernels.grouped_matmul import ampere as kernel
    from jaxmoe.ops.kernels.grouped_matmul.xla import XLA

    (M, E, k, inner, out), rng = (20, 3, 2, 40, 48), np.random.default_rng(0)
    schedule = scheduled(jnp.asarray(skewed(M, E, k, 1)), E, kernel.TILE_ROWS, kernel.AMPERE.span_rows(M * k, E))

    def plain(x: Any, weight: Any, _: Any, offset: Any, **options: Any) -> Any:
        assert not any(size % 32 for size in (x.shape[1], *weight.shape[1:]))
        return XLA.matmul(x, weight, schedule, offset, **options)

    monkeypatch.setattr(kernel, "grouped_matmul", plain)
    x = normal(rng, schedule.source.shape[0], inner)
    weight = normal(rng, 2 * E, *((out, inner) if transposed else (inner, out)))
    low = LowRankTerm(normal(rng, x.shape[0], 32), normal(rng, E, *((out, 32) if transposed else (32, out))))
    options: dict[str, Any] = {"transposed": transposed, "swiglu": transposed, "low": low}
    found, expected = (each.matmul(x, weight, schedule, E, **options) for each in (kernel.AMPERE, XLA))
    assert found.shape == expected.shape
    assert relative_error(np.asarray(found, np.float64), np.asarray(expected, np.float64)) <= bound("kernel_bf16")


@needs_kernels
@pytest.mark.parametrize("name", CASES if on_gpu else ["wide"])
def test_swiglu_of_the_product(name: str, path: Any) -> None:
    assert matmul_error(name, path, True, True, swiglu=True) <= bound("kernel_swiglu_bf16")


@needs_kernels
def test_a_wrong_group_is_seen(path: Any) -> None:
    assert matmul_error("wide", path, True, False, shift=1) > 100 * bound("kernel_bf16")


@needs_kernels
@pytest.mark.parametrize("capability", [(8, 0), (12, 0)], ids=str)
@pytest.mark.parametrize(("A", "C"), [(160, 32), *([(1536, 2048), (2048, 32)] if on_gpu else [])])
def test_grouped_outer_equals_the_groups_products(A: int, C: int, capability: tuple[int, int], path: Any) -> None:
    from jaxmoe.ops.kernels.grouped_matmul import ampere as kernel

    M, E, k, rng = 90, 5, 2, np.random.default_rng(A + C)
    schedule = scheduled(jnp.asarray(skewed(M, E, k, 2, empty=2)), E, kernel.TILE_ROWS)
    source = np.asarray(schedule.source)
    left = jnp.where(source[:, None] >= 0, normal(rng, len(source), A), 0)
    right = normal(rng, len(source), C)
    groups = schedule.first_tile, schedule.tile_count
    found = kernel.grouped_outer(left, right, *groups, capability=capability, interpret=path)
    expected = np.zeros((E, A, C))
    for e, (first, count) in enumerate(zip(*map(np.asarray, (schedule.first_tile, schedule.tile_count)), strict=True)):
        rows = slice(kernel.TILE_ROWS * first, kernel.TILE_ROWS * (first + count))
        expected[e] = np.asarray(left, np.float64)[rows].T @ np.asarray(right, np.float64)[rows]
    assert relative_error(found, expected) <= bound("kernel_fp32_sums")
    assert not np.asarray(found)[np.asarray(schedule.tile_count) == 0].any()


@needs_kernels
def test_the_small_case_that_a_process_runs_first(path: Any) -> None:
    from jaxmoe.ops.kernels.grouped_matmul import ampere as kernel
    from jaxmoe.ops.small_case import BOUND, why_not

    for dtype in ("bfloat16", "float16"):
        assert kernel.small_error(dtype, interpret=path) <= bound("kernel_bf16") < BOUND
    assert (
        why_not(lambda: 4e-2, "a case") == "is wrong on a case here: expected an error of at most 2e-02, found 4.0e-02"
    )
    assert why_not(lambda: 1 / 0, "a case") == "cannot run a case here: division by zero"


@needs_kernels
@pytest.mark.skipif(on_gpu, reason="a GPU runs the path for 8.0 in the tests above")
@pytest.mark.parametrize("capability", [(8, 0), (12, 0)], ids=str)
def test_every_path_can_be_lowered(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Mosaic refuses layouts, copies and slices that its instructions do not allow; it needs no GPU to say so."""
    from jax.experimental.mosaic.gpu import utils

    from jaxmoe.ops.kernels.grouped_matmul import ampere as kernel
    from jaxmoe.ops.kernels.grouped_matmul import ampere_matmul
    from jaxmoe.ops.schedule import Spans

    monkeypatch.setattr(utils, "_infer_arch", lambda: capability)

    def of(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    numbers = partial(of, jnp.int32)
    fields: Any = [numbers(6), numbers(6), numbers(6), numbers()]
    spans = Spans(*fields)
    monkeypatch.setattr(ampere_matmul, "HEIGHTS", (112, 128))
    run = jax.jit(partial(kernel.grouped_matmul, transposed=True, swiglu=True, capability=capability))
    operands = of(jnp.bfloat16, 96, 128), of(jnp.bfloat16, 2, 256, 128), spans
    assert "mosaic_gpu" in run.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    outer = jax.jit(partial(kernel.grouped_outer, capability=capability))
    pair = of(jnp.bfloat16, 96, 128), of(jnp.bfloat16, 96, 256)
    assert "mosaic_gpu" in outer.trace(*pair, numbers(2), numbers(2)).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("depths", [(2048,), (768, 64), (2048, 32), (96, 32)], ids=str)
@pytest.mark.parametrize("columns", [32, 96, 128, 1536])
def test_tiles_fit_every_card(columns: int, depths: tuple[int, ...]) -> None:
    from jaxmoe.ops.kernels.ampere import BLOCK_RESERVE, CARDS, THREADS
    from jaxmoe.ops.kernels.grouped_matmul.ampere_tiles import BLOCKS, column_tile, default_tiles

    for capability, card in CARDS.items():
        tiles = default_tiles(column_tile(columns), depths, capability)
        assert tiles.shared_bytes <= card.block_shared
        assert BLOCKS * (tiles.shared_bytes + BLOCK_RESERVE) <= card.shared
        assert tiles.slots >= 2 and not any(depth % tiles.depth for depth in depths)
        assert tiles.accumulators <= (112 if capability >= (10, 0) else 128)  # by ptxas 13.0, docs/log
        assert card.registers >= 255 * THREADS * BLOCKS


def test_a_card_that_is_not_listed_gets_the_least_of_its_generation() -> None:
    from jaxmoe.ops.kernels.ampere import CARDS, card_of

    assert card_of((8, 7)) == CARDS[8, 6]
    assert card_of((11, 0)) == CARDS[8, 6]
    assert card_of((9, 0)) == CARDS[9, 0]
