"""The kernel `swiglu_gradient` against the operations that it replaces, and the model with and without it.

Without a GPU the kernel runs in Pallas' interpreter.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.errors import UserError
from jaxmoe.ops.kernels import swiglu_gradient, swiglu_gradient_mosaic
from jaxmoe.ops.swiglu import swiglu
from tests.parity import relative_error
from tests.row_kernels import INTERPRETED, draw, made_up_gpu, step
from tests.test_ampere import path  # noqa: F401 - a fixture
from tests.test_kernels import needs_kernels, on_gpu
from tests.tolerances import bound

# (rows, width of an expert's hidden layer)
SHAPES = [(8, 64), (12, 192), (4, 128), (32, 768)]


def errors(
    shape: tuple[int, int], dtype: Any, late: float = 0.0, run: Any = swiglu_gradient, interpret: Any = INTERPRETED
) -> list[float]:
    """Relative errors of SwiGLU recomputed, of the gradient of gate and up, and of the weights' gradient.

    `late` plants the fault of shifted gates; `run` is the module of the kernel.
    """
    P, F = shape
    gate_up, d_hidden = (draw(key, P, width).astype(dtype) for key, width in ((0, 2 * F), (1, F)))
    weight = jax.random.uniform(jax.random.key(2), (P, 1))

    def weighed(gate_up: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = swiglu(*jnp.split(gate_up, 2, axis=-1))
        return weight * hidden, hidden

    _, pull, expected = jax.vjp(weighed, gate_up.astype(jnp.float32), weight, has_aux=True)
    expected_d_gate_up, expected_d_weight = pull(d_hidden.astype(jnp.float32))
    shifted = gate_up.at[:, :F].add(jnp.asarray(late, dtype))
    hidden, d_gate_up, d_weight = run.swiglu_gradient(shifted, d_hidden, weight, with_hidden=True, interpret=interpret)
    pairs = (hidden, expected), (d_gate_up, expected_d_gate_up), (d_weight[:, None], expected_d_weight)
    return [relative_error(*pair) for pair in pairs]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_three_in_one_pass(shape: tuple[int, int], dtype: Any) -> None:
    allowed = bound("swiglu_gradient_fp32" if dtype == jnp.float32 else "swiglu_gradient_bf16")
    assert max(errors(shape, dtype)) <= allowed
    assert min(errors(shape, dtype, late=0.1)) > 10 * allowed


@needs_kernels
@pytest.mark.parametrize("shape", [(16, 128), *([(67584, 768)] if on_gpu else [])], ids=str)
def test_the_kernel_in_mosaic(shape: tuple[int, int], path: Any) -> None:  # noqa: F811
    assert max(errors(shape, jnp.bfloat16, run=swiglu_gradient_mosaic, interpret=path)) <= bound("swiglu_gradient_bf16")


def test_what_is_not_asked_for_is_not_written() -> None:
    operands = draw(0, 8, 128), draw(1, 8, 64), draw(2, 8, 1)
    run = partial(swiglu_gradient.swiglu_gradient, *operands, interpret=INTERPRETED)
    hidden, *gradients = run(with_hidden=False)
    assert hidden is None
    for found, expected in zip(gradients, run(with_hidden=True)[1:], strict=True):
        assert jnp.array_equal(found, expected)


def test_rows_that_it_does_not_take() -> None:
    assert swiglu_gradient.unsupported(jnp.zeros((8, 128))) is None
    assert "found 96" in str(swiglu_gradient.unsupported(jnp.zeros((8, 192))))
    assert "found 6" in str(swiglu_gradient.unsupported(jnp.zeros((6, 128))))


def test_the_model_with_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of adapters, in float32, where rounding moves no token to other experts.

    In a scan the saved results would have to be copied for the kernel, so it is not used there.
    """
    if INTERPRETED:
        made_up_gpu(monkeypatch)
        interpreted = partial(swiglu_gradient.swiglu_gradient, interpret=True)
        monkeypatch.setattr(swiglu_gradient, "swiglu_gradient", interpreted)
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64}
    choices = {"norm_rotary": "xla"}
    scanned, expected = step(sizes, choices)
    without, _ = step(sizes, choices | {"swiglu_gradient": "xla"}, unroll=True)
    with_kernel, found = step(sizes, choices, unroll=True)
    assert (scanned, without) == (0, 0) and with_kernel > 0
    apart = [relative_error(a, b) for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True)]
    assert max(apart) <= bound("swiglu_gradient_model_fp32")
    with pytest.raises(UserError, match="triton cannot run here: needs unrolled layers, found a scan over them"):
        step(sizes, choices | {"swiglu_gradient": "triton"})
