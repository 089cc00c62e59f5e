"""The state of a training run on disk, so that a run that stops can go on."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.store.items import first_line, quiet_orbax

_VERSION = 1


class TrainCheckpoints:
    """The last `keep` states of a training run in the folder `directory`, one Orbax step each, written atomically.

    A state is any pytree of arrays and numbers. It is stored leaf by leaf, with the leaves' names in the metadata, so
    that a state of another structure is refused rather than misread. A run that is killed while it saves leaves the
    steps before it intact.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2) -> None:
        self.directory = pathlib.Path(directory).resolve()
        with quiet_orbax() as ocp:
            # Not asynchronous: on CPU the next step may reuse the memory that a background thread would still read.
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
            self._manager = ocp.CheckpointManager(self.directory, options=options)

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
        try:
            with quiet_orbax() as ocp:
                items = ocp.args.Composite(
                    state=ocp.args.PyTreeSave({str(i): leaf for i, (_, leaf) in enumerate(leaves)}),
                    metadata=ocp.args.JsonSave({"version": _VERSION, "leaves": entries, "metadata": dict(metadata)}),
                )
                self._manager.save(step, args=items, force=True)
        except ValueError as error:
            if "os_error_code" not in str(error):  # how tensorstore marks what the disk said
                raise
            raise OSError(f"{self.directory / str(step)}: cannot be written: {first_line(error)}") from error

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
        with quiet_orbax() as ocp:
            stored = self._restore(step, where, metadata=ocp.args.JsonRestore())
        if not isinstance(stored, dict) or stored.get("version") != _VERSION:
            raise UserError(f"{where}: expected a training checkpoint of version {_VERSION}, found another")
        expected = [[name, list(np.shape(leaf)), str(_dtype(leaf))] for name, leaf in leaves]
        for want, found in zip(expected, stored["leaves"], strict=False):
            if want != found:
                raise UserError(f"{where}: expected {_leaf_text(*want)}, found {_leaf_text(*found)}")
        if len(expected) != len(stored["leaves"]):
            raise UserError(f"{where}: expected {len(expected)} arrays, found {len(stored['leaves'])}")
        with quiet_orbax() as ocp:
            restore_args = {str(i): ocp.RestoreArgs(restore_type=np.ndarray) for i in range(len(leaves))}
            arrays = self._restore(step, where, state=ocp.args.PyTreeRestore(restore_args=restore_args))
        values = [_placed(arrays[str(i)], leaf) for i, (_, leaf) in enumerate(leaves)]
        return step, jax.tree.unflatten(jax.tree.structure(template), values), stored["metadata"]

    def _restore(self, step: int, where: pathlib.Path, **args: Any) -> Any:
        try:
            with quiet_orbax() as ocp:
                (item,) = self._manager.restore(step, args=ocp.args.Composite(**args)).values()
        except Exception as error:
            # as in `read_item`: the type depends on which layer met the damage
            raise UserError(f"{where}: cannot be read: {first_line(error)}") from error
        return item

    def wait(self) -> None:
        """Returns when everything that was saved is on disk."""
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
    """`value` as a jax.Array with the sharding of `like`, or as NumPy where `like` is no JAX array."""
    import jax

    if isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return jax.device_put(value, like.sharding) if like.sharding is not None else jax.device_put(value)
    return value
