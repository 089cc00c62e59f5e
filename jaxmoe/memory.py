"""How many bytes training and generation need, and which recomputation policy they leave room for.

Exact for what is stored, an estimate for activations. Standard library only: a forecast needs neither a device nor
weights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.lora import LORA_GROUPS, LoraConfig
from jaxmoe.parameters import (
    ParameterSpec,
    Quantization,
    lora_specs,
    nf4_candidates,
    parameter_specs,
    stored_specs,
)

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STORED_BYTES = DTYPE_BYTES | {"uint8": 1}
FLOAT32 = 4
ADAM_MOMENTS = 2  # optax.adamw keeps a first and a second moment of each trained parameter, float32
# What the backward pass finds instead of computing it again, most first; `jaxmoe.model.decoder` names the results.
Remat = Literal["fast", "balanced", "low-memory", "offload"]
ROOM = 0.9  # of a device's memory: an estimate that is 10 % short still fits
Attention = Literal["cudnn", "blocks"]  # of `jaxmoe.ops.implementations.OPERATIONS`
Experts = Literal["mosaic", "tiled"]  # the grouped matmul's, there
CUDNN_SEQUENCES = 4  # that one call takes of packed rows: jaxmoe.ops.attention_cudnn.MAX_RUNS
MOSAIC_ROWS = 16  # that an expert's rows are padded to for its kernel, as in jaxmoe.ops.experts


@dataclass(frozen=True)
class Part:
    """One share of the memory, in bytes; `exact` says whether it is counted or estimated."""

    name: str
    bytes: int
    exact: bool


@dataclass(frozen=True)
class Forecast:
    """What a run holds on its device at its peak."""

    parts: tuple[Part, ...]

    @property
    def total(self) -> int:
        """Sum of the parts, in bytes."""
        return sum(part.bytes for part in self.parts)


def parameter_count(config: Qwen3MoeConfig) -> int:
    """Number of parameters of the model (a tied head counts once)."""
    return _count(parameter_specs(config))


def adapter_count(config: Qwen3MoeConfig, lora: LoraConfig) -> int:
    """Number of parameters of the adapters."""
    return _count(lora_specs(config, lora))


def active_parameter_count(config: Qwen3MoeConfig) -> int:
    """Number of parameters that one token meets: k of the E experts of each layer, the rest whole."""
    specs = parameter_specs(config)
    experts = {path: specs.pop(path) for path in ("sparse.gate_up_proj", "sparse.down_proj") if path in specs}
    if not experts:
        return _count(specs)
    return _count(specs) + _count(experts) * config.num_experts_per_tok // config.num_experts


def training_forecast(
    config: Qwen3MoeConfig,
    lora: LoraConfig | None,
    *,
    batch_size: int,
    seq_length: int,
    dtype: str,
    accumulation: int = 1,
    quantize: str | None = None,
    remat: Remat = "low-memory",
    attention: Attention = "blocks",
    experts: Experts = "tiled",
    packed: bool = True,
) -> Forecast:
    """One step of AdamW on `batch_size` rows of `seq_length` tokens, each layer recomputed as `remat` says.

    `attention` and `experts` are the implementations that the device takes (`jaxmoe.ops.attention.implementation`,
    `jaxmoe.ops.experts.implementation`), `packed` whether some row may hold several documents.

    With `lora` only the adapters have gradients and moments; with None all parameters do, and are computed in `dtype`
    from float32 masters. What is trained is float32. `quantize` "nf4" holds the frozen parameters in 4 bits.
    Accumulation holds the sum beside the gradients of a micro-batch.
    """
    size = DTYPE_BYTES[dtype]
    # The loop over tiles has not been measured on a GPU: the gradient of every result, as if all were there at once.
    times = 2 if experts == "tiled" else 1
    layer = times * layer_bytes(config, batch_size, seq_length, size, experts)
    layer += adapted_bytes(config, lora, batch_size * seq_length, size, experts)
    layer += attention_bytes(config, batch_size, seq_length, attention, True, packed)
    parameters = parameter_count(config)
    tokens = batch_size * seq_length
    # The logits of a chunk, and their gradient; no layer is at work then.
    logits = 2 * min(loss_chunk(remat), tokens) * config.vocab_size * FLOAT32
    if lora:
        trained = adapter_count(config, lora) * FLOAT32
        stored = [*_frozen(config, dtype, quantize), Part("adapters", trained, True)]
    else:
        trained = parameters * FLOAT32
        stored = [Part("parameters", trained, True)]
        if dtype != "float32":
            stored.append(Part(f"{dtype} copy", parameters * size, True))
    return Forecast(
        (
            *stored,
            Part("gradients", trained * min(accumulation, 2), True),
            Part("optimizer state", ADAM_MOMENTS * trained, True),
            Part("layer inputs", 0 if remat == "offload" else layer_input_bytes(config, tokens), False),
            Part("kept results", kept_bytes(config, lora, batch_size, seq_length, size, remat, experts), False),
            max(
                Part(f"one layer, {attention}", layer, False),
                Part("one chunk of logits", logits, False),
                key=lambda part: part.bytes,
            ),
        )
    )


def choose_remat(forecasts: Mapping[Remat, Forecast], available: int | None) -> Remat:
    """The fastest policy whose forecast leaves a tenth of the `available` bytes; "low-memory" where none does.

    Where nobody knows what is available (None), "low-memory". Never "offload", which takes the host's memory: that is
    for the user to say.
    """
    *faster, frugal, _ = get_args(Remat)
    return next((p for p in faster if available is not None and forecasts[p].total <= ROOM * available), frugal)


def device_bytes(device: Any) -> int | None:
    """Bytes that a JAX device offers: a GPU's limit for JAX's allocator, a CPU's physical memory; None: unknown.

    The allocator takes three quarters of a card unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
    """
    if device.platform == "cpu":
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError):  # Windows has no sysconf
            return None
    return (device.memory_stats() or {}).get("bytes_limit")


def generation_forecast(
    config: Qwen3MoeConfig,
    lora: LoraConfig | None,
    *,
    batch_size: int,
    seq_length: int,
    dtype: str,
    quantize: str | None = None,
    attention: Attention = "blocks",
    experts: Experts = "tiled",
) -> Forecast:
    """Prefill and decoding of `batch_size` rows, `seq_length` tokens each, prompt and answer together."""
    size = DTYPE_BYTES[dtype]
    working = attention_bytes(config, batch_size, seq_length, attention, False)
    kv_width = config.num_key_value_heads * config.head_dim
    adapters = (Part("adapters", adapter_count(config, lora) * FLOAT32, True),) if lora else ()
    return Forecast(
        (
            *_frozen(config, dtype, quantize),
            *adapters,
            Part("KV cache", 2 * config.num_hidden_layers * batch_size * seq_length * kv_width * size, True),
            Part("one layer at work", layer_bytes(config, batch_size, seq_length, size, experts), False),
            Part(f"attention, {attention}", working, False),
            Part("logits", batch_size * config.vocab_size * FLOAT32, False),
        )
    )


def _frozen(config: Qwen3MoeConfig, dtype: str, quantize: str | None) -> tuple[Part, ...]:
    """The frozen parameters; in NF4 also the weights of one layer as `dtype`, which decoding makes for a moment."""
    size = DTYPE_BYTES[dtype]
    if quantize is None:
        return (Part("parameters", parameter_count(config) * size, True),)
    quantization = Quantization(nf4_candidates(config))
    specs = stored_specs(config, quantization).values()
    stored = sum(math.prod(spec.shape) * (STORED_BYTES[spec.dtype] if spec.dtype else size) for spec in specs)
    weights = parameter_specs(config)
    largest = max(math.prod(weights[path].shape[1:]) for path in quantization.paths)
    return Part("parameters (nf4)", stored, True), Part("one decoded weight", largest * size, False)


def padded_rows(routed_rows: int, num_experts: int, experts: Experts) -> int:
    """Upper bound on the rows that dispatch lays out: every expert's rows end on a whole tile.

    A tile of the loop holds at most 128 rows and at most half an expert's mean load (but no fewer than 8), as in
    `jaxmoe.ops.experts`.
    """
    tile = MOSAIC_ROWS if experts == "mosaic" else min(128, max(8, routed_rows // (2 * num_experts)))
    return routed_rows + min(num_experts, routed_rows) * tile


def loss_chunk(remat: Remat) -> int:
    """Tokens whose logits exist at a time: half as many where every byte counts, for a loss that is a little slower."""
    return 512 if remat == "offload" else 1024


def layer_input_bytes(config: Qwen3MoeConfig, tokens: int) -> int:
    """Bytes of the layers' inputs, float32; with the policy "offload" in the host's memory."""
    return config.num_hidden_layers * tokens * config.hidden_size * FLOAT32


def kept_bytes(
    config: Qwen3MoeConfig,
    lora: LoraConfig | None,
    batch_size: int,
    seq_length: int,
    size: int,
    remat: Remat,
    experts: Experts,
) -> int:
    """Bytes of what `remat` keeps of all layers beside their inputs, `size` bytes an element."""
    if remat in ("low-memory", "offload"):
        return 0
    tokens, sparse = batch_size * seq_length, len(config.sparse_layers)
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    # What attention adds to the residual stream, queries, keys and values, the heads' output and its normaliser.
    attention = tokens * ((config.hidden_size + 2 * heads + 2 * kv) * size + config.num_attention_heads * FLOAT32)
    attention += tokens * _ranks(lora, LORA_GROUPS["attention"]) * size  # and low-rank rows
    kept = config.num_hidden_layers * attention
    if sparse:
        k = config.num_experts_per_tok
        rows = padded_rows(tokens * k, config.num_experts, experts)
        # Router logits and probabilities; experts, weights and both directions of the permutation.
        kept += sparse * FLOAT32 * (tokens * (2 * config.num_experts + 3 * k) + rows)
        if remat == "fast":
            width = 2 * config.moe_intermediate_size + _ranks(lora, LORA_GROUPS["experts"])
            kept += sparse * rows * width * size
    return kept


def _ranks(lora: LoraConfig | None, group: Sequence[str]) -> int:
    """The sum of the ranks of the adapters on these targets."""
    return sum(lora.rank(target) for target in lora.targets if target in group) if lora else 0


def adapted_bytes(config: Qwen3MoeConfig, lora: LoraConfig | None, tokens: int, size: int, experts: Experts) -> int:
    """Bytes that a layer holds longer for the gradients of its experts, or of adapters on them: the gathered rows,
    those of the output's gradient, and the activation."""
    if not config.sparse_layers or (lora and not _ranks(lora, LORA_GROUPS["experts"])):
        return 0
    rows = padded_rows(tokens * config.num_experts_per_tok, config.num_experts, experts)
    return rows * (2 * config.hidden_size + config.moe_intermediate_size) * size


def attention_bytes(
    config: Qwen3MoeConfig,
    batch_size: int,
    seq_length: int,
    attention: Attention,
    training: bool,
    packed: bool = True,
) -> int:
    """Bytes that attention works in, beside its operands and its result.

    `jaxmoe.ops.attention` holds the logits and probabilities of a block of queries and what becomes of them, and the
    gradient of each; cuDNN's backward pass the gradients in float32 of whole rows, for each of the sequences of a call.
    """
    heads = batch_size * config.num_attention_heads * seq_length
    if attention == "blocks":
        return (8 if training else 4) * heads * query_chunk(seq_length) * FLOAT32
    sequences = CUDNN_SEQUENCES if packed else 1
    return 2 * sequences * heads * config.head_dim * FLOAT32 if training else 0


def query_chunk(seq_length: int) -> int:
    """Queries of a chunk of attention, as `jaxmoe.ops.attention_chunked.chunk_length`."""
    return min(max(64, -(-seq_length // 8)), 1024)


def layer_bytes(config: Qwen3MoeConfig, batch_size: int, seq_length: int, size: int, experts: Experts) -> int:
    """Bytes of all results inside the larger kind of decoder layer, `size` bytes an element."""
    tokens = batch_size * seq_length
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = tokens * (config.hidden_size * (size + FLOAT32) + (2 * heads + 2 * kv) * size)
    mlps = [0]
    if config.sparse_layers:
        rows = padded_rows(tokens * config.num_experts_per_tok, config.num_experts, experts)
        # Gathered rows, gate and up, their product, the experts' outputs.
        mlps.append(rows * (2 * config.hidden_size + 3 * config.moe_intermediate_size) * size)
    if config.dense_layers:
        mlps.append(tokens * 3 * config.intermediate_size * size)
    return attention + max(mlps)


def human(count_of_bytes: int) -> str:
    """Bytes in binary units, three significant digits: 61064245248 -> '56.9 GiB'."""
    value, unit = float(count_of_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{count_of_bytes} B" if unit == "B" else f"{value:.3g} {unit}"


def _count(specs: Mapping[str, ParameterSpec]) -> int:
    return sum(math.prod(spec.shape) for spec in specs.values())
