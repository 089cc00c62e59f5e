"""Writes a checkpoint with some of its experts, in HF form, one layer at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from convert.hf2jax import companion_files, config_bytes
from convert.jax2hf import HFForm, changed_config, write_hf
from jaxmoe.errors import UserError
from jaxmoe.other_fields import other_names
from jaxmoe.store.checkpoint import Block, Checkpoint

# The weights with an axis of experts, which is the first one of a layer's array.
_BY_EXPERT = ("sparse.gate", "sparse.gate_up_proj", "sparse.down_proj")


def write_pruned(
    dst: str | os.PathLike[str],
    source: Checkpoint,
    kept: Mapping[int, Sequence[int]],
    files: Mapping[str, bytes],
) -> None:
    """Writes `source` with the experts `kept` (index of a layer -> its experts) into the HF folder `dst`.

    The router keeps the rows of these experts. Every other weight keeps its bytes, and config.json all fields but the
    number of experts. `dst` must be new or empty; it appears whole or not at all. `files`, name -> content, are added.

    Raises:
        UserError: weights in NF4 or FP8, or layers that would have different numbers of experts.
    """
    if source.quantization is not None:
        form = source.quantization.form.upper()
        raise UserError(
            f"{source.path}: expected weights that can be written without some experts, found {form} (--dequantize "
            "decodes them)"
        )
    config = source.config
    counts = {len(set(experts)) for experts in kept.values()}
    if set(kept) != set(config.sparse_layers) or len(counts) != 1:
        raise UserError(
            f"experts: expected the same number in each of the MoE layers {', '.join(map(str, config.sparse_layers))}, "
            f"found {', '.join(f'{len(set(experts))} in {layer}' for layer, experts in kept.items()) or 'none'}"
        )
    left = counts.pop()
    content = config_bytes(source, None)
    # transformers 5 writes num_local_experts where 4.x wrote num_experts
    known = ("num_experts", "num_local_experts", *other_names("num_experts"))
    names = [name for name in known if name in json.loads(content)] or ["num_experts"]
    content = changed_config(content, dict.fromkeys(names, left))

    def blocks() -> Iterator[Block]:
        for block in source.blocks():
            yield _pruned(block, kept)
            del block  # or this name would hold it while the next one is made

    form = HFForm(layout=source.layout, stored_tied_head=source.stored_tied_head)
    companions = companion_files(source.path)
    write_hf(
        dst,
        config.replace(num_experts=left),
        source.dtypes,
        blocks(),
        {**companions, **files, "config.json": content},
        form,
    )


def _pruned(block: Block, kept: Mapping[int, Sequence[int]]) -> Block:
    """A layer with these experts, in the order of their index; another block as it is."""
    if block.layer is None or block.layer not in kept:
        return block
    experts = np.asarray(sorted(set(kept[block.layer])))
    return Block(
        block.layer, {path: array[experts] if path in _BY_EXPERT else array for path, array in block.arrays.items()}
    )
