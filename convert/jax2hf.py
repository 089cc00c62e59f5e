"""Writes an HF checkpoint one layer at a time: sharded safetensors with the keys of the original checkpoint."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from convert import fp8
from convert.adapters import load_adapter, merge
from convert.hf2jax import companion_files, config_bytes
from convert.names import Layout, block_shapes, blocks_of, rows
from convert.nf4 import matrix_tensors
from convert.safetensors_io import Planned, write_sharded
from convert.saved_modules import merged_form
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.errors import UserError, shown
from jaxmoe.nf4.codec import NF4
from jaxmoe.parameters import NESTED_QUANT_MAP, Quantization, stored_specs
from jaxmoe.recode import dequantized
from jaxmoe.store.checkpoint import Block
from jaxmoe.store.converted import is_converted, read_converted
from jaxmoe.store.files import output_folder, write_files

MAX_SHARD_SIZE = 5 * 10**9  # what transformers writes


@dataclass(frozen=True)
class HFForm:
    """How the weights of an HF folder are written.

    `max_shard_size` is in bytes. `stored_tied_head` repeats a tied embedding as lm_head. With `quantization`, weights
    come as the arrays of `stored_specs(config, quantization)`. Those in FP8 are written as Qwen does. Those in NF4 are
    written as bitsandbytes does, with the offset of the second quantisation as text. The length of that text must be
    known before the first byte is written, so `nested_offsets` holds all offsets, by layer and path.
    """

    max_shard_size: int = MAX_SHARD_SIZE
    layout: Layout = "per_expert"
    stored_tied_head: bool = False
    quantization: Quantization | None = None
    nested_offsets: Mapping[int, Mapping[str, np.ndarray]] = field(default_factory=dict)


def write_hf(
    dst: str | os.PathLike[str],
    config: Qwen3MoeConfig,
    dtypes: Mapping[str, np.dtype],
    blocks: Iterable[Block],
    files: Mapping[str, pathlib.Path | bytes],
    form: HFForm = HFForm(),
) -> None:
    """Streams `blocks` (the top level first, then every layer) into the HF folder `dst`, which must be new or empty.

    `dtypes` names the dtype of every path of `parameter_specs(config)`; `files`, name -> file or content, are copied
    beside the weights and must include config.json.
    """
    with output_folder(dst) as folder:
        write_files(folder, files)
        tensors = partial(_tensors, config, dtypes, form)
        outlines = tensors(_outlines(config, dtypes, form))
        planned = [Planned(name, array.shape, array.dtype) for name, array in outlines]
        write_sharded(folder, planned, tensors(blocks), form.max_shard_size)


def _outlines(config: Qwen3MoeConfig, dtypes: Mapping[str, np.dtype], form: HFForm) -> Iterator[Block]:
    """Blocks of the shapes and dtypes to come: all elements are one zero in memory, except the offsets of NF4."""
    specs = stored_specs(config, form.quantization)
    for layer in blocks_of(config):
        arrays = {
            name: np.broadcast_to(np.zeros((), specs[name].dtype or dtypes[name]), shape)
            for name, shape in block_shapes(config, layer, form.quantization).items()
        }
        offsets = form.nested_offsets.get(layer, {}) if layer is not None else {}
        yield Block(layer, arrays | {f"{path}.nested_offset": array for path, array in offsets.items()})


def _tensors(
    config: Qwen3MoeConfig, dtypes: Mapping[str, np.dtype], form: HFForm, blocks: Iterable[Block]
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and array of every tensor of the HF checkpoint, in the order in which it is written."""
    nested_quant_map = None
    for block in blocks:
        if block.layer is None:
            nested_quant_map = block.arrays.get(NESTED_QUANT_MAP)
        for row in rows(config, block.layer, form.layout):
            if f"{row.path}.codes" not in block.arrays:
                path = f"{row.path}.weight" if f"{row.path}.weight" in block.arrays else row.path
                yield row.key, block.arrays[path][row.part]
                continue
            if f"{row.path}.scales" in block.arrays:
                yield from fp8.matrix_tensors(
                    row, block.arrays[f"{row.path}.codes"], block.arrays[f"{row.path}.scales"]
                )
                continue
            one = NF4.of(block.arrays, row.path).matrix(row.matrix)
            yield from matrix_tensors(row, one, dtypes[row.path], nested_quant_map)
        if block.layer is None and form.stored_tied_head:
            yield "lm_head.weight", block.arrays["embed_tokens"]
        del block  # or this name would hold it while the next one is made


def changed_config(content: bytes, changes: Mapping[str, Any]) -> bytes:
    """The content of a config.json with `changes`; the same bytes if there are none."""
    if not changes:
        return content
    return (json.dumps(json.loads(content) | changes, indent=2, ensure_ascii=False) + "\n").encode()


def parse_size(text: str) -> int:
    """The number of bytes in "5GB", "300MB" (decimal units, as in transformers) or "2GiB" (binary units).

    Raises:
        UserError: another text, or less than one byte.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({'|'.join(units)})?", text.strip().upper())
    value = float(match[1]) * units.get(match[2], 1) if match else 0.0
    size = int(value) if math.isfinite(value) else 0
    if size < 1:
        raise UserError(f"size: expected a number of bytes such as 5GB or 500MB, found {shown(text)}")
    return size


def jax2hf(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    dequantize: bool = False,
    on_block: Callable[[Block, int], None] = lambda block, layers: None,
) -> None:
    """Converts the converted folder `src` into the HF folder `dst`, which must be new or empty.

    `adapter`, a PEFT or a converted one, is merged into the weights. Quantised weights keep their bytes and are written
    as bitsandbytes does (NF4) or as Qwen does (FP8). With `dequantize` they are decoded; only then can an adapter be
    merged into them. `on_block` is called after each block with the block and the number of layers.

    Raises:
        UserError: no converted folder, a damaged one, an adapter that does not fit, or `dst` is not empty.
    """
    if not is_converted(src):
        raise UserError(f"{src}: expected a converted folder, found no manifest.json")
    stored = read_converted(src)
    if dequantize and stored.quantization is None:
        raise UserError(f"{src}: dequantize: expected weights in NF4 or FP8, found none")
    if adapter is not None and stored.quantization is not None and not dequantize:
        form = stored.quantization.form.upper()
        raise UserError(
            f"{src}: adapter: expected weights that it can be merged into, found {form} (--dequantize decodes them)"
        )
    source = dequantized(stored) if dequantize else stored
    adapted = load_adapter(adapter, source.config, source) if adapter is not None else None
    merged = merged_form(source, adapted[0] if adapted is not None else None)
    config_file = changed_config(config_bytes(source, None), merged.config_changes)
    files = {"config.json": config_file, **companion_files(source.path)}

    def blocks() -> Iterator[Block]:
        for block in source.blocks():
            if adapted is not None:
                merge(source.config, block, *adapted)
            on_block(block, source.config.num_hidden_layers)
            yield block
            del block  # or this name would hold it while the next one is made

    form = HFForm(
        max_shard_size=max_shard_size,
        layout=source.layout,
        stored_tied_head=merged.stored_tied_head,
        quantization=source.quantization,
        nested_offsets={} if dequantize else stored.nested_offsets(),
    )
    write_hf(dst, merged.config, merged.dtypes, blocks(), files, form)
