"""Helpers for the tests of the one-pass kernels: random operands, a simulated GPU, a step of a small model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.config import LoraConfig
from jaxmoe.model.decoder import forward
from jaxmoe.model.init import init_adapters, init_parameters
from jaxmoe.model.interface import Options, Tokens
from jaxmoe.ops import implementations
from jaxmoe.ops.implementations import Device, forced
from peers.configs import config_of

INTERPRETED = jax.default_backend() != "gpu"
# (version of jax, dtype, which implementation of a one-pass kernel's operation runs on an NVIDIA GPU)
CHOSEN = [((0, 10, 2), "bfloat16", "xla"), ((0, 11, 0), "bfloat16", "mosaic"), ((0, 11, 0), "float32", "xla")]


def draw(key: int, *shape: int) -> jax.Array:
    """Normal values."""
    return jax.random.normal(jax.random.key(key), shape)


def made_up_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (8, 0)) -> None:
    """Lets a kernel be chosen without a GPU; the test makes it run in the interpreter."""
    monkeypatch.setattr(implementations, "default_device", lambda: Device("gpu", "made up", capability))


def step(
    sizes: dict[str, Any],
    choices: dict[str, str],
    *,
    unroll: bool = False,
    kernel: str = "pallas_call",
    dtype: Any = jnp.float32,
    targets: tuple[str, ...] = ("q_proj", "k_proj", "experts.gate_up_proj", "experts.down_proj"),
) -> tuple[int, Any]:
    """(how often a step's program names `kernel`, (its loss, gradients of the adapters)).

    In 16 bits rounding would move tokens to other experts, so `sizes` has to make the layers dense there. `choices`
    names implementations; attention and experts run in plain JAX.
    """
    config = config_of("plain").replace(**sizes, num_hidden_layers=2)
    lora = LoraConfig(r=8, targets=targets)
    params = init_parameters(config, jax.random.key(0), dtype)
    adapters = init_adapters(config, lora, jax.random.key(1))
    adapters = {path: array + 0.02 * draw(len(path), *array.shape) for path, array in adapters.items()}
    ids = jax.random.randint(jax.random.key(2), (2, 64), 0, config.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(64), ids.shape)
    options = Options(lora=lora, trainable="adapters", remat="fast", unroll=unroll)

    def loss(adapters: Any) -> Any:
        out = forward(params, adapters, Tokens(ids, positions, jnp.ones_like(ids)), config=config, options=options)
        return jnp.sum(out.hidden**2 * draw(5, *out.hidden.shape))

    with forced(attention="blocks", grouped_matmul="tiled", **choices):
        both = jax.jit(jax.value_and_grad(loss))
        return str(both.trace(adapters).jaxpr).count(kernel), jax.device_get(both(adapters))
