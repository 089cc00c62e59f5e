"""Reads an HF checkpoint one layer at a time, and writes it as a converted folder."""

from __future__ import annotations

import json
import logging
import math
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from convert import fp8, nf4
from convert.foreign_names import EMBEDDING, HEAD, missing_tensors, only_head, unexpected_tensors, usual_names
from convert.forms import find_form
from convert.names import Row, block_shapes, blocks_of, find_layout, rows
from convert.nf4 import companions, in_nf4, read_matrix
from convert.not_finite import noticing
from convert.safetensors_io import CODES, open_folder
from jaxmoe.config import DTYPES, read_config, read_json
from jaxmoe.errors import UserError
from jaxmoe.fp8.codec import E4M3
from jaxmoe.nf4.codec import NF4, decode
from jaxmoe.parameters import NESTED_QUANT_MAP, Quantization, matrix_shape, quantizable
from jaxmoe.recode import quantized
from jaxmoe.store.boxes import Box, common, origin, shape_of, slices, whole
from jaxmoe.store.checkpoint import Block, Checkpoint, Layout, Parts, cast
from jaxmoe.store.converted import write_converted
from jaxmoe.store.files import is_file
from jaxmoe.store.recoded import Recoded
from jaxmoe.tokenizer_files import MORE_TEMPLATES, NEEDED, has_tokenizer
from jaxmoe.weight_form import WeightForm

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

    def __init__(self, path: pathlib.Path, dtype: str | None, dequantize: bool) -> None:
        self.path = path
        # Before the config: for a folder of pickles, that is the error to report.
        self._tensors = usual_names(str(path), open_folder(path))
        # Before the config's fields: of another form than those read, the form is the error to report.
        self._form = find_form(str(path), read_json(path / "config.json"), self._tensors)
        _check_dequantize(path, self._form, dequantize)
        self.config, _ = read_config(path / "config.json")
        if self.config.tie_word_embeddings:
            self._tensors = only_head(self._tensors)
        self.layout: Layout = find_layout(self._tensors)
        self._check_count()
        self._target = np.dtype(_known(dtype)) if dtype else None
        self._rows = {layer: list(rows(self.config, layer, self.layout)) for layer in blocks_of(self.config)}
        self.quantization: Quantization | None = None
        if self._form is not None and not dequantize:
            find = nf4.find_quantization if self._form == "nf4" else fp8.find_quantization
            self.quantization = find(str(path), self.config, self._tensors, self._rows)
        self._nf4_candidates = quantizable(self.config, router=True)
        self._nested = any(key.endswith(".nested_absmax") for key in self._tensors)
        self._decoded_dtype = self._target or self._dtype_in_config()
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
        return self._form == "nf4" and row.path in self._nf4_candidates and in_nf4(row.key, self._tensors)

    def _in_fp8(self, row: Row) -> bool:
        return self._form == "fp8" and self._tensors[row.key].code == fp8.CODE

    def _is_quantized(self, row: Row) -> bool:
        return self._in_nf4(row) or self._in_fp8(row)

    def _read_nf4(self, row: Row) -> tuple[NF4, str, np.ndarray | None]:
        return read_matrix(row, self._tensors, self._nested)

    def _stored_path(self, row: Row) -> str:
        """The array that a row is a part of which is not held in a quantised form."""
        mixed = self.quantization is not None and row.path in self.quantization.paths
        return f"{row.path}.weight" if mixed else row.path

    def _check_keys(self) -> None:
        expected = {row.key for row in self._every_row()}
        quantized = (row.key for row in self._every_row() if self._in_nf4(row))
        expected.update(key for name in quantized for key in companions(name, self._nested))
        if self._form == "fp8":
            expected.update(fp8.scale_key(key) for key in self._check_fp8())
        found = set(self._tensors) - ({HEAD} if self.stored_tied_head else set())
        if missing := sorted(expected - found):
            raise missing_tensors(str(self.path), missing, found)
        if unexpected := sorted(found - expected):
            raise unexpected_tensors(str(self.path), unexpected)

    def _check_fp8(self) -> list[str]:
        """The keys of the weights in FP8; a notice says if transformers' dequantisation would read some otherwise."""
        keys = fp8.check_fp8(str(self.path), self._every_row(), self._tensors)
        if uneven := fp8.uneven_blocks(keys, self._tensors):
            first = f"{uneven[0]} {list(self._tensors[uneven[0]].shape)} ({len(uneven)} such weights)"
            logging.getLogger("jaxmoe").warning(
                f"{self.path}: {first}: no multiple of 128, so the last FP8 blocks are smaller; transformers' FP8 "
                "layers read them so, but its dequantize=True fails or divides the weight into equal blocks"
            )
        return keys

    def _check_tensors(self) -> dict[str, np.dtype]:
        """The stored dtype of every path; one for a whole stack unless every tensor is cast."""
        first: dict[str, tuple[str, np.dtype]] = {}
        for row in self._every_row():
            dtype, code = self._check_tensor(row)
            path = row.path if self._is_quantized(row) else self._stored_path(row)
            key, expected = first.setdefault(path, (row.key, dtype))
            if dtype != expected and self._target is None:
                one = f"NF4 of {expected}" if code.startswith("NF4") else CODES[expected.name]
                raise UserError(
                    f"{self._tensors[row.key].where}: expected {one} as in {key}, found {code} "
                    f"({self._layers_unlike(path, expected)}; --dtype, or dtype=, casts every tensor to one dtype)"
                )
        return {name: dtype for name, (_, dtype) in first.items()}

    def _check_tensor(self, row: Row) -> tuple[np.dtype, str]:
        """(the dtype of a row, once decoded; what to call its form), after a check of its shape."""
        if self._in_nf4(row):
            _, made_from, table = self._read_nf4(row)
            if self.quantization is not None:
                self._check_map(row, table)
            return np.dtype(made_from), f"NF4 of {made_from}"
        tensor = self._tensors[row.key]
        if tensor.shape != row.shape:
            raise UserError(
                f"{tensor.where}: expected shape {list(row.shape)}, as config.json says, found {list(tensor.shape)}"
            )
        if self._in_fp8(row):
            return self._decoded_dtype, f"FP8 of {self._decoded_dtype}"
        return tensor.dtype, tensor.code

    def _layers_unlike(self, path: str, expected: np.dtype) -> str:
        """Which layers of a stack have another dtype, for a message."""
        layers = [
            layer
            for layer, block in self._rows.items()
            if any(
                path == (row.path if self._is_quantized(row) else self._stored_path(row))
                and self._check_tensor(row)[0] != expected
                for row in block
            )
        ]
        shown = ", ".join(map(str, layers[:8])) + (", ..." if len(layers) > 8 else "")
        return f"so in layer{'s' if len(layers) > 1 else ''} {shown}"

    def _check_map(self, row: Row, table: np.ndarray | None) -> None:
        """Every weight has its own copy of the table; a converted folder holds it once, so all must be equal."""
        if self._nested_quant_map is None:
            self._nested_quant_map = table
        elif table is None or not np.array_equal(table, self._nested_quant_map):
            raise UserError(
                f"{self.path}: {row.key}.nested_quant_map: expected the same table for every weight, found another"
            )

    def _dtype_in_config(self) -> np.dtype:
        """The dtype to decode FP8 into. If config.json has none, the embedding's, which is not quantised."""
        if self.config.dtype is not None:
            return np.dtype(self.config.dtype)
        embedding = self._tensors.get(EMBEDDING)
        return embedding.dtype if embedding is not None else np.dtype("bfloat16")

    def _check_tied_head(self) -> bool:
        """Whether lm_head is stored although it is tied, as some tools do. It must then equal the embedding exactly."""
        head, embedding = self._tensors.get(HEAD), self._tensors.get(EMBEDDING)
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

    def block(self, layer: int | None, without: Collection[str] = ()) -> Block:
        """One layer, or the top level (None), except for the arrays in `without`. All experts of a layer come as one
        array per parameter."""
        return Block(layer, self._gather(layer, [row for row in self._rows[layer] if row.path not in without]))

    def matrices(self, layer: int, path: str, start: int, stop: int) -> list[np.ndarray]:
        """Some matrices of a weight that is not kept quantised, each contiguous; views of the file where possible."""
        entries = [row for row in self._rows[layer] if row.path == path]
        each = math.prod(matrix_shape(self.config, path)[:-1]) // len(entries)  # experts may be in one tensor
        found: list[np.ndarray] = []
        for number in range(start // each, -(-stop // each)):
            row, first = entries[number], number * each
            tensor = self._decoded(row, self.dtypes[path])
            parts = tensor.reshape(each, -1)[max(start - first, 0) : stop - first]
            found += [cast(self._tensors[row.key].where, part, self.dtypes[path]) for part in parts]
        return found

    def parts(self, layer: int | None, wanted: Mapping[str, Collection[Box]]) -> Parts:
        """Parts of the arrays that `block` has."""
        found = {path: {box: self._part(layer, path, box) for box in boxes} for path, boxes in wanted.items()}
        return Parts(str(self.path), found)

    def _part(self, layer: int | None, path: str, box: Box) -> np.ndarray:
        if path == NESTED_QUANT_MAP:
            assert self._nested_quant_map is not None
            return self._nested_quant_map[slices(box)]
        weight, _, name = path.rpartition(".")
        if self.quantization is None or weight not in self.quantization.paths or name in ("weight", "places"):
            entries = [row for row in self._rows[layer] if self._stored_path(row) == path]
            return self._plain_part(entries, self.dtypes[path], box)
        entries = [row for row in self._rows[layer] if row.path == weight]
        if self._form == "nf4":
            return self._nf4_part(entries, name, box)
        if name == "codes":
            return self._plain_part(entries, E4M3, box)
        return self._scales_part(entries, box)

    def _nf4_part(self, entries: list[Row], name: str, box: Box) -> np.ndarray:
        """A box of one of NF4's arrays; its leading axes count matrices."""
        lead = len(entries[0].matrix)
        here = [row for row in entries if common(tuple((i, i + 1) for i in row.matrix), box[:lead])]
        matrices: list[Any]
        if name == "nested_offset":
            matrices = [self._read_nf4(row)[0].nested_offset for row in here]
        else:
            suffix = "" if name == "codes" else f".{name}"
            tensors = (self._tensors[f"{row.key}{suffix}"] for row in here)
            matrices = [each.read_box((*box[lead:], *whole(each.shape[1:]))) for each in tensors]
        return np.stack(matrices).reshape(shape_of(box))

    def _scales_part(self, entries: list[Row], box: Box) -> np.ndarray:
        """A box of FP8's scales [..., matrices, rows, columns]."""
        if not entries[0].part:
            return self._read_scales(entries[0])[slices(box)]
        *lead, rows, columns = box
        here = [row for row in entries if common(tuple((i, i + 1) for i in row.matrix), tuple(lead))]
        found = [self._tensors[fp8.scale_key(row.key)].read_box((rows, columns)) for row in here]
        return np.stack(found).reshape(shape_of(box))

    def _read_scales(self, row: Row) -> np.ndarray:
        """The scales of one tensor; with leading axes for experts and matrices if it is a whole parameter."""
        assert self.quantization is not None
        shape = block_shapes(self.config, int(row.key.split(".")[2]), self.quantization)[f"{row.path}.scales"]
        scales = self._tensors[fp8.scale_key(row.key)].read()
        return scales if row.part else scales.reshape(shape)

    def _plain_part(self, entries: list[Row], dtype: np.dtype, box: Box) -> np.ndarray:
        if not entries[0].part:
            return cast(self._tensors[entries[0].key].where, self._decoded(entries[0], dtype, box), dtype)
        found = np.empty(shape_of(box), dtype)
        for row in entries:
            expert, height = row.part
            assert isinstance(expert, int) and isinstance(height, slice)
            if overlap := common(box, ((expert, expert + 1), (height.start, height.stop), (0, row.shape[1]))):
                (top, bottom), columns = overlap[1:]
                inner = (top - height.start, bottom - height.start), columns
                tensor = cast(self._tensors[row.key].where, self._decoded(row, dtype, inner), dtype)
                _copy(tensor, found[slices(overlap, origin(box))][0])
        return found

    def blocks(self) -> Iterator[Block]:
        """The top level, then every layer."""
        return map(self.block, self._rows)

    def _gather(self, layer: int | None, block: list[Row]) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        shapes = block_shapes(self.config, layer, self.quantization)
        if layer is None and self._nested_quant_map is not None:
            arrays[NESTED_QUANT_MAP] = self._nested_quant_map
        for row in block:
            if self.quantization is not None and self._is_quantized(row):
                self._place(row, arrays, shapes)
                continue
            path = self._stored_path(row)
            dtype = self.dtypes[path]
            tensor = cast(self._tensors[row.key].where, self._decoded(row, dtype), dtype)
            if not row.part:
                arrays[path] = tensor
                continue
            if path not in arrays:
                arrays[path] = np.empty(shapes[path], dtype)
            _copy(tensor, arrays[path][row.part])
        return arrays

    def _place(self, row: Row, arrays: dict[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Puts the arrays of a quantised weight into those of its parameter, as they are stored."""
        parts: dict[str, tuple[Any, np.ndarray]]  # name -> where in the parameter's array, what
        if self._in_nf4(row):
            parts = {name: (row.matrix, part) for name, part in self._read_nf4(row)[0].named(row.path).items()}
        else:
            codes, scales = fp8.read_codes(self._tensors[row.key]), self._read_scales(row)
            parts = {f"{row.path}.codes": (row.part, codes), f"{row.path}.scales": (row.matrix, scales)}
            if not row.part:
                arrays |= {name: part for name, (_, part) in parts.items()}
                return
        for name, (where, part) in parts.items():
            if name not in arrays:
                arrays[name] = np.empty(shapes[name], part.dtype)
            arrays[name][where] = part

    def _decoded(self, row: Row, dtype: np.dtype, box: Box | None = None) -> np.ndarray:
        """One tensor, or a box of it; a weight in FP8 or NF4 is decoded into `dtype` unless that is FP8's own, a plain
        one keeps its own."""
        if dtype == E4M3:
            return fp8.read_codes(self._tensors[row.key], box)
        if self._in_fp8(row):
            return fp8.decode_fp8(self._tensors[row.key], self._tensors[fp8.scale_key(row.key)], dtype, box)
        if self._in_nf4(row):
            packed, _, table = self._read_nf4(row)
            matrix = decode(packed, math.prod(row.shape), dtype, table).reshape(row.shape)
            return matrix if box is None else matrix[slices(box)]
        return self._tensors[row.key].read() if box is None else self._tensors[row.key].read_box(box)


def _copy(tensor: np.ndarray, part: np.ndarray) -> None:
    """Copies `tensor` into `part`, the last axis of both contiguous, as bytes: NumPy holds Python's lock while it
    copies bfloat16."""
    part.view(np.uint8)[...] = tensor.view(np.uint8)


def read_hf(path: str | os.PathLike[str], dtype: str | None = None, dequantize: bool = False) -> HFCheckpoint:
    """Opens an HF checkpoint and checks everything except the values. `dtype` casts every tensor, once.

    Quantised weights keep their bytes; for them `dtype` is the dtype to decode into. `dequantize` decodes weights in
    NF4 and FP8, one tensor at a time: NF4 to the dtype before quantisation, FP8 to that in config.json, or to `dtype`.

    Raises:
        UserError: no safetensors, another model type, a quantisation other than bitsandbytes' NF4 and blocks of FP8, a
            key that is missing, unexpected or stored twice, a wrong shape or dtype, dtypes that differ within a stack
            that is not cast, weights in FP8 that can only be decoded, or `dequantize` of plain weights.
    """
    return HFCheckpoint(pathlib.Path(path), dtype, dequantize)


def _check_dequantize(path: pathlib.Path, form: WeightForm | None, dequantize: bool) -> None:
    if form is None and dequantize:
        raise UserError(f"{path}: dequantize: expected weights in FP8 or NF4, found neither")


def _known(dtype: str) -> str:
    if dtype not in DTYPES:
        raise UserError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    return dtype


def companion_files(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Name -> file, for the files of the tokenizer and the generation config in the folder `path`, with the chat
    templates that lie in a folder inside.

    A notice says if there is no tokenizer: only commands that read or write text need one.

    Raises:
        UserError: a file is a broken link.
    """
    named = [file.relative_to(path).as_posix() for file in sorted(path.glob(MORE_TEMPLATES))]
    found = {name: path / name for name in (*_COMPANIONS, *named) if is_file(path / name)}
    if not has_tokenizer(path):
        logging.getLogger("jaxmoe").warning(
            "%s: no tokenizer (%s); commands that read or write text will need one", path, NEEDED
        )
    return found


def config_bytes(source: Checkpoint, dtype: str | None) -> bytes:
    """The content of config.json, with only these changes: `dtype`, under the key that the file uses for it, and the
    quantization_config if the weights are recoded or decoded."""
    content = (source.path / "config.json").read_bytes()
    raw = json.loads(content)
    changes: dict[str, Any] = {}
    if dtype is not None:
        names = [name for name in ("dtype", "torch_dtype") if name in raw] or ["dtype"]
        changes |= dict.fromkeys(names, dtype)
    decoded = raw.get("quantization_config") is not None and source.quantization is None
    if isinstance(source, Recoded) or decoded:
        changes["quantization_config"] = None
        if (quantization := source.quantization) is not None:
            changes["quantization_config"] = (
                fp8.settings_of(source.config, quantization)
                if quantization.form == "fp8"
                else nf4.settings_of(source.config, quantization, source.dtypes["embed_tokens"].name)
            )
    raw = {key: value for key, value in (raw | changes).items() if key not in changes or value is not None}
    return (json.dumps(raw, indent=2, ensure_ascii=False) + "\n").encode() if changes else content


def hf2jax(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    dtype: str | None = None,
    quantize: str | None = None,
    on_block: Callable[[Block, int], None] = lambda block, layers: None,
    dequantize: bool = False,
) -> None:
    """Converts the HF folder `src` into the converted folder `dst`, which must be new or empty.

    `quantize` "nf4" or "fp8" encodes projections, dense MLPs and experts. Weights that are in NF4 or FP8 already keep
    their bytes, unless `dequantize` decodes them.
    `on_block` is called after each block with the block and the number of layers. A notice names the first tensor that
    holds NaN or infinity.

    Raises:
        UserError: what `read_hf` and `companion_files` raise, or `dst` is not empty.
    """
    source: Checkpoint = read_hf(src, dtype, dequantize)
    if quantize is not None:
        source = quantized(source, quantize)
    files = {"config.json": config_bytes(source, dtype), **companion_files(source.path)}
    write_converted(dst, source, files, noticing(str(src), source, on_block))
