"""The kernel `swiglu_gradient` against the operations that it replaces, and the model with and without it.

Without a GPU the kernel runs in JAX's interpreter.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.errors import UserError
from jaxmoe.ops.implementations import choose
from jaxmoe.ops.kernels import swiglu_gradient
from jaxmoe.ops.swiglu import swiglu
from tests.parity import relative_error
from tests.row_kernels import CHOSEN, draw, made_up_gpu, step
from tests.test_ampere import path  # noqa: F401 - a fixture
from tests.test_kernels import needs_kernels, on_gpu
from tests.tolerances import bound

# (rows, width of an expert's hidden layer)
SHAPES = [(16, 64), (16, 192), (16, 128), (32, 768)]
REAL = (67584, 768)


def errors(shape: tuple[int, int], dtype: Any, interpret: Any, late: float = 0.0) -> list[float]:
    """Relative errors of SwiGLU recomputed, of the gradient of gate and up, and of the weights' gradient.

    `late` plants the fault of shifted gates.
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
    run = partial(swiglu_gradient.swiglu_gradient, with_hidden=True, interpret=interpret)
    hidden, d_gate_up, d_weight = run(shifted, d_hidden, weight)
    pairs = (hidden, expected), (d_gate_up, expected_d_gate_up), (d_weight[:, None], expected_d_weight)
    return [relative_error(*pair) for pair in pairs]


@needs_kernels
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("shape", [*SHAPES, *([REAL] if on_gpu else [])], ids=str)
def test_all_three_in_one_pass(shape: tuple[int, int], dtype: Any, path: Any) -> None:  # noqa: F811
    allowed = bound("swiglu_gradient_bf16")
    assert max(errors(shape, dtype, path)) <= allowed
    assert min(errors(shape, dtype, path, late=0.1)) > 10 * allowed


@needs_kernels
@pytest.mark.skipif(on_gpu, reason="a GPU runs it in the test above")
def test_real_sizes_can_be_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mosaic refuses layouts that its instructions do not allow."""
    from jax.experimental.mosaic.gpu import utils

    monkeypatch.setattr(utils, "_infer_arch", lambda: (8, 0))
    (P, F), dtype = REAL, jnp.bfloat16
    operands = [jax.ShapeDtypeStruct((P, width), dtype) for width in (2 * F, F)]
    run = jax.jit(partial(swiglu_gradient.swiglu_gradient, with_hidden=True))
    traced = run.trace(*operands, jax.ShapeDtypeStruct((P, 1), jnp.float32))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 1


@needs_kernels
def test_what_is_not_asked_for_is_not_written(path: Any) -> None:  # noqa: F811
    operands = draw(0, 16, 128).astype(jnp.bfloat16), draw(1, 16, 64).astype(jnp.bfloat16), draw(2, 16, 1)
    run = partial(swiglu_gradient.swiglu_gradient, *operands, interpret=path)
    hidden, *gradients = run(with_hidden=False)
    assert hidden is None
    for found, expected in zip(gradients, run(with_hidden=True)[1:], strict=True):
        assert jnp.array_equal(found, expected)


@needs_kernels
def test_rows_that_it_does_not_take() -> None:
    rows = partial(jnp.zeros, dtype=jnp.bfloat16)
    assert swiglu_gradient.unsupported(rows((16, 128))) is None
    assert "found 96" in str(swiglu_gradient.unsupported(rows((16, 192))))
    assert "found 6" in str(swiglu_gradient.unsupported(rows((6, 128))))
    assert "found float32" in str(swiglu_gradient.unsupported(jnp.zeros((16, 128))))


@pytest.mark.parametrize(("version", "dtype", "name"), CHOSEN)
def test_where_it_cannot_run_xla_does(version: Any, dtype: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up_gpu(monkeypatch)
    monkeypatch.setattr(jax, "__version_info__", version)
    rows = jnp.zeros((16, 128), dtype)
    assert choose("swiglu_gradient", rows, False).name == name
    assert choose("swiglu_gradient", rows, True).name == "xla"  # part of a stack that a scan saves


@needs_kernels
def test_the_model_with_the_kernel(monkeypatch: pytest.MonkeyPatch, path: Any) -> None:  # noqa: F811
    """Loss and gradients of adapters; every token goes to every expert, so rounding moves none. The control: shifted
    gates.

    In a scan the saved results would have to be copied for the kernel, so it is not used there.
    """
    kernel, late = swiglu_gradient.swiglu_gradient, 0.0

    def run(gate_up: Any, *operands: Any, **options: Any) -> Any:
        return kernel(gate_up + jnp.asarray(late, gate_up.dtype), *operands, **options, interpret=path)

    if not on_gpu:
        made_up_gpu(monkeypatch)
    monkeypatch.setattr(swiglu_gradient, "swiglu_gradient", run)
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 4}
    of = partial(step, sizes, kernel="name=swiglu_gradient", dtype=jnp.bfloat16)
    scanned, _ = of({"norm_rotary": "xla"})
    without, expected = of({"norm_rotary": "xla", "swiglu_gradient": "xla"}, unroll=True)

    def with_kernel() -> tuple[int, list[float]]:
        calls, found = of({"norm_rotary": "xla"}, unroll=True)
        return calls, [relative_error(a, b) for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True)]

    calls, apart = with_kernel()
    assert (scanned, without) == (0, 0) and calls > 0
    assert max(apart) <= bound("swiglu_gradient_model_bf16"), apart
    late = 0.5
    loss, *gradients = with_kernel()[1]
    assert loss == 0 and min(gradients) > 10 * bound("swiglu_gradient_model_bf16")
    with pytest.raises(UserError, match="mosaic cannot run here: needs unrolled layers, found a scan over them"):
        of({"norm_rotary": "xla", "swiglu_gradient": "mosaic"})
