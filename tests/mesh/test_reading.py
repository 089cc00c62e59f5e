"""What each of several processes reads of a checkpoint: nothing but what its devices hold, never the whole model.

The processes are imagined: eight devices of this one are divided among 2, 4 or 8, and each reads its share in turn.
"""

from __future__ import annotations

import functools
import math
import pathlib
import shutil
import tracemalloc
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest

from convert.hf2jax import hf2jax, read_hf
from convert.jax2hf import jax2hf
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.distributed.mesh import MeshShape
from jaxmoe.distributed.placement import Placement, devices_of
from jaxmoe.errors import UserError
from jaxmoe.parameters import Quantization, parameter_specs, quantizable
from jaxmoe.presets import PRESETS
from jaxmoe.store import digest, items
from jaxmoe.store.boxes import Box, shape_of, slices
from jaxmoe.store.checkpoint import Block, Checkpoint, Layout
from jaxmoe.store.converted import read_converted
from jaxmoe.store.digest import WeightsDigest, combined
from jaxmoe.store.loading import read_share, shares_of
from jaxmoe.store.shares import Processes
from peers.make_checkpoint import TINY, make_checkpoint

CONFIG = TINY.replace(
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=16,
    moe_intermediate_size=256,
    num_experts=16,
    dtype="bfloat16",
)
# The form, how the eight devices share the model, and among how many processes they are divided.
CASES = [
    ("HF", "fsdp=8", 8),
    ("converted", "expert=2,fsdp=4", 4),
    ("converted in NF4", "data=2,expert=4", 2),
]
MORE = [
    ("HF in NF4", "expert=8", 4),
    ("HF", "data=2,expert=4", 4),
    ("HF", "expert=4,fsdp=2", 2),
    ("HF in NF4", "fsdp=8", 2),
    ("converted", "expert=8", 8),
    ("converted", "fsdp=8", 2),
    ("converted in NF4", "expert=8", 8),
]
MOST = 1.1  # of its share: the bytes that a process may read, and the memory that it may need for them
COUNTER = pathlib.Path("/proc/self/io")


@pytest.fixture(scope="module", autouse=True)
def small_pieces() -> Iterator[None]:
    """Pieces and chunks that are to these arrays what a mebibyte is to those of a real model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "PIECE", 2**14)
        patch.setattr(items, "_LEAST_CHUNK", 2**14)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("forms")
    make_checkpoint(folder / "HF", CONFIG, dtype="bfloat16")
    hf2jax(folder / "HF", folder / "converted")
    hf2jax(folder / "HF", folder / "converted in NF4", quantize="nf4")
    jax2hf(folder / "converted in NF4", folder / "HF in NF4")
    return folder


def opened(folder: pathlib.Path) -> Checkpoint:
    return read_hf(folder) if folder.name.startswith("HF") else read_converted(folder)


def processes(count: int, mesh: str) -> list[Processes]:
    """The processes that the devices of a mesh are divided among, each as it sees itself."""
    order = {device: number for number, device in enumerate(devices_of(MeshShape.parse(mesh)).devices.flat)}
    return [Processes(mine, count, lambda device: order[device] * count // len(order)) for mine in range(count)]


class Read(NamedTuple):
    """What one process has read: layer -> path -> box -> what its devices hold, its digest, bytes from files, and the
    peak of memory for NumPy's arrays and Python's objects."""

    held: dict[int | None, dict[str, dict[Box, np.ndarray]]]
    collected: WeightsDigest
    bytes: int
    peak: int


class Asked(Exception):
    """A process waits for the others."""


def read(source: Checkpoint, mesh: str, among: Processes, everyone: list[bytes]) -> Read:
    """What one process reads; what it says of the digest is put into `everyone`."""

    def exchange(mine: bytes) -> list[bytes]:
        if len(everyone) == among.count:
            return everyone
        everyone.append(mine)
        raise Asked

    held = {}
    tracemalloc.start()
    before = _bytes_read()
    with WeightsDigest(exchange) as collected:
        for layer in (None, *range(source.config.num_hidden_layers)):
            block = read_share(source, placed(source, mesh), among, collected, layer)
            collected.wait(block)
            held[layer] = {path: {box: array.box(box) for box in array.held} for path, array in block.arrays.items()}
            del block
        done, (_, peak) = _bytes_read(), tracemalloc.get_traced_memory()
        tracemalloc.stop()
        with pytest.raises(Asked):
            collected.parts()
    return Read(held, collected, done - before, peak)


def placed(source: Checkpoint, mesh: str) -> Placement:
    return Placement(MeshShape.parse(mesh), source.config, None)


def _bytes_read() -> int:
    return int(COUNTER.read_text().split()[1]) if COUNTER.exists() else 0


@functools.cache
def of_one_process(folder: pathlib.Path) -> tuple[dict[int | None, dict[str, np.ndarray]], str]:
    """(layer -> the arrays, the digest of the model)."""
    with WeightsDigest() as collected:
        blocks = list(opened(folder).blocks())
        for block in blocks:
            collected.add(block)
        return {block.layer: block.arrays for block in blocks}, combined(collected.parts())


@pytest.mark.parametrize(
    ("form", "mesh", "count"), [*CASES, *(pytest.param(*each, marks=pytest.mark.wide) for each in MORE)]
)
def test_processes_read_their_shares(form: str, mesh: str, count: int, folders: pathlib.Path) -> None:
    expected, model = of_one_process(folders / form)
    total = sum(array.nbytes for arrays in expected.values() for array in arrays.values())
    on_disk = sum(file.stat().st_size for file in (folders / form).rglob("*") if file.is_file())
    read(opened(folders / form), mesh, processes(count, mesh)[0], [])  # libraries are loaded
    everyone: list[bytes] = []
    found = [read(opened(folders / form), mesh, among, everyone) for among in processes(count, mesh)]
    for each in found:
        sizes = dict.fromkeys(expected, 0)
        for layer, arrays in each.held.items():
            assert arrays.keys() == expected[layer].keys()
            for path, parts in arrays.items():
                for box, part in parts.items():
                    assert part.tobytes() == np.ascontiguousarray(expected[layer][path][slices(box)]).tobytes(), path
                    sizes[layer] += part.nbytes
        share = sum(sizes.values())
        assert combined(each.collected.parts()) == model
        assert each.bytes <= MOST * share / total * on_disk
        # While it holds its share it reads one layer more, as the loader does a few at a time; the rest is Python's.
        assert each.peak <= MOST * share + max(sizes.values()) + 2**18
    assert combined(read_by_one_process_less(everyone, found)) != model


def read_by_one_process_less(everyone: list[bytes], found: list[Read]) -> dict[tuple[str, int], str]:
    """The digests of arrays, as if one process had formed no pieces. Nothing is compared with a manifest."""
    collected = found[0].collected
    everyone[-1] = b"[]"
    collected._pieces = {place: pieces._replace(expected=None) for place, pieces in collected._pieces.items()}
    return collected.parts()


def test_damage_in_another_process_s_part_is_noticed(folders: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(folders / "converted", folder)
    source, everyone = opened(folder), []
    first, second = processes(2, "expert=8")
    of_first = read(source, "expert=8", first, everyone)
    array = folder / "layers" / "00001" / "sparse.down_proj"
    shutil.copyfile(array / "8.0.0", array / "9.0.0")  # an expert of the second process takes another's place
    read(source, "expert=8", second, everyone)
    with pytest.raises(UserError, match=r"layers/00001: sparse.down_proj: expected SHA-256 \w+\.\.\., found \w+"):
        of_first.collected.parts()


class Outline:
    """A checkpoint of which only the shapes are known."""

    path = pathlib.Path("outline")
    layout: Layout = "per_expert"
    stored_tied_head = False

    def __init__(self, config: Qwen3MoeConfig, quantization: Quantization | None) -> None:
        self.config, self.quantization = config, quantization
        self.dtypes = dict.fromkeys(parameter_specs(config), np.dtype("bfloat16"))

    def block(self, layer: int | None) -> Block:
        raise AssertionError

    def blocks(self) -> Iterator[Block]:
        raise AssertionError


@pytest.mark.parametrize("mesh", ["fsdp=8", "expert=8", "fsdp=2,expert=4"])
@pytest.mark.parametrize("in_nf4", [False, True])
def test_of_published_models_a_process_reads_its_share(in_nf4: bool, mesh: str) -> None:
    """Eight processes, a device each: what their devices hold, and pieces of the digest."""
    config = PRESETS["qwen3-235b-a22b" if mesh == "expert=8" else "qwen3-30b-a3b"]
    source = Outline(config, Quantization(quantizable(config)) if in_nf4 else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "PIECE", 2**20)
        held = read = 0
        for layer in (None, *range(8)):
            for array, share in shares_of(source, placed(source, mesh), processes(8, mesh)[3], layer).values():
                size = array.dtype.itemsize
                held += size * sum(math.prod(shape_of(box)) for box in share.held)
                read += size * sum(math.prod(shape_of(box)) for box in share.boxes)
    print(mesh, in_nf4, read / held, held)
    assert held <= read <= MOST * held
