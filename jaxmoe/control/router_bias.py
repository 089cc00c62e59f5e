"""The file router_bias.json: what `--router-bias-rate` of training found, for commands that route as the training did.

It holds one list of E numbers for each MoE layer, by the layer's index in the model: {"0": [0.01, -0.02, ...], ...}.
Qwen3-MoE has no place for them, so they lie beside the model's own files, which other programs read without them.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float32

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.errors import UserError, shown
from jaxmoe.json_text import read_json

FILE = "router_bias.json"


def as_bytes(bias: Float32[np.ndarray, "Ls E"], config: Qwen3MoeConfig) -> bytes:
    """The content of the file; reading it gives the same bits."""
    layers = zip(config.sparse_layers, bias.tolist(), strict=True)
    return ("{\n" + ",\n".join(f'"{layer}": {json.dumps(row)}' for layer, row in layers) + "\n}\n").encode()


def read(path: pathlib.Path, config: Qwen3MoeConfig) -> Float32[np.ndarray, "Ls E"]:
    """The bias of every MoE layer.

    Raises:
        UserError: other layers than those of the model, or something else than a number for each expert.
    """
    raw, wanted = read_json(path), [str(layer) for layer in config.sparse_layers]
    if sorted(raw) != sorted(wanted):
        other = sorted(set(raw) ^ set(wanted))[0]
        raise UserError(f"{path}: expected the {len(wanted)} MoE layers of the model, found a difference at {other!r}")
    for layer, row in raw.items():
        if not isinstance(row, list) or len(row) != config.num_experts or not all(map(_is_finite, row)):
            raise UserError(f"{path}: layer {layer}: expected {config.num_experts} finite numbers, found {shown(row)}")
    return np.asarray([raw[layer] for layer in wanted], np.float32)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < float(np.finfo(np.float32).max)
