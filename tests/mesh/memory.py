"""How much one of several processes reads of a model, and how much memory that takes:
`python -m tests.mesh.memory SMALL LARGE MESH INDEX COUNT PORT` prints it as JSON; `test_process_memory.py` starts it.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys

import jax

from convert.hf2jax import read_hf
from jaxmoe.distributed import ending, launch
from jaxmoe.distributed.agreement import exchange, wait_for_all
from jaxmoe.distributed.mesh import MeshShape
from jaxmoe.distributed.placement import Placement
from jaxmoe.store.checkpoint import Checkpoint
from jaxmoe.store.converted import is_converted, read_converted
from jaxmoe.store.digest import WeightsDigest, combined
from jaxmoe.store.loading import load_stacks


def of_status(name: str) -> int:
    """A number of bytes in /proc/self/status: VmRSS, or VmHWM, the peak since `forget_peak`."""
    found = re.search(rf"^{name}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def forget_peak() -> None:
    """Lets VmHWM start again from what is in memory."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def bytes_read() -> int:
    """Bytes of files that this process has read, by whatever call."""
    return int(pathlib.Path("/proc/self/io").read_text().split()[1])


def load(folder: pathlib.Path, mesh: str) -> tuple[dict[str, jax.Array], str]:
    """The weights where they lie, and their digest."""
    source: Checkpoint = read_converted(folder) if is_converted(folder) else read_hf(folder)
    with WeightsDigest(exchange) as digest:
        placement = Placement(MeshShape.parse(mesh), source.config, None)
        params = load_stacks(source.config, source, placement=placement, digest=digest)
        jax.block_until_ready(params)
        return params, combined(digest.parts())


def main(small: pathlib.Path, large: pathlib.Path, mesh: str) -> None:
    """Reads a small model, so that what the process itself takes is in memory, then the large one."""
    load(small, mesh)
    wait_for_all()
    forget_peak()
    itself, before = of_status("VmRSS"), bytes_read()
    params, digest = load(large, mesh)
    found = {"before": itself, "peak": of_status("VmHWM"), "read": bytes_read() - before, "digest": digest}
    found["share"] = sum(shard.data.nbytes for array in params.values() for shard in array.addressable_shards)
    print(json.dumps(found), flush=True)
    wait_for_all()


if __name__ == "__main__":
    little, much, shape, me, of, port = sys.argv[1:]
    flags = argparse.Namespace(coordinator=f"127.0.0.1:{port}", num_processes=int(of), process_id=int(me), heartbeat=60)
    launch.start(flags)
    with ending.together():
        main(pathlib.Path(little), pathlib.Path(much), shape)
