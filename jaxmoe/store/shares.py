"""Which parts of an array each process of a run reads: what its devices hold, and its share of the digest's pieces.

Each piece of the digest is formed by one process. If some hold all of it, these take turns. A piece that lies on the
devices of several processes is read once more, by one of all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxmoe.store import digest
from jaxmoe.store.boxes import Box, box_of, holds, joined, origin, pieces, slices


@dataclass(frozen=True)
class Processes:
    """The processes of a run, and which of them is this one; `owner` says to which one a device belongs."""

    mine: int
    count: int
    owner: Callable[[Any], int] = lambda device: device.process_index

    @classmethod
    def running(cls) -> Processes:
        """Those that JAX knows."""
        return cls(jax.process_index(), jax.process_count())


class Share(NamedTuple):
    """What a process reads of an array: the boxes that its devices hold; number -> boxes of the pieces of the digest
    that it forms, of which `further` are not within those boxes."""

    held: tuple[Box, ...]
    pieces: dict[int, tuple[Box, ...]]
    further: tuple[Box, ...]

    @property
    def boxes(self) -> tuple[Box, ...]:
        """All that is read, each once."""
        return tuple(dict.fromkeys((*self.held, *self.further)))


def share(sharding: NamedSharding, array: Any, processes: Processes, turn: int, *, digested: bool) -> Share:
    """What this process reads of an array, or of its shape, that lies as `sharding` says.

    `turn` shifts whose turn it is to form a piece; it is the same in all processes. Without `digested` there are no
    pieces.
    """
    parts: list[set[Box]] = [set() for _ in range(processes.count)]
    for device, index in sharding.devices_indices_map(array.shape).items():
        parts[processes.owner(device)].add(box_of(index or (), array.shape))
    held = tuple(tuple(joined(boxes)) for boxes in parts)
    mine = held[processes.mine]
    formed: dict[int, tuple[Box, ...]] = {}
    further: dict[Box, None] = {}
    if digested:
        elements = digest.PIECE // np.dtype(array.dtype).itemsize
        for number, (piece, holders) in enumerate(_holders(array.shape, elements, held)):
            whose = holders or range(processes.count)
            if whose[(number + turn) % len(whose)] != processes.mine:
                continue
            formed[number] = piece
            if not holders:
                further.update(dict.fromkeys(piece))
    return Share(mine, formed, tuple(further))


@functools.cache
def _holders(
    shape: tuple[int, ...], elements: int, held: tuple[tuple[Box, ...], ...]
) -> list[tuple[tuple[Box, ...], tuple[int, ...]]]:
    """For each piece of an array: its boxes, and the processes that hold all of it."""

    def processes_with(piece: tuple[Box, ...]) -> tuple[int, ...]:
        return tuple(
            number for number, boxes in enumerate(held) if all(any(holds(box, part) for box in boxes) for part in piece)
        )

    return [(piece, processes_with(piece)) for piece in pieces(shape, elements)]


class Portion:
    """An array of which this process has parts; an index of slices must be within one of them.

    `held` are the boxes that its devices hold; other parts are there for the digest.
    """

    def __init__(self, shape: Sequence[int], held: Sequence[Box], parts: Mapping[Box, np.ndarray]) -> None:
        self.shape, self.held, self._parts = tuple(shape), held, parts

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self.box(box_of(index, self.shape))

    def box(self, box: Box) -> np.ndarray:
        """A part."""
        if box in self._parts:
            return self._parts[box]
        around = next(each for each in self._parts if holds(each, box))
        return self._parts[around][slices(box, origin(around))]


@dataclass(frozen=True)
class Portions:
    """The arrays of a layer, or of the top level (None), of which this process has parts."""

    layer: int | None
    arrays: dict[str, Portion]
    on_device: Mapping[str, Any]  # always empty: `jaxmoe.store.checkpoint.Block` has arrays there
