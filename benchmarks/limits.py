"""What the hardware allows: floating-point operations of a token, and the card's measured speed of plain matmuls."""

from __future__ import annotations

import math
import time

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.memory import active_parameter_count
from jaxmoe.parameters import parameter_specs


def _head(config: Qwen3MoeConfig) -> int:
    return config.vocab_size * config.hidden_size


def _matrices(config: Qwen3MoeConfig) -> int:
    """Weights that a token is multiplied with in the layers: active ones without embedding, head and norms."""
    tables = _head(config) * (1 if config.tie_word_embeddings else 2)
    specs = parameter_specs(config)
    norms = sum(math.prod(spec.shape) for path, spec in specs.items() if path.endswith("norm"))
    return active_parameter_count(config) - tables - norms


def _attention(config: Qwen3MoeConfig, length: int) -> float:
    """Q K^T and P V of the causal half, averaged over the tokens of a row, all layers."""
    return 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length / 2


def forward_flops(config: Qwen3MoeConfig, length: int, *, head: bool) -> float:
    """Of a token in a row of `length`; `head` with logits for every token. A multiply-add counts as two."""
    return 2 * (_matrices(config) + (_head(config) if head else 0)) + _attention(config, length)


def lora_step_flops(config: Qwen3MoeConfig, length: int) -> float:
    """Of a token: forward, and backward with respect to activations (frozen weights have no gradient of their own).

    Nothing recomputed, the adapters' own products left out. Attention's backward pass counts twice its forward pass:
    the recomputed logits are the kernel's choice, not the mathematics'.
    """
    matrices = 2 * (_matrices(config) + _head(config))
    return 2 * matrices + 3 * _attention(config, length)


def matmul_flops_per_second(size: int = 8192, repeat: int = 20) -> float:
    """A plain bfloat16 product on JAX's default device, the median of `repeat`."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(product(x, x))
    start = time.perf_counter()
    results = [product(x, x) for _ in range(repeat)]
    jax.block_until_ready(results[-1])
    return 2 * size**3 * repeat / (time.perf_counter() - start)
