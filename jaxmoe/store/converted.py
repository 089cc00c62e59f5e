"""The converted folder: a checkpoint that is read and written layer by layer, with a checksum for every array.

It holds one Orbax item per decoder layer (`layers/00012`) and one for the rest (`top`), the files of the HF checkpoint
that are not weights, and `manifest.json`. Reading and writing need memory for one layer, not for the model. If weights
are in NF4, the manifest says so and has version 5, or 6 if some layers of a stack are not. If they are in FP8, it says
so and has version 7. Otherwise it has version 4.
Versions 1 to 3 are the same, except that their checksums are those of whole arrays, not of pieces.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, get_args

import numpy as np

from jaxmoe.config import DTYPES, Qwen3MoeConfig
from jaxmoe.errors import UserError
from jaxmoe.parameters import (
    Quantization,
    layer_paths,
    parameter_specs,
    quantizable,
    stored_specs,
    top_level_paths,
)
from jaxmoe.store.boxes import Box
from jaxmoe.store.checkpoint import Block, Checkpoint, Layout, Parts, cast
from jaxmoe.store.files import check_links, output_folder, write_files
from jaxmoe.store.items import (
    check_entries,
    read_item,
    read_manifest,
    read_parts,
    same_names,
    write_item,
    write_manifest,
)
from jaxmoe.weight_form import WeightForm

MANIFEST = "manifest.json"
_KIND = "jaxmoe checkpoint"
_VERSION, _NF4_VERSION, _MIXED_VERSION, _FP8_VERSION = 4, 5, 6, 7
_READ = (1, 2, 3, _VERSION, _NF4_VERSION, _MIXED_VERSION, _FP8_VERSION)
_SCALES = ("float32", "bfloat16")  # the dtypes of FP8's scales


def item_name(layer: int | None) -> str:
    """The path of a block in a converted folder."""
    return "top" if layer is None else f"layers/{layer:05d}"


def write_converted(
    dst: str | os.PathLike[str],
    source: Checkpoint,
    files: Mapping[str, pathlib.Path | bytes],
    on_block: Callable[[Block, int], None] = lambda block, layers: None,
) -> None:
    """Writes a checkpoint, one block at a time, as the converted folder `dst`, which must be new or empty.

    `files`, name -> file or content, are copied into the folder. `on_block` is called after each block with the block
    and the number of layers.
    """
    with output_folder(dst) as folder:
        write_files(folder, files)
        (folder / "layers").mkdir()
        items: dict[str, Any] = {}
        for block in source.blocks():
            items[item_name(block.layer)] = write_item(folder / item_name(block.layer), block.arrays)
            on_block(block, source.config.num_hidden_layers)
            del block  # else this name would keep it alive while the next one is made
        source_form = {"layout": source.layout, "stored_tied_head": source.stored_tied_head}
        manifest: dict[str, Any] = {"source": source_form, "items": items}
        version = _VERSION
        if source.quantization is not None:
            version, entry = _entry(source.quantization, source.dtypes)
            manifest = {source.quantization.form: entry} | manifest
        write_manifest(folder / MANIFEST, _KIND, version, manifest)


def _entry(quantization: Quantization, dtypes: Mapping[str, np.dtype]) -> tuple[int, dict[str, Any]]:
    """(the version of a manifest with quantised weights, what it says of them)."""
    mixed = dict(quantization.unquantized)
    entry: dict[str, Any] = {"weights": {path: dtypes[path].name for path in quantization.paths}}
    if mixed:
        entry["unquantized"] = mixed
    if quantization.form == "fp8":
        return _FP8_VERSION, {"scales": quantization.scales} | entry
    return _MIXED_VERSION if mixed else _NF4_VERSION, {"nested": quantization.nested} | entry


class ConvertedCheckpoint:
    """A converted folder whose manifest has been checked against its config; arrays are read on demand."""

    def __init__(self, path: pathlib.Path, dtype: str | None, verify: bool) -> None:
        self.path, self._verify = path, verify
        check_links(path)
        self.config = Qwen3MoeConfig.from_pretrained(path)
        manifest = read_manifest(path / MANIFEST, _KIND, _READ)
        self._items: dict[str, Any] = manifest.get("items") or {}
        try:
            self.layout: Layout = {name: name for name in get_args(Layout)}[manifest["source"]["layout"]]
            self.stored_tied_head = bool(manifest["source"]["stored_tied_head"])
        except (KeyError, TypeError):
            found = f"{manifest.get('source')!r}"[:200]
            raise UserError(f"{path / MANIFEST}: source: expected layout and stored_tied_head, found {found}") from None
        self._target = np.dtype(dtype) if dtype else None
        form: WeightForm = "fp8" if "fp8" in manifest else "nf4"
        self.quantization, weights = self._check_quantization(form, manifest.get(form))
        self.stored_dtypes = self._check_items() | weights
        mixed = dict(self.quantization.unquantized) if self.quantization else {}
        names = (*parameter_specs(self.config), *(f"{path}.weight" for path in mixed))
        self.dtypes = {name: self._target or self.stored_dtypes[name] for name in names}

    def _check_quantization(self, form: WeightForm, entry: Any) -> tuple[Quantization | None, dict[str, np.dtype]]:
        """(which weights are quantised, the dtype of each of them before quantisation, or to decode it into)."""
        if entry is None:
            return None, {}
        first = {"nf4": "nested", "fp8": "scales"}[form]
        try:
            value, weights = entry[first], dict(entry["weights"])
            known = quantizable(self.config, router=True)
            if type(value) is not bool if form == "nf4" else value not in _SCALES:
                raise ValueError
            if not weights or not set(weights) <= set(known):
                raise ValueError
            dtypes = {path: np.dtype({name: name for name in DTYPES}[dtype]) for path, dtype in weights.items()}
            mixed = {path: tuple(slots) for path, slots in entry.get("unquantized", {}).items()}
            specs = parameter_specs(self.config)
            if not set(mixed) <= set(weights) or not all(
                0 < len(slots) < specs[path].shape[0]
                and slots == tuple(i for i in range(specs[path].shape[0]) if i in slots)
                for path, slots in mixed.items()
            ):
                raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.path / MANIFEST}: {form}: expected {first} and weights, found {entry!r}"[:300]
            ) from None
        paths, unquantized = tuple(sorted(weights)), tuple(sorted(mixed.items()))
        if form == "fp8":
            return Quantization.in_fp8(paths, value, unquantized), dtypes
        return Quantization(paths, value, unquantized), dtypes

    def _check_items(self) -> dict[str, np.dtype]:
        specs = stored_specs(self.config, self.quantization)
        fixed = {name: spec.dtype for name, spec in specs.items() if spec.dtype is not None}
        top = top_level_paths(self.config, self.quantization)
        expected = {item_name(None): {name: specs[name].shape for name in top}}
        for layer in range(self.config.num_hidden_layers):
            paths = layer_paths(self.config, layer, self.quantization)
            expected[item_name(layer)] = {name: specs[name].shape[1:] for name, _ in paths}
        dtypes: dict[str, np.dtype] = {}
        same_names(f"{self.path / MANIFEST}: items", expected, self._items)
        for item, arrays in expected.items():
            where = f"{self.path / MANIFEST}: {item}"
            for name, dtype in check_entries(where, self._items[item], arrays, fixed).items():
                if dtypes.setdefault(name, dtype) != dtype:
                    raise UserError(f"{self.path / MANIFEST}: {item}: {name}: expected {dtypes[name]}, found {dtype}")
        return dtypes

    def block(self, layer: int | None) -> Block:
        """One layer, or the top level (None), checked against the manifest."""
        item = item_name(layer)
        arrays = read_item(self.path / item, self._items[item], self._verify)
        for name in filter(partial(self._is_cast, item), arrays):
            arrays[name] = cast(f"{item}: {name}", arrays[name], self.dtypes[name])
        return Block(layer, arrays, self._digests(item))

    def parts(self, layer: int | None, wanted: Mapping[str, Collection[Box]]) -> Parts:
        """Parts of the arrays that `block` has. Nobody has compared them with the manifest yet."""
        item = item_name(layer)
        entries = {name: self._items[item][name] for name in wanted}
        arrays = read_parts(self.path / item, entries, wanted)
        for name in filter(partial(self._is_cast, item), arrays):
            arrays[name] = {box: cast(f"{item}: {name}", part, self.dtypes[name]) for box, part in arrays[name].items()}
        return Parts(str(self.path / item), arrays, self._digests(item))

    def _is_cast(self, item: str, name: str) -> bool:
        """Whether an array is read in another dtype than it is stored in."""
        return name in self.dtypes and self.dtypes[name].name != self._items[item][name]["dtype"]

    def _digests(self, item: str) -> dict[str, str]:
        """The digests that the arrays of an item have if they are undamaged, as far as the manifest tells."""
        entries = self._items[item].items() if self._verify else ()
        return {name: entry["digest"] for name, entry in entries if "digest" in entry and not self._is_cast(item, name)}

    def blocks(self) -> Iterator[Block]:
        """The top level first, then every layer, each checked against the manifest."""
        return map(self.block, (None, *range(self.config.num_hidden_layers)))

    def nested_offsets(self) -> dict[int, dict[str, np.ndarray]]:
        """Layer -> path -> the offset of every weight in NF4. Only these small arrays are read: the length of an HF
        checkpoint depends on their values, so `convert` needs them before it writes."""
        if self.quantization is None or not self.quantization.nested:
            return {}
        offsets: dict[int, dict[str, np.ndarray]] = {}
        for layer in range(self.config.num_hidden_layers):
            item, suffix = item_name(layer), ".nested_offset"
            entries = {name: entry for name, entry in self._items[item].items() if name.endswith(suffix)}
            arrays = read_item(self.path / item, entries, self._verify, partial=True)
            offsets[layer] = {name.removesuffix(suffix): array for name, array in arrays.items()}
        return offsets


def read_converted(path: str | os.PathLike[str], dtype: str | None = None, verify: bool = True) -> ConvertedCheckpoint:
    """Opens a converted folder. `dtype` casts every weight that is not quantised; `verify` compares checksums.

    Raises:
        UserError: the manifest or the config is damaged, they do not agree, or a link leads out of the folder. Reading
            a block raises it for a missing or damaged item.
    """
    return ConvertedCheckpoint(pathlib.Path(path), dtype, verify)


def is_converted(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a converted folder."""
    return (pathlib.Path(path) / MANIFEST).is_file()
