"""Adapters in 16-bit models: A and B count in full, on every path that multiplies them, forwards and backwards.

Rounding the low-rank rows adds noise that differs from token to token; rounding A or B would change the adapter. So the
tests compare the matrix that a path applies. Least squares over many rows find it and average the noise away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops import experts, implementations, low_rank, projections
from jaxmoe.ops.implementations import Device
from jaxmoe.ops.kept import PROJECTED
from jaxmoe.ops.kernels.grouped_matmul import ampere, hopper, xla
from jaxmoe.ops.low_rank import Adapter, Factors
from jaxmoe.ops.schedule import Spans, make_schedule, permute
from tests.parity import relative_error
from tests.test_few_rows import in_nf4
from tests.tolerances import bound

ROWS, INNER, OUT = 4096, 64, 128
RANKS = (4, 32, 40)  # of the kernel's 64 columns, two terms of 40 need 128


class Tiles(NamedTuple):
    heights: tuple[int, ...]


def by_spans(
    x: Any,
    weight: Any,
    spans: Spans,
    offset: Any = 0,
    *,
    transposed: bool,
    swiglu: bool = False,
    others: Any = (),
    low: Any = None,
    tiles: Any = None,
) -> Any:
    """What the kernel computes, from its own list of work: tiles of rows, in float32, rounded once."""
    assert not swiglu
    out = np.zeros((x.shape[0], weight.shape[1 if transposed else 2]), np.float32)
    product = "mi,oi->mo" if transposed else "mi,io->mo"
    for first, height, group in zip(*(np.asarray(part)[: int(spans.used)] for part in spans[:3]), strict=True):
        assert 0 < 16 * height <= tiles.heights[-1]
        own = slice(16 * first, 16 * (first + height))
        layer = int(offset) + group
        for factor, stack in ((x, weight), *others):
            out[own] += jnp.einsum(product, factor[own].astype(jnp.float32), stack[layer].astype(jnp.float32))
        if low is not None:
            rows, matrices = low
            assert rows.shape[1] % 64 == 0  # what the kernel supports
            out[own] += jnp.einsum(product, rows[own].astype(jnp.float32), matrices[group].astype(jnp.float32))
    return jnp.asarray(out).astype(x.dtype)


def outer_by_groups(left: Any, right: Any, first: Any, count: Any, *, columns: tuple[int, int]) -> Any:
    """What the kernel of the gradients computes, and the sizes that it supports."""
    assert left.shape[1] % 64 == 0 and right.shape[1] % 16 == 0 and right.shape[1] >= 64
    assert all(size % 16 == 0 for size in columns)
    groups = [slice(16 * int(f), 16 * int(f + n)) for f, n in zip(first, count, strict=True)]
    left, right = (side[:, :size].astype(jnp.float32) for side, size in zip((left, right), columns, strict=True))
    return jnp.stack([left[own].T @ right[own] for own in groups])


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels replaced by plain products: the tests check their inputs and what is made of their results."""
    monkeypatch.setattr(hopper, "default_tiles", lambda columns, rows=128, swiglu=False: Tiles((rows // 2, rows)))
    monkeypatch.setattr(hopper, "grouped_matmul", by_spans)
    monkeypatch.setattr(hopper, "grouped_outer", outer_by_groups)
    monkeypatch.setattr(implementations, "default_device", lambda: Device("gpu", "made up", (9, 0)))
    monkeypatch.setattr(hopper.Hopper, "unsupported", lambda self, dtype, *widths: None)


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), jnp.float32)


def by_low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return low_rank.low_rank(x, a, b).astype(x.dtype)


def by_projection(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return projections.frozen_linears(x, [jnp.zeros((2, OUT, INNER), x.dtype)], 1, [None], [Adapter(a, b, 1.0)])[0]


def by_experts(products: Any) -> Callable[..., jax.Array]:
    def run(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """One of two experts has all rows, in its own order."""
        schedule = make_schedule(jnp.ones((ROWS, 1), jnp.int32), 2, 16, products.span_rows(ROWS, 2))
        adapter = Factors(jnp.stack([b[: a.shape[0], :1] @ a[:1], a]), jnp.stack([b + 1, b]))
        stack = jnp.zeros((2, OUT, INNER), x.dtype)
        everywhere = experts._Adapted(schedule, None)
        rows, _ = experts._project(permute(x, schedule), stack, 0, adapter, schedule, everywhere, products)
        return rows[schedule.destination[:, 0]]

    return run


PATHS: dict[str, Callable[..., jax.Array]] = {
    "linear map": by_low_rank,
    "frozen projection": by_projection,
    "experts in pure JAX": by_experts(xla.XLA),
    "experts by the kernel": by_experts(hopper.HOPPER),
}


def matrix_error(run: Callable[..., jax.Array], rank: int) -> float:
    x, a, b = draw(ROWS, INNER).astype(jnp.bfloat16), draw(rank, INNER), draw(OUT, rank)
    exact = np.asarray(b, np.float64) @ np.asarray(a, np.float64)
    found = np.asarray(run(x, a, b), np.float64)
    applied = np.linalg.lstsq(np.asarray(x, np.float64), found, rcond=None)[0].T
    return relative_error(applied, exact)


def rounded(weight: jax.Array, dtype: Any, axis: int) -> jax.Array:
    """The fault: the second term is lost."""
    return jnp.concatenate([weight.astype(dtype), jnp.zeros_like(weight, dtype)], axis)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("path", PATHS)
def test_adapters_are_not_rounded(path: str, rank: int, kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert matrix_error(PATHS[path], rank) <= bound("applied_adapter")
    for module in (low_rank, projections):
        monkeypatch.setattr(module, "split_high_low", rounded)
    assert matrix_error(PATHS[path], rank) > 3 * bound("applied_adapter")


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(
    ("path", "dtype"), [("linear map", "float32"), ("linear map", "bfloat16"), ("frozen projection", "bfloat16")]
)
def test_gradients(path: str, dtype: str, rank: int, kernel: None) -> None:
    """Against those of plain products in float32."""
    x, a, b = draw(512, INNER).astype(dtype), draw(rank, INNER), draw(OUT, rank)
    cotangent = draw(512, OUT).astype(dtype)

    def plain(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return (x.astype(jnp.float32) @ a.T) @ b.T

    _, pull = jax.vjp(plain, x, a, b)
    _, pull_found = jax.vjp(PATHS[path], x, a, b)
    for found, expected in zip(pull_found(cotangent), pull(cotangent.astype(jnp.float32)), strict=True):
        assert found.dtype == expected.dtype
        assert relative_error(found, expected) <= bound(f"low_rank_gradients_{dtype}")


SEVERAL = ((128, 4), (64, None), (192, 32), (64, 40))  # outputs and rank (None: no adapter) of maps of one x


def several_errors(forget: bool = False) -> list[float]:
    """Outputs and gradients of `frozen_linears` against plain products in float32; `forget` one map's cotangent."""
    x = draw(512, INNER).astype("bfloat16")
    stacks = [draw(2, out, INNER).astype("bfloat16") for out, _ in SEVERAL]
    pairs = [None if r is None else (draw(r, INNER), draw(out, r)) for out, r in SEVERAL]
    biases = [draw(out).astype("bfloat16") if out == 192 else None for out, _ in SEVERAL]
    cotangents = [draw(512, out).astype("bfloat16") for out, _ in SEVERAL]

    def plain(x: Any, pairs: Any) -> list[jax.Array]:
        ys = []
        for stack, pair, bias in zip(stacks, pairs, biases, strict=True):
            y = x.astype(jnp.float32) @ stack[1].astype(jnp.float32).T
            if pair is not None:
                y += 0.5 * (x.astype(jnp.float32) @ pair[0].T) @ pair[1].T
            ys.append(y if bias is None else y + bias)
        return ys

    def found(x: Any, pairs: Any) -> list[jax.Array]:
        adapters = [None if pair is None else Adapter(pair[0], pair[1], 0.5) for pair in pairs]
        return projections.frozen_linears(x, stacks, 1, biases, adapters)

    ys, pull = jax.vjp(plain, x, pairs)
    found_ys, found_pull = jax.vjp(found, x, pairs)
    expected = ys, pull([c.astype(jnp.float32) for c in cotangents])
    if forget:
        cotangents[1] = 0 * cotangents[1]
    leaves = map(jax.tree.leaves, ((found_ys, found_pull(cotangents)), expected))
    return [relative_error(a, b) for a, b in zip(*leaves, strict=True)]


@pytest.mark.parametrize("capability", [(9, 0), (8, 0)])
def test_several_maps_of_one_input(capability: tuple[int, int], kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Hopper's kernel, and below it by one product of XLA's."""
    monkeypatch.setattr(implementations, "default_device", lambda: Device("gpu", "made up", capability))
    monkeypatch.setattr(ampere.Ampere, "unsupported", lambda self, dtype, *widths: None)
    assert max(several_errors()) <= bound("low_rank_gradients_bfloat16")
    assert max(several_errors(forget=True)) > 10 * bound("low_rank_gradients_bfloat16")


@pytest.mark.parametrize(("capability", "reason"), [((9, 0), None), ((8, 0), "found quantised ones")])
def test_quantised_projections(
    capability: tuple[int, int], reason: str | None, kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(implementations, "default_device", lambda: Device("gpu", "made up", capability))
    monkeypatch.setattr(ampere.Ampere, "unsupported", lambda self, dtype, *widths: None)
    found = projections.unsupported(jnp.zeros((512, 128), jnp.bfloat16), [in_nf4(1, nested=False)])
    assert found is None if reason is None else reason in str(found)


def test_nothing_is_split_in_float32() -> None:
    a = draw(4, INNER)
    assert low_rank.split_high_low(a, jnp.float32, 0) is a


def test_the_terms_survive_compilation() -> None:
    """XLA may remove a conversion to 16 bits and back; then the second term would be zero."""
    a = draw(4, INNER)
    high, low = jnp.split(jax.jit(lambda a: low_rank.split_high_low(a, jnp.bfloat16, 0))(a).astype(jnp.float32), 2)
    assert relative_error(high, a) > 1e-4
    assert relative_error(high + low, a) <= bound("split_high_low")


@pytest.mark.parametrize("rank", [*RANKS, 64, 72])
@pytest.mark.parametrize("adapter_first", [True, False], ids=["A", "B"])
def test_gradients_of_experts_adapters_fit_the_kernel(adapter_first: bool, rank: int, kernel: None) -> None:
    """Any rank, on either side: the kernel's sizes and the loop give the same."""
    schedule = make_schedule(jnp.arange(60, dtype=jnp.int32).reshape(-1, 1) % 3, 4, 16)
    rows = jnp.arange(len(schedule.source))[:, None]
    placed = jnp.where(schedule.source[:, None] >= 0, 1, 0)
    low, wide = (placed * jnp.sin(rows * (1 + jnp.arange(width))) for width in (rank, 96))
    left, right = (low, wide) if adapter_first else (wide, low)
    found, expected = (each.outer(left, right, schedule) for each in (hopper.HOPPER, xla.XLA))
    assert found.shape == (4, left.shape[1], right.shape[1])
    assert relative_error(found, expected) <= bound("kernel_fp32_sums")
    assert not np.asarray(expected[3]).any()  # rows of no expert


def test_low_rank_rows_are_kept_with_the_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that saves queries, keys and values also saves x A^T: one product less in the backward pass."""

    def linear(self: Any, x: jax.Array, stack: jax.Array, layer: Any, *, transposed: bool, **_: Any) -> jax.Array:
        return x @ (stack[0].T if transposed else stack[0])

    monkeypatch.setattr(hopper.Hopper, "linear", linear)
    monkeypatch.setattr(hopper.Hopper, "unsupported", lambda self, dtype, *widths: None)
    monkeypatch.setattr(implementations, "default_device", lambda: Device("gpu", "made up", (9, 0)))
    x, a, b = draw(512, INNER).astype(jnp.bfloat16), draw(8, INNER), draw(OUT, 8)

    def products(*kept: str) -> int:
        run = jax.checkpoint(by_projection, policy=jax.checkpoint_policies.save_only_these_names(*kept))
        traced = jax.make_jaxpr(jax.grad(lambda a: jnp.sum(run(x, a, b))))(a)
        (backward,) = (e.params["jaxpr"] for e in traced.jaxpr.eqns if "policy" in e.params)
        return str(backward).count("dot_general")

    assert products(PROJECTED) == products() - 1
