"""Several processes of one run: how they find each other, and which of them this one is.

JAX's runtime connects them (`jax.distributed.initialize`). It finds the others by itself under SLURM, Open MPI and
Kubernetes; elsewhere `--coordinator`, `--num-processes` and `--process-id` say where they are. Process 0 writes what is
written once. Without any of this, the process is alone, and nothing here does anything.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxmoe.errors import UserError, shown

HEARTBEAT = 60  # seconds without a sign of life after which a process counts as dead
PATIENCE = 300  # seconds to wait for all processes to start


class Process(NamedTuple):
    """Which process of a run this one is: its number, from 0 on, how many there are, where the coordinator listens
    (HOST:PORT), and after how many seconds without a sign of life one of them counts as dead."""

    index: int = 0
    count: int = 1
    coordinator: str = ""
    heartbeat: int = HEARTBEAT

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.index == 0


class _State:
    """What `start` found."""

    this = Process()


_state = _State()


def this() -> Process:
    """The process that runs this code."""
    return _state.this


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say where the processes of a run find each other."""
    group = parser.add_argument_group(
        "several processes",
        "One run on several machines: start the same command on each. Under SLURM, Open MPI and Kubernetes the "
        "processes find each other without these flags.",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens for the others")
    group.add_argument(
        "--num-processes", type=int, metavar="N", help="how many processes the run has; 1: this one alone"
    )
    group.add_argument("--process-id", type=int, metavar="I", help="which of them this one is, from 0 on")
    group.add_argument(
        "--heartbeat",
        type=int,
        default=HEARTBEAT,
        metavar="SECONDS",
        help="how long a process may be silent before the others take it for dead and end (default: %(default)s)",
    )


def start(arguments: argparse.Namespace) -> Process:
    """Joins the other processes of the run, if there are any: call it before JAX looks for devices.

    Raises:
        UserError: flags that do not fit together, or processes that do not find each other.
    """
    named = {name: getattr(arguments, name) for name in ("coordinator", "num_processes", "process_id")}
    _check(named, arguments.heartbeat)
    if named["num_processes"] == 1 or (named["coordinator"] is None and not is_one_of_several(os.environ)):
        return this()

    import jax

    # What JAX does by default, to end the process with a stack trace when another one dies, `jaxmoe.distributed.ending`
    # does in one line. A signal is `jaxmoe.stopping`'s business.
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        jax.distributed.initialize(
            named["coordinator"],
            named["num_processes"],
            named["process_id"],
            local_device_ids=None if shares_its_devices(os.environ) else [],
            initialization_timeout=PATIENCE,
            heartbeat_timeout_seconds=arguments.heartbeat,
        )
    except Exception as error:  # the type depends on what fails
        where = f" at {named['coordinator']}" if named["coordinator"] else ""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(
            f"coordinator: expected all processes of the run{where} within {PATIENCE} seconds; JAX says: {reason}"
        ) from error
    found = _jax_state()
    _state.this = Process(found.process_id, found.num_processes, found.coordinator_address, arguments.heartbeat)
    return this()


def client() -> Any:
    """JAX's client of the coordinator; there are several processes."""
    return _jax_state().client


def _jax_state() -> Any:
    # JAX has no public name for it; Orbax uses the same.
    from jax._src import distributed

    return distributed.global_state


def _check(named: Mapping[str, Any], heartbeat: int) -> None:
    if heartbeat < 10:  # JAX sends a sign of life every few seconds
        raise UserError(f"heartbeat: expected at least 10 seconds, found {heartbeat}")
    coordinator, count, index = (named[name] for name in ("coordinator", "num_processes", "process_id"))
    if count == 1 and coordinator is None and index is None:
        return
    given = [f"--{name.replace('_', '-')}" for name, value in named.items() if value is not None]
    if len(given) not in (0, len(named)):
        raise UserError(f"coordinator, num_processes and process_id: expected all three or none, found {given[0]}")
    if not given:
        return
    if not re.fullmatch(r".+:\d{1,5}", str(coordinator)) or not 0 < int(str(coordinator).rpartition(":")[2]) < 2**16:
        raise UserError(f"coordinator: expected HOST:PORT, found {shown(coordinator)}")
    if count < 1:
        raise UserError(f"num_processes: expected at least 1, found {count}")
    if not 0 <= index < count:
        raise UserError(f"process_id: expected a number from 0 to {count - 1}, found {index}")


# A launcher that JAX knows -> the variables that say how many processes it has started: in all, and on this machine.
_LAUNCHERS = (("SLURM_NTASKS", "SLURM_TASKS_PER_NODE"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"))
_OF_A_STEP = ("SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")  # `srun` sets them for what it starts


def is_one_of_several(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows has started this process as one of several."""
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return importlib.util.find_spec("kubernetes") is not None  # with which JAX asks for the other pods
    for in_all, _ in _LAUNCHERS:
        if environment.get(in_all, "").isdigit() and int(environment[in_all]) > 1:
            return not in_all.startswith("SLURM") or all(name in environment for name in _OF_A_STEP)
    return False


def shares_its_devices(environment: Mapping[str, str]) -> bool:
    """Whether other processes of the run see the same GPUs as this one, so that each takes the one of its number.

    Otherwise a process takes all GPUs that it sees.
    """
    for _, here in _LAUNCHERS:
        if here in environment:
            beside = int(re.match(r"\d*", environment[here])[0] or 1)  # pyright: ignore[reportOptionalSubscript]
            seen = environment.get("CUDA_VISIBLE_DEVICES")
            return beside > 1 and (seen is None or len(seen.split(",")) >= beside)
    return False
