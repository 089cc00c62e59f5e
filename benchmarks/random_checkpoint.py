"""A checkpoint of a published shape in HF form, written to disk as fast as a copy."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from benchmarks.random_model import STD, routers
from convert.names import blocks_of, rows
from convert.safetensors_io import Planned, write_sharded
from jaxmoe.config import Qwen3MoeConfig

_POOL = 1 << 26  # normal numbers from which all tensors are cut


def write_checkpoint(folder: pathlib.Path, config: Qwen3MoeConfig, max_shard_size: int = 4 * 10**9) -> None:
    """Writes one tensor per expert, in bfloat16; routers as in `random_model`.

    Tensors are pieces of one pool of normal numbers, cut at random places.
    """
    rng = np.random.default_rng(0)
    dtype = np.dtype(ml_dtypes.bfloat16)
    pool = (rng.standard_normal(_POOL, dtype=np.float32) * STD).astype(dtype)
    gates = dict(zip(config.sparse_layers, routers(config), strict=True))
    table = [(layer, row) for layer in blocks_of(config) for row in rows(config, layer, "per_expert")]

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for layer, row in table:
            size = int(np.prod(row.shape))
            if len(row.shape) == 1:
                array = np.ones(row.shape, dtype)
            elif row.path == "sparse.gate":
                assert layer is not None
                array = gates[layer].astype(dtype)
            elif size > _POOL:  # the embedding
                array = np.resize(pool, row.shape)
            else:
                start = int(rng.integers(0, _POOL - size + 1))
                array = pool[start : start + size].reshape(row.shape)
            yield row.key, array

    folder.mkdir(parents=True, exist_ok=True)
    write_sharded(folder, [Planned(row.key, row.shape, dtype) for _, row in table], tensors(), max_shard_size)
    (folder / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n")
