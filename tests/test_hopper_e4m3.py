"""Experts in FP8 that the Hopper kernel decodes in registers: what each thread reads and makes, and where it is used.

On a GPU the kernel runs and gives the bits of decoded weights; so does the mixture, with rows in FP8, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmoe.fp8.codec import E4M3
from jaxmoe.fp8.stack import FP8Stack
from jaxmoe.ops import implementations
from jaxmoe.ops.experts import ExpertWeights, sorted_experts
from jaxmoe.ops.grouped_matmul import LowRankTerm
from jaxmoe.ops.implementations import forced
from jaxmoe.ops.kernels.grouped_matmul import hopper_e4m3 as kernel
from jaxmoe.ops.kernels.grouped_matmul.hopper import HOPPER
from jaxmoe.ops.kernels.grouped_matmul.hopper_thread import Thread
from jaxmoe.ops.low_rank import Adapter
from jaxmoe.ops.router import route
from jaxmoe.ops.schedule import make_schedule
from tests.parity import relative_error
from tests.test_implementations import HOPPER as HOPPER_CARD
from tests.test_kernels import needs_kernels, normal, on_gpu, scheduled, skewed, translated
from tests.tolerances import bound

WORD = np.uint32


def random_stack(groups: int, matrices: int, side: int, inner: int) -> FP8Stack:
    """Random codes of [groups, matrices * side, inner] and scales."""
    rng, shape = np.random.default_rng(3), (groups, matrices * side, inner)
    codes = np.asarray(rng.uniform(-448, 448, shape), E4M3)
    scales = rng.uniform(1e-5, 1e-3, (groups, matrices, side // 128, inner // 128)).astype(np.float32)
    return FP8Stack(jnp.asarray(codes), jnp.asarray(scales), shape, jnp.dtype(jnp.bfloat16))


class Threads(Thread):
    """All threads of the two warpgroups at once, in NumPy."""

    def __init__(self) -> None:
        self.i32 = "word"
        thread = np.arange(256)
        self.warpgroup, self.warp, self.lane = thread // 128, thread % 128 // 32, thread % 32
        self.row, self.place = self.lane // 4, self.lane % 4

    def plus(self, value: Any, other: Any) -> Any:
        return value + other

    def times(self, value: Any, factor: int) -> Any:
        return value * factor

    def masked(self, value: Any, mask: int) -> Any:
        return value & mask

    def xor(self, value: Any, other: Any) -> Any:
        return value ^ other

    def shifted(self, word: Any, bits: Any) -> Any:
        return word >> bits

    def element(self, vector_of: Any, n: int) -> Any:
        return vector_of[:, n]

    def scaled(self, value: Any, scale: Any) -> Any:
        return value * scale

    def load(self, ref: Any, index: Any, kind: Any, count: int = 1, alignment: int | None = None) -> Any:
        assert kind == self.i32 and not (index % alignment).any()
        return ref[index[:, None] + np.arange(4 * count)].copy().view(WORD)

    def load_transposed(self, ref: Any, byte: Any) -> list[Any]:
        by_warp = ref[byte[:, None] + np.arange(16)].copy().view(np.uint16).reshape(8, 4, 8, 8)
        warp, row, place = self.warp + 4 * self.warpgroup, self.row, self.place
        first, second = (by_warp[warp, :, 2 * place + n, row].astype(WORD) for n in range(2))
        return list((first | second << 16).T)

    def bytes_of(self, first: Any, second: Any, selector: Any) -> Any:
        eight = np.stack([first, second], -1).view(np.uint8)
        chosen = selector[:, None] >> 4 * np.arange(4) & 15
        return np.take_along_axis(eight, chosen, -1).copy().view(WORD)[:, 0]

    def widened(self, codes: Any, half: int) -> tuple[Any, Any]:
        pair = codes[:, None].copy().view(E4M3)[:, 2 * half : 2 * half + 2].astype(np.float32)
        return pair[:, 0], pair[:, 1]

    def rounded(self, first: Any, second: Any) -> Any:
        return np.stack([first, second], -1).astype(ml_dtypes.bfloat16).view(WORD)[:, 0]


def in_shared_memory(codes: np.ndarray, swizzle: int) -> np.ndarray:
    """Codes [rows, swizzle] as TMA writes them: the 16 bytes of a row are exchanged by the row's number."""
    place = np.arange(codes.size)
    memory = np.empty(codes.size, np.uint8)
    memory[place ^ (place >> 7 & swizzle // 16 - 1) << 4] = codes.view(np.uint8).ravel()
    return memory


@pytest.mark.parametrize("across", [False, True], ids=["along", "across"])
def test_the_threads_make_the_operand(across: bool) -> None:
    """Rows m and m + 8 of each warp, two neighbours in every eight of the contracted axis, with the decoded bits."""
    rng, scale, at = np.random.default_rng(0), np.float32(0.0123), Threads()
    codes = rng.uniform(-448, 448, (64, 128 if across else 64)).astype(E4M3)
    make = kernel.words_across if across else kernel.words_along
    words = make(at, in_shared_memory(codes, codes.shape[1]), scale)
    weights = (codes.astype(np.float32) * scale).astype(ml_dtypes.bfloat16)
    for eighth, half in np.ndindex(words.shape):
        contracted = (8 * eighth + 2 * at.place)[:, None] + np.arange(2)
        if across:  # the columns of rows m and m + 8 are neighbours
            column = 64 * at.warpgroup + kernel.E4M3_FORM.pair(at) // 2 + half
            expected = weights[contracted, column[:, None]]
        else:
            expected = weights[(16 * at.warp + at.row + 8 * half)[:, None], contracted]
        assert np.array_equal(words[eighth, half], expected.copy().view(WORD)[:, 0])


def test_scales_are_those_of_the_blocks() -> None:
    stack = random_stack(4, 2, 256, 384)
    (codes, scales), (_, along) = (kernel.coded(stack, 2, 2, transposed=transposed) for transposed in (False, True))
    found, along = np.asarray(scales), np.asarray(along)
    assert codes is stack.codes and found.shape == (2, 4, 3, 32)
    assert (found == np.asarray(stack.scales)[2:].reshape(2, 4, 3, 1)).all() and (along.swapaxes(1, 2) == found).all()


@needs_kernels
def test_a_small_product_decodes_in_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the bits of the decoded weights, both ways; elsewhere the kernel is translated, but cannot run."""
    if on_gpu:
        assert kernel.small_case_equal()
        return
    assert translated(kernel.small_case_equal, monkeypatch).count("mosaic_gpu_v2") == 2


@needs_kernels
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [60, 900, 3000])
@pytest.mark.parametrize("case", ["forward", "backward", "forward, low rank", "backward, low rank", "swiglu"])
def test_products_have_the_bits_of_decoded_weights(tokens: int, case: str) -> None:
    transposed, swiglu = "backward" not in case, case == "swiglu"
    E, k = 8, 2
    stack = random_stack(2 * E, 2, 256, 384)
    layout = HOPPER.tile_rows(tokens * k, E), HOPPER.span_rows(tokens * k, E)
    schedule = scheduled(jnp.asarray(skewed(tokens, E, k, 1)), E, *layout)
    rng = np.random.default_rng(tokens)
    P, out, inner = schedule.source.shape[0], *stack.shape[1:]
    x = normal(rng, P, inner if transposed else out)
    weight = normal(rng, E, *((out, 64) if transposed else (64, inner)))
    low = LowRankTerm(normal(rng, P, 64), weight) if "low rank" in case else None
    options: Any = {"transposed": transposed, "low": low, "swiglu": swiglu}

    def product(offset: int, name: str) -> np.ndarray:
        with forced(fp8_products=name):
            run = jax.jit(partial(HOPPER.matmul, **options))
            return np.asarray(run(x, stack, schedule, offset).astype(jnp.float32))[np.asarray(schedule.source) >= 0]

    expected = product(E, "decoded")
    found = product(E, "registers")
    # With many rows XLA applies SwiGLU, to the same rounded products.
    assert relative_error(found, expected) <= bound("kernel_swiglu_bf16") if swiglu else (found == expected).all()
    assert not (product(0, "registers") == expected).all()


def mixture(tokens: int, adapted: bool) -> tuple[Callable[[Any, Any], tuple[Any, Any]], Any, Any]:
    """(A function of x and of an adapter on `down`, which gives the mixture and both gradients; x; the adapter)."""
    E, k, D, F, rank = 8, 2, 512, 256, 4
    rng = np.random.default_rng(tokens)
    x, d_out, gate = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((tokens, D),) * 2 + ((E, D),))
    lora = [jnp.asarray(rng.standard_normal(shape) * 0.05, jnp.float32) for shape in ((E, rank, F), (E, D, rank))]
    held = random_stack(2 * E, 2, F, D), random_stack(2 * E, 1, D, F)
    held = [dataclasses.replace(stack, scales=stack.scales * 0.01) for stack in held]
    routing = route(x, gate, num_experts_per_tok=k, norm_topk_prob=True)

    def run(x: Any, lora: Any) -> Any:
        weights = ExpertWeights(held[0], held[1], E, trainable=False)
        return sorted_experts(x, routing, weights, None, Adapter(lora[0], lora[1], 0.5) if adapted else None)

    def value_and_gradients(x: Any, lora: Any) -> tuple[Any, Any]:
        value, pull = jax.vjp(run, x, lora)
        d_x, d_lora = pull(d_out)
        return value, (d_x, d_lora if adapted else ())

    return value_and_gradients, x.astype(jnp.bfloat16), lora


@needs_kernels
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [60, 900])
@pytest.mark.parametrize("adapted", [False, True], ids=["frozen", "adapted"])
def test_the_mixture_with_rows_in_fp8(tokens: int, adapted: bool) -> None:
    """Value and gradients are those of the oracle, which are not those of rows in 16 bits."""
    run, *operands = mixture(tokens, adapted)

    def found(name: str) -> list[np.ndarray]:
        with forced(fp8_products=name):
            return [np.asarray(a, np.float32) for a in jax.tree.leaves(jax.jit(run)(*operands))]

    for ours, oracle, unquantised in zip(found("mosaic"), found("xla"), found("registers"), strict=True):
        assert relative_error(ours, oracle) <= bound("mixture_bf16") < relative_error(ours, unquantised)


@needs_kernels
@pytest.mark.parametrize(("adapted", "in_fp8"), [(False, 2), (True, 1)], ids=["frozen", "adapted"])
def test_which_products_have_rows_in_fp8(adapted: bool, in_fp8: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four, those that go forwards without a low-rank term; the others decode in registers."""
    monkeypatch.setattr(implementations, "default_device", lambda: HOPPER_CARD)
    run, *operands = mixture(60, adapted)
    with forced(fp8_products="mosaic", swiglu_gradient="xla"):
        program = str(jax.make_jaxpr(run)(*operands))
    kernels = [program.count(f"name=grouped_matmul_{name}\n") for name in ("fp8", "e4m3")]
    assert kernels == [in_fp8, 4 - in_fp8]


def test_which_products_decode_in_registers() -> None:
    products = kernel.REGISTERS
    found = products.unsupported(jnp.bfloat16, random_stack(2, 1, 128, 128))
    assert found is None or (not on_gpu and "needs grouped matmul by mosaic, found tiled" in found)
    assert "needs bfloat16, found float32" in (products.unsupported(jnp.float32, random_stack(2, 1, 128, 128)) or "")
    odd = FP8Stack(jnp.zeros((2, 64, 128)), jnp.zeros((2, 1, 1, 1)), (2, 64, 128), jnp.dtype(jnp.bfloat16))
    assert "found 64 by 128" in (products.unsupported(jnp.bfloat16, odd) or "")
    for tokens, rows in ((1024, 256), (100, 128)):
        experts = jax.ShapeDtypeStruct((tokens, 2), jnp.int32)
        schedule = jax.eval_shape(
            partial(make_schedule, num_experts=8, tile=16, span_rows=HOPPER.span_rows(2 * tokens, 8)), experts
        )
        assert kernel.fitting_tiles(schedule, transposed=True, swiglu=False)[0] == rows
        low = lambda rank: LowRankTerm(jnp.zeros((16, rank)), jnp.zeros((2, 128, rank)))
        assert products.faster(schedule, low(64), swiglu=False)
        assert not products.faster(schedule, low(128), swiglu=False)
