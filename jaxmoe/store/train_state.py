"""Training checkpoints: the state of a run on disk, so that a run that stopped can resume."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmoe.errors import UserError, shown
from jaxmoe.store.files import refuse_links_out
from jaxmoe.store.items import first_line, quiet_orbax

_VERSION = 1


class TrainCheckpoints:
    """The last `keep` states of a training run in the folder `directory`, one Orbax step each.

    A state is any pytree of arrays and numbers. The names of its leaves are stored too, so that a state with another
    structure is refused. A checkpoint appears whole or not at all: if a run is killed while it saves, the earlier
    checkpoints stay intact.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2) -> None:
        self.directory = pathlib.Path(directory).resolve()
        with quiet_orbax() as ocp:
            # Not asynchronous: on a CPU the next step may overwrite memory that a background thread still reads.
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, metadata: Mapping[str, Any]) -> None:
        """Writes `state` and `metadata` (any JSON value) as the checkpoint of `step`, which must be new; returns when
        it is on disk.

        Raises:
            OSError: the disk is full or fails. Older checkpoints stay intact.
        """
        leaves = _named_leaves(state)
        entries = [[name, list(np.shape(leaf)), str(_dtype(leaf))] for name, leaf in leaves]
        try:
            with quiet_orbax() as ocp:
                items = ocp.args.Composite(
                    state=ocp.args.PyTreeSave({str(i): leaf for i, (_, leaf) in enumerate(leaves)}),
                    metadata=ocp.args.JsonSave({"version": _VERSION, "leaves": entries, "metadata": dict(metadata)}),
                )
                self._manager.save(step, args=items, force=True)
        except ValueError as error:
            if "os_error_code" not in str(error):  # tensorstore's mark for errors of the operating system
                raise
            raise OSError(f"{self.directory / str(step)}: cannot be written: {first_line(error)}") from error

    def restore_latest(self, template: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest (step, state, metadata), or None if there is no checkpoint.

        The state has the structure, dtypes and placement of `template`, whose leaves are arrays or
        `jax.ShapeDtypeStruct`. Leaves that are NumPy arrays in `template` are NumPy arrays in the state.

        Raises:
            UserError: the checkpoint is damaged, or its leaves differ from those of `template`.
        """
        import jax

        step = self.latest_step()
        if step is None:
            return None
        leaves = _named_leaves(template)
        refuse_links_out(self.directory / str(step))
        with quiet_orbax() as ocp:
            stored = self._restore(step, metadata=ocp.args.JsonRestore())
            self._check_leaves(step, leaves, stored)
            restore_args = {str(i): ocp.RestoreArgs(restore_type=np.ndarray) for i in range(len(leaves))}
            arrays = self._restore(step, state=ocp.args.PyTreeRestore(restore_args=restore_args))
        values = [_placed(arrays[str(i)], leaf) for i, (_, leaf) in enumerate(leaves)]
        return step, jax.tree.unflatten(jax.tree.structure(template), values), stored["metadata"]

    def _check_leaves(self, step: int, leaves: list[tuple[str, Any]], stored: Any) -> None:
        where = self.directory / str(step)
        version = stored.get("version") if isinstance(stored, dict) else None
        if version != _VERSION:
            raise UserError(f"{where}: version: expected {_VERSION}, found {version!r}")
        expected = [[name, list(np.shape(leaf)), str(_dtype(leaf))] for name, leaf in leaves]
        if not isinstance(stored.get("leaves"), list) or not isinstance(stored.get("metadata"), dict):
            raise UserError(f"{where}: expected leaves and metadata, found {shown(stored)}")
        for want, found in zip(expected, stored["leaves"], strict=False):
            if want != found:
                raise UserError(f"{where}: expected {_leaf_text(*want)}, found {shown(found)}")
        if len(expected) != len(stored["leaves"]):
            raise UserError(f"{where}: expected {len(expected)} arrays, found {len(stored['leaves'])}")

    def _restore(self, step: int, **item: Any) -> Any:
        """One item of a checkpoint: its name, and Orbax's options for it."""
        try:
            with quiet_orbax() as ocp:
                (value,) = self._manager.restore(step, args=ocp.args.Composite(**item)).values()
        except Exception as error:
            # As in `read_item`, the type depends on the layer that meets the damage.
            raise UserError(f"{self.directory / str(step)}: cannot be read: {first_line(error)}") from error
        return value

    def wait(self) -> None:
        """Waits until everything that was saved is on disk."""
        with quiet_orbax():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Releases the folder; call it once, after the last save."""
        with quiet_orbax():
            self._manager.close()


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    import jax

    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _dtype(leaf: Any) -> np.dtype:
    return np.dtype(leaf.dtype) if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _leaf_text(name: str, shape: list[int], dtype: str) -> str:
    return f"{name} {dtype} {shape}"


def _placed(value: np.ndarray, like: Any) -> Any:
    """`value` as a jax.Array with the sharding of `like`; as NumPy if `like` is not a JAX array."""
    import jax

    if isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return jax.device_put(value, like.sharding) if like.sharding is not None else jax.device_put(value)
    return value
