"""Trains with two settings, A and B, once for each of several seeds, and compares them: `python -m jaxmoe.routing ab`.

A run whose folder lies in OUT and is noted in OUT/finished.json is not trained again; one that stopped continues.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxmoe.cli.progress import print_line
from jaxmoe.errors import UserError, in_words
from jaxmoe.json_text import read_json
from jaxmoe.runs.paired import Difference, differences, last_numbers, write_differences
from jaxmoe.runs.record import RUN_FILE, read_run
from jaxmoe.store.files import output_file
from jaxmoe.store.lock import output_lock
from jaxmoe.train.identity import as_json, previous_identity
from jaxmoe.train.loop import train
from jaxmoe.train.prepare import prepare
from jaxmoe.train.settings import TrainConfig

FINISHED_FILE = "finished.json"
Sides = Mapping[str, Mapping[str, Any]]  # "A" and "B" -> the settings as in a file of --config


def run_pairs(sides: Sides, seeds: int, out: pathlib.Path) -> tuple[list[Difference], int | None]:
    """Trains what is not finished; after each pair the table and the page in `out` are written again.

    Args:
        sides: the settings of "A" and "B", fields of `TrainConfig` without `seed` and `output`. Both evaluate the same
            held-out records.
        seeds: how many pairs, with the seeds from 0 on.
        out: the folder of the runs, the table and the page.

    Returns:
        the differences over the pairs that are finished, and the signal that ended a run early, if one did.

    Raises:
        UserError: settings that no run can have, that evaluate nothing or not the same records, or a folder with runs
            of other settings.
    """
    changed = changed_settings(sides)
    said = [f"{name}: {first} in A, {second} in B" for name, (first, second) in changed.items()]
    for line in said or ["A and B have the same settings"]:
        print_line(line)
    planned = {(seed, side): _settings(sides[side], side, seed, out) for seed in range(seeds) for side in sides}
    own = {FINISHED_FILE, *(settings.output.name for settings in planned.values())}
    if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in own):
        raise UserError(f"{out}: expected a new or empty folder, or one of this command; found one with other files")
    if _finished(out).keys() < {settings.output.name for settings in planned.values()}:
        _check_data({side: planned[0, side] for side in sides})
    out.mkdir(parents=True, exist_ok=True)
    with output_lock(out):
        finished = _finished(out)
        for name, settings in ((settings.output.name, settings) for settings in planned.values()):
            _check_settings(out, name, finished.get(name), settings)
        found: list[Difference] = []
        for number, ((seed, side), settings) in enumerate(planned.items(), start=1):
            name = settings.output.name
            if name not in finished:
                print_line(f"run {number} of {len(planned)}: {side}, seed {seed}")
                stopped_by = train(settings)["stopped_by"]
                if stopped_by is not None:
                    return found, stopped_by
                finished[name] = _compared(settings)
                _note(out, finished)
            if side == [*sides][-1]:
                found = _compare(out, [*sides], seed + 1, changed)
    return found, None


def changed_settings(sides: Sides) -> dict[str, tuple[str, str]]:
    """The settings that differ between the two sides, in words: name -> those of the first and of the second."""
    first, second = (as_json(_settings(given, side, 0, pathlib.Path())) for side, given in sides.items())
    return {
        name: (in_words(first[name]), in_words(second[name]))
        for name in first
        if name != "output" and first[name] != second[name]
    }


def _settings(given: Mapping[str, Any], side: str, seed: int, out: pathlib.Path) -> TrainConfig:
    try:
        output = out / f"{side}-seed{seed}"
        settings = TrainConfig(**{**given, "seed": seed, "output": output, "resume": True})
    except TypeError:
        raise UserError(f"{side}: data: expected records to train on, found none") from None
    if settings.eval_data is None and settings.eval_fraction is None:
        raise UserError(
            f"{side}: expected eval_data or eval_fraction, since held-out losses are compared, found neither"
        )
    if settings.push_to_hub is not None:
        raise UserError(f"{side}: push_to_hub: expected none, since each run would replace the one before it")
    return settings


def _check_data(sides: Mapping[str, TrainConfig]) -> None:
    """Reads all that the first pair reads but the weights, so that no mistake in B is found when A has been trained.

    Raises:
        UserError: settings with which a run would not start, or other held-out records in B than in A.
    """
    held_out = []
    for side, settings in sides.items():
        try:
            plan = prepare(settings, previous_identity(settings))
        except UserError as error:
            raise UserError(f"{side}: {error}") from None
        plan.data.close()
        held_out.append(plan.identity["eval_data"])
    if held_out[0] != held_out[1]:
        raise UserError("A and B: expected the same held-out records, found others in B")


def _compared(settings: TrainConfig) -> dict[str, Any]:
    """The settings as JSON, without the folder, which may have been moved."""
    return as_json(settings) | {"output": None}


def _finished(out: pathlib.Path) -> dict[str, Any]:
    """Name of a run's folder -> its settings."""
    path = out / FINISHED_FILE
    return read_json(path) if path.exists() else {}


def _note(out: pathlib.Path, finished: Mapping[str, Any]) -> None:
    with output_file(out / FINISHED_FILE) as draft:
        draft.write_text(json.dumps(finished) + "\n", encoding="utf-8")


def _check_settings(out: pathlib.Path, name: str, before: Any, settings: TrainConfig) -> None:
    if before is None:
        return
    now = _compared(settings)
    changed = [key for key in now if not isinstance(before, dict) or before.get(key) != now[key]]
    if changed:
        raise UserError(
            f"{out}: expected runs of these settings or none, found {name} with another {changed[0]}; name another "
            "folder with --out"
        )


def _compare(
    out: pathlib.Path, sides: list[str], seeds: int, changed: Mapping[str, tuple[str, str]]
) -> list[Difference]:
    """Compares the pairs of the first seeds, and writes table and page."""
    names = [[f"{side}-seed{seed}" for side in sides] for seed in range(seeds)]
    runs = {name: read_run(out / name) for pair in names for name in pair}
    held_out = {name: read_json(out / name / RUN_FILE)["identity"]["eval_data"] for name in runs}
    for first, second in names:
        if held_out[first] != held_out[second]:
            raise UserError(f"{out}: expected the same held-out records in {first} and {second}, found others")
    found = differences([(last_numbers(runs[first]), last_numbers(runs[second])) for first, second in names])
    write_differences(out, runs, found, changed)
    return found
