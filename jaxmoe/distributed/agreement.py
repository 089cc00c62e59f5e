"""What the processes of a run tell each other: how far they are, and whether they are about to do the same.

Every process must call these functions in the same order. A process that is alone has nobody to ask.
"""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmoe import environment
from jaxmoe.distributed import launch
from jaxmoe.errors import UserError, shown

_PACKAGES = ("jaxmoe", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")
_FOREVER = 10**9  # milliseconds; a process that is dead ends the wait (`jaxmoe.distributed.ending`)
_calls = itertools.count()


def wait_for_all() -> None:
    """Returns when every process has called it."""
    if launch.this().count > 1:
        launch.client().wait_at_barrier(f"jaxmoe/barrier/{next(_calls)}", _FOREVER)


def exchange_values(value: Any) -> list[Any]:
    """The values of all processes, in the order of their numbers: anything that JSON can hold in a megabyte.

    They go through the coordinator, so no device need be ready. `exchange` takes more.
    """
    this = launch.this()
    if this.count == 1:
        return [value]
    client, place = launch.client(), f"jaxmoe/values/{next(_calls)}"
    client.key_value_set(f"{place}/{this.index}", json.dumps(value))
    values = [json.loads(client.blocking_key_value_get(f"{place}/{i}", _FOREVER)) for i in range(this.count)]
    client.wait_at_barrier(f"{place}/read", _FOREVER)
    client.key_value_delete(f"{place}/{this.index}")  # the coordinator holds in memory what nobody deletes
    return values


def exchange(message: bytes) -> list[bytes]:
    """The messages of all processes, in the order of their numbers, of any length; they go through the devices."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [message]
    sizes = multihost_utils.process_allgather(np.asarray(len(message)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    everyone = multihost_utils.process_allgather(padded)
    return [each[:size].tobytes() for each, size in zip(everyone, sizes, strict=True)]


def software_and_devices() -> dict[str, Any]:
    """By name, what processes of one run must have in common whatever they do: versions, and devices."""
    import jax

    versions = environment.versions(("python", *_PACKAGES))
    facts: dict[str, Any] = {f"the version of {name}": version for name, version in versions.items()}
    kind = jax.local_devices()[0].device_kind
    return facts | {"the kind of device": kind, "the number of devices": jax.local_device_count()}


def check_same_command(flags: Mapping[str, Any]) -> None:
    """Compares the flags of a command, and what it runs on, over all processes.

    Raises:
        UserError: as `check_agreement`.
    """
    if launch.this().count > 1:
        own = ("process_id", "coordinator")  # localhost on one machine, its name on the others
        named = {f"--{name.replace('_', '-')}": str(value) for name, value in flags.items() if name not in own}
        check_agreement(named | software_and_devices())


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Compares `facts`, anything that JSON can hold by name, over all processes.

    Raises:
        UserError: on all processes, if one differs from process 0; it names both and the first fact that differs.
    """
    for index, theirs in enumerate(everyone := exchange_values({"host": socket.gethostname(), "facts": facts})):
        for name in {**everyone[0]["facts"], **theirs["facts"]}:
            expected, found = (each["facts"].get(name) for each in (everyone[0], theirs))
            if expected != found:
                raise UserError(
                    f"process {index} on {theirs['host']} differs from process 0 on {everyone[0]['host']} in {name}: "
                    f"expected {shown(expected)}, found {shown(found)}"
                )
