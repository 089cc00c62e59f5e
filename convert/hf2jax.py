"""Reads an HF checkpoint one layer at a time, and writes it as a converted folder."""

from __future__ import annotations

import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from convert.names import Row, block_shapes, blocks_of, find_layout, rows
from convert.nf4 import companions, find_quantization, read_matrix, settings_of
from convert.safetensors_io import CODES, open_folder
from jaxmoe.config import DTYPES, read_config
from jaxmoe.errors import UserError
from jaxmoe.nf4.codec import NF4
from jaxmoe.nf4.recode import Recoded, quantized
from jaxmoe.parameters import NESTED_QUANT_MAP
from jaxmoe.store.checkpoint import Block, Checkpoint, Layout, cast
from jaxmoe.store.converted import write_converted
from jaxmoe.store.files import is_file
from jaxmoe.tokenizer_files import NEEDED, has_tokenizer

# The files of a checkpoint that are copied as they are.
_COMPANIONS = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_COMPARE_BYTES = 16 * 2**20


class HFCheckpoint:
    """An HF folder whose keys, shapes and dtypes have all been checked; weights are read on demand."""

    def __init__(self, path: pathlib.Path, dtype: str | None) -> None:
        self.path = path
        # Before the config: for a folder of pickles, that is the error to report.
        self._tensors = open_folder(path)
        self.config, raw = read_config(path / "config.json")
        self.layout: Layout = find_layout(self._tensors)
        self._check_count()
        self._target = np.dtype(_known(dtype)) if dtype else None
        self._rows = {layer: list(rows(self.config, layer, self.layout)) for layer in blocks_of(self.config)}
        settings = raw.get("quantization_config")
        self.quantization = find_quantization(str(path), settings, self.config, self._tensors, self._every_row())
        self.stored_tied_head = self._check_tied_head()
        self._check_keys()
        self._nested_quant_map: np.ndarray | None = None
        self.stored_dtypes = self._check_tensors()
        self.dtypes = {name: self._target or stored for name, stored in self.stored_dtypes.items()}

    def _check_count(self) -> None:
        """Compares how many tensors the config asks for with how many there are, before their names are formed."""
        per_layer = 3 * self.config.num_experts if self.layout == "per_expert" else 2
        least = self.config.num_hidden_layers + per_layer * len(self.config.sparse_layers)
        if len(self._tensors) < least:
            raise UserError(
                f"{self.path}: expected at least {least:,} tensors for num_hidden_layers "
                f"{self.config.num_hidden_layers:,} and num_experts {self.config.num_experts:,}, "
                f"found {len(self._tensors):,}"
            )

    def _every_row(self) -> Iterator[Row]:
        return (row for block in self._rows.values() for row in block)

    def _in_nf4(self, row: Row) -> bool:
        return self.quantization is not None and row.path in self.quantization.paths

    def _read_nf4(self, row: Row) -> tuple[NF4, str, np.ndarray | None]:
        assert self.quantization is not None
        return read_matrix(row, self._tensors, self.quantization.nested)

    def _check_keys(self) -> None:
        expected = {row.key for row in self._every_row()}
        if self.quantization is not None:
            quantized = (row.key for row in self._every_row() if self._in_nf4(row))
            expected.update(key for name in quantized for key in companions(name, self.quantization.nested))
        found = set(self._tensors) - ({"lm_head.weight"} if self.stored_tied_head else set())
        if missing := sorted(expected - found):
            under = [name for name in sorted(found) if name.endswith(f".{missing[0]}")]
            instead = f", found {under[0]}" if under else ""
            raise UserError(f"{self.path}: missing tensor {missing[0]} ({len(missing)} missing in all){instead}")
        if unexpected := sorted(found - expected):
            raise UserError(f"{self.path}: unexpected tensor {unexpected[0]} ({len(unexpected)} unexpected in all)")

    def _check_tensors(self) -> dict[str, np.dtype]:
        first: dict[str, tuple[str, np.dtype]] = {}
        for row in self._every_row():
            if self._in_nf4(row):
                _, made_from, table = self._read_nf4(row)
                dtype, code = np.dtype(made_from), f"NF4 of {made_from}"
                self._check_map(row, table)
            else:
                tensor = self._tensors[row.key]
                if tensor.shape != row.shape:
                    raise UserError(f"{row.key}: expected shape {list(row.shape)}, found {list(tensor.shape)}")
                dtype, code = tensor.dtype, tensor.code
            key, expected = first.setdefault(row.path, (row.key, dtype))
            if dtype != expected:
                one = CODES[expected.name] if not self._in_nf4(row) else f"NF4 of {expected}"
                raise UserError(f"{row.key}: expected {one} as in {key}, found {code}")
        return {name: dtype for name, (_, dtype) in first.items()}

    def _check_map(self, row: Row, table: np.ndarray | None) -> None:
        """Every weight has its own copy of the table; a converted folder holds it once, so all must be equal."""
        if self._nested_quant_map is None:
            self._nested_quant_map = table
        elif table is None or not np.array_equal(table, self._nested_quant_map):
            raise UserError(f"{row.key}.nested_quant_map: expected the same table for every weight, found another")

    def _check_tied_head(self) -> bool:
        """Whether lm_head is stored although it is tied, as some tools do. It must then equal the embedding exactly."""
        head, embedding = self._tensors.get("lm_head.weight"), self._tensors.get("model.embed_tokens.weight")
        if not self.config.tie_word_embeddings or head is None or embedding is None:
            return False
        same = (head.code, head.shape) == (embedding.code, embedding.shape)
        if same:
            a, b = (tensor.read().reshape(-1).view(np.uint8) for tensor in (head, embedding))
            steps = range(0, a.size, _COMPARE_BYTES)
            same = all(np.array_equal(a[i : i + _COMPARE_BYTES], b[i : i + _COMPARE_BYTES]) for i in steps)
        if not same:
            raise UserError(
                f"{self.path}: lm_head.weight: expected the values of the embedding (tie_word_embeddings), found others"
            )
        return True

    def block(self, layer: int | None) -> Block:
        """One layer, or the top level (None). All experts of a layer come as one array per parameter."""
        return Block(layer, self._gather(layer, self._rows[layer]))

    def blocks(self) -> Iterator[Block]:
        """The top level, then every layer."""
        return map(self.block, self._rows)

    def _gather(self, layer: int | None, block: list[Row]) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        shapes = block_shapes(self.config, layer, self.quantization)
        if layer is None and self._nested_quant_map is not None:
            arrays[NESTED_QUANT_MAP] = self._nested_quant_map
        for row in block:
            if self._in_nf4(row):
                for name, part in self._read_nf4(row)[0].named(row.path).items():
                    if name not in arrays:
                        arrays[name] = np.empty(shapes[name], part.dtype)
                    arrays[name][row.matrix] = part
                continue
            dtype = self.dtypes[row.path]
            tensor = cast(row.key, self._tensors[row.key].read(), dtype)
            if not row.part:
                arrays[row.path] = tensor
                continue
            if row.path not in arrays:
                arrays[row.path] = np.empty(shapes[row.path], dtype)
            _copy(tensor, arrays[row.path][row.part])
        return arrays


def _copy(tensor: np.ndarray, part: np.ndarray) -> None:
    """Copies `tensor` into `part`, both contiguous, as bytes: NumPy holds Python's lock while it copies bfloat16."""
    part.view(np.uint8)[...] = tensor.view(np.uint8)


def read_hf(path: str | os.PathLike[str], dtype: str | None = None) -> HFCheckpoint:
    """Opens an HF checkpoint and checks everything except the values. `dtype` casts every tensor, once.

    Weights in NF4 keep their bytes; for them `dtype` is the dtype to decode into.

    Raises:
        UserError: no safetensors, another model type, a quantisation other than bitsandbytes' NF4, a key that is
            missing, unexpected or stored twice, a wrong shape or dtype, or dtypes that differ within a stack.
    """
    return HFCheckpoint(pathlib.Path(path), dtype)


def _known(dtype: str) -> str:
    if dtype not in DTYPES:
        raise UserError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    return dtype


def companion_files(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Name -> file, for the files of the tokenizer and the generation config in the folder `path`.

    A notice says if there is no tokenizer: only commands that read or write text need one.

    Raises:
        UserError: a file is a broken link.
    """
    found = {name: path / name for name in _COMPANIONS if is_file(path / name)}
    if not has_tokenizer(path):
        logging.getLogger("jaxmoe").warning(
            "%s: no tokenizer (%s); commands that read or write text will need one", path, NEEDED
        )
    return found


def config_bytes(source: Checkpoint, dtype: str | None) -> bytes:
    """The content of config.json, with only these changes: `dtype`, under the key that the file uses for it, and the
    quantization_config if the weights are recoded."""
    content = (source.path / "config.json").read_bytes()
    raw = json.loads(content)
    changes: dict[str, Any] = {}
    if dtype is not None:
        names = [name for name in ("dtype", "torch_dtype") if name in raw] or ["dtype"]
        changes |= dict.fromkeys(names, dtype)
    if isinstance(source, Recoded):
        changes["quantization_config"] = None
        if source.quantization is not None:
            settings = settings_of(source.config, source.quantization, source.dtypes["embed_tokens"].name)
            changes["quantization_config"] = settings
    raw = {key: value for key, value in (raw | changes).items() if key not in changes or value is not None}
    return (json.dumps(raw, indent=2, ensure_ascii=False) + "\n").encode() if changes else content


def hf2jax(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    dtype: str | None = None,
    quantize: str | None = None,
    on_block: Callable[[Block, int], None] = lambda block, layers: None,
) -> None:
    """Converts the HF folder `src` into the converted folder `dst`, which must be new or empty.

    `quantize` "nf4" encodes projections, dense MLPs and experts. Weights that are in NF4 already keep their bytes.
    `on_block` is called after each block with the block and the number of layers.

    Raises:
        UserError: what `read_hf` and `companion_files` raise, or `dst` is not empty.
    """
    source: Checkpoint = read_hf(src, dtype)
    if quantize is not None:
        source = quantized(source, quantize)
    files = {"config.json": config_bytes(source, dtype), **companion_files(source.path)}
    write_converted(dst, source, files, on_block)
