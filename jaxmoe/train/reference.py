"""What the reference model says of every pair: computed once, before the first step, and stored with the run.

The reference is the model as the run starts. Its log-probabilities do not change, so a run that stores them computes no
forward pass of the reference in its steps, and a resumed run reads the same numbers.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jaxtyping import Float32

from jaxmoe.cli.progress import progress
from jaxmoe.data.packing import Sequences
from jaxmoe.distributed import launch
from jaxmoe.distributed.placement import whole
from jaxmoe.errors import UserError
from jaxmoe.model.interface import Params
from jaxmoe.store.files import output_file
from jaxmoe.train.identity import REFERENCE_FILE
from jaxmoe.train.prepare import Plan
from jaxmoe.train.step import make_reference_step

OfPairs = Float32[np.ndarray, "pairs 2"]


def fill_in_reference(plan: Plan, frozen: Params, trainable: Params) -> None:
    """Fills in `Sequences.reference` of the run's data: from the run's folder, or computed with the model as the run
    starts and written there.

    Raises:
        UserError: a file in the run's folder that does not hold the numbers of this run.
    """
    path = plan.settings.output / REFERENCE_FILE
    wanted = {name: reference for name, sequences in _parts(plan) if (reference := sequences.reference) is not None}
    if path.exists():
        found = read_reference(path, wanted)
    else:
        found = {name: _computed(plan, sequences, frozen, trainable) for name, sequences in _parts(plan)}
        if launch.this().is_first:
            _write(path, found)
    for name, reference in wanted.items():
        reference[:] = found[name]


def _parts(plan: Plan) -> Iterator[tuple[str, Sequences]]:
    assert isinstance(plan.data.sequences, Sequences), "a run that stores this does not stream its data"
    yield "data", plan.data.sequences
    if plan.data.held_out is not None:
        yield "eval_data", plan.data.held_out


def _computed(plan: Plan, sequences: Sequences, frozen: Params, trainable: Params) -> OfPairs:
    """The log-probabilities of both answers of every pair."""
    size, placement = plan.settings.batch_size, plan.model.placement
    in_order = sequences.in_order()
    step, total = jax.jit(make_reference_step(plan.model)), in_order.steps(1, size)
    found = np.zeros((in_order.count_of_documents, 2), np.float32)
    with progress("log-probabilities of the reference") as show:
        for number in range(total):
            batch = in_order.batch(number, (size,))
            arrays, placed = plan.fed(frozen, placement.place_batch(batch, tokens=2))
            log_probs = whole(step(arrays, trainable, placed)).astype(np.float64)
            for line, documents in enumerate(in_order.plan(number, size)):
                for place, document in enumerate(documents, start=1):
                    both = slice(2 * line, 2 * line + 2)
                    here = batch.segment_ids[both] == place
                    found[document] = np.sum(log_probs[both] * here, axis=1)
            show(number + 1, total, f"{number + 1} of {total} batches")
    return found


def _write(path: pathlib.Path, arrays: Mapping[str, OfPairs]) -> None:
    from safetensors.numpy import save

    with output_file(path) as draft:
        draft.write_bytes(save(dict(arrays)))


def read_reference(path: pathlib.Path, wanted: Mapping[str, OfPairs]) -> dict[str, np.ndarray]:
    """The stored numbers, of the names and shapes of `wanted`.

    Raises:
        UserError: the file holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    expected = ", ".join(f"{name} [{len(array)}, 2]" for name, array in wanted.items())
    try:
        found = load(path.read_bytes())
    except (SafetensorError, ValueError) as error:
        shown = str(error)
    else:
        shapes = lambda arrays: {name: (array.shape, array.dtype) for name, array in arrays.items()}
        if shapes(found) == shapes(wanted) and all(np.isfinite(array).all() for array in found.values()):
            return found
        shown = ", ".join(f"{name} {[*array.shape]}" for name, array in found.items())
    raise UserError(f"{path}: expected finite float32 {expected}, found {shown}; delete it to compute it again")
