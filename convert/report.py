"""Describes a folder: an HF checkpoint, a converted checkpoint, a PEFT adapter or a converted adapter."""

from __future__ import annotations

import math
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from convert import fp8
from convert.adapters import SETTINGS, WEIGHTS
from convert.hf2jax import read_hf
from convert.mixed import unquantized_layers
from convert.safetensors_io import Tensor, open_folder, read_header
from jaxmoe.config import Qwen3MoeConfig, read_json
from jaxmoe.memory import parameter_count
from jaxmoe.parameters import Quantization
from jaxmoe.store.adapter import is_adapter, read_adapter
from jaxmoe.store.converted import is_converted, read_converted

Entry = tuple[str, tuple[int, ...], str, int]  # name, shape, dtype, bytes


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Kind, config, tensors (grouped over layers and experts), number of parameters and bytes, as JSON values.

    A converted folder is read whole, because its checksums are compared.

    Raises:
        UserError: what reading the folder raises.
    """
    path = pathlib.Path(path)
    if is_converted(path):
        source = read_converted(path)
        entries = [
            (f"layers.{block.layer}.{name}" if block.layer is not None else name, *_facts(array))
            for block in source.blocks()
            for name, array in block.arrays.items()
        ]
        more = _quantized(source.config, source.quantization) | {"checksums": "verified"}
        return _report("converted checkpoint", _model(source.config), entries, **more)
    if is_adapter(path):
        config, lora, arrays = read_adapter(path)
        entries = [(name, *_facts(array)) for name, array in arrays.items()]
        return _report("converted adapter", lora.to_dict() | {"model": _model(config)}, entries, checksums="verified")
    more: dict[str, Any] = {}
    if (path / SETTINGS).is_file():
        tensors = read_header(path / WEIGHTS).values()
        settings = {key: value for key, value in read_json(path / SETTINGS).items() if value not in (None, {}, [])}
        kind, summary = "PEFT adapter", settings
    else:
        checkpoint = read_hf(path)
        summary, kind = _model(checkpoint.config), "HF checkpoint"
        more = _quantized(checkpoint.config, checkpoint.quantization)
        tensors = open_folder(path).values()
    return _report(kind, summary, _hf_entries(tensors), **more)


def _hf_entries(tensors: Iterable[Tensor]) -> list[Entry]:
    """One entry per weight. The bytes of a weight in NF4 include those of the tensors that accompany its codes."""
    entries: dict[str, Entry] = {}
    beside: dict[str, int] = {}
    for tensor in tensors:
        weight, dot, _ = tensor.name.partition(".weight.")
        if dot:
            beside[f"{weight}.weight"] = beside.get(f"{weight}.weight", 0) + tensor.data.nbytes
        else:
            dtype = "float8_e4m3fn" if tensor.code == fp8.CODE else tensor.stored_dtype.name
            entries[tensor.name] = (tensor.name, tensor.shape, dtype, tensor.data.nbytes)
    for name, nbytes in beside.items():
        _, shape, _, codes = entries[name]
        entries[name] = (name, shape, "nf4", codes + nbytes)
    return list(entries.values())


def _facts(array: np.ndarray) -> tuple[tuple[int, ...], str, int]:
    return array.shape, array.dtype.name, array.nbytes


def _quantized(config: Qwen3MoeConfig, quantization: Quantization | None) -> dict[str, Any]:
    """What a report says of a quantised form, and the number of parameters, which is then not that of the stored
    elements."""
    if quantization is None:
        return {}
    form = f"NF4 with {'double quantisation' if quantization.nested else 'float32 block maxima'}"
    if quantization.form == "fp8":
        form = f"FP8 in blocks of 128 x 128 with {quantization.scales} scales"
    left = {
        path: f" (but not in layers {', '.join(map(str, layers))})"
        for path, layers in unquantized_layers(config, quantization).items()
    }
    text = f"{form}: {', '.join(path + left.get(path, '') for path in quantization.paths)}"
    return {"parameters": parameter_count(config), "quantization": text}


def _model(config: Qwen3MoeConfig) -> dict[str, Any]:
    layers = {"sparse_layers": len(config.sparse_layers), "dense_layers": len(config.dense_layers)}
    return config.to_hf() | layers


def _report(kind: str, config: dict[str, Any], entries: Iterable[Entry], **more: Any) -> dict[str, Any]:
    groups: dict[tuple[str, tuple[int, ...], str], list[int]] = {}
    for name, shape, dtype, nbytes in entries:
        groups.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "*", name), shape, dtype), []).append(nbytes)
    tensors = [
        {"name": name, "count": len(sizes), "shape": list(shape), "dtype": dtype, "bytes": sum(sizes)}
        for (name, shape, dtype), sizes in groups.items()
    ]
    return {
        "kind": kind,
        "parameters": sum(tensor["count"] * math.prod(tensor["shape"]) for tensor in tensors),
        **more,
        "bytes": sum(tensor["bytes"] for tensor in tensors),
        "config": config,
        "tensors": tensors,
    }


def as_text(report: dict[str, Any]) -> str:
    """The report of `inspect` as lines of text."""
    head = f"{report['kind']}: {report['parameters']:,} parameters, {size_text(report['bytes'])}"
    if "checksums" in report:
        head += f", checksums {report['checksums']}"
    lines = [head, *([report["quantization"]] if "quantization" in report else []), ""]
    width = max(len(name) for name in report["config"])
    lines += [f"  {name:<{width}}  {value}" for name, value in report["config"].items()]
    table = [("tensor", "count", "shape", "dtype", "size")]
    for tensor in report["tensors"]:
        shape = " x ".join(map(str, tensor["shape"]))
        table.append((tensor["name"], str(tensor["count"]), shape, tensor["dtype"], size_text(tensor["bytes"])))
    widths = [max(len(row[i]) for row in table) for i in range(5)]
    lines += [
        "",
        *("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table),
    ]
    return "\n".join(lines)


def size_text(nbytes: float) -> str:
    """A size in binary units: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.1f} {unit}" if unit != "B" else f"{int(nbytes)} B"
        nbytes /= 1024
    raise AssertionError
