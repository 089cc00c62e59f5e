"""The figures of one run, or of several beside each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxmoe.figures.figure import Figure, Heatmap, Lines, Samples, Series, Table
from jaxmoe.runs.history import History
from jaxmoe.runs.record import ExpertLoad, RunRecord

MOST_COLUMNS = 160  # of a heatmap, each some pixels wide

# name -> (title, unit, caption); further numbers of a row get a figure by their name
NUMBERS: dict[str, tuple[str, str, str]] = {
    "loss": ("Loss", "nats", "Training loss per learned token."),
    "eval_loss": ("Held-out loss", "nats", "Mean loss per learned token of the held-out records, at each evaluation."),
    "learning_rate": ("Learning rate", "learning rate", "What the optimizer multiplied its update by."),
    "grad_norm": ("Gradient norm", "norm", "Global norm of the gradient before clipping."),
    "tokens_per_second": ("Speed", "tokens/s", "Tokens without padding per second, since the logged step before."),
    "aux_loss": (
        "Load-balancing loss",
        "loss",
        "Before its coefficient. It is lowest if all experts are used alike.",
    ),
}
LOADS = {
    "expert_load_cv": (
        "Expert load: variation",
        "standard deviation / mean",
        "How unevenly each MoE layer's experts were loaded: 0 is even.",
    ),
    "expert_load_entropy": (
        "Expert load: entropy",
        "entropy / log E",
        "Entropy of each MoE layer's load over its experts: 1 is even, 0 means that one expert took all.",
    ),
    "device_load_max": (
        "Device load",
        "largest / mean",
        "In each MoE layer, the routed rows of the busiest device of the expert axis over the mean: 1 is even.",
    ),
}
WATCHED = {
    "routing_changed": (
        "Probe: tokens with other experts",
        "share of tokens",
        "The share of the probe's tokens that use another set of experts than with the base model.",
    ),
    "routing_divergence": (
        "Probe: divergence from the base's router",
        "nats",
        "Jensen-Shannon divergence of the router's probabilities from the base's, mean over the probe's tokens.",
    ),
    "routing_load_cv": (
        "Probe: load variation",
        "standard deviation / mean",
        "How unevenly the probe's tokens load each MoE layer's experts: 0 is even.",
    ),
    "routing_dead_experts": ("Probe: unused experts", "experts", "How many experts no token of the probe uses."),
}
BY_LAYER = LOADS | WATCHED


def of_runs(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Figure]:
    """All figures: of one run, or of several, whose `names` are all different."""
    alone = runs[0] if len(runs) == 1 else None
    figures: list[Figure] = []
    figures += _losses_of(alone) if alone else [_numbers(name, runs, names) for name in ("loss", "eval_loss")]
    scalars = dict.fromkeys(name for run in runs for name in run.history.names(per_layer=False))
    figures += [_numbers(name, runs, names) for name in {**NUMBERS, **scalars} if name not in ("loss", "eval_loss")]
    for name in dict.fromkeys(name for run in runs for name in run.history.names(per_layer=True)):
        figures.append(_load_by_layer(name, alone) if alone else _numbers(name, runs, names, _mean_over_layers))
    if alone and alone.load is not None:
        figures.append(_load_by_expert(alone.load))
    figures = [figure for figure in figures if not isinstance(figure, Lines) or figure.series]
    if samples := _samples(runs, names):
        figures.append(samples)
    if changes := [(name, *change) for run, name in zip(runs, names, strict=True) for change in run.changes]:
        header = ("run", "after step", "setting", "before", "now")
        caption = "What a resumed run did otherwise than before."
        figures.append(Table("changes", "Changes", caption, header, tuple(changes)))
    return [*figures, _settings(runs, names)]


def _losses_of(run: RunRecord) -> list[Figure]:
    """Training and held-out loss in one figure."""
    history = run.history
    series = [
        Series(name, history.column(column), bridged=column == "eval_loss")
        for name, column in (("training", "loss"), ("held-out", "eval_loss"))
        if column in history.names(per_layer=False)
    ]
    caption = "Mean loss per learned token: of each logged step, and of the held-out records at each evaluation."
    caption += f" Of the logged steps every {history.every}th is drawn." if history.every > 1 else ""
    return (
        [Lines("loss", "Loss", caption, "step", "nats", x=history.steps(), series=tuple(series), from_zero=False)]
        if series
        else []
    )


def _numbers(
    name: str,
    runs: Sequence[RunRecord],
    names: Sequence[str],
    values: Callable[[History, str], np.ndarray] = History.column,
) -> Lines:
    """One number over the steps, one line for each run that has it."""
    columns = {
        label: (run.history.steps(), column)
        for label, run in zip(names, runs, strict=True)
        if np.isfinite(column := values(run.history, name)).any()
    }
    x = np.unique(np.concatenate([steps for steps, _ in columns.values()])) if columns else np.zeros(0)
    series = []
    for label, (steps, column) in columns.items():
        y = np.full(len(x), np.nan)
        y[np.searchsorted(x, steps)] = column
        series.append(Series(label, y, bridged=True))
    title, unit, caption = NUMBERS.get(name) or BY_LAYER.get(name) or (name, name, "As the loss reports it.")
    caption += " Mean over the layers." if name in BY_LAYER else ""
    from_zero = name not in ("loss", "eval_loss", *BY_LAYER) and name in NUMBERS
    return Lines(name, title, caption, "step", unit, x=x, series=tuple(series), from_zero=from_zero)


def _mean_over_layers(history: History, name: str) -> np.ndarray:
    matrix = history.matrix(name)
    return np.mean(matrix, axis=1) if matrix.size else np.full(len(matrix), np.nan)


def _load_by_layer(name: str, run: RunRecord) -> Figure:
    matrix, steps = run.history.matrix(name), run.history.steps()
    kept = np.flatnonzero(np.isfinite(matrix).any(axis=1))
    kept = kept[np.unique(np.linspace(0, len(kept) - 1, min(len(kept), MOST_COLUMNS)).round().astype(int))]
    title, unit, caption = BY_LAYER.get(name) or (name, name, "One number per MoE layer.")
    return Heatmap(
        name,
        title,
        caption,
        row_label="MoE layer",
        column_label="step",
        unit=unit,
        values=matrix[kept].T[None],
        row_names=tuple(range(matrix.shape[1])),
        column_names=tuple(map(int, steps[kept])),
    )


def _load_by_expert(found: ExpertLoad) -> Figure:
    return Heatmap(
        "expert_load",
        f"Expert load at step {found.step}",
        "Each expert's share of its layer's routed rows times the number of experts: 1 is even, 0 unused.",
        row_label="MoE layer",
        column_label="expert",
        unit="load",
        values=found.load[None],
        row_names=tuple(range(len(found.load))),
        center=1.0,
    )


def _samples(runs: Sequence[RunRecord], names: Sequence[str]) -> Samples | None:
    """What the model wrote after the fixed prompts: of one run at every evaluation, of several at their last."""
    pages: list[tuple[str, list[tuple[str, str]]]] = []
    for run, name in zip(runs, names, strict=True):
        steps = sorted({sample.step for sample in run.samples})
        for step in steps if len(runs) == 1 else steps[-1:]:
            texts = [(sample.prompt, sample.text) for sample in run.samples if sample.step == step]
            pages.append((f"step {step}" if len(runs) == 1 else f"{name}, step {step}", texts))
    if not pages:
        return None
    caption = "What the model wrote after fixed prompts, always with the most probable token."
    return Samples(
        "samples",
        "Samples",
        caption,
        page_names=tuple(name for name, _ in pages),
        prompts=tuple(tuple(prompt for prompt, _ in texts) for _, texts in pages),
        texts=tuple(tuple(text for _, text in texts) for _, texts in pages),
    )


def _settings(runs: Sequence[RunRecord], names: Sequence[str]) -> Table:
    """All settings of one run; of several those that differ."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    lines = [(key, *(_shown(run.settings.get(key)) for run in runs)) for key in keys]
    if len(runs) == 1:
        body = tuple(line for line in lines if line[1])
        return Table("settings", "Settings", "Those that have a value.", ("setting", "value"), body)
    differing = tuple(line for line in lines if len({*line[1:]}) > 1)
    return Table("settings", "Settings", "Those in which the runs differ.", ("setting", *names), differing)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)
