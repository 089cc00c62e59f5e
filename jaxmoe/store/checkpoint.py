"""What a checkpoint is to the code that reads one: a config, dtypes, and one block of arrays after the other.

An HF folder (`convert.hf2jax`), a converted folder (`jaxmoe.store.converted`) and a checkpoint that is recoded on the
way (`jaxmoe.nf4.recode`) are read alike. Arrays are NumPy, bfloat16 as `ml_dtypes.bfloat16`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import ml_dtypes  # noqa: F401  (registers bfloat16, so that np.dtype("bfloat16") works)
import numpy as np

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.errors import UserError
from jaxmoe.parameters import Quantization

# how the experts of an HF checkpoint lie on disk: one tensor per expert and projection, as transformers writes them, or
# as it holds them in memory
Layout = Literal["per_expert", "fused"]


@dataclass(frozen=True)
class Block:
    """One decoder layer, or the top level (None): dotted path -> array without the layer axis.

    The paths are those of `stored_specs`: a weight in NF4 is several arrays.
    """

    layer: int | None
    arrays: dict[str, np.ndarray]


@runtime_checkable
class Checkpoint(Protocol):
    """What reading an HF folder and reading a converted folder have in common."""

    path: pathlib.Path
    config: Qwen3MoeConfig
    quantization: Quantization | None
    dtypes: dict[str, np.dtype]  # of every path of `parameter_specs(config)`; of a weight in NF4: what it was made from
    layout: Layout  # of the HF checkpoint that this comes from
    stored_tied_head: bool  # that checkpoint stored lm_head although it is tied

    def block(self, layer: int | None) -> Block:
        """One decoder layer, or the top level, which has to come first; layers may be read in several threads."""
        ...

    def blocks(self) -> Iterator[Block]:
        """The top level first, then every layer; each block is dropped before the next one is made."""
        ...


def cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`array` in `dtype`, rounded once to the nearest, ties to even; the array itself when it has that dtype already.

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
