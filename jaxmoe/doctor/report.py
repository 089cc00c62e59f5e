"""What the doctor finds: devices, versions, the implementation of each operation, and a forecast of the memory.

Only `devices`, `operations` and what depends on them start JAX.
"""

from __future__ import annotations

import pathlib
import shutil
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxmoe import __version__, environment, memory
from jaxmoe.config import LoraConfig, Qwen3MoeConfig, expand_targets, read_config, read_json
from jaxmoe.doctor import cards, nodes
from jaxmoe.errors import UserError
from jaxmoe.lora import adapts_experts, modules_to_save
from jaxmoe.memory import LOSSES_OVER_PAIRS, LossName, OptimizerName
from jaxmoe.parameters import Quantization
from jaxmoe.presets import PRESETS
from jaxmoe.store.converted import is_converted
from jaxmoe.weight_form import WeightForm, weight_form

PACKAGES = (
    "jax jaxlib jax-cuda12-plugin jax-cuda13-plugin flax optax orbax-checkpoint numpy ml_dtypes safetensors "
    "transformers tokenizers tensorboardX torch peft bitsandbytes"
).split()


@dataclass(frozen=True)
class DoctorConfig:
    """The flags of `python -m jaxmoe.doctor`."""

    model: str | None = field(
        default=None,
        metadata={
            "help": f"forecast the memory of this model: a folder, a config.json, or one of {', '.join(PRESETS)}",
            "metavar": "MODEL",
        },
    )
    train: Literal["lora", "full"] = field(default="lora", metadata={"help": "train adapters or all parameters"})
    lora_targets: tuple[str, ...] = field(
        default=("attention", "experts"),
        metadata={"help": "what gets adapters: groups (attention, router, experts, dense) or targets"},
    )
    lora_experts: int | None = field(
        default=None, metadata={"help": "how many experts of a layer get an adapter (default: all)"}
    )
    lora_r: int = field(default=16, metadata={"help": "rank of the adapters"})
    modules_to_save: tuple[str, ...] = field(
        default=(), metadata={"help": "weights to train in full beside the adapters: lm_head, embed_tokens"}
    )
    batch_size: int = field(default=1, metadata={"help": "sequences per micro-batch"})
    seq_length: int = field(default=2048, metadata={"help": "tokens per sequence"})
    loss: LossName = field(
        default="next-token", metadata={"help": "dpo and orpo hold two sequences, a pair, for each one of --batch-size"}
    )
    optimizer: OptimizerName = field(default="adamw", metadata={"help": "the optimizer whose state is counted"})
    accumulation: int = field(default=1, metadata={"help": "micro-batches per optimizer step"})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="bfloat16", metadata={"help": "dtype of the parameters and of the computation"}
    )
    quantize: WeightForm | None = field(
        default=None,
        metadata={"help": "hold frozen projections, dense MLPs and experts in 4 bits (nf4: QLoRA) or in 8 (fp8)"},
    )
    dequantize: bool = field(default=False, metadata={"help": "decode weights in FP8 or NF4 while they are read"})
    pack: bool = field(
        default=True, metadata={"help": "pack several records into a sequence; attention then needs more memory"}
    )
    cards: bool = field(
        default=False,
        metadata={"help": "show what runs and fits on cards of 24 to 180 GB: of --model, or of each published shape"},
    )
    mesh: bool = field(
        default=False,
        metadata={
            "help": "show this machine's GPUs and links, and what --mesh auto picks on nodes of 8 GPUs: of --model, "
            "or of 30B and 235B"
        },
    )
    json: bool = field(default=False, metadata={"help": "print the report as one JSON object"})

    def __post_init__(self) -> None:
        if self.train == "full" and self.quantize is not None:
            raise UserError("quantize: only valid with LoRA training, found train full")
        if self.train == "full" and self.cards:
            raise UserError("cards: only valid with LoRA training, found train full")
        for name in ("lora_experts", "lora_r", "batch_size", "seq_length", "accumulation"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}: expected at least 1, found {value}")


def versions() -> dict[str, str | None]:
    """The versions of Python, of jaxmoe and of the packages that it can use; None if one is not installed."""
    return environment.versions(("python", "jaxmoe", *PACKAGES)) | {"jaxmoe": __version__}


def devices() -> list[dict[str, Any]]:
    """JAX's devices: name, platform, and the bytes that JAX may use (None if unknown)."""
    import jax

    return [
        {"name": device.device_kind, "platform": device.platform, "memory": memory.device_bytes(device)}
        for device in jax.devices()
    ]


def operations() -> list[tuple[str, str, str]]:
    """(operation, implementation, reason) on the default device."""
    from jaxmoe.ops import implementations

    return [
        *implementations.explain(),
        ("expert dispatch", "sort", "stable sort by expert; no token is dropped"),
    ]


def load_config(model: str) -> Qwen3MoeConfig:
    """The config that `model` names: a preset, a folder, or a config.json.

    Raises:
        UserError: `model` is none of the three, or its config asks for something that is not supported.
    """
    if model in PRESETS:
        return PRESETS[model]
    path = pathlib.Path(model)
    if path.is_dir():
        return Qwen3MoeConfig.from_pretrained(path)
    if path.is_file():
        return read_config(path)[0]
    raise UserError(f"model: expected a folder, a config.json or one of {', '.join(PRESETS)}; found {model!r}")


def stored_in(model: str) -> WeightForm | None:
    """The form in which the checkpoint of `model` stores its weights, as its config.json says; None: not quantised."""
    if model in PRESETS:
        return None
    path = pathlib.Path(model)
    raw = read_json(path / "config.json" if path.is_dir() else path)
    return weight_form(raw.get("quantization_config"))


def quantization_of(model: str) -> Quantization | None:
    """Which weights of the checkpoint in the folder `model` are quantised; None if there is no such checkpoint.

    Raises:
        UserError: a checkpoint that cannot be read.
    """
    path = pathlib.Path(model)
    if stored_in(model) is None or not (is_converted(path) or any(path.glob("*.safetensors"))):
        return None
    from jaxmoe.model.opening import open_checkpoint

    return open_checkpoint(path)[1].quantization


def forecast(options: DoctorConfig) -> dict[str, Any]:
    """Parameter counts, and the memory that training and generation need, part by part, in bytes.

    Quantised weights stay as they are stored unless `dequantize` decodes them.

    Raises:
        UserError: full training of a quantised model, another form for one, `dequantize` of plain weights, adapters on
            layers that the model lacks, or an unknown model.
    """
    assert options.model is not None
    config = load_config(options.model)
    lora = _lora(options, config)
    stored = stored_in(options.model)
    if options.dequantize and stored is None:
        raise UserError(f"{options.model}: dequantize: expected weights in FP8 or NF4, found neither")
    held = None if options.dequantize else stored
    if held and options.quantize not in (None, held):
        raise UserError(
            f"quantize: expected plain weights or {options.quantize}, found {held} in {options.model} "
            "(--dequantize decodes it)"
        )
    if held and options.train == "full":
        why = f"since {options.model} is in {held} (--dequantize decodes it)"
        raise UserError(f"train: expected lora, {why}, found full")
    quantize = options.quantize or held
    shape = {"batch_size": options.batch_size, "seq_length": options.seq_length, "dtype": options.dtype}
    shape["quantize"] = quantize
    quantization = quantization_of(options.model) if held and options.quantize is None else None
    selected = _implementations(config, options.dtype)
    trained = lora if options.train == "lora" else None
    parameters = memory.parameter_count(config)
    workload = memory.Workload(
        config,
        trained,
        **shape,
        accumulation=options.accumulation,
        packed=options.pack,
        quantization=quantization,
        pairs=options.loss in LOSSES_OVER_PAIRS,
        optimizer=options.optimizer,
        **selected,
    )
    training = memory.training_forecasts(workload)
    return {
        "model": options.model,
        "stored": stored,
        "parameters": parameters,
        "active_parameters": memory.active_parameter_count(config),
        "trained_parameters": memory.adapter_count(config, trained) if trained else parameters,
        **shape,
        "loss": options.loss,
        "training": training["low-memory"],
        "training_by_remat": {remat: plan.total for remat, plan in training.items()},
        "generation": memory.generation_forecast(workload),
    }


def on_cards(options: DoctorConfig) -> dict[str, tuple[memory.Workload, list[cards.Row]]]:
    """For the model of the options, or each published shape: a LoRA training step, and what fits on which card.

    Raises:
        UserError: adapters on layers that the model lacks, or an unknown model.
    """
    found = {}
    for model in (options.model,) if options.model is not None else PRESETS:
        config = load_config(model)
        work = memory.Workload(
            config,
            _lora(options, config),
            options.batch_size,
            options.seq_length,
            options.dtype,
            accumulation=options.accumulation,
            packed=options.pack,
            pairs=options.loss in LOSSES_OVER_PAIRS,
            optimizer=options.optimizer,
        )
        found[model] = work, list(cards.rows(work))
    return found


def on_nodes(options: DoctorConfig) -> dict[str, tuple[memory.Workload, list[nodes.Fit]]]:
    """For the model of the options, or 30B and 235B: a training step, whose batch is that of each device, and what
    holds it.

    Raises:
        UserError: adapters on layers that the model lacks, or an unknown model.
    """
    found = {}
    for model in (options.model,) if options.model is not None else nodes.MODELS:
        config = load_config(model)
        work = memory.Workload(
            config,
            _lora(options, config) if options.train == "lora" else None,
            options.batch_size,
            options.seq_length,
            options.dtype,
            accumulation=options.accumulation,
            packed=options.pack,
        )
        forms: dict[str, str | None] = {options.dtype: None}
        if options.train == "lora":
            forms |= {"FP8": "fp8", "NF4": "nf4"}
        found[model] = work, list(nodes.fits(work, forms))
    return found


def _lora(options: DoctorConfig, config: Qwen3MoeConfig) -> LoraConfig:
    """The adapters of the options."""
    saved = modules_to_save(options.modules_to_save, config)
    targets, experts = expand_targets(options.lora_targets), ()
    if options.lora_experts is not None and any(map(adapts_experts, targets)):
        if options.lora_experts > config.num_experts:
            raise UserError(f"lora_experts: expected at most {config.num_experts}, found {options.lora_experts}")
        experts = (tuple(range(options.lora_experts)),) * len(config.sparse_layers)  # the memory is that of any others
    return LoraConfig(r=options.lora_r, targets=targets, adapted_experts=experts, **saved)


def _implementations(config: Qwen3MoeConfig, dtype: str) -> Any:
    """The names of the implementations of attention and experts on this device; empty if JAX finds no device."""
    from jaxmoe.model.selection import selected_implementations

    try:
        return selected_implementations(config, dtype)
    except RuntimeError:
        return {}


def report(options: DoctorConfig) -> dict[str, Any]:
    """The whole report: versions, devices, problems, and, where known, operations and the forecast."""
    found: dict[str, Any] = {"versions": versions(), "devices": [], "problems": []}
    try:
        found["devices"] = devices()
        found["operations"] = operations()
    except RuntimeError as error:  # raised by JAX if a driver or plugin does not match
        found["problems"].append(f"JAX finds no device: {' '.join(str(error).split())}")
    on_gpu = any(device["platform"] == "gpu" for device in found["devices"])
    if found["devices"] and not on_gpu and shutil.which("nvidia-smi"):
        found["problems"].append(
            "an NVIDIA driver is installed, but JAX does not use the GPU: pip install 'jaxmoe[cuda12]' (or cuda13)"
        )
    if found["devices"]:
        from jaxmoe.model.selection import fallbacks, jax_without_kernels

        found["problems"] += jax_without_kernels()
    if options.mesh:
        found["node"], problems = nodes.this_machine()
        found["problems"] += problems
        found["nodes"] = on_nodes(options)
    if options.cards:
        found["cards"] = on_cards(options)
    if options.model is not None:
        found["forecast"] = forecast(options)
        if found["devices"]:
            found["problems"] += fallbacks(load_config(options.model), options.dtype)
    return found
