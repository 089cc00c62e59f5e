"""Which smaller training steps fit into a device, by forecast: what to say when a step does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

from jaxmoe.memory import ROOM, Remat, Workload, format_bytes, training_forecast

_SHORTEST = 128  # tokens; shorter sequences save next to nothing
Change = tuple[str, Workload]  # flags of `python -m jaxmoe.train`, the step that they make


def advice(work: Workload, available: int | None) -> str:
    """What would fit into `available` bytes (None: unknown) in place of `work`, each with its forecast.

    First come single changes. If none of them is enough, they are made one after the other until the step fits.
    """
    needed = _total(work)
    room = "" if available is None else f", {format_bytes(available)} are there"
    begin = f"the step needs {format_bytes(needed)} by forecast{room}"
    # A step that was forecast to fit, and did not, needs more than its forecast.
    target = needed if available is None else min(ROOM * available, needed)
    smaller = (next((each for each in kind if _total(each[1]) < target), None) for kind in _changes(work))
    if singles := [_shown(change) for change in smaller if change is not None]:
        return f"{begin}; use {' or '.join(singles)}"
    together = _together(work, target)
    if _total(together[1]) < target:
        return f"{begin}; use {_shown(together)}"
    return f"{begin}; no smaller step fits, the least is {_shown(together)}"


def _total(work: Workload) -> int:
    return training_forecast(work).total


def _shown(change: Change) -> str:
    flags, work = change
    return f"{flags or 'this step'} ({format_bytes(_total(work))})"


def _changes(work: Workload) -> Iterator[Iterator[Change]]:
    """Each kind of change, from the weakest to the strongest of its kind."""
    yield _policies(work)
    yield _one_by_one(work)
    yield _shorter(work)
    yield _in_four_bits(work)


def _policies(work: Workload) -> Iterator[Change]:
    policies = get_args(Remat)
    for remat in policies[policies.index(work.remat) + 1 :]:
        yield f"--remat {remat}", replace(work, remat=remat)


def _one_by_one(work: Workload) -> Iterator[Change]:
    if work.batch_size > 1:
        accumulation = work.accumulation * work.batch_size
        flags = f"--batch-size 1 --accumulation {accumulation}"
        yield flags, replace(work, batch_size=1, accumulation=accumulation)


def _shorter(work: Workload) -> Iterator[Change]:
    length = work.seq_length // 2
    while length >= _SHORTEST:
        yield f"--seq-length {length}", replace(work, seq_length=length)
        length //= 2


def _in_four_bits(work: Workload) -> Iterator[Change]:
    if work.lora is not None and work.quantize is None:
        yield "--quantize nf4", replace(work, quantize="nf4")


def _together(work: Workload, target: float) -> Change:
    """The strongest change of each kind in turn, the length last, until the step is smaller than `target`."""
    flags = []
    for kind in (_policies, _one_by_one, _in_four_bits):
        for text, smaller in list(kind(work))[-1:]:
            flags.append(text)
            work = smaller
        if _total(work) < target:
            return " ".join(flags), work
    shorter = list(_shorter(work))
    for text, smaller in shorter:
        if _total(smaller) < target or smaller is shorter[-1][1]:
            return " ".join([*flags, text]), smaller
    return " ".join(flags), work
