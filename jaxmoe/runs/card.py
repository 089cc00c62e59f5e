"""The model card of what a run trained: the README.md beside an adapter or a model, as the Hugging Face Hub shows it.

The card holds names of folders and files, never their paths: it may be published.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from jaxmoe.errors import printable
from jaxmoe.runs.record import RunRecord
from jaxmoe.store.files import output_file

CARD_FILE = "README.md"
Kind = Literal["adapter", "merged", "model"]

_WHAT = {
    "adapter": "A LoRA adapter in PEFT's form.",
    "merged": "A model with a LoRA adapter merged into its weights.",
    "model": "A model of which all parameters were trained.",
}
# These say how a run goes on or where it writes, not what it learns.
_NOT_SHOWN = frozenset(
    """adapter allow_change compilation_cache config data eval_data eval_every from_scratch keep log_every log_samples
    model output patience push_to_hub report_to resume resume_from sample_prompts save_every tensorboard
    tokenizer""".split()
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BAR = 24  # characters of a full bar


def write_card(run: RunRecord, folder: pathlib.Path, kind: Kind) -> None:
    """Writes the card into the folder of an adapter or a model, in the place of an earlier one."""
    with output_file(folder / CARD_FILE) as draft:
        draft.write_text(card(run, kind), encoding="utf-8", errors="backslashreplace")


def card(run: RunRecord, kind: Kind) -> str:
    """The card as Markdown: the base model, the data, the settings, the losses, and how the experts were loaded."""
    library = "peft" if kind == "adapter" else "transformers"
    base = _base(run)
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    front["tags"] = ["jaxmoe", "qwen3_moe"]
    if base is not None and _HUB_ID.fullmatch(base):
        front["base_model"] = base
    sections = [
        # YAML reads JSON's strings and lists.
        ["---", *(f"{name}: {json.dumps(value)}" for name, value in front.items()), "---"],
        [f"# {_text(run.name)}"],
        [_WHAT[kind] + f" Trained with jaxmoe {run.versions.get('jaxmoe', '')}".rstrip() + "."],
        _table(_origin(run, base)),
        ["## Loss"],
        _table(_losses(run)),
        *_routing(run),
        ["## Settings"],
        _table(_settings(run.settings)),
        *_changes(run),
        ["## Use"],
        ["```python", *_use(kind), "```"],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def _base(run: RunRecord) -> str | None:
    """The base model: an id of the hub, or the name of a folder."""
    model = run.settings.get("model")
    return _name(model) if isinstance(model, str) else None


def _origin(run: RunRecord, base: str | None) -> Iterator[tuple[str, str]]:
    yield "base model", base or "random weights"
    for field, words in (("adapter", "continues the adapter"), ("data", "data"), ("eval_data", "held-out data")):
        if (value := run.settings.get(field)) not in (None, []):
            yield words, _shown(value)
    yield "steps", f"{run.step:,}" + ("" if run.total_steps is None else f" of {run.total_steps:,}")
    if (speed := run.speed()) is not None:
        yield "speed", f"{speed:,.0f} tokens/s"
    yield "device", run.device
    yield "versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())


def _losses(run: RunRecord) -> Iterator[tuple[str, str]]:
    before, after, lowest = run.held_out()
    loss = run.history.last("loss")
    rows = {
        "training loss of the last logged step": loss,
        "held-out loss before training": before,
        "held-out loss after training": after,
    }
    for words, value in rows.items():
        if value is not None:
            yield words, f"{value:.4f}"
    if lowest is not None:
        yield "lowest held-out loss", f"{lowest.loss:.4f} at step {lowest.step:,}"


def _routing(run: RunRecord) -> Iterator[list[str]]:
    """A picture of how each MoE layer loaded its experts, at the end: as one number, and expert by expert."""
    entropy = run.history.matrix("expert_load_entropy")
    measured = np.flatnonzero(np.isfinite(entropy).any(axis=1)) if entropy.size else []
    if not len(measured):
        return
    yield ["## Routing"]
    yield [
        "How evenly each MoE layer loaded its experts in the last logged step: the load's entropy over log E (1.00 is",
        "even), and its standard deviation over its mean (0.00 is even).",
    ]
    variation = run.history.matrix("expert_load_cv")[measured[-1]]
    bars = [f"layer  {'entropy':{_BAR}}        deviation"]
    for layer, (even, spread) in enumerate(zip(entropy[measured[-1]], variation, strict=True)):
        filled = round(_BAR * min(max(float(even), 0.0), 1.0)) if np.isfinite(even) else 0
        bars.append(f"{layer:5}  {'█' * filled:░<{_BAR}}  {even:.2f}  {spread:.2f}")
    yield ["```", *bars, "```"]
    if run.load is not None:
        yield [f"The load of each expert at step {run.load.step:,}: ▄ is an even share, █ twice that or more, · none."]
        lines = [f"{layer:5}  {''.join(map(_height, load))}" for layer, load in enumerate(run.load.load)]
        yield ["```", "layer  experts", *lines, "```"]


def _height(load: float) -> str:
    """A share of the load, times the number of experts, as a character."""
    return "·▁▂▃▄▅▆▇█"[min(8, math.ceil(4 * float(load)))]


def _settings(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if name not in _NOT_SHOWN and value not in (None, [], False):
            yield name, _shown(value)


def _changes(run: RunRecord) -> Iterator[list[str]]:
    if run.changes:
        yield ["Changed while it ran:"]
        yield _table((f"{each.name}, after step {each.after_step}", _shown(each.now)) for each in run.changes)


def _use(kind: Kind) -> list[str]:
    loader, of_model = "AutoModelForCausalLM", "folder"
    imports = [f"from transformers import {loader}, AutoTokenizer"]
    if kind == "adapter":
        loader, of_model = "AutoPeftModelForCausalLM", 'model.peft_config["default"].base_model_name_or_path'
        imports = [f"from peft import {loader}", "from transformers import AutoTokenizer"]
    return [
        *imports,
        "",
        'folder = "."  # this folder, or the id of its repository',
        f'model = {loader}.from_pretrained(folder, dtype="auto")',
        f"tokenizer = AutoTokenizer.from_pretrained({of_model})",
    ]


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    lines = [f"| {_text(name)} | {_text(value)} |" for name, value in rows if value]
    return ["| | |", "|---|---|", *lines] if lines else []


def _shown(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return _name(value) if isinstance(value, str) else json.dumps(value)


def _name(value: str) -> str:
    """An id of the hub as it is; of any other path the last name."""
    if _HUB_ID.fullmatch(value) and not pathlib.Path(value).exists():
        return value
    return pathlib.PurePath(value).name or value


def _text(value: str) -> str:
    """Text in a cell, which nothing in it can end."""
    return printable(" ".join(value.split())).replace("|", "\\|").replace("<", "&lt;")
