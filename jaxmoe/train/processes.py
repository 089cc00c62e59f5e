"""What the processes of a training run share and compare before the first step."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from jaxmoe.distributed import launch
from jaxmoe.distributed.agreement import exchange_values, software_and_devices
from jaxmoe.errors import UserError
from jaxmoe.store.files import remove_leftovers, unfinished_folder
from jaxmoe.store.lock import output_lock
from jaxmoe.train.settings import TrainConfig


def settings_of_processes(settings: TrainConfig) -> dict[str, Any]:
    """What must be the same in all processes and is known at once: settings, versions, devices."""
    if launch.this().count == 1:
        return {}
    flags = {f"--{name.replace('_', '-')}": value for name, value in dataclasses.asdict(settings).items()}
    facts = {name: str(value) if isinstance(value, pathlib.Path) else value for name, value in flags.items()}
    return facts | software_and_devices()


@contextlib.contextmanager
def claimed_by_first(output: pathlib.Path) -> Iterator[pathlib.Path | None]:
    """Process 0 holds the lock of the output folder; what dead processes left in it is gone when the block begins.

    Yields a folder beside it that all processes see, and that is removed at the end; None if there is only one process.

    Raises:
        InUse: another run writes the folder.
        UserError: a process does not see what process 0 writes beside the folder.
    """
    this = launch.this()
    with contextlib.ExitStack() as held:
        shared = None
        if this.is_first:
            held.enter_context(output_lock(output))
            beside = pathlib.Path(os.path.realpath(output))
            remove_leftovers(beside.parent)
            remove_leftovers(output)
            if this.count > 1:
                shared = held.enter_context(unfinished_folder(beside))
        if this.count > 1:
            [name, *_] = exchange_values(str(shared))
            shared = pathlib.Path(name)
            seen = exchange_values(shared.is_dir())
            if not all(seen):
                raise UserError(
                    f"{output}: expected a folder on a disk that all processes share, but process {seen.index(False)} "
                    "does not see what process 0 writes there"
                )
        yield shared
