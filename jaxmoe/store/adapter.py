"""The converted adapter: one Orbax item, and `adapter.json` with both configs and a checksum for every array."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.errors import ConfigError, UserError, is_finite, shown
from jaxmoe.lora import LORA_TARGETS, OPTIONAL_FIELDS, LoraConfig
from jaxmoe.parameters import lora_specs
from jaxmoe.store.files import check_links, output_folder
from jaxmoe.store.items import check_entries, read_item, read_manifest, same_names, write_item, write_manifest

ADAPTER_MANIFEST = "adapter.json"
_KIND, _VERSION = "jaxmoe adapter", 2
_WHOLE_CHECKSUMS = 1  # the version whose checksums are those of whole arrays, not of pieces


def write_adapter(
    dst: str | os.PathLike[str], config: Qwen3MoeConfig, lora: LoraConfig, adapters: Mapping[str, Any]
) -> None:
    """Writes a converted adapter into the folder `dst`, which must be new or empty.

    `adapters` holds the arrays of `lora_specs(config, lora)`, NumPy or JAX.

    Raises:
        UserError: another set of arrays or another shape, or `dst` is not empty.
    """
    arrays = {name: np.asarray(array) for name, array in adapters.items()}
    check_adapter("adapter", config, lora, arrays)
    with output_folder(dst) as folder:
        entries = write_item(folder / "adapter", arrays)
        model = config.to_hf()
        content = {"lora": lora.to_dict(), "model": model, "arrays": entries}
        write_manifest(folder / ADAPTER_MANIFEST, _KIND, _VERSION, content)


def read_adapter(
    path: str | os.PathLike[str], config: Qwen3MoeConfig | None = None, verify: bool = True
) -> tuple[Qwen3MoeConfig, LoraConfig, dict[str, np.ndarray]]:
    """Reads a converted adapter: (config of the model that it was made for, config of the adapter, arrays).

    `verify` compares checksums.

    Raises:
        UserError: another folder or a damaged one, a link that leads out of it, or shapes that do not fit `config`,
            which by default is the first config.
    """
    path = pathlib.Path(path)
    check_links(path)
    if not path.is_dir() or not (path / ADAPTER_MANIFEST).is_file():
        raise UserError(f"{path}: expected a converted adapter, found no {ADAPTER_MANIFEST}")
    manifest = read_manifest(path / ADAPTER_MANIFEST, _KIND, (_WHOLE_CHECKSUMS, _VERSION))
    raw = manifest.get("lora")
    known = {field.name for field in fields(LoraConfig)}
    required = known - set(OPTIONAL_FIELDS)
    if not isinstance(raw, dict) or not required <= set(raw) <= known or not isinstance(manifest.get("model"), dict):
        raise UserError(
            f"{path / ADAPTER_MANIFEST}: lora, model: expected {', '.join(sorted(known))}, found {shown(raw)}"
        )
    try:
        lora = LoraConfig(**{name: _tuples(value) for name, value in raw.items()})
        numbers = [lora.scale(target) * lora.rank(target) for target in lora.targets]
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path / ADAPTER_MANIFEST}: lora: {error}") from None
    if not all(map(is_finite, numbers)) or type(lora.use_rslora) is not bool:
        raise UserError(f"{path / ADAPTER_MANIFEST}: lora: expected finite scales, found {shown(raw)}")
    try:
        own = Qwen3MoeConfig.from_hf(manifest["model"])
    except ConfigError as error:
        raise UserError(f"{path / ADAPTER_MANIFEST}: model: {error}") from None
    shapes = {name: spec.shape for name, spec in lora_specs(config or own, lora).items()}
    check_entries(f"{path / ADAPTER_MANIFEST}: arrays", manifest.get("arrays"), shapes)
    return own, lora, read_item(path / "adapter", manifest["arrays"], verify)


def _tuples(value: Any) -> Any:
    """A JSON value with tuples in place of lists: the fields of `LoraConfig` are tuples."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder with a converted adapter."""
    return (pathlib.Path(path) / ADAPTER_MANIFEST).is_file()


def check_adapter(where: str, config: Qwen3MoeConfig, lora: LoraConfig, adapters: Mapping[str, np.ndarray]) -> None:
    """Raises UserError, which starts with `where`, unless `adapters` has the names and shapes of `lora_specs`, and
    zeros beyond a layer's rank and its experts."""
    specs = lora_specs(config, lora)
    same_names(where, specs, adapters)
    for name, spec in specs.items():
        if adapters[name].shape != spec.shape:
            raise UserError(f"{where}: {name}: expected shape {spec.shape}, found {adapters[name].shape}")
    for target in filter(lora.expert_places, lora.targets):
        arrays = [adapters[f"{LORA_TARGETS[target].path}.lora_{x}"] for x in "AB"]
        for slot, experts in enumerate(lora.adapted_experts):
            if any(array[slot, len(experts) :].any() for array in arrays):
                raise UserError(
                    f"{where}: {target}: expected zeros after the adapters of {len(experts)} experts, found others in "
                    f"layer {slot} of its stack"
                )
    for target, ranks in lora.layer_ranks:
        a, b = (adapters[f"{LORA_TARGETS[target].path}.lora_{x}"] for x in "AB")
        for slot, rank in enumerate(ranks):
            if a[slot][..., rank:, :].any() or b[slot][..., rank:].any():
                raise UserError(
                    f"{where}: {target}: expected zeros beyond the rank {rank} of layer {slot} of its stack"
                )
