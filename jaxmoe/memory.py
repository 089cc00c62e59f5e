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
# Recomputation policies, from the one that saves most results for the backward pass to the one that saves least.
Remat = Literal["fast", "balanced", "low-memory", "offload"]
ROOM = 0.9  # share of a device's memory that a forecast may fill: an estimate that is 10 % too low still fits
Attention = Literal["cudnn", "blocks"]  # of `jaxmoe.ops.implementations.OPERATIONS`
Experts = Literal["mosaic", "tiled"]  # the grouped matmul's, there
CUDNN_SEQUENCES = 4  # documents of a sequence in one call, as in jaxmoe.ops.attention_cudnn.MAX_RUNS
MOSAIC_ROWS = 16  # the kernel pads an expert's rows to a multiple of this, as in jaxmoe.ops.experts


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
    """Number of parameters that one token uses: k of the E experts of each layer, and everything else."""
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
    """The forecast of one step of AdamW on `batch_size` sequences of `seq_length` tokens with the policy `remat`.

    `attention` and `experts` are the implementations that run on the device (`jaxmoe.ops.attention.implementation`,
    `jaxmoe.ops.experts.implementation`). `packed` says whether a sequence may hold several documents.

    With `lora` only the adapters have gradients and moments. With None all parameters do; the model computes in `dtype`
    from float32 masters. Trained parameters are float32. `quantize` "nf4" holds the frozen parameters in 4 bits.
    Accumulation needs memory for a sum of gradients beside those of a micro-batch.
    """
    size = DTYPE_BYTES[dtype]
    # The loop over tiles has not been measured on a GPU. The forecast assumes the gradients of all results at once.
    times = 2 if experts == "tiled" else 1
    layer = times * layer_bytes(config, batch_size, seq_length, size, experts)
    layer += adapted_bytes(config, lora, batch_size * seq_length, size, experts)
    layer += attention_bytes(config, batch_size, seq_length, attention, True, packed)
    parameters = parameter_count(config)
    tokens = batch_size * seq_length
    # The logits of a chunk and their gradient. They exist while no layer runs, so only the larger of the two counts.
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
    """The fastest policy whose forecast leaves a tenth of the `available` bytes free; "low-memory" if none does.

    If the available memory is unknown (None), "low-memory". Never "offload": it uses the host's memory, so the user has
    to ask for it.
    """
    *faster, frugal, _ = get_args(Remat)
    return next((p for p in faster if available is not None and forecasts[p].total <= ROOM * available), frugal)


def device_bytes(device: Any) -> int | None:
    """Bytes that JAX can use on a device: the allocator's limit on a GPU, the physical memory on a CPU; None: unknown.

    The allocator takes three quarters of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
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
    """The forecast of prefill and decoding for `batch_size` sequences; `seq_length` counts prompt and answer."""
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
    """The frozen parameters. With NF4 also one weight in `dtype`: each is decoded for a short time when it is used."""
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
    """Upper bound on the padded rows P: the rows of every expert are padded to whole tiles.

    A tile of the loop has at most 128 rows and at most half an expert's mean load, but at least 8 rows, as in
    `jaxmoe.ops.experts`.
    """
    tile = MOSAIC_ROWS if experts == "mosaic" else min(128, max(8, routed_rows // (2 * num_experts)))
    return routed_rows + min(num_experts, routed_rows) * tile


def loss_chunk(remat: Remat) -> int:
    """How many tokens have logits at a time; half as many with "offload", which makes the loss slightly slower."""
    return 512 if remat == "offload" else 1024


def layer_input_bytes(config: Qwen3MoeConfig, tokens: int) -> int:
    """Bytes of the layers' inputs, float32. The policy "offload" holds them in the host's memory."""
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
    """Bytes of the results that `remat` saves in all layers beside their inputs, `size` bytes an element."""
    if remat in ("low-memory", "offload"):
        return 0
    tokens, sparse = batch_size * seq_length, len(config.sparse_layers)
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    # The output of attention, queries, keys and values, the heads' output and its normaliser.
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
    """Bytes that the gradients of a layer's experts, or of their adapters, need until the end of the layer: the
    gathered rows, the rows of the output's gradient, and the activation."""
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
    """Bytes of the temporaries of attention, beside its operands and its result.

    `jaxmoe.ops.attention` holds the logits and probabilities of a chunk of queries, and in training their gradients.
    cuDNN's backward pass holds float32 gradients of whole sequences, once for each document of a call.
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
