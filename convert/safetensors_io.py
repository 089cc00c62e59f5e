"""Reads and writes safetensors files. The header is checked before any tensor is read; tensors are views of the file.

Weights in pickles are never read, because a pickle can run code. The format (github.com/huggingface/safetensors): the
length of the header in 8 bytes, a JSON header, then the tensors without gaps.
"""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jaxmoe.errors import UserError, shown
from jaxmoe.json_text import NOT_DOWNLOADED, POINTER, is_pointer, parse_json, read_json
from jaxmoe.store.boxes import Box, runs, shape_of
from jaxmoe.store.files import is_file, named_in

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# Bytes per element of the format's dtypes. Those that cannot be converted are listed so that errors can name them.
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
FLOATS = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
# The dtypes that are read and written: also those of the codes of NF4 and FP8.
_DTYPES = {**FLOATS, "U8": np.dtype(np.uint8), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}
CODES = {dtype.name: code for code, dtype in _DTYPES.items()}
_PICKLES = (
    "can run code and are not read; transformers' from_pretrained(...) and save_pretrained(...) write safetensors"
)
_WITHOUT_INDEX = f"if it is the whole model, rename it to {SINGLE}"
# A file that a folder of another kind holds -> what the folder is, and what it is for.
_OTHER_FOLDERS = {
    "manifest.json": "a converted folder, which needs no conversion",
    "adapter_config.json": "a PEFT adapter (python -m convert peft2jax reads it)",
    "adapter.json": "a converted adapter (python -m convert jax2peft reads it)",
}
_MAX_HEADER = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor of a file: `code` is the format's name of its dtype, `data` a read-only view of its bytes, which begin
    at `offset` in the file."""

    name: str
    file: pathlib.Path
    code: str
    shape: tuple[int, ...]
    data: np.ndarray
    offset: int = 0

    @property
    def where(self) -> str:
        """File and name, for a message."""
        return f"{self.file}: {self.name}"

    @property
    def dtype(self) -> np.dtype:
        """The NumPy dtype; raises UserError unless it is a float of 16 or 32 bits."""
        if self.code not in FLOATS:
            raise UserError(f"{self.where}: expected one of {', '.join(FLOATS)}, found {self.code}")
        return FLOATS[self.code]

    @property
    def stored_dtype(self) -> np.dtype:
        """The NumPy dtype; raises UserError unless it is uint8, e4m3, or a float of 16 or 32 bits."""
        return _DTYPES[self.code] if self.code in ("U8", "F8_E4M3") else self.dtype

    def read(self) -> np.ndarray:
        """The values, as a view of the mapped file: no copy is made."""
        return self.data.view(self.dtype).reshape(self.shape)

    def read_box(self, box: Box) -> np.ndarray:
        """The values in a box, in memory of their own: no other bytes of the file are read, and no page stays mapped.

        Raises:
            UserError: the file has become shorter.
        """
        dtype = _DTYPES[self.code]
        found = np.empty(shape_of(box), dtype)
        rest = found.reshape(-1).view(np.uint8).data
        with self.file.open("rb", buffering=0) as stream:
            for first, count in runs(box, self.shape):
                stream.seek(self.offset + first * dtype.itemsize)
                part, rest = rest[: count * dtype.itemsize], rest[count * dtype.itemsize :]
                while part:
                    if not (size := stream.readinto(part)):
                        raise UserError(f"{self.where}: expected its bytes, found the end of the file")
                    part = part[size:]
        return found

    def read_as(self, code: str, shape: tuple[int, ...]) -> np.ndarray:
        """Like `read`; raises UserError unless the tensor has this dtype and shape."""
        if (self.code, self.shape) != (code, shape):
            found = f"{self.code} {list(self.shape)}"
            raise UserError(f"{self.where}: expected {code} {list(shape)}, found {found}")
        return self.data.view(_DTYPES[code]).reshape(shape)


def read_header(file: pathlib.Path) -> dict[str, Tensor]:
    """Name -> tensor of one file, in the order of the file.

    Raises:
        UserError: no safetensors file, a broken header, offsets that overlap, leave gaps or do not fit the shapes, or a
            file that is shorter or longer than its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if is_pointer(prefix + stream.read(len(POINTER))):
            raise UserError(f"{file}: expected a safetensors file, found {NOT_DOWNLOADED}")
        if size < 8 or _is_text(prefix):
            found = f"a file that starts with {shown(prefix.decode(errors='replace'))}" if prefix else "an empty one"
            raise UserError(f"{file}: expected a safetensors file, found {found}")
        stream.seek(8)
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise UserError(
                f"{file}: expected a safetensors header of at most {max(size - 8, 0)} bytes, found {length}"
            )
        encoded = stream.read(length)
    try:
        text = encoded.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: expected a JSON header, found {error}") from None
    header = parse_json(text, f"{file}: safetensors header", strict=True)
    if not isinstance(header, dict) or not text.startswith("{"):
        raise UserError(f"{file}: expected a JSON object as header, found {type(header).__name__}")
    metadata = header.pop("__metadata__", None)
    texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if metadata is not None and not texts:
        raise UserError(f"{file}: __metadata__: expected an object of texts, found {shown(metadata)}")
    spans = sorted((*_span(file, name, entry), name) for name, entry in header.items())
    end, base = 0, 8 + length
    for start, stop, name in spans:
        if start != end:
            what = "an overlap" if start < end else "a gap"
            raise UserError(f"{file}: {name}: expected offset {end}, found {start} ({what})")
        end = stop
    if base + end != size:
        what = "truncated" if size < base + end else "too long"
        raise UserError(f"{file}: expected {base + end} bytes as its header says, found {size} ({what})")
    mapped = np.asarray(np.memmap(file, dtype=np.uint8, mode="r"))
    return {
        name: Tensor(
            name,
            file,
            header[name]["dtype"],
            tuple(header[name]["shape"]),
            mapped[base + start : base + stop],
            base + start,
        )
        for start, stop, name in spans
    }


def _is_text(prefix: bytes) -> bool:
    """Whether a file starts as a text does, such as a page that was downloaded in its place: a header of that length
    cannot be."""
    return all(0x20 <= byte < 0x7F or byte in b"\t\r\n" for byte in prefix)


def _span(file: pathlib.Path, name: str, entry: Any) -> tuple[int, int]:
    """The offsets of a tensor, checked against its dtype and shape."""
    try:
        code, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, stop)):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{file}: {name}: expected dtype, shape and data_offsets, found {shown(entry)}") from None
    if not isinstance(code, str) or code not in _ITEM_BYTES:
        raise UserError(f"{file}: {name}: expected a dtype such as F32, BF16 or F16, found {shown(code)}")
    if stop - start != math.prod(shape) * _ITEM_BYTES[code]:
        nbytes = math.prod(shape) * _ITEM_BYTES[code]
        raise UserError(f"{file}: {name}: expected {nbytes} bytes for {code} {shape}, found offsets {start} to {stop}")
    return start, stop


def open_folder(folder: pathlib.Path) -> dict[str, Tensor]:
    """Name -> tensor over `model.safetensors`, or over the shards that `model.safetensors.index.json` lists.

    Raises:
        UserError: no safetensors, an index that names a file outside the folder, a missing shard, a key that its shard
            lacks, or a key that two shards hold.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: expected a folder, found a file" if folder.exists() else f"folder not found: {folder}"
        )
    single, index = folder / SINGLE, folder / INDEX
    if not is_file(index):
        if is_file(single):
            return read_header(single)
        if ggufs := sorted(p.name for p in folder.glob("*.gguf")):
            raise UserError(
                f"{folder}: expected {SINGLE} or {INDEX}, found {ggufs[0]} (GGUF is not supported); download the "
                "model's safetensors in 16 bits, FP8 or NF4 by bitsandbytes"
            )
        pickles = sorted(p.name for suffix in ("*.bin", "*.pt", "*.pth") for p in folder.glob(suffix))
        ours = next((what for name, what in _OTHER_FOLDERS.items() if (folder / name).is_file()), None)
        if ours:
            raise UserError(f"{folder}: expected a model with {SINGLE} or {INDEX}, found {ours}")
        others = sorted(p.name for p in folder.glob("*.safetensors"))
        found = f"only {pickles[0]} (pickles {_PICKLES})" if pickles else "neither"
        if len(others) == 1:
            found = f"only {others[0]} ({_WITHOUT_INDEX})"
        elif others:
            found = f"{len(others)} files such as {others[0]}, but no index: download {INDEX} too"
        raise UserError(f"{folder}: expected {SINGLE} or {INDEX}, found {found}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index}: expected weight_map, key -> file, found {type(weight_map).__name__}")
    if is_file(single) and SINGLE not in weight_map.values():
        raise UserError(
            f"{folder}: expected {SINGLE} or {INDEX}, found both: remove the one that does not belong to the model "
            f"(transformers reads {SINGLE})"
        )
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        shard = named_in(folder, name, by=INDEX)
        if not is_file(shard):
            raise UserError(f"file not found: {shard} (named in {INDEX})")
        for key, tensor in read_header(shard).items():
            if key in tensors:
                raise UserError(f"{shard}: {key}: expected it in one file, found it in {tensors[key].file.name} too")
            if key not in weight_map:
                raise UserError(f"{index}: {key}: expected it in weight_map, found it only in {name}")
            tensors[key] = tensor
    for key, name in weight_map.items():
        if key not in tensors:
            raise UserError(f"{index}: {key}: expected it in {name}, as weight_map says, found it nowhere")
        if (found := tensors[key].file.name) != name:
            raise UserError(f"{index}: {key}: expected it in {name}, as weight_map says, found it in {found}")
    return tensors


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_sharded(
    folder: pathlib.Path, planned: Iterable[Planned], tensors: Iterator[tuple[str, np.ndarray]], max_shard_size: int
) -> None:
    """Writes `tensors`, which come in the order of `planned`, into files of at most `max_shard_size` bytes each.

    A tensor above the limit gets its own file. As in transformers, a single file is named `model.safetensors` and has
    no index.
    """
    groups: list[list[Planned]] = []
    used = 0
    for plan in planned:
        if not groups or used + plan.nbytes > max_shard_size:
            groups.append([])
            used = 0
        groups[-1].append(plan)
        used += plan.nbytes
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        with (folder / file).open("wb") as stream:
            offsets = _write_header(stream, group, {"format": "pt"})
            for plan in group:
                name, array = next(tensors)
                assert (name, array.shape, array.dtype) == (plan.name, plan.shape, plan.dtype), (name, plan)
                stream.seek(offsets[name])
                write_array(stream, array)
                del array  # a view that would hold a layer while the next one is made
        weight_map |= {plan.name: file for plan in group}
    with contextlib.suppress(StopIteration):
        raise AssertionError(f"tensor {next(tensors)[0]} was not planned")
    if len(groups) > 1:
        total = sum(plan.nbytes for group in groups for plan in group)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes one safetensors file."""
    with path.open("wb") as stream:
        plans = [Planned(name, array.shape, array.dtype) for name, array in tensors.items()]
        offsets = _write_header(stream, plans, metadata)
        for name, array in tensors.items():
            stream.seek(offsets[name])
            write_array(stream, array)


def write_array(stream: BinaryIO, array: np.ndarray) -> None:
    """Writes the bytes of an array in C order; a contiguous array is not copied first."""
    stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _write_header(stream: BinaryIO, plans: list[Planned], metadata: Mapping[str, str]) -> dict[str, int]:
    # As in the safetensors library, wide dtypes come first, so that every tensor is aligned.
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for plan in sorted(plans, key=lambda plan: -plan.dtype.itemsize):
        ends = [offset, offset + plan.nbytes]
        header[plan.name] = {"dtype": CODES[plan.dtype.name], "shape": list(plan.shape), "data_offsets": ends}
        offset += plan.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    stream.write(struct.pack("<Q", len(encoded)) + encoded)
    base = stream.tell()
    return {plan.name: base + header[plan.name]["data_offsets"][0] for plan in plans}
