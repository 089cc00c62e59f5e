"""A checkpoint as its readers see it: a config, dtypes, and the arrays of one layer after the other.

An HF folder (`convert.hf2jax`), a converted folder (`jaxmoe.store.converted`) and a checkpoint that is recoded while it
is read (`jaxmoe.recode`) share this interface. Arrays are NumPy, bfloat16 as `ml_dtypes.bfloat16`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import ml_dtypes  # noqa: F401  (registers bfloat16, so that np.dtype("bfloat16") works)
import numpy as np

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.errors import UserError
from jaxmoe.parameters import Quantization
from jaxmoe.store.boxes import Box

# How an HF checkpoint stores experts: one tensor per expert and projection, as transformers writes them, or all experts
# of a layer in one tensor, as transformers holds them in memory.
Layout = Literal["per_expert", "fused"]


@dataclass(frozen=True)
class Pieces:
    """An array of `shape` and `dtype` that is on the device in consecutive pieces.

    Each piece [m, ...] holds the next m of what the array's leading axes, taken together, count.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[Any, ...]


@dataclass(frozen=True)
class Block:
    """The arrays of one decoder layer, or of the top level (None): dotted path -> array without the layer axis.

    The paths are those of `jaxmoe.parameters.stored_specs`: a quantised weight is several arrays.
    """

    layer: int | None
    arrays: dict[str, np.ndarray]
    # Path -> `jaxmoe.store.digest.digest`, for arrays that were compared with it when they were read.
    digests: Mapping[str, str] = field(default_factory=dict)
    # Path -> array, for arrays that were made on the device and so are not among `arrays`.
    on_device: Mapping[str, Pieces] = field(default_factory=dict)


@runtime_checkable
class Checkpoint(Protocol):
    """The interface of everything that can be read as a checkpoint."""

    path: pathlib.Path
    config: Qwen3MoeConfig
    quantization: Quantization | None
    # Of every path of `parameter_specs(config)`; for quantised weights the dtype to decode into. In a mixed stack "x"
    # the dtype of the layers that are not quantised is that of "x.weight".
    dtypes: dict[str, np.dtype]
    layout: Layout  # of the original HF checkpoint
    stored_tied_head: bool  # whether the original HF checkpoint stores lm_head although it is tied

    def block(self, layer: int | None) -> Block:
        """One decoder layer, or the top level, which must be read first; several threads may read layers."""
        ...

    def blocks(self) -> Iterator[Block]:
        """The top level, then every layer. No reference to a block is kept, so that memory holds one layer."""
        ...


@runtime_checkable
class Divisible(Checkpoint, Protocol):
    """A checkpoint that also reads parts of a layer, so that no layer need be in memory as a whole."""

    def block(self, layer: int | None, without: Collection[str] = ()) -> Block:
        """Like `Checkpoint.block`, except for the arrays in `without`, which are not read."""
        ...

    def matrices(self, layer: int, path: str, start: int, stop: int) -> list[np.ndarray]:
        """Some of the matrices of `jaxmoe.parameters.matrix_shape` of a plain weight, each contiguous."""
        ...


@runtime_checkable
class MadeOnDevice(Checkpoint, Protocol):
    """A checkpoint that makes arrays from those that it reads, and can do so on the device."""

    def device_block(self, layer: int | None) -> Block:
        """Like `block`, with these arrays in `Block.on_device`."""
        ...


@dataclass(frozen=True)
class Parts:
    """Parts of the arrays of one decoder layer, or of the top level: path -> box -> the part, in NumPy.

    `digests` are those that whole arrays must have, as far as the folder `where` says so.
    """

    where: str
    arrays: dict[str, dict[Box, np.ndarray]]
    digests: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class ReadInParts(Checkpoint, Protocol):
    """A checkpoint of which a process reads what its devices hold, and nothing else."""

    def parts(self, layer: int | None, wanted: Mapping[str, Collection[Box]]) -> Parts:
        """Parts of arrays as `Checkpoint.block` has them, where several threads may read; the top level comes first.

        A weight that is quantised or decoded on the way is read matrix by matrix.
        """
        ...


def cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`array` in `dtype`, rounded once (to nearest, ties to even); the same array if it has that dtype already.

    Raises:
        UserError: a finite value that float16 cannot hold.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        out = array.astype(dtype)
    if dtype == np.float16:
        lost = np.isinf(out) & np.isfinite(array)
        if lost.any():
            raise UserError(f"{name}: expected values that float16 can hold, found {float(array[lost].flat[0]):g}")
    return out
