"""What this machine has, which implementation each operation takes, and what fits: `python -m jaxmoe.doctor`.

With `--model`, a forecast of the memory that training and generation need; `qwen3-30b-a3b` needs no download.
"""

from __future__ import annotations

import json
import pathlib
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any, Literal, get_args

from jaxmoe import __version__, memory
from jaxmoe.cli.arguments import ArgumentParser, add_dataclass_arguments, dataclass_from_arguments
from jaxmoe.config import LoraConfig, Qwen3MoeConfig, expand_targets, read_json
from jaxmoe.errors import UserError
from jaxmoe.presets import PRESETS

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
            "help": f"forecast this model's memory: a folder, a config.json, or one of {', '.join(PRESETS)}",
            "metavar": "MODEL",
        },
    )
    train: Literal["lora", "full"] = field(default="lora", metadata={"help": "train adapters or all parameters"})
    lora_targets: tuple[str, ...] = field(
        default=("attention", "experts"), metadata={"help": "groups (attention, router, experts, dense) or targets"}
    )
    lora_r: int = field(default=16, metadata={"help": "rank of the adapters"})
    batch_size: int = field(default=1, metadata={"help": "rows in a batch"})
    seq_length: int = field(default=2048, metadata={"help": "tokens in a row"})
    accumulation: int = field(default=1, metadata={"help": "micro-batches per optimizer step"})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="bfloat16", metadata={"help": "dtype of the parameters and of the computation"}
    )
    quantize: Literal["nf4"] | None = field(
        default=None, metadata={"help": "frozen projections, dense MLPs and experts in 4 bits (QLoRA)"}
    )
    pack: bool = field(
        default=True, metadata={"help": "a row may hold several records; without, attention takes less memory"}
    )
    json: bool = field(default=False, metadata={"help": "print one JSON object"})

    def __post_init__(self) -> None:
        if self.train == "full" and self.quantize is not None:
            raise UserError("quantize: expected only where adapters are trained")
        for name in ("lora_r", "batch_size", "seq_length", "accumulation"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 1, found {getattr(self, name)}")


def versions() -> dict[str, str | None]:
    """Installed version of Python, of this package and of each package that it can use; None where there is none."""
    found: dict[str, str | None] = {"python": platform.python_version(), "jaxmoe": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def devices() -> list[dict[str, Any]]:
    """JAX's devices: name, platform, and the bytes that JAX may use there (None where unknown)."""
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
        ("expert dispatch", "sort", "stable sort by expert, gathers both ways, no token dropped"),
        ("attention, decoding", "xla", "jax.nn.dot_product_attention against the KV cache, mask [B, T, S]"),
    ]


def load_config(model: str) -> Qwen3MoeConfig:
    """The config of a preset's name, a folder, or a config.json.

    Raises:
        UserError: it is none of the three, or the config cannot be honoured.
    """
    if model in PRESETS:
        return PRESETS[model]
    path = pathlib.Path(model)
    if path.is_dir():
        return Qwen3MoeConfig.from_pretrained(path)
    if path.is_file():
        return Qwen3MoeConfig.from_hf(read_json(path))
    raise UserError(f"model: expected a folder, a config.json or one of {', '.join(PRESETS)}; found {model!r}")


def stored_in(model: str) -> Literal["nf4"] | None:
    """What `load_config`'s model is quantised in already, by its config.json."""
    from convert.nf4 import is_nf4

    if model in PRESETS:
        return None
    path = pathlib.Path(model)
    raw = read_json(path / "config.json" if path.is_dir() else path)
    return "nf4" if is_nf4(raw.get("quantization_config")) else None


def forecast(options: DoctorConfig) -> dict[str, Any]:
    """Parameter counts, and the parts of the memory that training and generation take, in bytes."""
    assert options.model is not None
    config = load_config(options.model)
    lora = LoraConfig(r=options.lora_r, targets=expand_targets(options.lora_targets))
    quantize = options.quantize or stored_in(options.model)
    if quantize and options.train == "full":
        raise UserError(f"train: expected lora, for {options.model} is in {quantize}, found full")
    shape = {"batch_size": options.batch_size, "seq_length": options.seq_length, "dtype": options.dtype}
    shape["quantize"] = quantize
    taken = _implementations(config, options.dtype)
    trained = lora if options.train == "lora" else None
    parameters = memory.parameter_count(config)
    training = {
        remat: memory.training_forecast(
            config,
            trained,
            **shape,
            accumulation=options.accumulation,
            remat=remat,
            packed=options.pack,
            **taken,
        )
        for remat in get_args(memory.Remat)
    }
    return {
        "model": options.model,
        "parameters": parameters,
        "active_parameters": memory.active_parameter_count(config),
        "trained_parameters": memory.adapter_count(config, trained) if trained else parameters,
        **shape,
        "training": training["low-memory"],
        "training_by_remat": {remat: plan.total for remat, plan in training.items()},
        "generation": memory.generation_forecast(config, trained, **shape, **taken),
    }


def _implementations(config: Qwen3MoeConfig, dtype: str) -> Any:
    """What this device takes for attention and experts; where JAX finds none, what runs anywhere."""
    from jaxmoe.model.selection import selected_implementations

    try:
        return selected_implementations(config, dtype)
    except RuntimeError:
        return {}


def report(options: DoctorConfig) -> dict[str, Any]:
    """Everything that the doctor knows, as one dictionary."""
    found: dict[str, Any] = {"versions": versions(), "devices": [], "problems": []}
    try:
        found["devices"] = devices()
        found["operations"] = operations()
    except RuntimeError as error:  # JAX's answer to a driver or plugin that does not fit
        found["problems"].append(f"JAX finds no device: {' '.join(str(error).split())}")
    on_gpu = any(device["platform"] == "gpu" for device in found["devices"])
    if found["devices"] and not on_gpu and shutil.which("nvidia-smi"):
        found["problems"].append(
            "there is an NVIDIA driver and JAX does not use it: pip install 'jaxmoe[cuda12]' (or cuda13)"
        )
    if options.model is not None:
        found["forecast"] = forecast(options)
        if found["devices"]:
            from jaxmoe.model.selection import fallbacks

            found["problems"] += fallbacks(load_config(options.model), options.dtype)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report."""
    parser = ArgumentParser(description="What this machine has, which implementation each operation takes, what fits.")
    add_dataclass_arguments(parser, DoctorConfig)
    options = dataclass_from_arguments(DoctorConfig, parser.parse_args(argv))
    found = report(options)
    if options.json:
        if "forecast" in found:
            for name in ("training", "generation"):
                value = found["forecast"][name]
                found["forecast"][name] = {**asdict(value), "total": value.total}
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(_lines(found)))
    return 0


def _lines(found: dict[str, Any]) -> list[str]:
    lines = ["Devices"]
    for device in found["devices"]:
        size = "unknown memory" if device["memory"] is None else memory.human(device["memory"])
        lines.append(f"  {device['platform']}: {device['name']}, {size}")
    lines += [f"  ! {problem}" for problem in found["problems"]]
    lines += ["", "Versions"]
    lines += [f"  {name:<18} {version or 'not installed'}" for name, version in found["versions"].items()]
    if "operations" in found:
        lines += ["", "Operations"]
        lines += [f"  {what:<21} {how:<12} {why}" for what, how, why in found["operations"]]
    if "forecast" not in found:
        return [*lines, "", "What fits: name a model, for instance --model qwen3-30b-a3b"]
    plan = found["forecast"]
    dtype = f"{plan['dtype']} with weights in {plan['quantize']}" if plan["quantize"] else plan["dtype"]
    lines += [
        "",
        f"Memory of {plan['model']} in {dtype}, {plan['batch_size']} x {plan['seq_length']} tokens",
        f"  {plan['parameters']:,} parameters, {plan['active_parameters']:,} of them active for a token, "
        f"{plan['trained_parameters']:,} trained",
    ]
    for name in ("training", "generation"):
        total = plan[name].total
        lines += ["", f"  {name}: {memory.human(total)}"]
        lines += [
            f"    {part.name:<20} {memory.human(part.bytes):>9}{'' if part.exact else '  (estimate)'}"
            for part in plan[name].parts
        ]
        lines += [f"    {_verdict(total, device)}" for device in _distinct(found["devices"])]
        if name == "training":
            totals = ", ".join(f"{remat} {memory.human(size)}" for remat, size in plan["training_by_remat"].items())
            lines += [f"    by --remat: {totals}; auto takes the first but offload that leaves a tenth of the device"]
    return lines


def _verdict(total: int, device: dict[str, Any]) -> str:
    if device["memory"] is None:
        return f"{device['name']}: memory unknown"
    room = device["memory"] - total
    word = "fits" if room >= 0 else "DOES NOT FIT"
    return f"{word} on one {device['name']}: {memory.human(abs(room))} {'left' if room >= 0 else 'short'}"


def _distinct(all_devices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [device for i, device in enumerate(all_devices) if device not in all_devices[:i]]
