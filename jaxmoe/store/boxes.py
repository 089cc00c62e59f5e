"""Parts of arrays: what several processes share out among themselves when they read a checkpoint.

A box is a part of an array: on each axis the first index and the one after the last. The elements of an array, in C
order, are divided into pieces of `jaxmoe.store.digest.PIECE` bytes, from which its digest is formed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

Box = tuple[tuple[int, int], ...]


def whole(shape: Sequence[int]) -> Box:
    """The box that is the array."""
    return tuple((0, size) for size in shape)


def box_of(index: Sequence[slice], shape: Sequence[int]) -> Box:
    """The box of an index of slices without steps."""
    return tuple(each.indices(size)[:2] for each, size in zip(index, shape, strict=True))


def slices(box: Box, origin: Sequence[int] = ()) -> tuple[slice, ...]:
    """A box as a NumPy index, of an array whose first element is at `origin`."""
    starts = origin or (0,) * len(box)
    return tuple(slice(start - first, stop - first) for (start, stop), first in zip(box, starts, strict=True))


def origin(box: Box) -> tuple[int, ...]:
    """The index of the first element of a box."""
    return tuple(start for start, _ in box)


def shape_of(box: Box) -> tuple[int, ...]:
    """The lengths of the axes of a box."""
    return tuple(stop - start for start, stop in box)


def common(box: Box, other: Box) -> Box | None:
    """The elements that two boxes have in common; None if there are none."""
    found = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, other, strict=True))
    return found if all(start < stop for start, stop in found) else None


def holds(box: Box, other: Box) -> bool:
    """Whether the box `other` lies within `box`."""
    return all(a <= c and d <= b for (a, b), (c, d) in zip(box, other, strict=True))


def joined(boxes: Iterable[Box]) -> list[Box]:
    """The elements of boxes that do not overlap, in fewer boxes where some are neighbours."""
    found = list(boxes)
    for axis in range(len(found[0]) if found else 0):
        beside: dict[tuple[Box, Box], list[tuple[int, int]]] = {}
        for box in sorted(found):
            ends = beside.setdefault((box[:axis], box[axis + 1 :]), [])
            if ends and ends[-1][1] == box[axis][0]:
                ends[-1] = ends[-1][0], box[axis][1]
            else:
                ends.append(box[axis])
        found = [(*before, each, *after) for (before, after), ends in beside.items() for each in ends]
    return found


def runs(box: Box, shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first element, number of elements) of what lies together in memory in a box, in C order."""
    partial = [axis for axis, (each, size) in enumerate(zip(box, shape, strict=True)) if each != (0, size)]
    axis = partial[-1] if partial else 0
    (start, stop), inner = box[axis], math.prod(shape[axis + 1 :])
    for place in itertools.product(*(range(*each) for each in box[:axis])):
        before = 0
        for index, size in zip(place, shape, strict=False):
            before = before * size + index
        yield (before * shape[axis] + start) * inner, (stop - start) * inner


def between(start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    """The boxes of the elements from `start` to `stop` in C order, one after the other; each lies together in memory.

    There is at least one element.
    """
    if len(shape) <= 1:
        yield ((start, stop),) if shape else ()
        return
    inner = math.prod(shape[1:])
    first, last = start // inner, (stop - 1) // inner
    begins, ends = start - first * inner, stop - last * inner
    if first == last and (begins or ends < inner):
        yield from (((first, first + 1), *box) for box in between(begins, ends, shape[1:]))
        return
    if begins:
        yield from (((first, first + 1), *box) for box in between(begins, inner, shape[1:]))
        first += 1
    entire = last + (ends == inner)
    if first < entire:
        yield ((first, entire), *whole(shape[1:]))
    if ends < inner:
        yield from (((last, last + 1), *box) for box in between(0, ends, shape[1:]))


def pieces(shape: Sequence[int], elements: int) -> list[tuple[Box, ...]]:
    """The pieces of an array, `elements` each, except that the last one may be smaller; each as boxes in C order."""
    total = math.prod(shape)
    return [tuple(between(start, min(start + elements, total), shape)) for start in range(0, total, elements)]
