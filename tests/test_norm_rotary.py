"""The kernel `norm_rotary` against the operations that it replaces, and the model with and without it.

Without a GPU the kernel runs in Pallas' interpreter.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.model.init import init_parameters
from jaxmoe.ops.implementations import forced
from jaxmoe.ops.kernels import norm_rotary, norm_rotary_mosaic
from jaxmoe.ops.norm import rms_norm
from jaxmoe.ops.rotary import apply_rotary
from peers.configs import config_of
from tests.parity import relative_error
from tests.parity.batches import Batch
from tests.parity.faults import FAULTS
from tests.parity.trace import jax_trace
from tests.row_kernels import INTERPRETED, draw, made_up_gpu, step
from tests.test_ampere import path  # noqa: F401 - a fixture
from tests.test_kernels import needs_kernels, on_gpu
from tests.tolerances import bound

EPS = 1e-6
# (batch, tokens, heads, columns of a head)
HEADS = [(2, 8, 4, 128), (1, 16, 6, 64), (3, 32, 1, 32)]


def rotary_errors(
    shape: tuple[int, ...], dtype: Any, turn: float = 1.0, run: Any = norm_rotary, interpret: Any = INTERPRETED
) -> list[float]:
    """Relative errors of the output and of the gradient; `turn` plants the fault of another angle.

    `run` is the module of the kernel.
    """
    x, d_out = (draw(key, *shape).astype(dtype) for key in (0, 1))
    weight = (1 + 0.1 * draw(2, shape[-1])).astype(dtype)
    angles = 3 * draw(3, *shape[:2], shape[-1] // 2)

    def plain(x: jax.Array) -> jax.Array:
        normed = rms_norm(x, weight.astype(jnp.float32), EPS)
        return apply_rotary(normed, jnp.cos(angles), jnp.sin(angles))

    def kernel(x: jax.Array) -> jax.Array:
        return run.norm_rotary(x, weight, jnp.cos(turn * angles), jnp.sin(turn * angles), EPS, interpret)

    expected, pull = jax.vjp(plain, x.astype(jnp.float32))
    found, kernel_pull = jax.vjp(kernel, x)
    (d_x,), (expected_d_x,) = kernel_pull(d_out), pull(d_out.astype(jnp.float32))
    return [relative_error(found, expected), relative_error(d_x, expected_d_x)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_norm_and_rotation_in_one_pass(shape: tuple[int, ...], dtype: Any) -> None:
    allowed = bound("norm_rotary_fp32" if dtype == jnp.float32 else "norm_rotary_bf16")
    assert max(rotary_errors(shape, dtype)) <= allowed
    assert min(rotary_errors(shape, dtype, turn=1.1)) > 10 * allowed


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 32, 2, 64), *([(2, 4096, 32, 128)] if on_gpu else [])], ids=str)
def test_the_kernel_in_mosaic(shape: tuple[int, ...], path: Any) -> None:  # noqa: F811
    assert max(rotary_errors(shape, jnp.bfloat16, run=norm_rotary_mosaic, interpret=path)) <= bound("norm_rotary_bf16")


def test_heads_that_it_does_not_take() -> None:
    assert norm_rotary.unsupported(jnp.zeros((1, 32, 1, 128))) is None
    assert "found 96" in str(norm_rotary.unsupported(jnp.zeros((1, 32, 1, 96))))
    assert "found 31" in str(norm_rotary.unsupported(jnp.zeros((1, 31, 1, 128))))


@pytest.fixture
def kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the device is simulated, and the kernel runs in the interpreter."""
    if INTERPRETED:
        made_up_gpu(monkeypatch)
        kernel = norm_rotary.norm_rotary
        monkeypatch.setattr(norm_rotary, "norm_rotary", lambda *operands: kernel(*operands, True))


def test_the_model_with_the_kernel(kernel_runs: None) -> None:
    """Loss and gradients of adapters, in float32, where rounding moves no token to other experts."""
    sizes = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 256}
    (none, expected), (calls, found) = (step(sizes, {"norm_rotary": name}) for name in ("xla", "triton"))
    # Queries and keys: forward, recomputed and backward.
    assert (none, calls) == (0, 6)
    errors = [relative_error(a, b) for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True)]
    assert max(errors) <= bound("norm_rotary_model_fp32")


def test_the_parity_suite_sees_through_the_kernel(kernel_runs: None) -> None:
    """The trace has the kernel's results under the operations' names; a norm that is left out is missing there, too."""
    config = config_of("plain").replace(head_dim=64, num_hidden_layers=1)
    params = init_parameters(config, jax.random.key(0))
    one_layer = SimpleNamespace(params=params, adapters={}, config=config, lora_config=None)
    ids, ones = np.arange(64, dtype=np.int32)[None], np.ones((1, 64), np.int32)
    batch = Batch(ids, ids, ones)

    def traced(implementation: str) -> dict[str, np.ndarray]:
        with forced(norm_rotary=implementation, attention="blocks", grouped_matmul="tiled"):
            return jax_trace(one_layer, batch)

    expected, found = traced("xla"), traced("triton")
    assert set(expected) - set(found) == {"q_norm", "k_norm"} and not set(found) - set(expected)
    errors = {name: relative_error(found[name], expected[name]) for name in found}
    assert max(errors.values()) <= bound("norm_rotary_model_fp32"), errors
    with FAULTS["q and k norm missing"](), forced(attention="blocks", grouped_matmul="tiled"):
        wrong = jax_trace(one_layer, batch)
    assert relative_error(wrong["q_rotary"], expected["q_rotary"]) > 1e3 * bound("norm_rotary_model_fp32")
