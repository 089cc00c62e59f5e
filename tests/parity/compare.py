"""Turns the arrays of a case into figures: every side against the float64 oracle and against transformers.

A figure is a number or a list of numbers by layer, so that figures can be written as JSON, judged (`verdict.py`) and
shown (`report.py`) without the arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxmoe.config import Qwen3MoeConfig
from tests.parity.measures import (
    Flip,
    dense_weights,
    differing,
    flips,
    gap_errors,
    logit_errors,
    margins,
    relative_error,
)
from tests.parity.plan import Case, Plan

Arrays = dict[str, np.ndarray]
Figures = dict[str, Any]

PERCENTILE = 99.9
_KL_EDGES = np.logspace(-16, 2, 73)
_MARGIN_EDGES = np.logspace(-7, 2, 55)


def compare_case(plan: Plan, case: Case) -> Figures:
    """All figures of one case."""
    config = Qwen3MoeConfig.from_pretrained(case.checkpoint)
    exact = plan.load(case, "exact", "free")
    figures: Figures = {
        "case": case.name,
        "dtype": case.dtype,
        "quantized": case.quantized and ("FP8" if case.quantized.endswith("fp8") else "NF4"),
        "adapter": case.adapter is not None,
        "layers": config.num_hidden_layers,
        "sparse_layers": list(config.sparse_layers),
        "experts": [config.num_experts_per_tok, config.num_experts] if config.sparse_layers else None,
        "tokens": int(np.prod(exact["logits"].shape[:2])),
        "logit_std": float(exact["logits"].std()),
        "runs": {},
        "gradients": {},
    }
    if config.sparse_layers:
        margin = margins(exact["router_logits"], config.num_experts_per_tok)
        figures["margins"] = _histogram(margin, _MARGIN_EDGES)
        figures["router_logit_std"] = float(exact["router_logits"].std())
    for run in _forward_runs(case):
        for side in plan.sides[1:]:
            if against := _forward(plan, case, config, exact, side, run, run):
                figures["runs"].setdefault(side, {})[run] = against
    for fault in case.faults:
        if against := _forward(plan, case, config, exact, "jaxmoe", f"free+{fault}", "free"):
            figures["runs"]["jaxmoe"][f"free+{fault}"] = against
    if "gradients" in case.runs:
        figures["gradients"] = _gradients(plan, case)
    return figures


def _gradients(plan: Plan, case: Case) -> dict[str, dict[str, Figures]]:
    """By side and by what it is compared with, over all draws."""
    made = [side for side in plan.sides if all(plan.has(case, side, run) for run in case.gradient_runs)]
    pairs = [
        (side, other) for side in made[1:] for other in ("exact", "transformers") if other in made and other != side
    ]
    draws: dict[tuple[str, str], list[Figures]] = {pair: [] for pair in pairs}
    for run in case.gradient_runs:
        arrays = {side: plan.load(case, side, run) for side in made}
        for side, other in pairs:
            compared = compare_gradients(arrays[side], arrays[other], arrays["exact"], case.learning_rate)
            draws[side, other].append(compared)
    out: dict[str, dict[str, Figures]] = {}
    for (side, other), figures in draws.items():
        out.setdefault(side, {})[other] = figures[0] if len(figures) == 1 else _over_draws(figures)
    return out


def _over_draws(draws: list[Figures]) -> Figures:
    """Root mean squares of the errors of several gradients; of the loss the worst."""
    rms = lambda values: float(np.sqrt(np.mean(np.square(values))))
    paths = draws[0]["gradients"]
    gradients = {
        path: [rms(errors) for errors in zip(*(draw["gradients"][path] for draw in draws), strict=True)]
        for path in paths
    }
    return {
        "loss": max(draw["loss"] for draw in draws),
        "gradients": gradients,
        "gradient_max": max(max(errors) for errors in gradients.values()),
        "gradient_all": rms([draw["gradient_all"] for draw in draws]),
        "draws": [draw["gradient_all"] for draw in draws],
    }


def _forward(
    plan: Plan, case: Case, config: Qwen3MoeConfig, exact: Arrays, side: str, run: str, stock_run: str
) -> Figures:
    """One run of one side against the oracle and, unless it is transformers itself, against transformers."""
    if not plan.has(case, side, run):
        return {}
    found = plan.load(case, side, run)
    against = {"exact": compare_run(config, found, exact)}
    if side != "transformers" and plan.has(case, "transformers", stock_run):
        against["transformers"] = compare_run(config, found, plan.load(case, "transformers", stock_run))
    return against


def _forward_runs(case: Case) -> Iterator[str]:
    return (run for run in case.runs if run in ("free", "pinned"))


def compare_run(config: Qwen3MoeConfig, found: Arrays, expected: Arrays) -> Figures:
    """The figures of one forward pass against another, over all tokens (a batch has no padding)."""
    V = expected["logits"].shape[-1]
    logits = logit_errors(found["logits"].reshape(-1, V), expected["logits"].reshape(-1, V))
    out: Figures = {
        "kl_by_token": [float(f"{kl:.3e}") for kl in logits.kl],
        "logits_max": logits.max_abs,
        "logits_relative": logits.relative,
        "kl": float(logits.kl.mean()),
        "kl_max": float(logits.kl.max()),
        "kl_histogram": _histogram(logits.kl, _KL_EDGES),
        "top1": logits.top1,
        "top10": logits.top10,
        "hidden": _by_layer(found["hidden"], expected["hidden"]),
    }
    if not config.sparse_layers:
        return out
    k, E = config.num_experts_per_tok, config.num_experts
    # a pinned run used the reference's experts; its own router's choice is judged
    chosen = found.get("chosen", found["selected"])
    differ = differing(chosen, expected["selected"])
    listed = flips(chosen, expected["selected"], expected["router_logits"])
    gaps = gap_errors(found["router_logits"], expected["router_logits"])
    weights = (dense_weights(a["selected"], a["weights"], E) for a in (found, expected))
    out |= {
        "router_logits": _by_layer(found["router_logits"], expected["router_logits"]),
        "weights": _by_layer(*weights),
        "flip_share": float(differ.mean()),
        "flip_share_by_layer": differ.mean(axis=(1, 2)).tolist(),
        "flip_margins": _histogram(np.asarray([flip.margin for flip in listed]), _MARGIN_EDGES),
        "largest_flip": listed[0].margin if listed else 0.0,
        "gap_error": float(np.percentile(gaps, PERCENTILE)),
        "gap_error_by_layer": np.percentile(gaps, PERCENTILE, axis=(1, 2)).tolist(),
        "aux_loss": abs(found["aux_loss"].item() / expected["aux_loss"].item() - 1),
        "k": k,
    }
    return out


def compare_gradients(found: Arrays, expected: Arrays, exact: Arrays, learning_rate: float) -> Figures:
    """Loss, each adapter's gradient in each layer, and the adapter after one step, in learning rates.

    AdamW's first step is the gradient's sign, so only entries whose gradient is larger than its rounding error are
    compared. Their gradient is above 0.001 of the matrix's root mean square, and above 1,000 times the largest rounding
    error in the expected gradient of the matrix. Rounding then moves no entry by more than about 0.001.
    """
    paths = [name.removeprefix("gradient.") for name in expected if name.startswith("gradient.")]
    gradients = {
        path: [
            relative_error(f, e) for f, e in zip(found[f"gradient.{path}"], expected[f"gradient.{path}"], strict=True)
        ]
        for path in paths
    }
    everything = [np.concatenate([a[f"gradient.{p}"].ravel() for p in paths]) for a in (found, expected)]
    out: Figures = {
        "loss": abs(found["loss"].item() / expected["loss"].item() - 1),
        "gradients": gradients,
        "gradient_max": max(max(errors) for errors in gradients.values()),
        "gradient_all": relative_error(*everything),
    }
    if f"after.{paths[0]}" in expected:
        worst, compared, total = 0.0, 0, 0
        for path in paths:
            gradient = expected[f"gradient.{path}"].astype(np.float64)
            rms = np.sqrt((gradient**2).mean(axis=(-2, -1), keepdims=True))
            rounding = np.abs(gradient - exact[f"gradient.{path}"]).max(axis=(-2, -1), keepdims=True)
            clear = np.abs(gradient) > np.maximum(1e-3 * rms, 1e3 * rounding)
            difference = np.abs(found[f"after.{path}"].astype(np.float64) - expected[f"after.{path}"])[clear]
            worst = max(worst, float(difference.max(initial=0.0)) / learning_rate)
            compared, total = compared + int(clear.sum()), total + clear.size
        if compared:  # in 16 bit no entry is that far above its rounding error
            out |= {"step": worst, "step_compared": compared / total}
    return out


def _by_layer(found: np.ndarray, expected: np.ndarray) -> list[float]:
    return [relative_error(f, e) for f, e in zip(found, expected, strict=True)]


def _histogram(values: np.ndarray, edges: np.ndarray) -> dict[str, list[float]]:
    inside = np.clip(np.asarray(values, np.float64), edges[0], edges[-1])
    return {"edges": edges.tolist(), "counts": np.histogram(inside, edges)[0].tolist()}


def list_flips(plan: Plan, case: Case) -> Iterator[tuple[str, str, int, Flip]]:
    """(side, run, layer, flip against the oracle's experts) of every side and run, widest margin first."""
    config = Qwen3MoeConfig.from_pretrained(case.checkpoint)
    if not config.sparse_layers:
        return
    exact = plan.load(case, "exact", "free")
    for side in plan.sides[1:]:
        for run in _forward_runs(case):
            if plan.has(case, side, run):
                chosen = plan.load(case, side, run)["chosen"]
                for flip in flips(chosen, exact["selected"], exact["router_logits"]):
                    yield side, run, config.sparse_layers[flip.slot], flip
