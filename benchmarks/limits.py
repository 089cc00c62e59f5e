"""Limits of the hardware: floating-point operations per token, and the card's measured speed of plain matmuls."""

from __future__ import annotations

import math
import time

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.memory import active_parameter_count
from jaxmoe.parameters import parameter_specs, quantizable


def _head(config: Qwen3MoeConfig) -> int:
    return config.vocab_size * config.hidden_size


def _matrices(config: Qwen3MoeConfig) -> int:
    """The number of layer weights with which a token is multiplied: active ones, without embedding, head and norms."""
    tables = _head(config) * (1 if config.tie_word_embeddings else 2)
    specs = parameter_specs(config)
    norms = sum(math.prod(spec.shape) for path, spec in specs.items() if path.endswith("norm"))
    return active_parameter_count(config) - tables - norms


def _attention(config: Qwen3MoeConfig, length: int) -> float:
    """Operations of Q K^T and P V, causal half only, in all layers, averaged over the tokens of a sequence."""
    return 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length / 2


def forward_flops(config: Qwen3MoeConfig, length: int, *, head: bool) -> float:
    """Operations per token of a forward pass over `length` tokens; a multiply-add counts as two.

    `head`: whether every token has logits.
    """
    return 2 * (_matrices(config) + (_head(config) if head else 0)) + _attention(config, length)


def step_flops(config: Qwen3MoeConfig, length: int, *, full: bool = False) -> float:
    """Operations per token of a training step: forward, and backward for the activations.

    With LoRA frozen weights have no gradient; with `full` each has one, which takes as many operations as its forward
    product. Recomputation and the adapters' own products do not count. Attention's backward pass counts as twice its
    forward pass: a kernel may recompute the logits, but the mathematics does not need it.
    """
    matrices = 2 * (_matrices(config) + _head(config))
    return (3 if full else 2) * matrices + 3 * _attention(config, length)


def matmul_flops_per_second(size: int = 8192, repeat: int = 20) -> float:
    """Operations per second of a plain bfloat16 product on JAX's default device, the mean of `repeat` products."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(product(x, x))
    start = time.perf_counter()
    results = [product(x, x) for _ in range(repeat)]
    jax.block_until_ready(results[-1])
    return 2 * size**3 * repeat / (time.perf_counter() - start)


def copied_bytes_per_second(size: int = 2**32, repeat: int = 10) -> float:
    """Bytes per second, read and written together, of a plain copy on JAX's default device."""
    import jax
    import jax.numpy as jnp

    x = jnp.zeros(size // 4, jnp.float32)
    copy = jax.jit(lambda a: a + 1)
    jax.block_until_ready(copy(x))
    start = time.perf_counter()
    for _ in range(repeat):
        result = copy(x)
    jax.block_until_ready(result)
    return 2 * size * repeat / (time.perf_counter() - start)


# NF4 with double quantisation: 4 bits an element, 8 a block of 64, 32 a block of 256 blocks. FP8: 32 bits a block of
# 128 x 128.
ELEMENT_BYTES = {"nf4": 1 / 2 + 1 / 64 + 4 / 64 / 256, "fp8": 1 + 4 / 128**2}


def decoded_token_bytes(
    config: Qwen3MoeConfig, experts: float, slots: int, batch: int, quantize: str | None = None
) -> float:
    """Bytes that one step of decoding must read: the weights that it uses, and the keys and values so far.

    Args:
        config: the model.
        experts: different experts that the batch uses in a layer, on average.
        slots: positions of the KV cache that each sequence reads.
        batch: sequences.
        quantize: the form of the layers' matrices, `ELEMENT_BYTES`. All other arrays have 16 bits.
    """
    quantized = quantizable(config) if quantize else ()
    total = 2.0 * slots * batch * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    for path, spec in parameter_specs(config).items():
        if path == "embed_tokens" and not config.tie_word_embeddings:
            continue  # one row per sequence
        elements = math.prod(spec.shape)
        if path in ("sparse.gate_up_proj", "sparse.down_proj"):
            elements *= experts / config.num_experts
        total += elements * (ELEMENT_BYTES[quantize] if quantize and path in quantized else 2)
    return total
