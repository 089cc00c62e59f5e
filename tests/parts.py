"""Parts of a checkpoint's arrays against its blocks."""

from __future__ import annotations

import numpy as np

from jaxmoe.store.boxes import slices, whole
from jaxmoe.store.checkpoint import Checkpoint, ReadInParts


def check_parts(source: Checkpoint) -> None:
    """Three random boxes of every array, and all of it, have the bits that the blocks have."""
    assert isinstance(source, ReadInParts)
    rng = np.random.default_rng(0)
    for block in source.blocks():
        wanted = {}
        for path, array in block.arrays.items():
            ends = [np.sort([rng.choice(n + 1, 2, replace=False) for n in array.shape]) for _ in range(3)]
            boxes = [tuple((int(a), int(b)) for a, b in each) for each in ends]
            wanted[path] = list(dict.fromkeys([*boxes, whole(array.shape)]))
        found = source.parts(block.layer, wanted).arrays
        assert found.keys() == wanted.keys()
        for path, boxes in wanted.items():
            for box in boxes:
                part, expected = found[path][box], np.ascontiguousarray(block.arrays[path][slices(box)])
                assert (part.dtype, part.shape) == (expected.dtype, expected.shape)
                assert part.tobytes() == expected.tobytes(), (path, box)
