"""Which experts of each layer get an adapter: those that a task uses most, by a capture, or those that a file lists.

Source: expert-specialised fine-tuning (ESFT, Wang et al. 2024, arXiv 2407.01906).
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

import numpy as np
from jaxtyping import Float64

from captures import Capture
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.control.captured_text import check_experts
from jaxmoe.errors import UserError, shown
from jaxmoe.json_text import read_json

Experts = tuple[tuple[int, ...], ...]  # for each MoE layer, in rising order
_TOP = re.compile(r"top:(\d{1,9})")


def is_top(choice: str) -> bool:
    """Whether a choice needs a capture: `top:N`, and not the name of a file."""
    return choice.startswith("top:")


def chosen_experts(choice: str, capture: pathlib.Path | None, config: Qwen3MoeConfig) -> Experts:
    """The experts that `choice` means: `top:N`, the N of each layer that the capture uses most, or a JSON file.

    Raises:
        UserError: another form, too many experts, a capture of another model, or experts that the model does not have.
    """
    if choice and not is_top(choice):
        return _from_file(pathlib.Path(choice), config)
    match = _TOP.fullmatch(choice)
    if match is None or not 1 <= int(match[1]) <= config.num_experts:
        raise UserError(f"lora_experts: expected top:1 to top:{config.num_experts}, or a file, found {shown(choice)}")
    assert capture is not None
    found = Capture.open(capture)
    check_experts(found, config, "lora_experts")
    order = np.argsort(-gate_scores(found), axis=1, kind="stable")[:, : int(match[1])]
    return tuple(tuple(sorted(layer.tolist())) for layer in order)


def gate_scores(capture: Capture) -> Float64[np.ndarray, "Ls E"]:
    """The mean over tokens of each expert's weight, 0 where a token does not use it (ESFT-Gate).

    A capture without router logits has no weights; each of a token's k experts then counts 1 / k (ESFT-Token).
    """
    layers, k = len(capture.model.layers), capture.model.num_experts_per_tok
    total = np.zeros((layers, capture.model.num_experts))
    for chunk in capture.chunks():
        weights = chunk.weights if capture.keep_logits else np.full(chunk.experts.shape, 1 / k)
        for layer in range(layers):
            np.add.at(total[layer], chunk.experts[layer].astype(np.intp), weights[layer])
    return total / capture.tokens


def _from_file(path: pathlib.Path, config: Qwen3MoeConfig) -> Experts:
    """The experts in a JSON file: an object from a layer's index in the model to its experts, or one that has such an
    object under "experts", as ESFT's and `prune`'s files have. Layers that it leaves out get no adapters."""
    raw: Any = read_json(path)
    raw = raw.get("experts", raw)
    where = f'{path}: expected an object of layers such as {{"{config.sparse_layers[0]}": [0, 3]}}'
    if not isinstance(raw, dict) or not raw:
        raise UserError(f"{where}, found {shown(raw)}")
    layers = {str(layer): layer for layer in config.sparse_layers}
    experts: dict[int, tuple[int, ...]] = {}
    for layer, found in raw.items():
        if layer not in layers:
            raise UserError(f"{path}: expected MoE layers of the model, found {shown(layer)}")
        numbers = found if isinstance(found, list) else [found]
        if any(type(one) is not int or not 0 <= one < config.num_experts for one in numbers):
            raise UserError(
                f"{path}: layer {layer}: expected experts from 0 to {config.num_experts - 1}, found {shown(found)}"
            )
        experts[layers[layer]] = tuple(sorted(set(numbers)))
    if not any(experts.values()):
        raise UserError(f"{path}: expected at least one expert, found none")
    return tuple(experts.get(layer, ()) for layer in config.sparse_layers)
