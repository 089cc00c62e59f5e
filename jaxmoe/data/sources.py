"""Where data comes from: several sources, each with a weight or all without one."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxmoe.errors import UserError

_WEIGHTED = re.compile(r"(.+):([-+.0-9e]+|nan|inf)", re.DOTALL | re.IGNORECASE)
DEFAULT_WINDOW = 10_000  # records that a stream shuffles and packs together


Sources = tuple[str, ...] | str | pathlib.Path  # several of them, or one


class Source(NamedTuple):
    """A file, a folder or a data set (`jaxmoe.data.inputs`), and how many of its records come for those of others."""

    name: str
    weight: float | None = None


def sources(given: Sources, field: str) -> list[Source]:
    """What a flag or a caller names: `a.jsonl`, or `a.jsonl:2` with a weight.

    A path that exists is one, whatever colons it has.
    If one source has a weight, the others have 1.

    Raises:
        UserError: no source, an empty name, or a weight that is no number above 0; the message starts with `field`.
    """
    texts = as_tuple(given)
    if not texts:
        raise UserError(f"{field}: expected at least one file, folder or data set, found none")
    if "" in texts:
        raise UserError(f"{field}: expected the name of a file, a folder or a data set, found an empty text")
    found = [_source(text, field) for text in texts]
    if all(each.weight is None for each in found):
        return found
    return [each._replace(weight=1.0 if each.weight is None else each.weight) for each in found]


def as_tuple(given: Sources) -> tuple[str, ...]:
    """One source, or several, as a tuple of strings."""
    return tuple(map(str, given)) if isinstance(given, tuple | list) else (str(given),)


def _source(text: str, field: str) -> Source:
    match = None if pathlib.Path(text).exists() else _WEIGHTED.fullmatch(text)
    if match is None:
        return Source(text)
    try:
        weight = float(match[2])
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise UserError(f"{field}: expected FILE:WEIGHT with a weight above 0, found {text!r}")
    return Source(match[1], weight)


def weights_of(found: Sequence[Source]) -> list[float] | None:
    """The weights, or None if the sources have none."""
    weights = [each.weight for each in found if each.weight is not None]
    return weights or None
