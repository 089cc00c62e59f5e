"""Training checkpoints: the state of a run on disk, so that a run that stopped can resume."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxmoe.distributed import launch
from jaxmoe.distributed.agreement import exchange_values, wait_for_all
from jaxmoe.errors import UserError, shown
from jaxmoe.json_text import MAX_FILE, parse_json, read_json
from jaxmoe.store import element_sums
from jaxmoe.store.digest import checksums
from jaxmoe.store.element_sums import checksum_of, sum_of_part
from jaxmoe.store.files import check_links, os_error
from jaxmoe.store.items import check_zarray, first_line, quiet_orbax, wait_for_stragglers
from jaxmoe.tokenizer_files import check_small_file

_VERSION = 2
_WITHOUT_CHECKSUMS = 1  # what earlier versions wrote
_BY_SEVERAL = 3  # several processes wrote it: no process had a whole array, so the checksums are other ones
_MOST_DESCRIPTION = 4096  # bytes that describe an array
_OCDBT = "manifest.ocdbt"
_STEP_FILE = "_CHECKPOINT_METADATA"  # what Orbax writes about a step, and reads of every step at once
_TEMPORARY = "*.orbax-checkpoint-tmp*"


def _way_out(others: Collection[int]) -> str:
    """What to do without a damaged checkpoint, if there are these other steps."""
    if not others:
        return "no older checkpoint is left: start again in a new folder"
    return f"--resume-from {max(others)} continues from the checkpoint before it"


class TrainCheckpoints:
    """The last `keep` states of a training run in the folder `directory`, one Orbax step each, and one that is spared.

    A state is any pytree of arrays and numbers. The name, shape, dtype and SHA-256 of each leaf are stored too, and
    compared when the state is restored. A checkpoint appears whole or not at all: if a run is killed while it saves,
    the earlier checkpoints stay intact.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2) -> None:
        """Opens the folder, which need not exist.

        Raises:
            UserError: a link leads out of it, or what Orbax wrote about a step is damaged or endless.
        """
        self.directory = pathlib.Path(os.path.realpath(directory))
        self._keep = keep
        self.notice: str | None = None  # what `restore` could not verify
        self._several = launch.this().count > 1
        check_links(self.directory)
        if launch.this().is_first:
            self._remove_unfinished()
        wait_for_all()
        for file in self.directory.glob(f"*/{_STEP_FILE}"):
            check_small_file(file)
        with quiet_orbax() as ocp:
            # Not asynchronous: on a CPU the next step may overwrite memory that a background thread still reads.
            options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
            try:
                self._manager = ocp.CheckpointManager(self.directory, options=options)
            except OSError:
                raise
            except Exception as error:  # the type depends on what is damaged
                file = self._unlisted(ocp)
                steps = [int(folder.name) for folder in self.directory.iterdir() if folder.name.isdecimal()]
                way_out = _way_out([step for step in steps if str(step) != file.parent.name])
                raise UserError(
                    f"{file}: cannot be read: {first_line(error)}; move this step's folder away, then {way_out}"
                ) from error

    def _unlisted(self, ocp: Any) -> pathlib.Path:
        """The file that keeps Orbax from listing the checkpoints: each step's own is tried alone."""
        for file in sorted(self.directory.glob(f"*/{_STEP_FILE}"), reverse=True):
            with tempfile.TemporaryDirectory() as alone:
                copy = pathlib.Path(alone, file.parent.name, _STEP_FILE)
                copy.parent.mkdir()
                shutil.copyfile(file, copy)
                try:
                    ocp.CheckpointManager(alone).close()
                except Exception:
                    return file
        return self.directory

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, metadata: Mapping[str, Any], spared: int | None = None) -> None:
        """Writes `state` and `metadata` (any JSON value) as the checkpoint of `step`; returns when it is on disk.

        Checkpoints of the same or later steps are removed first: they are those that the run did not resume from.
        Afterwards only the last ones are kept, and that of the step `spared`, however old it is.

        Raises:
            OSError: the disk is full or fails. Older checkpoints stay intact.
        """
        leaves = _named_leaves(state)
        digests = self._checksums(leaf for _, leaf in leaves)
        entries = [
            [name, list(np.shape(leaf)), str(_dtype(leaf)), digest]
            for (name, leaf), digest in zip(leaves, digests, strict=True)
        ]
        content = {"version": _BY_SEVERAL if self._several else _VERSION, "step": step, "leaves": entries}
        content["metadata"] = dict(metadata)
        try:
            with quiet_orbax() as ocp:
                for later in self.steps():
                    if later >= step:
                        self._manager.delete(later)
                items = ocp.args.Composite(
                    state=ocp.args.PyTreeSave({str(i): leaf for i, (_, leaf) in enumerate(leaves)}),
                    metadata=ocp.args.JsonSave(content | {"sha256": _content_digest(content)}),
                )
                self._manager.save(step, args=items, force=True)
                for old in self.steps()[: -self._keep]:
                    if old != spared:
                        self._manager.delete(old)
        except ValueError as error:
            self._remove_failed()
            if "os_error_code" not in str(error):  # tensorstore's mark for errors of the operating system
                raise
            raise os_error(self.directory / str(step), first_line(error, 3000)) from error
        except OSError as error:
            self._remove_failed()
            if error.errno is None:
                raise
            raise OSError(error.errno, os.strerror(error.errno), str(self.directory / str(step))) from error

    def _checksums(self, leaves: Iterable[Any]) -> list[str]:
        """The checksum of each leaf, of which each of several processes has a share."""
        if not self._several:
            return checksums(np.asarray(leaf) for leaf in leaves)
        ours = [sum(sum_of_part(*part, np.shape(leaf)) for part in _own_parts(leaf)) for leaf in leaves]
        return [checksum_of(sums) for sums in zip(*exchange_values(ours), strict=True)]

    def _remove_failed(self) -> None:
        """Removes what a save that failed left behind, unless other processes may still write there."""
        if not self._several:
            self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        """Removes what a killed run, or a save that failed, left behind: this process alone writes here."""
        if any(self.directory.glob(_TEMPORARY)):
            wait_for_stragglers(self.directory / "*.orbax-checkpoint-tmp")
        for folder in self.directory.glob(_TEMPORARY):
            shutil.rmtree(folder, ignore_errors=True)

    def chosen_step(self, which: str | None) -> int | None:
        """The step that `--resume-from` names: a number, "previous" (the one before the newest), or None (the newest).

        Raises:
            UserError: there is no such checkpoint.
        """
        steps = self.steps()
        if which is None:
            return max(steps, default=None)
        if which == "previous":
            if len(steps) < 2:
                raise UserError(
                    f"resume_from: expected two checkpoints or more in {self.directory}, found {len(steps)}"
                )
            return steps[-2]
        if int(which) not in steps:
            found = ", ".join(map(str, steps)) or "none"
            raise UserError(
                f"resume_from: expected a step with a checkpoint in {self.directory} ({found}), found {which}"
            )
        return int(which)

    def restore_latest(self, template: Any, which: str | None = None) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest (step, state, metadata), or that of `which` (`chosen_step`); None if there is no checkpoint.

        The state has the structure, dtypes and placement of `template`, whose leaves are arrays or
        `jax.ShapeDtypeStruct`. Leaves that are NumPy arrays in `template` are NumPy arrays in the state.

        Raises:
            UserError: the checkpoint is damaged, its leaves differ from those of `template`, or a link leads out of the
                folder. For a damaged one, the message names the checkpoint before it, if there is one.
        """
        step = self.chosen_step(which)
        if step is None:
            return None
        check_links(self.directory)
        try:
            return step, *self._restore(step, template)
        except UserError as error:
            raise UserError(f"{error}; {_way_out([each for each in self.steps() if each < step])}") from error

    def _restore(self, step: int, template: Any) -> tuple[Any, dict[str, Any]]:
        import jax

        leaves = _named_leaves(template)
        self._check_sizes(step, leaves)
        with quiet_orbax() as ocp:
            stored = self._read(step, metadata=ocp.args.JsonRestore())
            digests = self._check_leaves(step, leaves, stored)
            self._check_stored(step, leaves)
            shared = self._several and stored["version"] == _BY_SEVERAL
            restore_args = {
                str(i): _of_process(ocp, leaf) if shared else ocp.RestoreArgs(restore_type=np.ndarray)
                for i, (_, leaf) in enumerate(leaves)
            }
            arrays = self._read(step, state=ocp.args.PyTreeRestore(restore_args=restore_args))
        values = [arrays[str(i)] for i in range(len(leaves))]
        self._check_values(step, leaves, values, digests)
        placed = [_placed(value, leaf) for value, (_, leaf) in zip(values, leaves, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(template), placed), stored["metadata"]

    def _check_leaves(self, step: int, leaves: list[tuple[str, Any]], stored: Any) -> list[str] | None:
        """Compares the leaves with those of the template; returns their checksums, None if none were stored."""
        where = self._path(step)
        content = dict(stored) if isinstance(stored, dict) else {}
        digest, version = content.pop("sha256", None), content.get("version")
        if version not in (_WITHOUT_CHECKSUMS, _VERSION, _BY_SEVERAL):
            raise UserError(
                f"{where}: version: expected {_WITHOUT_CHECKSUMS}, {_VERSION} or {_BY_SEVERAL}, found {version!r}"
            )
        if version != _WITHOUT_CHECKSUMS and digest != _content_digest(content):
            raise UserError(f"{where}: metadata: expected the checksum that it names, found another")
        if (written := content.get("step", step)) != step:  # the folder's name is not part of the checksum
            raise UserError(f"{where}: expected the checkpoint of step {step}, found that of step {written}")
        entries, length = content.get("leaves"), 3 if version == _WITHOUT_CHECKSUMS else 4
        listed = isinstance(entries, list) and all(isinstance(e, list) and len(e) == length for e in entries)
        if entries is None or not listed or not isinstance(content.get("metadata"), dict):
            raise UserError(f"{where}: metadata: expected leaves and metadata, found others")
        expected = [[name, list(np.shape(leaf)), str(_dtype(leaf))] for name, leaf in leaves]
        for want, found in zip(expected, entries, strict=False):
            if want != found[:3]:
                raise UserError(f"{where}: expected {_leaf_text(*want)}, found {shown(found[:3])}")
        if len(expected) != len(entries):
            raise UserError(f"{where}: expected {len(expected)} arrays, found {len(entries)}")
        if version == _WITHOUT_CHECKSUMS:
            self.notice = f"{where}: an earlier version wrote this checkpoint without checksums; it was not verified"
            return None
        return [digest for *_, digest in entries]

    def _check_sizes(self, step: int, leaves: list[tuple[str, Any]]) -> None:
        """Raises UserError if a file is larger than all arrays together: libraries may read it as a whole."""
        nbytes = sum(math.prod(np.shape(leaf)) * _dtype(leaf).itemsize for _, leaf in leaves)
        for file in self._path(step).rglob("*"):
            if file.is_file() and (size := file.stat().st_size) > nbytes + MAX_FILE:
                raise UserError(f"{file}: expected at most {nbytes + MAX_FILE:,} bytes, found {size:,}")

    def _check_stored(self, step: int, leaves: list[tuple[str, Any]]) -> None:
        """Compares what the stored arrays say of themselves with the template, before memory is taken for them."""
        folder = self._path(step) / "state"
        form = read_json(folder / "_METADATA")
        if form.get("use_zarr3") or not form.get("use_ocdbt", True) or not (folder / _OCDBT).is_file():
            raise UserError(f"{folder}: expected arrays in one OCDBT database, found another form")
        for index, (name, leaf) in enumerate(leaves):
            where = f"{self._path(step)}: {name}"
            raw = parse_json(self._description(folder, index, where), where)
            raw = raw if isinstance(raw, dict) else {}
            check_zarray(where, raw, np.shape(leaf))
            if not _is_dtype(raw.get("dtype"), _dtype(leaf)):
                raise UserError(f"{where}: expected {_dtype(leaf)}, found {shown(raw.get('dtype'))}")

    def _description(self, folder: pathlib.Path, index: int, where: str) -> bytes:
        """The text that describes one stored array."""
        import tensorstore

        base = {"driver": "file", "path": f"{folder}/"}
        try:
            store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
            text = bytes(store.read(f"{index}/.zarray").result().value)
        except Exception as error:
            raise UserError(f"{where}: cannot be read: {first_line(error)}") from error
        if len(text) > _MOST_DESCRIPTION:
            raise UserError(f"{where}: expected at most {_MOST_DESCRIPTION} bytes about it, found {len(text):,}")
        return text

    def _check_values(
        self, step: int, leaves: list[tuple[str, Any]], values: list[Any], digests: list[str] | None
    ) -> None:
        where = self._path(step)
        for (name, leaf), value in zip(leaves, values, strict=True):
            want, found = ((list(np.shape(each)), str(_dtype(each))) for each in (leaf, value))
            if want != found:
                raise UserError(f"{where}: expected {_leaf_text(name, *want)}, found {_leaf_text(name, *found)}")
        if digests is None:
            return
        added_up = any(str(digest).startswith(element_sums.PREFIX) for digest in digests)
        if added_up and not self._several:
            formed = [checksum_of([sum_of_part(value, (0,) * value.ndim, value.shape)]) for value in values]
        else:
            formed = self._checksums(values) if added_up else checksums(values)
        for (name, _), want, found in zip(leaves, digests, formed, strict=True):
            if want != found:
                kind = "checksum" if added_up else "SHA-256"
                raise UserError(f"{where}: {name}: expected {kind} {str(want)[:20]}..., found {found[:20]}...")

    def _path(self, step: int) -> pathlib.Path:
        return self.directory / str(step)

    def _read(self, step: int, **item: Any) -> Any:
        """One item of a checkpoint: its name, and Orbax's options for it."""
        try:
            with quiet_orbax() as ocp:
                (value,) = self._manager.restore(step, args=ocp.args.Composite(**item)).values()
        except Exception as error:
            # As in `read_item`, the type depends on the layer that meets the damage.
            raise UserError(f"{self._path(step)}: cannot be read: {first_line(error)}") from error
        return value

    def wait(self) -> None:
        """Waits until everything that was saved is on disk."""
        with quiet_orbax():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Releases the folder; call it once, after the last save."""
        with quiet_orbax():
            self._manager.close()


def _content_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    import jax

    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _dtype(leaf: Any) -> np.dtype:
    return np.dtype(leaf.dtype) if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _is_dtype(name: Any, expected: np.dtype) -> bool:
    """Whether `name` is that of a dtype in the description of a zarr array, such as "<f4"."""
    try:
        return isinstance(name, str) and np.dtype(name) == expected
    except TypeError:
        return False


def _leaf_text(name: str, shape: list[int], dtype: str) -> str:
    return f"{name} {dtype} {shape}"


def _own_parts(leaf: Any) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
    """(array, the indices where it begins in the leaf): the parts that this process answers for, of several."""
    import jax

    if isinstance(leaf, jax.Array):
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                yield np.asarray(shard.data), tuple(span.start or 0 for span in shard.index)
    elif launch.this().is_first:
        yield np.asarray(leaf), (0,) * np.ndim(leaf)


def _of_process(ocp: Any, leaf: Any) -> Any:
    """How Orbax restores a leaf of which this process holds a share."""
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _placed(value: Any, like: Any) -> Any:
    """`value` as a jax.Array with the sharding of `like`; as NumPy if `like` is not a JAX array."""
    import jax

    if isinstance(value, jax.Array):
        return value
    if isinstance(like, jax.Array) and not like.is_fully_addressable:
        return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])
    if isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return jax.device_put(value, like.sharding) if like.sharding is not None else jax.device_put(value)
    return value
