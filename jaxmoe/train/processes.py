"""What the processes of a training run share and compare before the first step."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import Any

import jax

from jaxmoe import environment
from jaxmoe.distributed import launch
from jaxmoe.distributed.agreement import exchange_values, wait_for_all
from jaxmoe.errors import UserError
from jaxmoe.store.files import remove_leftovers
from jaxmoe.store.lock import output_lock
from jaxmoe.train.settings import TrainConfig

_PACKAGES = ("jaxmoe", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")


def settings_of_processes(settings: TrainConfig) -> dict[str, Any]:
    """What must be the same in all processes and is known at once: settings, versions, devices."""
    if launch.this().count == 1:
        return {}
    flags = {f"--{name.replace('_', '-')}": value for name, value in dataclasses.asdict(settings).items()}
    facts = {name: str(value) if isinstance(value, pathlib.Path) else value for name, value in flags.items()}
    device = jax.local_devices()[0]
    facts |= {
        f"the version of {name}": version for name, version in environment.versions(("python", *_PACKAGES)).items()
    }
    return facts | {"the kind of device": device.device_kind, "the number of devices": jax.local_device_count()}


@contextlib.contextmanager
def claimed_by_first(output: pathlib.Path) -> Iterator[None]:
    """Process 0 holds the lock of the output folder; what dead processes left in it is gone when the block begins.

    Raises:
        InUse: another run writes the folder.
        UserError: a process does not see what process 0 writes beside the folder.
    """
    if launch.this().count == 1:
        with _claimed(output):
            yield
        return
    if launch.this().is_first:
        with _claimed(output):
            _check_shared(output)
            yield
    else:
        _check_shared(output)
        yield


@contextlib.contextmanager
def _claimed(output: pathlib.Path) -> Iterator[None]:
    with output_lock(output):
        remove_leftovers(pathlib.Path(os.path.realpath(output)).parent)
        remove_leftovers(output)
        yield


def _check_shared(output: pathlib.Path) -> None:
    """Raises UserError on all processes if one of them does not see the parent of the output folder as process 0 does:
    checkpoints are written by all."""
    parent = pathlib.Path(os.path.realpath(output)).parent
    [name, *_] = exchange_values(f".jaxmoe-seen-{secrets.token_hex(8)}")
    token = parent / name
    if launch.this().is_first:
        token.touch()
    wait_for_all()
    seen = exchange_values(token.exists())
    if launch.this().is_first:
        token.unlink(missing_ok=True)
    if not all(seen):
        raise UserError(
            f"{output}: expected a folder on a disk that all processes share, but process {seen.index(False)} does not "
            "see what process 0 writes there"
        )
