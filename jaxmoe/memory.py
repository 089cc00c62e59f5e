"""How many bytes training and generation need, and which recomputation policy they leave room for.

Exact for what is stored, an estimate for activations. Standard library only: a forecast needs neither a device nor
weights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.distributed.mesh import ONE_DEVICE, MeshShape
from jaxmoe.distributed.sharding import held_elements
from jaxmoe.errors import UserError
from jaxmoe.lora import LORA_GROUPS, LORA_TARGETS, LoraConfig
from jaxmoe.parameters import (
    NF4_BLOCK,
    ParameterSpec,
    Quantization,
    lora_specs,
    parameter_specs,
    stored_specs,
)

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STORED_BYTES = DTYPE_BYTES | {"uint8": 1, "float8_e4m3fn": 1, "int32": 4}
FLOAT32 = 4
OptimizerName = Literal["adamw", "adafactor", "lion", "muon"]
SMALLEST_FACTORED = 128  # Adafactor keeps rows and columns of a matrix if both sides are at least this long
# Recomputation policies, from the one that saves most results for the backward pass to the one that saves least.
Remat = Literal["fast", "balanced", "low-memory", "offload"]
ROOM = 0.96  # share of JAX's pool on a GPU that a forecast may fill; forecasts are 0 to 3 % above what a step holds
HOST_ROOM = 0.9  # share of a CPU's memory that it may fill: other programs need some, too
LARGE_MOMENTS = 2**29  # bytes of AdamW's moments that "offload" holds in the host's memory; smaller ones stay
LossName = Literal["next-token", "dpo", "orpo"]  # what training minimises
LOSSES_OVER_PAIRS = ("dpo", "orpo")  # they compare two sequences, a chosen and a rejected answer
Attention = Literal["cudnn", "flash", "blocks"]  # names in `jaxmoe.ops.implementations.OPERATIONS`
Experts = Literal["mosaic", "mma", "tiled", "ragged_dot"]  # names of the grouped matmul there
NF4Products = Literal["mosaic", "decoded"]  # of its products with experts in NF4
FP8Products = Literal["registers", "decoded", "mosaic", "xla"]  # and of those with experts in FP8
CONTEXT_TILE = 512  # tokens that meet at a time on a `context` axis, as in jaxmoe.ops.attention_context
CUDNN_SEQUENCES = 4  # documents of a sequence in one call, as in jaxmoe.ops.attention_cudnn.MAX_PIECES
MOSAIC_ROWS = 16  # the kernels pad an expert's rows to a multiple of this, as in jaxmoe.ops.experts
MOSAIC_RANK = 64  # and the rank of experts' adapters, as in jaxmoe.ops.kernels.grouped_matmul.hopper
DECODED_SIDES = 128  # Hopper's kernel decodes NF4 and FP8 itself if the matrices' sides are multiples of this


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
    """Number of parameters of the adapters, the weights that they hold in full included."""
    return _count(lora_specs(config, lora))


def saved_count(config: Qwen3MoeConfig, lora: LoraConfig | None) -> int:
    """Number of parameters of the weights that the adapters hold in full."""
    specs = lora_specs(config, lora) if lora else {}
    return _count({path: specs[path] for path in lora.saved_paths}) if lora else 0


def active_parameter_count(config: Qwen3MoeConfig) -> int:
    """Number of parameters that one token uses: k of the E experts of each layer, and everything else."""
    specs = parameter_specs(config)
    experts = {path: specs.pop(path) for path in ("sparse.gate_up_proj", "sparse.down_proj") if path in specs}
    if not experts:
        return _count(specs)
    return _count(specs) + _count(experts) * config.num_experts_per_tok // config.num_experts


@dataclass(frozen=True)
class Workload:
    """What a forecast is for: a model with or without adapters, the shape of a batch, and how it runs.

    Attributes:
        config: the model.
        lora: the adapters, the only parameters that are trained; None: in training all parameters are.
        batch_size: sequences of a micro-batch; with `pairs`, pairs of sequences.
        seq_length: tokens per sequence; in generation prompt and answer together.
        dtype: of the frozen parameters and of the computation. Trained parameters are float32.
        accumulation: micro-batches per step. Several need memory for a sum, in addition to the gradients of one.
        quantize: "nf4" holds the frozen parameters in 4 bits, "fp8" in 8.
        quantization: which of them, if it is not all that the form is used for.
        remat: the recomputation policy.
        attention: the implementation that runs on the device (`jaxmoe.ops.attention.implementation`).
        experts: the implementation of the experts' products (`jaxmoe.ops.experts.implementation`).
        nf4_products: how its kernel multiplies by experts in NF4.
        fp8_products: how it multiplies by experts in FP8.
        packed: a sequence may hold several documents.
        mesh: the devices that share a step; the forecast is for one of them, and `batch_size` counts its own sequences.
        pairs: the loss compares answers, each in a sequence of its own.
        optimizer: what it keeps of each trained parameter is counted.
        router_logits: how many arrays of all router logits the losses of a step read or differentiate.
    """

    config: Qwen3MoeConfig
    lora: LoraConfig | None
    batch_size: int
    seq_length: int
    dtype: str
    accumulation: int = 1
    quantize: str | None = None
    remat: Remat = "low-memory"
    attention: Attention = "blocks"
    experts: Experts = "tiled"
    nf4_products: NF4Products = "decoded"
    fp8_products: FP8Products = "decoded"
    packed: bool = True
    quantization: Quantization | None = None
    mesh: MeshShape = ONE_DEVICE
    pairs: bool = False
    optimizer: OptimizerName = "adamw"
    router_logits: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on this device."""
        return self.batch_size * self.seq_length * (2 if self.pairs else 1) // self.mesh.context

    @property
    def size(self) -> int:
        """Bytes of an element in `dtype`."""
        return DTYPE_BYTES[self.dtype]

    @property
    def rows(self) -> int:
        """An upper bound on the padded rows P of a MoE layer; a device that holds a share of the experts has room for
        the rows of all."""
        routed = self.mesh.expert * self.tokens * self.config.num_experts_per_tok
        return padded_rows(routed, self.config.num_experts // self.mesh.expert, self.experts)


def training_forecast(work: Workload) -> Forecast:
    """The forecast of one training step."""
    config, lora = work.config, work.lora
    layer = training_layer_bytes(work)
    parameters = _held(parameter_specs(config), work.mesh)
    # The logits of a chunk and their gradient.
    logits = 2 * min(loss_chunk(work.remat), work.tokens) * config.vocab_size * FLOAT32
    if lora:
        trained = _held(lora_specs(config, lora), work.mesh) * FLOAT32
        stored = [*_frozen(work), Part("adapters", trained, True), *_saved_copy(work)]
        if embedding_on_host(config, lora, work.remat):
            table = Part("embedding, in the host's memory", -config.vocab_size * config.hidden_size * work.size, True)
            rows = work.accumulation * work.tokens * config.hidden_size * work.size
            stored += [table, Part("vectors of a step's tokens", rows, True)]
    else:
        trained = parameters * FLOAT32
        stored = [Part("parameters", trained, True)]
        if work.dtype != "float32":
            stored.append(Part(f"{work.dtype} copy", parameters * work.size, True))
    on_host = moments_on_host(config, lora, work.remat, work.optimizer)
    in_a_layer = (Part(f"one layer, {work.attention}", layer, False), *_gathered(work), *_decoded(work, training=True))
    in_the_head = (Part("one chunk of logits", logits, False),)
    in_the_optimizer = (Part("orthogonal factors", orthogonal_bytes(work), False),)
    if on_host:
        in_the_optimizer = (Part("an adapter's update", update_bytes(work), False),)
    return Forecast(
        (
            *stored,
            Part("gradients", trained * min(work.accumulation, 2), True),
            Part("optimizer state", 0 if on_host else optimizer_bytes(work), True),
            Part("layer inputs", 0 if work.remat == "offload" else layer_input_bytes(config, work.tokens), False),
            Part("kept results", kept_bytes(work), False),
            *_router_logits(work),
            # No layer runs while logits exist or while weights are updated, so only the largest of these counts.
            *max(in_a_layer, in_the_head, in_the_optimizer, key=lambda parts: sum(part.bytes for part in parts)),
        )
    )


def _router_logits(work: Workload) -> tuple[Part, ...]:
    """The router's logits of all MoE layers."""
    count = work.router_logits * len(work.config.sparse_layers) * work.tokens * work.config.num_experts
    return (Part("router logits", count * FLOAT32, True),) if count else ()


def training_forecasts(work: Workload) -> dict[Remat, Forecast]:
    """`training_forecast` with each recomputation policy."""
    return {remat: training_forecast(replace(work, remat=remat)) for remat in get_args(Remat)}


def choose_remat(
    forecasts: Mapping[Remat, Forecast], available: int | None, *, room: float = ROOM, may_offload: bool = False
) -> Remat:
    """The fastest policy whose forecast fits into `room` of the `available` bytes; if none does, the most frugal one.

    "offload" is tried only if `may_offload`. If the available memory is unknown (None), the choice is "low-memory".
    """
    if available is None:
        return "low-memory"
    policies = [policy for policy in get_args(Remat) if may_offload or policy != "offload"]
    return next((policy for policy in policies if forecasts[policy].total <= room * available), policies[-1])


def offloaded_bytes(work: Workload) -> int:
    """Bytes that the policy "offload" holds in the host's memory."""
    inputs = layer_input_bytes(work.config, work.tokens)
    on_host = moments_on_host(work.config, work.lora, "offload", work.optimizer)
    moments = _moment_bytes(work.config, work.lora) if on_host and work.lora else 0
    table = work.config.vocab_size * work.config.hidden_size * work.size
    return inputs + moments + (table if embedding_on_host(work.config, work.lora, "offload") else 0)


def device_bytes(device: Any) -> int | None:
    """Bytes that JAX can use on a device: the allocator's limit on a GPU, the physical memory on a CPU; None: unknown.

    The allocator takes three quarters of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
    """
    if device.platform == "cpu":
        return host_bytes()
    return (device.memory_stats() or {}).get("bytes_limit")


def host_bytes() -> int | None:
    """The physical memory of this machine; None: unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # Windows has no sysconf
        return None


def check_fits(what: str, needed: int) -> None:
    """Raises UserError, which starts with `what`, if `needed` bytes are more than this machine has."""
    available = host_bytes()
    if available is not None and needed > available:
        raise UserError(f"{what}: needs {format_bytes(needed)} of memory, this machine has {format_bytes(available)}")


def forward_batches(work: Workload, most: int = 4) -> int:
    """How many micro-batches one forward pass with all router logits, the base's beside them, can hold in the memory
    that a training step takes: 1 to `most`.

    What a step saves for its backward pass is free then; the work of one layer fits in both.
    """
    saved = 0 if work.remat == "offload" else layer_input_bytes(work.config, work.tokens)
    saved += kept_bytes(work)
    logits = 2 * len(work.config.sparse_layers) * work.tokens * work.config.num_experts * FLOAT32
    layer = layer_bytes(work) + attention_bytes(work, training=False)
    return next((n for n in range(most, 1, -1) if (n - 1) * layer + n * logits <= saved), 1)


def generation_forecast(work: Workload) -> Forecast:
    """The forecast of prefill and decoding."""
    config = work.config
    kv_width = config.num_key_value_heads * config.head_dim
    adapters = (Part("adapters", adapter_count(config, work.lora) * FLOAT32, True),) if work.lora else ()
    return Forecast(
        (
            *_frozen(work),
            *adapters,
            *_saved_copy(work),
            *_decoded(work, training=False),
            Part("KV cache", 2 * config.num_hidden_layers * work.tokens * kv_width * work.size, True),
            Part("one layer at work", layer_bytes(work), False),
            *_gathered(work),
            Part(f"attention, {work.attention}", attention_bytes(work, training=False), False),
            Part("logits", work.batch_size * config.vocab_size * FLOAT32, False),
        )
    )


def _frozen(work: Workload) -> tuple[Part, ...]:
    """The frozen parameters."""
    config, size = work.config, work.size
    if work.quantize is None:
        return (Part("parameters", _held(parameter_specs(config), work.mesh) * size, True),)
    specs = stored_specs(config, _quantization(work)).values()
    stored = sum(held_elements(spec, work.mesh) * (STORED_BYTES[spec.dtype] if spec.dtype else size) for spec in specs)
    return (Part(f"parameters ({work.quantize})", stored, True),)


def _quantization(work: Workload) -> Quantization | None:
    """Which frozen parameters are quantised."""
    return work.quantization or (Quantization.default(work.config, work.quantize) if work.quantize else None)


def _gathered(work: Workload) -> tuple[Part, ...]:
    """The weights of a layer that devices share with `fsdp`, put together; of two layers, since XLA may gather the next
    one while this one computes."""
    if work.mesh.fsdp == 1:
        return ()
    stored = stored_specs(work.config, _quantization(work)).values()
    stacks = [spec for spec in stored if spec.axes[0] == "layers"]
    whole = replace(work.mesh, fsdp=1)
    layer = sum(
        held_elements(spec, whole) // spec.shape[0] * (STORED_BYTES[spec.dtype] if spec.dtype else work.size)
        for spec in stacks
    )
    return (Part("two layers' weights", 2 * layer, False),)


def _decoded(work: Workload, *, training: bool) -> tuple[Part, ...]:
    """With quantised weights those in `dtype` that exist at once: each is decoded for a short time when it is used.

    In training the kernel decodes the experts' codes itself, unless they have adapters of high ranks; it reads the
    scales of a layer's experts in float32. Otherwise it reads all experts of a layer, decoded. XLA decodes those of
    both products together, unless the policy is "offload" (`jaxmoe.ops.experts`). The loop over tiles decodes the
    experts of a few tiles, no more than it has rows.
    """
    if (quantization := _quantization(work)) is None:
        return ()
    specs, paths = parameter_specs(work.config), quantization.paths
    held = work.mesh.expert
    experts = [math.prod(specs[path].shape[1:]) // held for path in paths if path.startswith("sparse.")] or [0]
    others = max(math.prod(specs[path].shape[1:]) for path in paths if not path.startswith("sparse.")) * work.size
    if training and _decodes_in_kernel(work, quantization):
        # NF4's as they are decoded, and in the order of the kernel; those of FP8 are few
        scales = 2 * sum(experts) // NF4_BLOCK * FLOAT32 if quantization.form == "nf4" else 0
        return (Part("decoded weights", max(scales, others), False),)
    together = max(experts) if work.remat == "offload" else sum(experts)
    if work.experts == "tiled":
        together = min(together, work.rows * max(work.config.hidden_size, 2 * work.config.moe_intermediate_size))
    return (Part("decoded weights", max(together * work.size, others), False),)


def _decodes_in_kernel(work: Workload, quantization: Quantization) -> bool:
    """Whether no expert is decoded in memory in training, as `jaxmoe.ops.kernels.grouped_matmul.hopper_nf4` and
    `hopper_e4m3` say."""
    sides = work.config.hidden_size, work.config.moe_intermediate_size
    targets = [target for target in work.lora.targets if target in LORA_GROUPS["experts"]] if work.lora else []
    rank = max((work.lora.rank(target) for target in targets), default=0) if work.lora else 0
    in_kernel = {"nf4": work.nf4_products == "mosaic", "fp8": work.fp8_products in ("registers", "mosaic")}
    return (
        (work.experts, work.dtype) == ("mosaic", "bfloat16")
        and in_kernel[quantization.form]
        and 2 * rank <= MOSAIC_RANK  # two 16-bit terms of it
        and not any(side % DECODED_SIDES for side in sides)
        and not any(path.startswith("sparse.") for path, _ in quantization.unquantized)
    )


def _saved_copy(work: Workload) -> tuple[Part, ...]:
    """The weights that the adapter holds in full, in `dtype`, which the forward pass uses; the adapter is float32."""
    count = saved_count(work.config, work.lora)
    return (Part(f"{work.dtype} copy of modules to save", count * work.size, True),) if count else ()


def moments_on_host(
    config: Qwen3MoeConfig, lora: LoraConfig | None, remat: Remat, optimizer: OptimizerName = "adamw"
) -> bool:
    """Whether AdamW's moments lie in the host's memory: they do if they are large. Those of other optimizers never do,
    since an update of theirs may need more than one element at a time."""
    large = lora is not None and _moment_bytes(config, lora) >= LARGE_MOMENTS
    return remat == "offload" and optimizer == "adamw" and large


def update_bytes(work: Workload) -> int:
    """Bytes that the update of the largest array needs on the device while moments lie in the host's memory: a copy of
    its gradient, and for one layer gradient, weights, change, and two moments before and after (estimated)."""
    assert work.lora is not None
    elements, spec = max(
        ((held_elements(spec, work.mesh), spec) for spec in lora_specs(work.config, work.lora).values()),
        key=lambda pair: pair[0],
    )
    return FLOAT32 * (elements + 7 * elements // (spec.shape[0] if spec.axes[0] == "layers" else 1))


def _moment_bytes(config: Qwen3MoeConfig, lora: LoraConfig) -> int:
    return 2 * FLOAT32 * adapter_count(config, lora)


def optimizer_bytes(work: Workload) -> int:
    """Bytes of what the optimizer keeps of the trained parameters on a device, float32; without a few counters."""
    specs = lora_specs(work.config, work.lora) if work.lora else parameter_specs(work.config)
    return FLOAT32 * sum(_kept_elements(spec, work) for spec in specs.values())


def _kept_elements(spec: ParameterSpec, work: Workload) -> int:
    """AdamW has two moments, Lion one, Muon one of a matrix. Adafactor keeps rows and columns of a matrix with long
    sides, whole on every device, else a second moment; an element stands for what it does not keep."""
    held = held_elements(spec, work.mesh)
    match work.optimizer:
        case "adamw":
            return 2 * held
        case "lion":
            return held
        case "muon":
            return held if is_orthogonalised(spec) else 2 * held
        case "adafactor":
            batch, sides = math.prod(spec.shape[: batch_axes(spec)]), spec.shape[batch_axes(spec) :]
            if len(sides) == 2 and min(sides) >= SMALLEST_FACTORED:
                return batch * (sum(sides) + 1)
            return held + 2 * batch


def orthogonal_bytes(work: Workload) -> int:
    """Bytes that Muon needs at once to orthogonalise its largest stack: three arrays of its size (estimated)."""
    if work.optimizer != "muon":
        return 0
    specs = lora_specs(work.config, work.lora) if work.lora else parameter_specs(work.config)
    return 3 * FLOAT32 * max(held_elements(spec, work.mesh) for spec in specs.values() if is_orthogonalised(spec))


def batch_axes(spec: ParameterSpec) -> int:
    """How many of an array's axes, the first ones, count matrices or vectors: those of layers and experts."""
    return sum(axis in ("layers", "experts", "adapted_experts") for axis in spec.axes[:2])


def is_orthogonalised(spec: ParameterSpec) -> bool:
    """Whether Muon takes an array: if it holds the layers' matrices. Embedding and head are no such."""
    return spec.axes[0] == "layers" and len(spec.shape) == 2 + batch_axes(spec)


def embedding_on_host(config: Qwen3MoeConfig, lora: LoraConfig | None, remat: Remat) -> bool:
    """Whether the embedding lies in the host's memory: it can if it is frozen and is not also the head."""
    frozen = lora is not None and "embed_tokens" not in lora.modules_to_save
    return remat == "offload" and frozen and not config.tie_word_embeddings


def padded_rows(routed_rows: int, num_experts: int, experts: Experts) -> int:
    """Upper bound on the padded rows P: the rows of every expert are padded to whole tiles.

    A tile of the loop has at most 128 rows and at most half an expert's mean load, but at least 8 rows, as in
    `jaxmoe.ops.experts`.
    """
    tile = MOSAIC_ROWS if experts != "tiled" else min(128, max(8, routed_rows // (2 * num_experts)))
    return routed_rows + min(num_experts, routed_rows) * tile


def loss_chunk(remat: Remat) -> int:
    """How many tokens have logits at a time; fewer with "offload", which makes the loss slightly slower."""
    return 256 if remat == "offload" else 1024


def layer_input_bytes(config: Qwen3MoeConfig, tokens: int) -> int:
    """Bytes of the layers' inputs, float32. The policy "offload" holds them in the host's memory."""
    return config.num_hidden_layers * tokens * config.hidden_size * FLOAT32


def kept_bytes(work: Workload) -> int:
    """Bytes of the results that the policy saves in all layers besides their inputs."""
    if work.remat in ("low-memory", "offload"):
        return 0
    config, lora, tokens, sparse = work.config, work.lora, work.tokens, len(work.config.sparse_layers)
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    # The output of attention, queries, keys and values, the heads' output and its normaliser.
    attention = tokens * ((config.hidden_size + 2 * heads + 2 * kv) * work.size + config.num_attention_heads * FLOAT32)
    attention += tokens * _ranks(lora, LORA_GROUPS["attention"]) * work.size  # and low-rank rows
    kept = config.num_hidden_layers * attention
    if sparse:
        # Router logits and probabilities; experts, weights and both directions of the permutation.
        routing = tokens * (2 * config.num_experts + 3 * config.num_experts_per_tok) + work.rows
        kept += sparse * FLOAT32 * routing
        if work.remat == "fast":
            width = 2 * config.moe_intermediate_size + _ranks(lora, LORA_GROUPS["experts"])
            kept += sparse * work.rows * width * work.size
    return kept


def _ranks(lora: LoraConfig | None, group: Sequence[str]) -> int:
    """The sum of the ranks of the adapters on these targets."""
    return sum(lora.rank(target) for target in lora.targets if target in group) if lora else 0


def adapted_bytes(work: Workload) -> int:
    """Bytes that the gradients of a layer's experts, or of their adapters, need until the end of the layer: the
    gathered rows, the rows of the output's gradient, and the activation."""
    config = work.config
    if not config.sparse_layers or (work.lora and not _ranks(work.lora, LORA_GROUPS["experts"])):
        return 0
    return work.rows * (2 * config.hidden_size + config.moe_intermediate_size) * work.size


def scattered_bytes(work: Workload) -> int:
    """Bytes of one layer's adapters of all experts, which exist for a short time where only some experts have one, and
    of their gradients."""
    if not (work.lora and work.lora.adapted_experts):
        return 0
    return 2 * FLOAT32 * sum(_expert_adapters(work).values())


def expert_adapter_bytes(work: Workload) -> int:
    """Bytes of one layer's adapters of the experts as the products read them, with a padded rank, and of their
    gradients before they join those of all layers."""
    multiple = MOSAIC_RANK if work.experts in ("mosaic", "mma") else 1
    padded = sum(
        elements // rank * -(-rank // multiple) * multiple for rank, elements in _expert_adapters(work).items()
    )
    return padded * work.size + FLOAT32 * sum(_expert_adapters(work).values())


def _expert_adapters(work: Workload) -> dict[int, int]:
    """Rank -> number of elements of one layer's adapters of all experts that have this rank."""
    if work.lora is None:
        return {}
    lora, found = replace(work.lora, adapted_experts=()), dict[int, int]()
    specs = lora_specs(work.config, lora)
    for target in lora.targets:
        if target in LORA_GROUPS["experts"]:
            both = [specs[f"{LORA_TARGETS[target].path}.{name}"] for name in ("lora_A", "lora_B")]
            elements = sum(held_elements(spec, work.mesh) // spec.shape[0] for spec in both)
            found[lora.rank(target)] = found.get(lora.rank(target), 0) + elements
    return found


def attention_bytes(work: Workload, *, training: bool) -> int:
    """Bytes of the temporaries of attention, not counting its operands and its result.

    `jaxmoe.ops.attention_chunked` holds the logits and probabilities of a chunk of queries, and in training their
    gradients. cuDNN's backward pass holds float32 gradients of whole sequences, once for each document of a call.
    On a `context` axis both kinds hold the keys and values of whole sequences, in training with float32 gradients;
    `jaxmoe.ops.attention_context` also holds the logits of a pair of tiles.
    """
    config, shared, heads = work.config, 0, work.tokens * work.config.num_attention_heads
    if (devices := work.mesh.context) > 1:
        keys = work.batch_size * work.seq_length * config.num_key_value_heads * config.head_dim
        shared = 2 * keys * (work.size + (FLOAT32 if training else 0))
        if work.attention != "cudnn" or (config.sliding_window or work.seq_length) < work.seq_length:
            tile = min(work.seq_length // (2 * devices), CONTEXT_TILE)
            return shared + (8 if training else 4) * work.batch_size * config.num_attention_heads * tile**2 * FLOAT32
    if work.attention == "blocks":
        return (8 if training else 4) * heads * query_chunk(work.seq_length) * FLOAT32
    if work.attention == "flash":  # a number for each head's query
        return heads * FLOAT32 if training else 0
    documents = CUDNN_SEQUENCES if work.packed else 1
    return shared + (2 * documents * heads * config.head_dim * FLOAT32 if training else 0)


def query_chunk(seq_length: int) -> int:
    """Queries per chunk of attention, as in `jaxmoe.ops.attention_chunked.chunk_length`."""
    return min(max(64, -(-seq_length // 8)), 1024)


def training_layer_bytes(work: Workload) -> int:
    """Bytes of what one layer's backward pass holds at its peak: results and gradients of the layer.

    The gradients of the MLP are gone when those of attention begin, so only the larger of the two counts.
    """
    config, tokens, size = work.config, work.tokens, work.size
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    # The loop over tiles has not been measured on a GPU. The forecast assumes that all gradients exist at once.
    times = 2 if work.experts == "tiled" else 1
    mlp = times * mlp_bytes(work) + adapted_bytes(work) + expert_adapter_bytes(work) + scattered_bytes(work)
    # Queries and keys before their norm; the gradients of the output, and of queries, keys and values. Documents are
    # handled a few at a time: the gradients of the last ones are then added to those of all.
    gradients = tokens * size * (2 * heads + kv + (2 if work.packed else 1) * (heads + 2 * kv))
    attention = gradients + attention_bytes(work, training=True)
    residual = tokens * config.hidden_size * FLOAT32  # the gradient of the layer's output
    if work.remat == "offload":
        residual *= 2  # and the layer's input, back from the host
    return times * attention_result_bytes(work) + residual + max(mlp, attention)


def layer_bytes(work: Workload) -> int:
    """Bytes of all results inside the larger kind of decoder layer."""
    return attention_result_bytes(work) + mlp_bytes(work)


def attention_result_bytes(work: Workload) -> int:
    """Bytes of a layer's normalised input, residual stream, queries, keys, values and the heads' output."""
    config, tokens, size = work.config, work.tokens, work.size
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return tokens * (config.hidden_size * (size + FLOAT32) + (2 * heads + 2 * kv) * size)


def mlp_bytes(work: Workload) -> int:
    """Bytes of all results of the larger kind of MLP, dense or mixture."""
    config, tokens, size = work.config, work.tokens, work.size
    mlps = [0]
    if config.sparse_layers:
        # Gathered rows, gate and up, their product, the experts' outputs.
        mlps.append(work.rows * (2 * config.hidden_size + 3 * config.moe_intermediate_size) * size)
    if config.dense_layers:
        mlps.append(tokens * 3 * config.intermediate_size * size)
    return max(mlps)


def format_bytes(count_of_bytes: int) -> str:
    """Bytes in binary units, three significant digits: 61064245248 -> '56.9 GiB'."""
    value, unit = float(count_of_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{count_of_bytes} B" if unit == "B" else f"{value:.3g} {unit}"


def _held(specs: Mapping[str, ParameterSpec], mesh: MeshShape) -> int:
    """Number of parameters that lie on a device."""
    return sum(held_elements(spec, mesh) for spec in specs.values())


def _count(specs: Mapping[str, ParameterSpec]) -> int:
    return sum(math.prod(spec.shape) for spec in specs.values())
