"""Checkpoints on disk: the converted folder, the converted adapter, and the state of a training run.

A converted folder holds one Orbax item per decoder layer (`layers/00012`) and one for the rest (`top`), the files of
the HF checkpoint that are not weights, and `manifest.json` with shape, dtype and SHA-256 of every array. Orbax copies
the host arrays that it saves, so one item is written after the other: the peak is a layer, not a model. Arrays are
NumPy here, bfloat16 as `ml_dtypes.bfloat16`; no model and no device is needed. A folder with weights in NF4 says so in
its manifest, whose version is then 2.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import ml_dtypes  # noqa: F401  (registers bfloat16, so that np.dtype("bfloat16") works)
import numpy as np

from jaxmoe.config import DTYPES, LoraConfig, Qwen3MoeConfig, read_json
from jaxmoe.errors import UserError
from jaxmoe.parameters import (
    Quantization,
    layer_paths,
    lora_specs,
    nf4_candidates,
    parameter_specs,
    stored_specs,
    top_level_paths,
)
from jaxmoe.store.files import copy_file, output_folder

MANIFEST, ADAPTER_MANIFEST = "manifest.json", "adapter.json"
_VERSION, _NF4_VERSION = 1, 2
_FORMATS = {MANIFEST: "jaxmoe checkpoint", ADAPTER_MANIFEST: "jaxmoe adapter"}
# Compression runs on all cores at once, each with a chunk and its compressed copy: small chunks keep the peak low.
_CHUNK_BYTES = 16 * 2**20

# how the experts of an HF checkpoint lie on disk: one tensor per expert and projection, as transformers writes them, or
# as it holds them in memory
Layout = Literal["per_expert", "fused"]


@dataclass(frozen=True)
class Block:
    """One decoder layer, or the top level (None): dotted path -> array without the layer axis.

    The paths are those of `stored_specs`: a weight in NF4 is several arrays.
    """

    layer: int | None
    arrays: dict[str, np.ndarray]


@runtime_checkable
class Checkpoint(Protocol):
    """What reading an HF folder and reading a converted folder have in common."""

    path: pathlib.Path
    config: Qwen3MoeConfig
    quantization: Quantization | None
    dtypes: dict[str, np.dtype]  # of every path of `parameter_specs(config)`; of a weight in NF4: what it was made from
    layout: Layout  # of the HF checkpoint that this comes from
    stored_tied_head: bool  # that checkpoint stored lm_head although it is tied

    def block(self, layer: int | None) -> Block:
        """One decoder layer, or the top level, which has to come first; layers may be read in several threads."""
        ...

    def blocks(self) -> Iterator[Block]:
        """The top level first, then every layer; each block is dropped before the next one is made."""
        ...


def cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`array` in `dtype`, rounded once to the nearest, ties to even; the array itself when it has that dtype already.

    Raises:
        UserError: a finite value that float16 cannot hold.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        out = array.astype(dtype)
    if dtype == np.float16:
        lost = np.isinf(out) & np.isfinite(array)
        if lost.any():
            raise UserError(f"{name}: expected values that float16 can hold, found {float(array[lost].flat[0]):g}")
    return out


def item_name(layer: int | None) -> str:
    """Where a block lies in a converted folder."""
    return "top" if layer is None else f"layers/{layer:05d}"


def write_converted(
    dst: str | os.PathLike[str],
    source: Checkpoint,
    files: Mapping[str, pathlib.Path | bytes],
    on_block: Callable[[Block, int], None] = lambda block, layers: None,
) -> None:
    """Streams a checkpoint into the converted folder `dst`; `files`, name -> file or content, are copied beside it."""
    with output_folder(dst) as folder:
        for name, content in files.items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                copy_file(content, folder / name)
        (folder / "layers").mkdir()
        items: dict[str, Any] = {}
        for block in source.blocks():
            items[item_name(block.layer)] = write_item(folder / item_name(block.layer), block.arrays)
            on_block(block, source.config.num_hidden_layers)
            del block  # the next one is made while this name would still hold it
        source_form = {"layout": source.layout, "stored_tied_head": source.stored_tied_head}
        manifest: dict[str, Any] = {"source": source_form, "items": items}
        version = _VERSION
        if source.quantization is not None:
            version, paths = _NF4_VERSION, source.quantization.paths
            weights = {path: source.dtypes[path].name for path in paths}
            manifest = {"nf4": {"nested": source.quantization.nested, "weights": weights}} | manifest
        _write_manifest(folder / MANIFEST, manifest, version)


class ConvertedCheckpoint:
    """A converted folder whose manifest agrees with its config; arrays are read when `blocks` gets to them."""

    def __init__(self, path: pathlib.Path, dtype: str | None, verify: bool) -> None:
        self.path, self._verify = path, verify
        self.config = Qwen3MoeConfig.from_pretrained(path)
        manifest = _read_manifest(path / MANIFEST, (_VERSION, _NF4_VERSION))
        self._items: dict[str, Any] = manifest.get("items") or {}
        try:
            self.layout: Layout = {name: name for name in get_args(Layout)}[manifest["source"]["layout"]]
            self.stored_tied_head = bool(manifest["source"]["stored_tied_head"])
        except (KeyError, TypeError):
            raise UserError(f"{path / MANIFEST}: source: expected layout and stored_tied_head, found neither") from None
        self._target = np.dtype(dtype) if dtype else None
        self.quantization, weights = self._check_nf4(manifest.get("nf4"))
        self.stored_dtypes = self._check_items() | weights
        self.dtypes = {name: self._target or self.stored_dtypes[name] for name in parameter_specs(self.config)}

    def _check_nf4(self, entry: Any) -> tuple[Quantization | None, dict[str, np.dtype]]:
        """(what is in NF4, the dtype that each of its weights was made from)."""
        if entry is None:
            return None, {}
        try:
            nested, weights = entry["nested"], dict(entry["weights"])
            known = nf4_candidates(self.config, router=True)
            if type(nested) is not bool or not weights or not set(weights) <= set(known):
                raise ValueError
            dtypes = {path: np.dtype({name: name for name in DTYPES}[dtype]) for path, dtype in weights.items()}
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.path / MANIFEST}: nf4: expected nested and weights, found {entry!r}"[:300]
            ) from None
        return Quantization(tuple(sorted(weights)), nested), dtypes

    def _check_items(self) -> dict[str, np.dtype]:
        specs = stored_specs(self.config, self.quantization)
        fixed = {name: spec.dtype for name, spec in specs.items() if spec.dtype is not None}
        top = top_level_paths(self.config, self.quantization)
        expected = {item_name(None): {name: specs[name].shape for name in top}}
        for layer in range(self.config.num_hidden_layers):
            paths = layer_paths(self.config, layer, self.quantization)
            expected[item_name(layer)] = {name: specs[name].shape[1:] for name, _ in paths}
        dtypes: dict[str, np.dtype] = {}
        _same_names(f"{self.path / MANIFEST}: items", expected, self._items)
        for item, arrays in expected.items():
            where = f"{self.path / MANIFEST}: {item}"
            for name, dtype in check_entries(where, self._items[item], arrays, fixed).items():
                if dtypes.setdefault(name, dtype) != dtype:
                    raise UserError(f"{self.path / MANIFEST}: {item}: {name}: expected {dtypes[name]}, found {dtype}")
        return dtypes

    def block(self, layer: int | None) -> Block:
        """One layer or the top level, checked against the manifest."""
        return Block(layer, self._read(item_name(layer)))

    def blocks(self) -> Iterator[Block]:
        """The top level first, then every layer, each checked against the manifest."""
        return map(self.block, (None, *range(self.config.num_hidden_layers)))

    def nested_offsets(self) -> dict[int, dict[str, np.ndarray]]:
        """Layer -> path -> the offsets of the weights in NF4: the only arrays whose values a plan of an HF checkpoint
        needs; they are small and read by themselves."""
        if self.quantization is None or not self.quantization.nested:
            return {}
        offsets: dict[int, dict[str, np.ndarray]] = {}
        for layer in range(self.config.num_hidden_layers):
            item, suffix = item_name(layer), ".nested_offset"
            entries = {name: entry for name, entry in self._items[item].items() if name.endswith(suffix)}
            arrays = read_item(self.path / item, entries, self._verify, partial=True)
            offsets[layer] = {name.removesuffix(suffix): array for name, array in arrays.items()}
        return offsets

    def _read(self, item: str) -> dict[str, np.ndarray]:
        arrays = read_item(self.path / item, self._items[item], self._verify)
        if self._target is not None:
            for name in arrays.keys() & self.dtypes.keys():
                arrays[name] = cast(f"{item}: {name}", arrays[name], self._target)
        return arrays


def read_converted(path: str | os.PathLike[str], dtype: str | None = None, verify: bool = True) -> ConvertedCheckpoint:
    """Opens a converted folder; `dtype` casts every weight that is not in NF4, `verify` compares checksums.

    Raises:
        UserError: here, for a manifest or config that is damaged or does not agree; from `blocks`, for a missing or
            damaged item.
    """
    return ConvertedCheckpoint(pathlib.Path(path), dtype, verify)


def is_converted(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a converted folder, as against an HF one."""
    return (pathlib.Path(path) / MANIFEST).is_file()


# --- adapters


def write_adapter(
    dst: str | os.PathLike[str], config: Qwen3MoeConfig, lora: LoraConfig, adapters: Mapping[str, Any]
) -> None:
    """Writes a converted adapter: one Orbax item, and `adapter.json` with both configs and every array's checksum.

    `adapters` holds the arrays of `lora_specs(config, lora)`, NumPy or JAX.
    """
    arrays = {name: np.asarray(array) for name, array in adapters.items()}
    check_adapter("adapter", config, lora, arrays)
    with output_folder(dst) as folder:
        entries = write_item(folder / "adapter", arrays)
        model = config.to_hf()
        _write_manifest(folder / ADAPTER_MANIFEST, {"lora": asdict(lora), "model": model, "arrays": entries})


def read_adapter(
    path: str | os.PathLike[str], config: Qwen3MoeConfig | None = None, verify: bool = True
) -> tuple[Qwen3MoeConfig, LoraConfig, dict[str, np.ndarray]]:
    """Reads a converted adapter: the config of the model that it was made for, its own, and its arrays.

    Raises:
        UserError: a damaged folder, or an adapter whose shapes do not fit `config`.
    """
    path = pathlib.Path(path)
    manifest = _read_manifest(path / ADAPTER_MANIFEST)
    raw = manifest.get("lora")
    known = {field.name for field in fields(LoraConfig)}
    if not isinstance(raw, dict) or set(raw) != known or not isinstance(manifest.get("model"), dict):
        raise UserError(f"{path / ADAPTER_MANIFEST}: lora, model: expected {', '.join(sorted(known))}, found {raw!r}")
    lora = LoraConfig(**{name: _tuples(value) for name, value in raw.items()})
    own = Qwen3MoeConfig.from_hf(manifest["model"])
    shapes = {name: spec.shape for name, spec in lora_specs(config or own, lora).items()}
    check_entries(f"{path / ADAPTER_MANIFEST}: arrays", manifest.get("arrays"), shapes)
    return own, lora, read_item(path / "adapter", manifest["arrays"], verify)


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that a frozen dataclass holds."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a converted adapter."""
    return (pathlib.Path(path) / ADAPTER_MANIFEST).is_file()


def check_adapter(where: str, config: Qwen3MoeConfig, lora: LoraConfig, adapters: Mapping[str, np.ndarray]) -> None:
    """Raises UserError unless `adapters` holds exactly the arrays that `lora_specs(config, lora)` asks for."""
    specs = lora_specs(config, lora)
    _same_names(where, specs, adapters)
    for name, spec in specs.items():
        if adapters[name].shape != spec.shape:
            raise UserError(f"{where}: {name}: expected shape {spec.shape}, found {adapters[name].shape}")


# --- training runs


class TrainCheckpoints:
    """The last `keep` states of a training run in the folder `directory`, one Orbax step each, written atomically.

    A state is any pytree of arrays and numbers. It is stored leaf by leaf, with the leaves' names in the metadata, so
    that a state of another structure is refused rather than misread. A run that is killed while it saves leaves the
    steps before it intact.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2) -> None:
        self._ocp = _orbax()
        self.directory = pathlib.Path(directory).resolve()
        # Not asynchronous: on CPU the next step may reuse the memory that a background thread would still be reading.
        options = self._ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        self._manager = self._ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, metadata: Mapping[str, Any]) -> None:
        """Writes `state` and `metadata` (anything that JSON can hold) as the checkpoint of `step`, a new one; returns
        when it is on disk.

        Raises:
            OSError: the disk is full or fails; older checkpoints are as they were.
        """
        leaves = _named_leaves(state)
        entries = [[name, list(np.shape(leaf)), str(_dtype(leaf))] for name, leaf in leaves]
        items = self._ocp.args.Composite(
            state=self._ocp.args.PyTreeSave({str(i): leaf for i, (_, leaf) in enumerate(leaves)}),
            metadata=self._ocp.args.JsonSave({"version": _VERSION, "leaves": entries, "metadata": dict(metadata)}),
        )
        try:
            with _without_stray_tracebacks():
                self._manager.save(step, args=items, force=True)
        except ValueError as error:
            if "os_error_code" not in str(error):  # how tensorstore marks what the disk said
                raise
            raise OSError(f"{self.directory / str(step)}: cannot be written: {_first_line(error)}") from error

    def restore_latest(self, template: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest (step, state, metadata), or None when there is none.

        The state has the structure, dtypes and placement of `template`, whose leaves are arrays or
        `jax.ShapeDtypeStruct`; NumPy leaves come back as NumPy.

        Raises:
            UserError: the checkpoint is damaged, or its leaves are not those of `template`.
        """
        import jax

        step = self.latest_step()
        if step is None:
            return None
        where = self.directory / str(step)
        leaves = _named_leaves(template)
        stored = self._restore(step, where, metadata=self._ocp.args.JsonRestore())
        if not isinstance(stored, dict) or stored.get("version") != _VERSION:
            raise UserError(f"{where}: expected a training checkpoint of version {_VERSION}, found another")
        expected = [[name, list(np.shape(leaf)), str(_dtype(leaf))] for name, leaf in leaves]
        for want, found in zip(expected, stored["leaves"], strict=False):
            if want != found:
                raise UserError(f"{where}: expected {_leaf_text(*want)}, found {_leaf_text(*found)}")
        if len(expected) != len(stored["leaves"]):
            raise UserError(f"{where}: expected {len(expected)} arrays, found {len(stored['leaves'])}")
        restore_args = {str(i): self._ocp.RestoreArgs(restore_type=np.ndarray) for i in range(len(leaves))}
        arrays = self._restore(step, where, state=self._ocp.args.PyTreeRestore(restore_args=restore_args))
        values = [_placed(arrays[str(i)], leaf) for i, (_, leaf) in enumerate(leaves)]
        return step, jax.tree.unflatten(jax.tree.structure(template), values), stored["metadata"]

    def _restore(self, step: int, where: pathlib.Path, **args: Any) -> Any:
        try:
            (item,) = self._manager.restore(step, args=self._ocp.args.Composite(**args)).values()
        except Exception as error:
            # as in `read_item`: the type depends on which layer stumbled over the damage
            raise UserError(f"{where}: cannot be read: {_first_line(error)}") from error
        return item

    def wait(self) -> None:
        """Returns when everything that was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Releases the folder; call it once, after the last save."""
        self._manager.close()


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    import jax

    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _dtype(leaf: Any) -> np.dtype:
    return np.dtype(leaf.dtype) if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _leaf_text(name: str, shape: list[int], dtype: str) -> str:
    return f"{name} {dtype} {shape}"


def _placed(value: np.ndarray, like: Any) -> Any:
    """`value` as a jax.Array with the sharding of `like`, or as NumPy where `like` is no JAX array."""
    import jax

    if isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return jax.device_put(value, like.sharding) if like.sharding is not None else jax.device_put(value)
    return value


# --- manifests and Orbax items


def _write_manifest(path: pathlib.Path, content: dict[str, Any], version: int = _VERSION) -> None:
    head = {"format": _FORMATS[path.name], "version": version}
    path.write_text(json.dumps(head | content, indent=1) + "\n", encoding="utf-8")


def _read_manifest(path: pathlib.Path, versions: tuple[int, ...] = (_VERSION,)) -> dict[str, Any]:
    raw = read_json(path)
    if raw.get("format") != _FORMATS[path.name]:
        raise UserError(f"{path}: format: expected {_FORMATS[path.name]!r}, found {raw.get('format')!r}")
    if raw.get("version") not in versions:
        expected = " or ".join(map(str, versions))
        raise UserError(f"{path}: version: expected {expected}, found {raw.get('version')!r}")
    return raw


def _same_names(where: str, expected: Iterable[str], found: Any) -> None:
    if not isinstance(found, Mapping):
        raise UserError(f"{where}: expected a JSON object, found {type(found).__name__}")
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        raise UserError(f"{where}: expected {missing[0]}, found none ({len(missing)} missing)")
    if unexpected:
        raise UserError(f"{where}: unexpected {unexpected[0]} ({len(unexpected)} unexpected)")


def check_entries(
    where: str, entries: Any, shapes: Mapping[str, tuple[int, ...]], fixed: Mapping[str, str] = MappingProxyType({})
) -> dict[str, np.dtype]:
    """Checks the manifest's entries of one item against the expected shapes and returns the dtypes.

    `fixed` names the dtypes that are given; every other one has to be a float.
    """
    _same_names(where, shapes, entries)
    dtypes = {}
    for name, shape in shapes.items():
        entry = entries[name]
        if not isinstance(entry, dict) or set(entry) != {"shape", "dtype", "sha256"}:
            raise UserError(f"{where}: {name}: expected shape, dtype and sha256, found {entry!r}")
        if entry["shape"] != list(shape):
            raise UserError(f"{where}: {name}: expected shape {list(shape)}, found {entry['shape']}")
        if entry["dtype"] not in ((fixed[name],) if name in fixed else DTYPES):
            expected = fixed.get(name, "a float dtype")
            raise UserError(f"{where}: {name}: expected {expected}, found {entry['dtype']!r}")
        dtypes[name] = np.dtype(entry["dtype"])
    return dtypes


def checksum(array: np.ndarray) -> str:
    """SHA-256 of the array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def write_item(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Writes one Orbax item and returns its entries for the manifest."""
    # In a thread of its own, which is waited for: Ctrl-C and SIGTERM are raised in the main thread, and one that tore
    # Orbax out of a write would leave others running while the folder is being removed.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(_save, path.resolve(), arrays).result()
    return {
        name: {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": checksum(array)}
        for name, array in arrays.items()
    }


def _save(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    ocp = _orbax()
    # one file per chunk: the single-file format (OCDBT) gathers the whole item in memory before it writes
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))
    save_args = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in arrays}
    try:
        with _without_stray_tracebacks():
            checkpointer.save(path, args=ocp.args.PyTreeSave(dict(arrays), save_args=save_args))
    except ValueError as error:
        _wait_for_stragglers(path)
        # tensorstore reports a failing disk as ValueError, with the cause in the text
        raise OSError(f"{path.name}: cannot be written: {_first_line(error)}") from error
    finally:
        checkpointer.close()


@contextlib.contextmanager
def _without_stray_tracebacks() -> Iterator[None]:
    """When one array fails, Orbax stops listening to the others, and tensorstore prints a traceback for each of them
    through this hook; the error itself is raised as ever."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        yield
    except BaseException:
        time.sleep(0.2)  # for those that are still to come
        raise
    finally:
        sys.unraisablehook = hook


def _wait_for_stragglers(path: pathlib.Path) -> None:
    """Returns once the writes that were under way when one failed have ended: nothing new appears beside `path`."""
    before = None
    while (now := sorted(map(str, path.parent.glob(f"{path.name}*/**/*")))) != before:
        before = now
        time.sleep(0.2)


def read_item(
    path: pathlib.Path, entries: Mapping[str, Any], verify: bool, partial: bool = False
) -> dict[str, np.ndarray]:
    """Reads one Orbax item, or (`partial`) some of its arrays, and compares it with its entries in the manifest.

    Raises:
        UserError: a missing or unreadable item, or an array whose shape, dtype or checksum differs.
    """
    ocp = _orbax()
    if not path.is_dir():
        raise UserError(f"{path}: expected a folder with arrays, found none")
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))
    restore_args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in entries}
    try:
        with _without_stray_tracebacks():
            chosen = {"item": dict.fromkeys(entries, 0), "partial_restore": True} if partial else {}
            options = ocp.args.PyTreeRestore(restore_args=restore_args, **chosen)
            arrays = checkpointer.restore(path.resolve(), args=options)
    except Exception as error:
        # damaged files surface as whatever the layer that stumbled raises: ValueError, KeyError, JSON and zstd errors
        raise UserError(f"{path}: cannot be read: {_first_line(error)}") from error
    finally:
        checkpointer.close()
    _same_names(str(path), entries, arrays)
    for name, entry in entries.items():
        array = arrays[name]
        if list(array.shape) != entry["shape"] or array.dtype != np.dtype(entry["dtype"]):
            found = f"{array.dtype} {list(array.shape)}"
            raise UserError(f"{path}: {name}: expected {entry['dtype']} {entry['shape']}, found {found}")
        if verify and (found := checksum(array)) != entry["sha256"]:
            raise UserError(f"{path}: {name}: expected SHA-256 {entry['sha256'][:16]}..., found {found[:16]}...")
    return arrays


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _orbax() -> Any:
    """Orbax, imported where it is used because it loads JAX, and without its log lines: what it logs it also raises."""
    import absl.logging
    import orbax.checkpoint as ocp

    absl.logging.set_verbosity(absl.logging.FATAL)
    return ocp
