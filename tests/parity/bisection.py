"""Finds where two runs diverge: the first layer, then the first operation in it, with the smallest case that shows it.

The first layer is the first one whose output is off by more than rounding. The case is a one-layer model whose
embedding table holds the reference's hidden states before that layer, for one sequence of the batch. So every tool of
the suite can run it. Each side records every operation in it. The case is kept in `minimal/CASE`.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.parity import engine
from tests.parity.batches import Batch
from tests.parity.measures import differing, margins, relative_error
from tests.parity.plan import Case, Plan, log, read_batch, write_batch
from tests.parity.trace import OPERATIONS
from tests.parity.weights import Weights
from tests.tolerances import bound

Shapes = dict[str, Any]


def explain(plan: Plan, case: Case, result: dict[str, Any]) -> dict[str, Any] | None:
    """The cause of the first failed check of a forward pass: layer, operation, error, and the path of the case."""
    for check in result["checks"]:
        if not check["passed"] and not check["goal"] and plan.has(case, check["side"], check["run"]):
            if check["run"] == "gradients":
                return explain_gradients(result["figures"], check["side"])
            found = explain_run(plan, case, check["side"], check["run"])
            log("parity", f"{case.name}: {check['side']} parts from transformers in {found}")
            return found
    return None


def explain_gradients(figures: dict[str, Any], side: str) -> dict[str, Any]:
    """The deepest layer whose gradients are off, since errors travel backward to the first layer.

    If no single gradient is off, the layer of the largest error is named, without an operation.
    """
    against = "transformers" if figures["dtype"] == "float32" else "exact"
    errors = figures["gradients"][side][against]["gradients"]
    limit = bound("parity_gradients") if against == "transformers" else bound("bisection_16_bit")
    each = [(slot, path, error) for path, layers in errors.items() for slot, error in enumerate(layers)]
    wrong = [found for found in each if found[2] > limit]
    slot, path, error = max(wrong) if wrong else max(each, key=lambda found: found[2])
    operation = f"gradient of {path}" if wrong else None
    return {"side": side, "run": "gradients", "layer": slot, "operation": operation, "error": error}


def explain_run(plan: Plan, case: Case, side: str, run: str) -> dict[str, Any]:
    """Layer and operation at which `side` diverges from transformers in `run`, which may have a planted fault."""
    base, _, fault = run.partition("+")
    stock, found = plan.load(case, "transformers", base)["hidden"], plan.load(case, side, run)["hidden"]
    layer = first_layer(found, stock, case.dtype)
    row = int(np.argmax([relative_error(f, s) for f, s in zip(found[layer + 1], stock[layer + 1], strict=True)]))
    folder = plan.folder / "minimal" / case.name / side
    small = write_minimal(folder, case, layer, row, stock[layer, row], (fault,) if fault else ())
    traced = Plan(folder, plan.device, (small,), f"{side}, layer {layer} of {case.name}", ("transformers", side))
    engine.run(traced)
    return {
        "side": side,
        "run": run,
        "layer": layer,
        **first_operation(traced, small, side, f"trace+{fault}" if fault else "trace"),
        "case": str(folder.relative_to(plan.folder)),
    }


def first_layer(found: np.ndarray, expected: np.ndarray, dtype: str) -> int:
    """The first layer whose output [L + 1, B, T, D] is off by more than rounding; the last layer if none is."""
    limit = _limit(dtype)
    errors = [relative_error(f, e) for f, e in zip(found[1:], expected[1:], strict=True)]
    return next((layer for layer, error in enumerate(errors) if error > limit), len(errors) - 1)


def first_operation(plan: Plan, case: Case, side: str, run: str) -> dict[str, Any]:
    """The first recorded operation that is off by more than rounding; `operation` is None if none is."""
    expected, found = plan.load(case, "transformers", "trace"), plan.load(case, side, run)
    limit, errors = _limit(case.dtype), {}
    for name in OPERATIONS:
        if name not in expected or name not in found:
            continue
        if name == "selected":
            clear = margins(expected["router_logits"], expected["selected"].shape[-1]) > limit
            errors[name] = float(differing(found[name], expected[name])[clear].mean()) if clear.any() else 0.0
        elif name == "weights":  # each side may list a token's experts in its own order
            errors[name] = relative_error(np.sort(found[name], -1), np.sort(expected[name], -1))
        else:
            errors[name] = relative_error(found[name], expected[name])
    worst = next((name for name, error in errors.items() if not error <= limit), None)
    return {"operation": worst, "error": errors[worst] if worst else max(errors.values()), "errors": errors}


def write_minimal(
    folder: pathlib.Path, case: Case, layer: int, row: int, hidden: np.ndarray, faults: tuple[str, ...]
) -> Case:
    """The one-layer model of `layer`, whose token t has the embedding `hidden[t]` [D], and its one input sequence."""
    folder.mkdir(parents=True, exist_ok=True)
    inputs = torch.from_numpy(np.ascontiguousarray(hidden))
    batch = read_batch(case.batch)
    ids = np.arange(len(hidden), dtype=np.int32)[None]
    small = Batch(ids, batch.position_ids[row : row + 1], batch.segment_ids[row : row + 1])
    changes: dict[str, Any] = {
        "name": f"{case.name}-layer-{layer}",
        "checkpoint": str(_one_layer(pathlib.Path(case.checkpoint), folder / "model", layer, inputs)),
        "batch": str(write_batch(folder / "input.batch", small)),
        "runs": ("trace",),
        "faults": faults,
    }
    if case.quantized:
        changes["quantized"] = str(_one_layer(pathlib.Path(case.quantized), folder / "model-nf4", layer, inputs))
    if case.adapter:
        changes["adapter"] = str(_one_layer_adapter(pathlib.Path(case.adapter), folder / "adapter", layer))
    return replace(case, **changes)


def _one_layer(source: pathlib.Path, target: pathlib.Path, layer: int, inputs: torch.Tensor) -> pathlib.Path:
    """The layer's tensors as they are stored, named as layer 0; the embedding is replaced and tied."""
    target.mkdir(exist_ok=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    dense = _is_dense(config, layer)
    config |= {
        "num_hidden_layers": 1,
        "vocab_size": len(inputs),
        "tie_word_embeddings": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0] if dense else [],
    }
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for file in source.glob("token*"):
        (target / file.name).write_bytes(file.read_bytes())
    weights = Weights(source, torch.float32, "cpu")
    prefix = f"model.layers.{layer}."
    tensors = {key.replace(prefix, "model.layers.0."): weights.stored(key) for key in weights if key.startswith(prefix)}
    tensors["model.norm.weight"] = weights.stored("model.norm.weight")
    tensors["model.embed_tokens.weight"] = inputs  # in float32: each side rounds it to its own dtype
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _is_dense(config: Shapes, layer: int) -> bool:
    experts = config.get("num_local_experts", config.get("num_experts", 0))
    step = config.get("decoder_sparse_step", 1)
    return layer in config.get("mlp_only_layers", ()) or not experts or (layer + 1) % step != 0


def _one_layer_adapter(source: pathlib.Path, target: pathlib.Path, layer: int) -> pathlib.Path:
    target.mkdir(exist_ok=True)
    (target / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    prefix: Callable[[int], str] = lambda n: f"base_model.model.model.layers.{n}."
    tensors = load_file(source / "adapter_model.safetensors")
    kept = {k.replace(prefix(layer), prefix(0)): t for k, t in tensors.items() if k.startswith(prefix(layer))}
    save_file(kept, target / "adapter_model.safetensors", metadata={"format": "pt"})
    return target


def _limit(dtype: str) -> float:
    return bound("bisection_fp32" if dtype == "float32" else "bisection_16_bit")
