"""Writes a checkpoint in HF form: sharded safetensors, layer by layer, with the keys that the source had."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from convert.adapters import load_adapter, merge
from convert.hf2jax import companion_files
from convert.names import Layout, blocks_of, rows
from convert.safetensors_io import Planned, write_sharded
from jaxmoe.checkpoint import Block, is_converted, read_converted
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.errors import UserError
from jaxmoe.files import copy_file, output_folder

MAX_SHARD_SIZE = 5 * 10**9  # what transformers writes


def write_hf(
    dst: str | os.PathLike[str],
    config: Qwen3MoeConfig,
    dtypes: Mapping[str, np.dtype],
    blocks: Iterable[Block],
    files: Mapping[str, pathlib.Path | bytes],
    max_shard_size: int = MAX_SHARD_SIZE,
    layout: Layout = "per_expert",
    stored_tied_head: bool = False,
) -> None:
    """Streams `blocks` (the top level first, then every layer) into the HF folder `dst`, which must be new or empty.

    `dtypes` names the dtype of every path of `parameter_specs(config)`; `files`, name -> file or content, are copied
    beside the weights and have to include config.json. `stored_tied_head` repeats a tied embedding as lm_head.
    """
    with output_folder(dst) as folder:
        for name, content in files.items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                copy_file(content, folder / name)
        planned = []
        for layer in blocks_of(config):
            planned += [Planned(row.key, row.shape, dtypes[row.path]) for row in rows(config, layer, layout)]
            if layer is None and stored_tied_head:
                planned.append(Planned("lm_head.weight", planned[0].shape, planned[0].dtype))
        write_sharded(folder, planned, _tensors(config, blocks, layout, stored_tied_head), max_shard_size)


def _tensors(
    config: Qwen3MoeConfig, blocks: Iterable[Block], layout: Layout, stored_tied_head: bool
) -> Iterator[tuple[str, np.ndarray]]:
    for block in blocks:
        for row in rows(config, block.layer, layout):
            yield row.key, block.arrays[row.path][row.part]
        if block.layer is None and stored_tied_head:
            yield "lm_head.weight", block.arrays["embed_tokens"]
        del block  # the next one is made while this name would still hold it


def parse_size(text: str) -> int:
    """Bytes in "5GB", "300MB" or "2GiB": decimal units as transformers reads them, and binary ones."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({'|'.join(units)})?", text.strip().upper())
    size = int(float(match[1]) * units.get(match[2], 1)) if match else 0
    if size < 1:
        raise UserError(f"size: expected a number of bytes such as 5GB or 500MB, found {text!r}")
    return size


def jax2hf(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    on_block: Callable[[Block, int], None] = lambda block, layers: None,
) -> None:
    """Converts the converted folder `src` into the HF folder `dst`; an adapter of either form is merged on the way."""
    if not is_converted(src):
        raise UserError(f"{src}: expected a converted folder (with manifest.json), found none")
    source = read_converted(src)
    files = {"config.json": source.path / "config.json", **companion_files(source.path)}
    adapted = load_adapter(adapter, source.config) if adapter is not None else None

    def blocks() -> Iterator[Block]:
        for block in source.blocks():
            if adapted is not None:
                merge(source.config, block, *adapted)
            on_block(block, source.config.num_hidden_layers)
            yield block
            del block

    write_hf(dst, source.config, source.dtypes, blocks(), files, max_shard_size, source.layout, source.stored_tied_head)
