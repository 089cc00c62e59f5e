"""The Hopper kernels against float64 products row by row: compiled on a GPU, elsewhere in JAX's interpreter.

The interpreter runs the kernel's own program (copies, barriers, wgmma, the loops of each warpgroup) on a CPU and looks
for races between its threads. It needs jax 0.11 or newer; `make test-kernels` creates an environment with it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxmoe.ops.experts import ExpertWeights, sorted_experts
from jaxmoe.ops.grouped_matmul import LowRankTerm
from jaxmoe.ops.implementations import forced
from jaxmoe.ops.kernels.grouped_matmul import xla as tiled
from jaxmoe.ops.low_rank import Adapter
from jaxmoe.ops.router import route
from jaxmoe.ops.schedule import Spans, make_schedule
from tests.parity import relative_error
from tests.tolerances import bound

on_gpu = jax.default_backend() == "gpu"
needs_kernels = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="jax 0.11 or newer has the kernels' language and their interpreter"
)
scheduled = jax.jit(make_schedule, static_argnums=(1, 2, 3))


def interpreter() -> Any:
    """None on a GPU; elsewhere the interpreter's parameters, with race detection."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    language: Any = plgpu  # jax 0.10 lacks the interpreter
    return None if on_gpu else language.InterpretGPUParams(detect_races=True)


def skewed(M: int, E: int, k: int, seed: int, empty: int = 0) -> np.ndarray:
    """Expert ids [M, k]; the last `empty` experts get none, the others get very unequal shares."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((M, E)) + 2 * rng.standard_normal(E)
    logits[:, E - empty :] = -np.inf
    return np.argsort(-logits, axis=1)[:, :k].astype(np.int32)


def by_rows(x, weight, schedule, transposed, offset=0):
    """Float64 products of the rows that are placed, and which rows those are."""
    placed = np.flatnonzero(np.asarray(schedule.source) >= 0)
    tile = len(schedule.source) // len(schedule.tile_expert)
    experts = np.asarray(schedule.tile_expert)[placed // tile] + offset
    rows = np.asarray(x, np.float64)[placed]
    out = np.empty((len(placed), weight.shape[1 if transposed else 2]))
    for expert in np.unique(experts):
        matrix = np.asarray(weight[expert], np.float64)
        out[experts == expert] = rows[experts == expert] @ (matrix.T if transposed else matrix)
    return out, placed


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[-1]), jnp.bfloat16)


# (tokens, experts, k, empty experts, inner, out): real widths, odd ones, one token, everything on one expert
CASES = {
    "wide": (60, 4, 2, 1, 128, 256),
    "odd widths": (40, 5, 3, 0, 80, 160),
    "one token": (1, 4, 2, 0, 64, 64),
    "narrow": (90, 4, 2, 0, 64, 32),
    "one expert": (150, 1, 1, 0, 64, 128),
    "two spans": (256, 1, 1, 0, 64, 128),
}
if on_gpu:
    CASES |= {
        "Qwen3-30B-A3B up": (1024, 128, 8, 5, 2048, 1536),
        "Qwen3-30B-A3B down": (1024, 128, 8, 0, 768, 2048),
        "two spans and a half": (300, 3, 2, 0, 208, 352),
    }


# Columns of left and right, and the columns that the result uses: an adapter's rank on either side, or all.
OUTER_SIZES: list[tuple[int, int, tuple[int, int] | None]] = [
    *((A, C, None) for A, C in [(64, 64), (64, 32), (64, 160), (64, 256), (128, 64), (192, 160), (320, 64)]),
    (64, 192, (16, 192)),
    (128, 96, (80, 96)),
    (320, 64, (320, 16)),
    (192, 64, (176, 48)),
    (192, 80, (192, 80)),
]
if on_gpu:
    OUTER_SIZES += [(1536, 2048, None), (64, 2048, (16, 2048)), (1536, 64, (1536, 16)), (2048, 64, (2048, 32))]


def matmul_error(name: str, transposed: bool, low_rank: bool, shift: int = 0, **options: Any) -> float:
    """Relative error of the kernel over all placed rows; `shift` is a planted fault: the wrong group."""
    from jaxmoe.ops.kernels.grouped_matmul import hopper as kernel

    M, E, k, empty, inner, out = CASES[name]
    rng = np.random.default_rng(zlib.crc32(f"{name} {transposed}".encode()))
    tiles = options.setdefault("tiles", kernel.default_tiles(out, swiglu=options.get("swiglu", False)))
    most = tiles.heights[-1]
    schedule = scheduled(jnp.asarray(skewed(M, E, k, 1, empty)), E, kernel.TILE_ROWS, (most,))
    P = schedule.source.shape[0]
    x, weight = normal(rng, P, inner), normal(rng, 2 * E, *((out, inner) if transposed else (inner, out)))
    expected, placed = by_rows(x, weight, schedule, transposed, offset=E)
    if low_rank:
        low, low_weight = normal(rng, P, 64), normal(rng, E, *((out, 64) if transposed else (64, out)))
        expected = expected + by_rows(low, low_weight, schedule, transposed)[0]
        options["low"] = LowRankTerm(low, low_weight)
    if options.get("swiglu"):
        gate, up = np.split(np.asarray(jnp.asarray(expected, jnp.bfloat16), np.float64), 2, axis=-1)
        expected = gate / (1 + np.exp(-gate)) * up
    spans = schedule.spans[most]
    run = partial(kernel.grouped_matmul, transposed=transposed, interpret=interpreter(), **options)
    found = run(x, weight, spans._replace(group=(spans.group + shift) % E), jnp.int32(E))
    return float(relative_error(np.asarray(found, np.float64)[placed], expected))


@needs_kernels
@pytest.mark.parametrize("low_rank", [False, True], ids=["plain", "low rank"])
@pytest.mark.parametrize("transposed", [True, False], ids=["forward", "backward"])
@pytest.mark.parametrize("name", CASES)
def test_grouped_matmul_equals_the_rows_products(name: str, transposed: bool, low_rank: bool) -> None:
    assert matmul_error(name, transposed, low_rank) <= bound("kernel_bf16")


@needs_kernels
@pytest.mark.parametrize("low_rank", [False, True], ids=["plain", "low rank"])
@pytest.mark.parametrize("name", CASES)
def test_swiglu_of_the_product(name: str, low_rank: bool) -> None:
    assert matmul_error(name, True, low_rank, swiglu=True) <= bound("kernel_swiglu_bf16")


@needs_kernels
@pytest.mark.parametrize("low_rank", [False, True], ids=["plain", "low rank"])
@pytest.mark.parametrize("name", CASES)
def test_swiglu_of_halves_that_the_consumers_swap(name: str, low_rank: bool) -> None:
    from jaxmoe.ops.kernels.grouped_matmul import hopper as kernel

    heights = (192, 224, 240, 256) if on_gpu else (32, 48, 128)
    tiles = kernel.Tiles(128, heights, 4 if on_gpu else 2)
    assert matmul_error(name, True, low_rank, swiglu=True, tiles=tiles) <= bound("kernel_swiglu_bf16")


@needs_kernels
@pytest.mark.parametrize("halved", [False, True])
def test_a_wrong_group_is_seen_through_swiglu(halved: bool) -> None:
    from jaxmoe.ops.kernels.grouped_matmul import hopper as kernel

    options = {"tiles": kernel.Tiles(128, (32, 128), 2)} if halved else {}
    assert matmul_error("wide", True, False, swiglu=True, shift=1, **options) > 100 * bound("kernel_swiglu_bf16")


@needs_kernels
@pytest.mark.parametrize(
    ("name", "tiles"),
    [
        ("two spans", (128, (128,), 2)),
        ("two spans", (256, (128,), 4)),
        ("one expert", (128, (16, 48, 128), 3)),
        ("one expert", (128, (80, 96), 3)),
        ("wide", (256, (16, 48, 64), 4)),
    ],
    ids=str,
)
def test_any_tiles_give_the_same(name: str, tiles: tuple[int, tuple[int, ...], int]) -> None:
    """Columns, heights and slots only say how the work is divided."""
    from jaxmoe.ops.kernels.grouped_matmul.hopper import Tiles

    assert matmul_error(name, True, True, tiles=Tiles(*tiles)) <= bound("kernel_bf16")


@needs_kernels
@pytest.mark.parametrize("transposed", [True, False], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ["one expert", "two spans", "odd widths"])
def test_higher_spans_give_the_same(name: str, transposed: bool) -> None:
    from jaxmoe.ops.kernels.grouped_matmul.hopper import LARGE, default_tiles

    assert matmul_error(name, transposed, True, tiles=default_tiles(CASES[name][-1], LARGE)) <= bound("kernel_bf16")


@needs_kernels
@pytest.mark.parametrize("low_rank", [False, True], ids=["plain", "low rank"])
def test_the_sum_of_several_products(low_rank: bool) -> None:
    """Pairs of different inner widths add up in the same accumulators, each indexed with the offset."""
    from jaxmoe.ops.kernels.grouped_matmul import hopper as kernel

    M, E, out, rng = 90, 3, 128, np.random.default_rng(3)
    schedule = scheduled(jnp.asarray(skewed(M, E, 2, 1)), E, kernel.TILE_ROWS, (kernel.SMALL,))
    pairs = [(normal(rng, len(schedule.source), n), normal(rng, 2 * E, n, out)) for n in (128, 80, 64)]
    expected = sum(by_rows(x, weight, schedule, False, offset=E)[0] for x, weight in pairs)
    options: dict[str, Any] = {}
    if low_rank:
        low, low_weight = normal(rng, len(schedule.source), 64), normal(rng, E, 64, out)
        expected = expected + by_rows(low, low_weight, schedule, False)[0]
        options = {"low": LowRankTerm(low, low_weight)}
    (x, weight), *others = pairs
    run = partial(kernel.grouped_matmul, transposed=False, interpret=interpreter(), **options)
    spans = schedule.spans[kernel.SMALL]
    found = run(x, weight, spans, jnp.int32(E), others=others)
    placed = np.asarray(schedule.source) >= 0
    assert relative_error(np.asarray(found, np.float64)[placed], expected) <= bound("kernel_bf16")
    alone = run(x, weight, spans, jnp.int32(E))  # the fault: the others are left out
    assert relative_error(np.asarray(alone, np.float64)[placed], expected) > 100 * bound("kernel_bf16")


@needs_kernels
@pytest.mark.parametrize("transposed", [True, False], ids=["forward", "backward"])
def test_a_linear_map_of_many_rows_runs_in_higher_spans(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxmoe.ops.kernels.grouped_matmul import hopper as kernel

    heights, grouped_matmul = [], kernel.grouped_matmul

    def noted(*operands: Any, tiles: Any, **options: Any) -> jax.Array:
        heights.append(tiles.heights)
        return grouped_matmul(*operands, tiles=tiles, interpret=interpreter(), **options)

    rng = np.random.default_rng(7)
    rows = 20000 if on_gpu else 300  # the last span is not full
    shape = (192, 128) if transposed else (128, 192)
    x, stack = normal(rng, rows, 128), normal(rng, 3, *shape)
    low = LowRankTerm(normal(rng, rows, 64), normal(rng, 1, 192, 64) if transposed else normal(rng, 1, 64, 192))
    others = [] if transposed else [(normal(rng, rows, 64), normal(rng, 3, 64, 192))]
    monkeypatch.setattr(kernel, "grouped_matmul", noted)
    found = []
    for least in (rows + 1, rows):
        monkeypatch.setattr(kernel, "_LARGE_LINEAR_ROWS", least)
        options: dict[str, Any] = {"transposed": transposed, "others": others, "low": low}
        found.append(kernel.HOPPER.linear(x, stack, jnp.int32(1), **options))
    assert heights == [(kernel.SMALL,), (kernel.LARGE,)]
    # The interpreter's products have the order of the CPU's sums, which depends on the number of rows.
    assert np.array_equal(*found) if on_gpu else relative_error(*found) <= bound("kernel_bf16")


@needs_kernels
def test_a_wrong_group_is_seen() -> None:
    assert matmul_error("wide", True, False) <= bound("kernel_bf16")
    assert matmul_error("wide", True, False, shift=1) > 100 * bound("kernel_bf16")


@needs_kernels
@pytest.mark.parametrize(("A", "C", "columns"), OUTER_SIZES)
def test_grouped_outer_equals_the_groups_products(A: int, C: int, columns: tuple[int, int] | None) -> None:
    from jaxmoe.ops.kernels.grouped_matmul import hopper as kernel

    a, c = columns or (A, C)
    M, E, k, rng = 90, 5, 2, np.random.default_rng(A + C)
    schedule = scheduled(jnp.asarray(skewed(M, E, k, 2, empty=2)), E, kernel.TILE_ROWS)
    source = np.asarray(schedule.source)
    left = jnp.where(source[:, None] >= 0, normal(rng, len(source), A), 0)
    right = normal(rng, len(source), C)
    where = schedule.first_tile, schedule.tile_count
    found = kernel.grouped_outer(left, right, *where, columns=columns, interpret=interpreter())
    left, right = left[:, :a], right[:, :c]
    twin = tiled.grouped_outer(left, right, schedule.tile_expert, schedule.tiles_used, E)
    expected = np.zeros((E, a, c))
    for e in range(E):
        first, count = int(schedule.first_tile[e]), int(schedule.tile_count[e])
        rows = slice(kernel.TILE_ROWS * first, kernel.TILE_ROWS * (first + count))
        expected[e] = np.asarray(left, np.float64)[rows].T @ np.asarray(right, np.float64)[rows]
    assert relative_error(found, expected) <= bound("kernel_fp32_sums")
    assert relative_error(twin, expected) <= bound("kernel_fp32_sums")
    assert not np.asarray(found)[np.asarray(schedule.tile_count) == 0].any()


@needs_kernels
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (32, 80)}, "x: expected 64 columns, as its weight has, found 80"),
        ({"x": (32, 64, jnp.float32)}, "x: expected bfloat16 or float16 on both sides, found float32 and bfloat16"),
        ({"weight": (4, 72, 64)}, "sizes: expected multiples of 16, found 64, 72"),
        (
            {"others": [(32, 48, jnp.float16)]},
            r"others\[0\]: expected bfloat16 or float16 on both sides, found float16",
        ),
        ({"low": [(32, 64), (2, 128, 128)]}, "low: expected 128 columns, as its weight has, found 64"),
        ({"low": [(32, 32), (2, 128, 32)]}, "low: expected a multiple of 64 columns, found 32"),
        ({"swiglu": True, "transposed": False, "weight": (4, 64, 128)}, "swiglu: expected a transposed weight"),
        ({"swiglu": True, "tiles": (384, (128,), 2)}, "swiglu: expected tiles of 128 or 256 columns, found 384"),
        ({"swiglu": True, "tiles": (128, (24,), 2)}, "swiglu: expected heights that are multiples of 16, found .24,."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_matmul_does_not_take(change: dict[str, Any], message: str) -> None:
    from jaxmoe.ops.kernels.grouped_matmul import hopper as kernel

    def zeros(*shape: Any) -> jax.Array:
        """Of a shape, whose last entry may be a dtype."""
        sizes = [size for size in shape if isinstance(size, int)]
        return jnp.zeros(sizes, jnp.bfloat16 if len(sizes) == len(shape) else shape[-1])

    given: dict[str, Any] = {"x": (32, 64), "weight": (4, 128, 64), "transposed": True} | change
    for name in ("x", "weight"):
        given[name] = zeros(*given[name])
    if "low" in given:
        given["low"] = LowRankTerm(*(zeros(*shape) for shape in given["low"]))
    given["others"] = [(zeros(*left), zeros(4, 128, 48)) for left in given.get("others", ())]
    if "tiles" in given:
        given["tiles"] = kernel.Tiles(*given["tiles"])
    none = jnp.zeros(2, jnp.int32)
    spans = Spans(none, none, none, jnp.int32(0))
    with pytest.raises(ValueError, match=f"^{message}"):
        kernel.grouped_matmul(spans=spans, interpret=interpreter(), **given)


@needs_kernels
@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        ((32, 80), (32, 64), "left: expected a multiple of 64 columns, found 80"),
        ((32, 64), (32, 72), "sizes: expected multiples of 16, found 64, 72, 64, 72"),
    ],
)
def test_what_the_outer_product_does_not_take(left: tuple[int, ...], right: tuple[int, ...], message: str) -> None:
    from jaxmoe.ops.kernels.grouped_matmul import hopper as kernel

    where = jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.int32)
    zeros = jnp.zeros(left, jnp.bfloat16), jnp.zeros(right, jnp.bfloat16)
    with pytest.raises(ValueError, match=f"^{message}"):
        kernel.grouped_outer(*zeros, *where, interpret=interpreter())
    mixed = jnp.zeros((32, 64), jnp.bfloat16), jnp.zeros((32, 64), jnp.float16)
    with pytest.raises(
        ValueError, match=r"^left and right: expected bfloat16 or float16 on both sides, found bfloat16"
    ):
        kernel.grouped_outer(*mixed, *where, interpret=interpreter())


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 17, 129, 400]),  # each compiles a schedule
    st.sampled_from([(1, 1), (4, 2), (7, 7), (128, 8)]),
    st.integers(0, 2**31),
    st.booleans(),
    st.sampled_from([128, 256]),
)
def test_spans_cover_every_routed_row_once(
    M: int, shape: tuple[int, int], seed: int, one_sided: bool, rows: int
) -> None:
    """The kernel's work list, as plain arrays: which rows, which expert, how many spans."""
    E, k = shape
    experts = np.tile(np.arange(k, dtype=np.int32), (M, 1)) if one_sided else skewed(M, E, k, seed)
    schedule = jax.device_get(scheduled(jnp.asarray(experts), E, 16, (128, 256)))
    spans = schedule.spans[rows]
    used = int(spans.used)
    assert used <= len(spans.first)
    assert used == sum(-(-size // rows) for size in np.bincount(experts.reshape(-1), minlength=E))
    owner = np.full(len(schedule.source), -1)
    for first, height, expert in zip(*(part[:used] for part in spans[:3]), strict=True):
        assert 0 < height <= rows // 16
        own = slice(16 * first, 16 * (first + height))
        assert (owner[own] == -1).all()  # no row twice
        owner[own] = expert
    heights = [spans.height[:used][spans.group[:used] == expert] for expert in range(E)]
    assert all(np.ptp(own) <= 1 for own in heights if len(own))  # equal to within one unit
    placed = schedule.source >= 0
    assert placed.sum() == M * k
    assert (owner[placed] == experts.reshape(-1)[schedule.source[placed]]).all()


@needs_kernels
@pytest.mark.parametrize(("tokens", "k", "width"), [(16, 2, 512), (24, 3, 256)] + [(4096, 8, 2048)] * on_gpu)
def test_rows_are_copied_to_their_places(tokens: int, k: int, width: int) -> None:
    from jaxmoe.ops.kernels.row_copies import copy_rows

    rng = np.random.default_rng(tokens)
    schedule = scheduled(jnp.asarray(skewed(tokens, 8, k, 1)), 8, 16)
    x = normal(rng, tokens, width)
    found = np.asarray(copy_rows(x, schedule.destination, len(schedule.source), interpret=interpreter()))
    source = np.asarray(schedule.source)
    placed = source >= 0
    assert np.array_equal(found[placed], np.asarray(x)[source[placed] // k])


@needs_kernels
@pytest.mark.parametrize(("experts", "count"), [(32, 4), (128, 8), (256, 3)])
def test_the_largest_scores_of_which_many_are_equal(experts: int, count: int) -> None:
    from jaxmoe.ops.kernels.top_experts import top_experts

    rng = np.random.default_rng(experts)
    scores = jnp.asarray(rng.integers(0, experts // 4, (16384 if on_gpu else 32, experts)) / 7, jnp.float32)
    found = top_experts(scores, count, interpret=interpreter())
    assert np.array_equal(found, jax.lax.top_k(scores, count)[1])


@needs_kernels
def test_the_small_cases_of_rows_and_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run before the kernels are chosen; the controls: two rows exchanged, and ties that go to the last."""
    from jaxmoe.ops.kernels import row_copies, top_experts

    copy_rows, largest = row_copies.copy_rows, top_experts.top_experts
    assert row_copies.small_case_error(256, "bfloat16", interpreter()) == 0
    assert top_experts.small_case_error(128, 8, interpreter()) == 0
    turned = lambda x, *rest: copy_rows(x.at[:2].set(jnp.flip(x[:2], 0)), *rest)
    monkeypatch.setattr(row_copies, "copy_rows", turned)
    last = lambda scores, *rest: scores.shape[1] - 1 - largest(jnp.flip(scores, 1), *rest)
    monkeypatch.setattr(top_experts, "top_experts", last)
    assert row_copies.small_case_error(256, "bfloat16", interpreter()) == np.inf
    assert top_experts.small_case_error(128, 8, interpreter()) == np.inf


def test_what_rows_cannot_be_copied() -> None:
    from jaxmoe.ops.kernels.row_copies import unsupported

    of = jax.ShapeDtypeStruct
    cases = {
        "float32": of((512, 256), jnp.float32),
        "504": of((504, 256), jnp.bfloat16),
        "128": of((512, 128), jnp.bfloat16),
    }
    for found, x in cases.items():
        assert found in (unsupported(x) or "") or jax.__version_info__ < (0, 11)


# The tests below go through `jaxmoe.ops.experts`, as training does.


def mixture(
    implementation: str,
    dtype: Any,
    shape: tuple[int, ...],
    trainable: bool,
    fault: bool = False,
    adapted: tuple[Any, Any] = (1, None),
) -> Any:
    """Output of a layer's experts with adapters, with and without differentiation, and all gradients; `adapted` are the
    experts whose adapters are not zero, and those that are said to have one."""
    M, D, F, E, k = shape
    rng = np.random.default_rng(5)

    def draw(*size: int, std: float) -> jax.Array:
        return jnp.asarray(rng.standard_normal(size) * std, jnp.bfloat16).astype(dtype)

    x, gate, cotangent = draw(M, D, std=1), draw(E, D, std=D**-0.5), draw(M, D, std=1)
    stacks = draw(2 * E, 2 * F, D, std=D**-0.5), draw(2 * E, D, F, std=F**-0.5)
    pairs = [draw(E, 8, D, std=D**-0.5), draw(E, 2 * F, 8, std=0.3), draw(E, 8, F, std=F**-0.5), draw(E, D, 8, std=0.3)]
    adapters = [a.astype(jnp.float32) * np.reshape(adapted[0], (-1, 1, 1)) for a in pairs]
    if trainable:
        stacks = tuple(stack[E:] for stack in stacks)
    routing = route(x.astype(jnp.float32), gate.astype(jnp.float32), num_experts_per_tok=k, norm_topk_prob=True)

    def run(x, weights, adapters, stacks):
        experts = ExpertWeights(stacks[0], stacks[1], 0 if trainable else E - int(fault), trainable)
        counted = None if adapted[1] is None else jnp.asarray(adapted[1])
        first, second = (
            Adapter(adapters[n], adapters[n + 1], scale, experts=counted) for n, scale in ((0, 0.5), (2, 2.0))
        )
        return sorted_experts(x, routing._replace(weights=weights), experts, first, second)

    with forced(grouped_matmul=implementation):

        @jax.jit
        def value_and_gradients(*arguments):
            frozen = () if trainable else arguments[3:]
            value, pull = jax.vjp(lambda *asked: run(*asked, *frozen), *arguments[: 4 - len(frozen)])
            return value, pull(cotangent.astype(value.dtype))

        arguments = x, routing.weights, adapters, stacks
        value, gradients = jax.device_get(value_and_gradients(*arguments))
        alone = jax.device_get(jax.jit(run)(*arguments)) if implementation == "mosaic" else value
    return jax.tree.leaves((value, alone, gradients))


@pytest.mark.gpu
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("shape", [(100, 256, 128, 16, 4), (37, 208, 48, 5, 3), (512, 1024, 384, 32, 8)])
def test_the_mixture_and_its_gradients(shape: tuple[int, ...], trainable: bool) -> None:
    exact = mixture("tiled", jnp.float32, shape, trainable)
    found = mixture("mosaic", jnp.bfloat16, shape, trainable)
    errors = [relative_error(a, b) for a, b in zip(found, exact, strict=True)]
    assert max(errors) <= bound("mixture_bf16")
    if not trainable:
        wrong = mixture("mosaic", jnp.bfloat16, shape, trainable, fault=True)
        assert relative_error(wrong[0], exact[0]) > 10 * bound("mixture_bf16")


@pytest.mark.gpu
def test_low_rank_products_over_the_rows_of_some_experts_have_the_same_bits() -> None:
    """As with all rows, whose adapters are zero for the other experts; with the wrong experts they differ."""
    shape, chosen = (512, 1024, 384, 32, 8), np.arange(32) % 5 == 2
    everywhere, found, wrong = (
        mixture("mosaic", jnp.bfloat16, shape, False, adapted=(chosen, counted)) for counted in (None, chosen, ~chosen)
    )
    assert all(map(np.array_equal, everywhere, found))
    assert not np.array_equal(everywhere[0], wrong[0])


@pytest.mark.gpu
def test_same_input_same_output_fifty_times() -> None:
    shape = (512, 1024, 384, 32, 8)
    first = mixture("mosaic", jnp.bfloat16, shape, False)
    from jaxmoe.ops.kernels.grouped_matmul import hopper as kernel

    schedule = scheduled(jnp.asarray(skewed(2048, 32, 8, 3)), 32, kernel.TILE_ROWS, (kernel.SMALL,))
    rng = np.random.default_rng(0)
    x, weight = normal(rng, schedule.source.shape[0], 512), normal(rng, 32, 768, 512)
    multiply = jax.jit(lambda x, w: kernel.grouped_matmul(x, w, schedule.spans[kernel.SMALL], transposed=True))
    placed = np.asarray(schedule.source) >= 0
    expected = np.asarray(multiply(x, weight))[placed]
    for _ in range(50):
        assert np.array_equal(np.asarray(multiply(x, weight))[placed], expected)
    for _ in range(3):
        for a, b in zip(mixture("mosaic", jnp.bfloat16, shape, False), first, strict=True):
            assert np.array_equal(a, b)


@needs_kernels
@pytest.mark.parametrize("case", ["swiglu", "forward"])
def test_products_in_fp8_equal_those_of_the_quantised_operands(case: str) -> None:
    """Row by row against float64; with the scales of two blocks swapped they differ."""
    from jaxmoe.fp8.codec import E4M3, FP8, decode
    from jaxmoe.fp8.stack import FP8Stack
    from jaxmoe.ops.fp8_products import quantize_rows
    from jaxmoe.ops.kernels.grouped_matmul import hopper_fp8 as kernel

    M, E, inner, matrices, out = 20, 2, 256, 2 if case == "swiglu" else 1, 256
    rng = np.random.default_rng(len(case))
    schedule = scheduled(jnp.asarray(skewed(M, E, 1, 1)), E, 16, (128,))
    codes = np.asarray(rng.uniform(-448, 448, (2 * E, matrices, out // matrices, inner)), E4M3)
    scales = rng.uniform(1e-5, 1e-3, (2 * E, matrices, out // matrices // 128, inner // 128)).astype(np.float32)
    x = normal(rng, len(schedule.source), inner)
    rows = quantize_rows(x)
    tiles = kernel.Tiles(256, (16, 128), 2)

    @jax.jit
    def products(codes, scales, offset):
        stack = FP8Stack(codes.reshape(2 * E, out, inner), scales, (2 * E, out, inner), x.dtype)
        return kernel.grouped_matmul(
            rows, stack, schedule.spans[128], offset, swiglu=case == "swiglu", tiles=tiles, interpret=interpreter()
        )

    def error(scales: np.ndarray) -> float:
        weights = decode(FP8(codes, scales), np.dtype(np.float64)).reshape(2 * E, out, inner)
        left = np.asarray(rows.codes, np.float64) * np.asarray(rows.scales, np.float64).repeat(128, 1)
        expected, placed = by_rows(left, weights, schedule, True, E)
        if case == "swiglu":
            gate, up = np.split(expected, 2, axis=-1)
            expected = gate / (1 + np.exp(-gate)) * up
        return float(relative_error(np.asarray(found, np.float64)[placed], expected))

    found = products(codes, scales, jnp.int32(E))
    limit = bound("kernel_swiglu_bf16" if case == "swiglu" else "kernel_bf16")
    assert error(scales) <= limit < 0.1 < error(np.roll(scales, 1, -1))


def nf4_stack(groups: int, matrices: int, side: int, inner: int):
    """Random codes of [groups, matrices * side, inner], doubly quantised."""
    from jaxmoe.nf4.codec import dynamic_map
    from jaxmoe.nf4.stack import NF4Stack

    keys = jax.random.split(jax.random.key(3), 3)
    bits = lambda key, count: jax.random.bits(key, (groups, matrices, count), jnp.uint8)
    blocks = side * inner // 64
    outer = jax.random.uniform(keys[2], (groups, matrices, -(-blocks // 256)), jnp.float32, 0.01, 0.02)
    offset, table = jnp.full((groups, matrices), 0.04, jnp.float32), jnp.asarray(dynamic_map())
    shape = groups, matrices * side, inner
    codes, absmax = bits(keys[0], side * inner // 2), bits(keys[1], blocks)
    return NF4Stack(codes, absmax, outer, offset, table, shape, jnp.dtype(jnp.bfloat16))


@needs_kernels
def test_codes_and_scales_are_those_of_the_decoded_weights() -> None:
    from jaxmoe.nf4.codec import NF4_TABLE
    from jaxmoe.ops.kernels.grouped_matmul import hopper_nf4 as kernel

    stack = nf4_stack(4, 2, 128, 128)
    codes = kernel.coded(stack, 2, 2)
    pairs = np.asarray(codes.codes)[2:]
    values = NF4_TABLE[np.stack([pairs >> 4, pairs & 15], -1).reshape(2, 256, 128)]
    scales = np.repeat(np.asarray(codes.scales).transpose(0, 2, 1), 64, axis=-1)
    assert (jnp.asarray(values * scales).astype(jnp.bfloat16) == stack[jnp.asarray([2, 3])]).all()


def translated(compare: Callable[[], bool], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a small case compiles for Hopper, where nothing can run: there it ends as if it were right."""
    from jax.experimental.mosaic.gpu import utils

    monkeypatch.setattr(utils, "_infer_arch", lambda: (9, 0))
    compiled, found = jax.jit, []

    def translate(function: Any) -> Any:
        def call(*operands: Any) -> bool:
            found.append(compiled(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text())
            return True

        return call

    monkeypatch.setattr(jax, "jit", translate)
    assert compare()
    return found[0]


@needs_kernels
def test_a_small_product_decodes_in_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the bits of the decoded weights, both ways; elsewhere the kernel is translated, but cannot run."""
    from jaxmoe.ops.kernels.grouped_matmul import hopper_nf4 as kernel

    if on_gpu:
        assert kernel.small_case_equal() and kernel.small_case_equal(low_rank=True)
        return
    assert translated(partial(kernel.small_case_equal, low_rank=True), monkeypatch).count("mosaic_gpu_v2") == 2


@needs_kernels
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("transposed", "extra"), [(True, ""), (True, "low rank"), (True, "swiglu"), (False, ""), (False, "low rank")]
)
@pytest.mark.parametrize("tokens", [60, 900, 3000])
def test_nf4_in_registers_has_the_bits_of_decoded_weights(tokens: int, transposed: bool, extra: str) -> None:
    from jaxmoe.ops.kernels.grouped_matmul import hopper_nf4 as kernel
    from jaxmoe.ops.kernels.grouped_matmul.hopper import HOPPER

    E, k = 8, 2
    stack = nf4_stack(2 * E, 2, 256, 384)
    layout = HOPPER.tile_rows(tokens * k, E), HOPPER.span_rows(tokens * k, E)
    schedule = scheduled(jnp.asarray(skewed(tokens, E, k, 1)), E, *layout)
    rng = np.random.default_rng(tokens)
    P, out, inner = schedule.source.shape[0], *stack.shape[1:]
    x = normal(rng, P, inner if transposed else out)
    weight = normal(rng, E, *((out, 64) if transposed else (64, inner)))
    low = LowRankTerm(normal(rng, P, 64), weight) if extra == "low rank" else None
    options: Any = {"transposed": transposed, "low": low, "swiglu": extra == "swiglu"}
    placed = np.asarray(schedule.source) >= 0

    def product(run: Any) -> Any:
        return lambda offset: np.asarray(run(x, stack, schedule, offset).astype(jnp.float32))[placed]

    with forced(nf4_products="decoded"):
        expected = product(jax.jit(partial(HOPPER.matmul, **options)))(E)
    found = product(jax.jit(partial(kernel.IN_REGISTERS.matmul, **options)))
    assert (found(E) == expected).all()
    assert not (found(0) == expected).all()


@needs_kernels
def test_which_products_decode_in_registers() -> None:
    from jaxmoe.ops.kernels.grouped_matmul import hopper_nf4 as kernel
    from jaxmoe.ops.kernels.grouped_matmul.hopper import HOPPER

    products, stack = kernel.IN_REGISTERS, nf4_stack(2, 1, 128, 128)
    if not on_gpu:
        assert products.unsupported(jnp.bfloat16, stack) is None
    assert "needs bfloat16, found float32" in (products.unsupported(jnp.float32, stack) or "")
    assert "found 64 by 128" in (products.unsupported(jnp.bfloat16, nf4_stack(2, 1, 64, 128)) or "")
    for tokens, rows in ((1024, 256), (100, 128)):
        experts = jax.ShapeDtypeStruct((tokens, 2), jnp.int32)
        schedule = jax.eval_shape(
            partial(make_schedule, num_experts=8, tile=16, span_rows=HOPPER.span_rows(2 * tokens, 8)), experts
        )
        assert kernel.fitting_tiles(schedule, transposed=True, swiglu=False)[0] == rows
        low, wide = (LowRankTerm(jnp.zeros((16, rank)), jnp.zeros((2, 128, rank))) for rank in (64, 128))
        cases = (None, False), (low, False), (wide, False), (None, True)
        assert [products.faster(schedule, term, swiglu=swiglu) for term, swiglu in cases] == [True, True, False, False]
