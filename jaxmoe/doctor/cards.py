"""What fits on cards that one can buy: for each, in 16 bits, FP8 and NF4, how long and how many sequences train."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, get_args

from jaxmoe.cuda import GIB, OUTSIDE_POOL
from jaxmoe.memory import ROOM, Remat, Workload, format_bytes, training_forecast

_MOST = 2**20  # tokens of a sequence, and sequences; larger batches need no forecast


@dataclass(frozen=True)
class Card:
    """A card's memory as CUDA reports it, in GiB, and the implementations of attention and experts that run on it."""

    name: str
    memory: float
    implementations: dict[str, Any]

    @property
    def pool(self) -> int:
        """Bytes that JAX's pool gets with `--memory-limit`."""
        return int(self.memory * GIB) - OUTSIDE_POOL


_BEFORE_HOPPER = {"attention": "flash", "experts": "mma"}
_HOPPER = {"attention": "cudnn", "experts": "mosaic"}
_BLACKWELL = {"attention": "cudnn", "experts": "mma"}
CARDS = (
    Card("24 GB (RTX 3090)", 23.6, _BEFORE_HOPPER),
    Card("24 GB (RTX 4090)", 23.5, _BEFORE_HOPPER),
    Card("32 GB (RTX 5090)", 31.3, _BLACKWELL),
    Card("48 GB (L40S)", 44.4, _BEFORE_HOPPER),
    Card("80 GB (A100)", 79.3, _BEFORE_HOPPER),
    Card("80 GB (H100)", 79.1, _HOPPER),
    Card("180 GB (B200)", 178.4, _BLACKWELL),
)


@dataclass(frozen=True)
class Row:
    """What one card holds of a model in one form; sizes are None where not even the smallest fits.

    Attributes:
        card: the card's name.
        attention: the implementation of attention that runs there.
        experts: that of the experts' products.
        weights: the dtype, or "fp8" or "nf4".
        remat: the fastest policy with which the workload's own batch fits.
        needed: bytes of that step, with what lies outside JAX's pool; of the most frugal policy if none fits.
        batch: the most sequences of the workload's length, a power of two.
        length: the longest sequence, a power of two that the model's positions allow; alone in its batch.
    """

    card: str
    attention: str
    experts: str
    weights: str
    remat: Remat | None
    needed: int
    batch: int | None
    length: int | None

    def text(self, work: Workload) -> str:
        """The row as a line."""
        runs = f"{self.attention} + {self.experts}"
        begin = f"{self.card:<17} {runs:<15} {self.weights:<9} {work.batch_size} x {work.seq_length}"
        if self.remat is None:
            begin += f" does not fit ({format_bytes(self.needed)})"
        else:
            begin += f" with {self.remat}, {format_bytes(self.needed)}"
        if self.batch is None and self.length is None:
            return begin
        most = [f"{self.batch} x {work.seq_length}"] if self.batch is not None else []
        most += [f"1 x {self.length}"] if self.length is not None else []
        return f"{begin}; at most {' or '.join(most)} with offload"


def rows(work: Workload) -> Iterator[Row]:
    """The rows of all cards for LoRA training like `work`, in its dtype, in FP8 and in NF4."""
    for card in CARDS:
        for quantize in (None, "fp8", "nf4"):
            yield _row(card, replace(work, quantize=quantize, **card.implementations))


def _row(card: Card, work: Workload) -> Row:
    def fits(remat: Remat, **changes: Any) -> bool:
        return training_forecast(replace(work, remat=remat, **changes)).total <= ROOM * card.pool

    remat = next((policy for policy in get_args(Remat) if fits(policy)), None)
    needed = training_forecast(replace(work, remat=remat or "offload")).total + OUTSIDE_POOL
    powers = [2**n for n in range(_MOST.bit_length())]
    lengths = [n for n in powers if 128 <= n <= work.config.max_position_embeddings]
    # What is larger than something that does not fit does not fit either.
    batch = max(takewhile(lambda n: fits("offload", batch_size=n), powers), default=None)
    length = max(takewhile(lambda n: fits("offload", batch_size=1, seq_length=n), lengths), default=None)
    return Row(card.name, work.attention, work.experts, work.quantize or work.dtype, remat, needed, batch, length)
