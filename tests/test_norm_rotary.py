"""The kernel `norm_rotary` against the operations that it replaces, and the model with and without it.

Without a GPU the kernel runs in JAX's interpreter.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.model.init import init_parameters
from jaxmoe.ops.implementations import choose, forced
from jaxmoe.ops.kernels import norm_rotary
from jaxmoe.ops.norm import rms_norm
from jaxmoe.ops.rotary import apply_rotary
from peers.configs import config_of
from tests.parity import relative_error
from tests.parity.batches import Batch
from tests.parity.faults import FAULTS
from tests.parity.trace import jax_trace
from tests.row_kernels import CHOSEN, draw, made_up_gpu, step
from tests.test_ampere import path  # noqa: F401 - a fixture
from tests.test_kernels import needs_kernels, on_gpu
from tests.tolerances import bound

EPS = 1e-6
# (batch, tokens, heads, columns of a head)
HEADS = [(2, 16, 4, 128), (1, 32, 6, 64), (2, 32, 1, 32), (1, 8, 3, 256)]
REAL = [(2, 4096, 32, 128), (2, 4096, 4, 128)]


def rotary_errors(shape: tuple[int, ...], dtype: Any, interpret: Any, turn: float = 1.0) -> list[float]:
    """Relative errors of the output and of the gradient; `turn` plants the fault of another angle."""
    x, d_out = (draw(key, *shape).astype(dtype) for key in (0, 1))
    weight = (1 + 0.1 * draw(2, shape[-1])).astype(dtype)
    angles = 3 * draw(3, *shape[:2], shape[-1] // 2)

    def plain(x: jax.Array) -> jax.Array:
        normed = rms_norm(x, weight.astype(jnp.float32), EPS)
        return apply_rotary(normed, jnp.cos(angles), jnp.sin(angles))

    def kernel(x: jax.Array) -> jax.Array:
        return norm_rotary.norm_rotary(x, weight, jnp.cos(turn * angles), jnp.sin(turn * angles), EPS, interpret)

    expected, pull = jax.vjp(plain, x.astype(jnp.float32))
    found, kernel_pull = jax.vjp(kernel, x)
    (d_x,), (expected_d_x,) = kernel_pull(d_out), pull(d_out.astype(jnp.float32))
    return [relative_error(found, expected), relative_error(d_x, expected_d_x)]


@needs_kernels
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("shape", [*HEADS, *(REAL if on_gpu else [])], ids=str)
def test_norm_and_rotation_in_one_pass(shape: tuple[int, ...], dtype: Any, path: Any) -> None:  # noqa: F811
    allowed = bound("norm_rotary_bf16")
    assert max(rotary_errors(shape, dtype, path)) <= allowed
    assert min(rotary_errors(shape, dtype, path, turn=1.1)) > 10 * allowed


@needs_kernels
@pytest.mark.skipif(on_gpu, reason="a GPU runs it in the test above")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_real_sizes_can_be_lowered(shape: tuple[int, ...], dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards and backwards. Mosaic refuses layouts that its instructions do not allow."""
    from jax.experimental.mosaic.gpu import utils

    monkeypatch.setattr(utils, "_infer_arch", lambda: (8, 0))

    def both(x: Any, d_out: Any, *others: Any) -> Any:
        out, pull = jax.vjp(lambda x: norm_rotary.norm_rotary(x, *others, EPS), x)
        return out, pull(d_out)

    x, weight = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[-1:], dtype)
    table = jax.ShapeDtypeStruct((*shape[:2], shape[-1] // 2), jnp.float32)
    lowered = jax.jit(both).trace(x, x, weight, table, table).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu") == 2


@needs_kernels
def test_heads_that_it_does_not_take() -> None:
    heads = partial(jnp.zeros, dtype=jnp.bfloat16)
    assert norm_rotary.unsupported(heads((1, 32, 1, 128))) is None
    assert "found 96" in str(norm_rotary.unsupported(heads((1, 32, 1, 96))))
    assert "found 31" in str(norm_rotary.unsupported(heads((1, 31, 1, 128))))
    assert "found float32" in str(norm_rotary.unsupported(jnp.zeros((1, 32, 1, 128))))


@pytest.mark.parametrize(("version", "dtype", "name"), CHOSEN)
def test_where_it_cannot_run_xla_does(version: Any, dtype: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up_gpu(monkeypatch)
    monkeypatch.setattr(jax, "__version_info__", version)
    heads = jnp.zeros((1, 32, 1, 128), dtype)
    assert choose("norm_rotary", heads, True).name == name
    assert choose("norm_rotary", heads, False).name == "xla"  # a norm that is trained


# Dense: rounding moves no token to other experts.
SIZES = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 128, "mlp_only_layers": (0, 1)}


@pytest.fixture
def kernel_runs(monkeypatch: pytest.MonkeyPatch, path: Any) -> None:  # noqa: F811
    """Without a GPU the device is simulated, and the kernel runs in the interpreter.

    The interpreter calls back to Python, which JAX refuses to recompute; so there nothing is recomputed.
    """
    if not on_gpu:
        made_up_gpu(monkeypatch)
        monkeypatch.setattr(jax, "checkpoint", lambda function, **_: function)
        kernel = norm_rotary.norm_rotary
        monkeypatch.setattr(norm_rotary, "norm_rotary", lambda *operands: kernel(*operands, path))


@needs_kernels
def test_the_model_with_the_kernel(kernel_runs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of adapters. The control: another sine."""
    run = partial(step, SIZES, kernel="name=norm_rotary", dtype=jnp.bfloat16, targets=("q_proj", "k_proj"))
    none, expected = run({"norm_rotary": "xla"})

    def with_kernel() -> tuple[int, list[float]]:
        calls, found = run({"norm_rotary": "mosaic"})
        return calls, [relative_error(a, b) for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True)]

    calls, errors = with_kernel()
    assert none == 0 < calls
    assert max(errors) <= bound("norm_rotary_model_bf16")
    kernel = norm_rotary.norm_rotary
    turned = lambda x, weight, cos, sin, eps: kernel(x, weight, cos, 0.9 * sin, eps)
    monkeypatch.setattr(norm_rotary, "norm_rotary", turned)
    assert min(with_kernel()[1]) > bound("norm_rotary_model_bf16")


@needs_kernels
def test_the_parity_suite_sees_through_the_kernel(kernel_runs: None) -> None:
    """The trace has the kernel's results under the operations' names; a norm that is left out is missing there, too."""
    config = config_of("plain").replace(**SIZES | {"mlp_only_layers": (0,)}, num_hidden_layers=1)
    params = init_parameters(config, jax.random.key(0), jnp.bfloat16)
    one_layer = SimpleNamespace(params=params, adapters={}, config=config, lora_config=None)
    ids, ones = np.arange(64, dtype=np.int32)[None], np.ones((1, 64), np.int32)
    batch = Batch(ids, ids, ones)

    def traced(implementation: str) -> dict[str, np.ndarray]:
        with forced(norm_rotary=implementation, attention="blocks", grouped_matmul="tiled"):
            return jax_trace(one_layer, batch)

    expected, found = traced("xla"), traced("mosaic")
    assert set(expected) - set(found) == {"q_norm", "k_norm"} and not set(found) - set(expected)
    errors = {name: relative_error(found[name], expected[name]) for name in found}
    assert max(errors.values()) <= bound("norm_rotary_model_bf16"), errors
    with FAULTS["q and k norm missing"](), forced(attention="blocks", grouped_matmul="tiled"):
        wrong = jax_trace(one_layer, batch)
    assert relative_error(wrong["q_rotary"], expected["q_rotary"]) > 100 * bound("norm_rotary_model_bf16")
