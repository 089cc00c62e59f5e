"""The identity of a run: the entries that must be the same for `--resume` to continue it.

The identity is stored in `train_config.json`. Each field of `TrainConfig` says how it enters the identity.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe import environment
from jaxmoe.cli.config_file import settings_text
from jaxmoe.config import Qwen3MoeConfig, read_json
from jaxmoe.distributed.placement import whole
from jaxmoe.errors import UserError, in_words, shown
from jaxmoe.model.interface import Params
from jaxmoe.runs.history import METRICS_FILE
from jaxmoe.runs.record import LOAD_FILE, RUN_FILE, SAMPLES_FILE
from jaxmoe.runs.report import REPORT_FILE
from jaxmoe.store import digest
from jaxmoe.store.files import check_links, output_file
from jaxmoe.store.lock import SUFFIX
from jaxmoe.train.settings import APART, VALUE, TrainConfig, changeable_settings
from jaxmoe.train.trackers import TRACKERS_FILE

CONFIG_FILE = "run.toml"
REFERENCE_FILE = "reference.safetensors"  # "data" and "eval_data": float32 [pairs, 2], of chosen and rejected answers
FILES_OF_A_START = {RUN_FILE, CONFIG_FILE, METRICS_FILE, "metrics.tmp", TRACKERS_FILE, "tensorboard", "checkpoints"}
FILES_OF_A_START |= {REFERENCE_FILE, SAMPLES_FILE, LOAD_FILE, REPORT_FILE}
_ONLY_MORE = ("max_steps",)  # steps that are done are not undone
CONTENT = ("model", "data", "eval_data")  # entries that hold digests, which tell a user nothing
Identity = dict[str, Any]  # entry -> what JSON can hold


def entries_by_value() -> list[str]:
    """The fields of TrainConfig whose value is an entry."""
    return [each.name for each in dataclasses.fields(TrainConfig) if each.metadata["identity"] == VALUE]


def entries_to_work_out() -> set[str]:
    """The entries whose values are worked out from fields of TrainConfig."""
    kinds = (each.metadata["identity"] for each in dataclasses.fields(TrainConfig))
    return {entry for kind in kinds if kind not in (VALUE, APART) for entry in kind}


def identity_of(settings: TrainConfig, worked_out: Mapping[str, Any]) -> Identity:
    """The identity without the entry "model", which needs the weights (`model_content`)."""
    expected = entries_to_work_out() - {"model"}
    assert set(worked_out) == expected, f"expected the entries {sorted(expected)}, found {sorted(worked_out)}"
    return {**worked_out, **{name: getattr(settings, name) for name in entries_by_value()}}


def _content_of_ends(config: Qwen3MoeConfig, params: Params) -> list[Any]:
    """The entry "model" of runs from before digests over all weights: its config, and SHA-256 over the first and last
    vector of every parameter."""

    @jax.jit
    def ends(params: Params) -> Params:
        return {path: a.reshape(-1, a.shape[-1])[jnp.asarray([0, -1])] for path, a in params.items()}

    total = hashlib.sha256()
    for path, vectors in sorted(jax.device_get(ends(params)).items()):
        total.update(path.encode() + vectors.tobytes())
    return [config.to_hf(), total.hexdigest()]


def model_content(config: Qwen3MoeConfig, params: Params, weights: str | None, previous: Identity | None) -> list[Any]:
    """The entry "model": its config, and the digest of all weights; in the form of the `previous` run if it has an
    older one.

    `weights` is the digest that was formed while `params` were read, None for random weights.
    """
    before = None if previous is None else previous.get("model")
    if isinstance(before, list) and len(before) == 2 and not str(before[1]).startswith(digest.PREFIX):
        return _content_of_ends(config, params)
    return [config.to_hf(), weights or digest.of_parameters({path: whole(array) for path, array in params.items()})]


def previous_identity(settings: TrainConfig) -> Identity | None:
    """The identity of the run that --resume continues, or None if the output folder is new or as good as new.

    A run that saved no checkpoint and no result holds nothing to continue, so without --resume another one may start in
    its folder.

    Raises:
        UserError: the folder holds something else, a link that leads out of it, or --resume is missing.
    """
    output = settings.output
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: expected a folder, found a file")
    if _is_empty(output):
        return None
    if not settings.resumes:
        if _holds_nothing_to_continue(output):
            return None
        raise UserError(f"{output}: expected a new or empty folder, or --resume; found a folder with files in it")
    identity = read_json(output / RUN_FILE).get("identity", {})
    check_links(output)
    if not isinstance(identity, dict):
        raise UserError(f"{output / RUN_FILE}: identity: expected an object, found {shown(identity)}")
    return identity


def _is_empty(output: pathlib.Path) -> bool:
    return not output.exists() or all(file.name == SUFFIX for file in output.iterdir())


def _holds_nothing_to_continue(output: pathlib.Path) -> bool:
    """Whether the folder holds the files of a run that ended before its first checkpoint, and no others."""
    names = {file.name for file in output.iterdir()} - {SUFFIX}
    checkpoints = output / "checkpoints"
    return names <= FILES_OF_A_START and RUN_FILE in names and not (checkpoints.is_dir() and any(checkpoints.iterdir()))


def remove_start(output: pathlib.Path) -> None:
    """Removes what a run wrote that ended before its first checkpoint; its folder stays if it holds anything else."""
    for name in FILES_OF_A_START:
        path = output / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        output.rmdir()


def check_same_run(
    settings: TrainConfig, previous: Mapping[str, Any], identity: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """Compares the run in the output folder with this one: entry -> [before, now] of those that --allow-change allows.

    Raises:
        UserError: they differ in another entry; the message names the first, and the flag that would allow it.
    """
    now, changes = json.loads(json.dumps(identity)), {}
    for name in sorted(dict.fromkeys([*now, *previous]), key=partial(_rank, previous, now)):
        before, after = previous.get(name), now.get(name)
        if before == after:
            continue
        fields = [field for field in changeable_settings() if name in _entries(field)]
        if not {*fields} & {*settings.allow_change}:
            what = f"{_difference(name, before, after, settings.output)}{_changed_settings(settings, name)}"
            raise UserError(f"{what}{_way_out(settings, fields)}")
        if name in _ONLY_MORE and not (isinstance(before, int) and after > before):
            where = f"{name}: to resume {settings.output} with another value"
            raise UserError(f"{where}, expected more than {in_words(before)}, found {in_words(after)}")
        changes[name] = [before, after]
    return changes


def _rank(previous: Mapping[str, Any], now: Mapping[str, Any], name: str) -> int:
    """Which of the entries that differ is named first: one that makes others differ."""
    if name == "mixture":  # other weights are a setting; other sizes follow from the data and from other settings
        return 2 if _weights(previous.get(name)) == _weights(now.get(name)) else 0
    return 0 if name == "streaming" else 1


def _difference(name: str, before: Any, after: Any, output: pathlib.Path) -> str:
    """How the entry `name` of two runs differs, in words."""
    part, of_content = "", name in CONTENT
    if name == "mixture":
        name, part, before, after = "data", "weights ", _weights(before), _weights(after)
        of_content = before == after  # what differs are the sizes of the sources
    elif isinstance(before, dict) and isinstance(after, dict):
        key = next(key for key in (*before, *after) if before.get(key) != after.get(key))
        part, before, after = f"{key} ", before.get(key), after.get(key)
    where = f"{name}: to resume {output}"
    if of_content:
        return f"{where}, expected the same content as before, found different content"
    return f"{where}, expected {part}{in_words(before)}, found {in_words(after)}"


def _weights(mixture: Any) -> list[Any]:
    """The weights in the entry "mixture", which also holds the sizes of sources that are not streamed."""
    if not isinstance(mixture, list):
        return []
    return [each[0] if isinstance(each, list) and each else each for each in mixture]


def _changed_settings(settings: TrainConfig, entry: str) -> str:
    """The settings that decide an entry and differ from those in the run's record."""
    path = settings.output / RUN_FILE
    before = read_json(path).get("settings") if path.is_file() else None
    if not isinstance(before, dict):
        return ""
    now = as_json(settings)
    fields = [field for field in now if field != entry and entry in _entries(field)]
    fields = [field for field in fields if field in before and before[field] != now[field]]
    changed = [f"{field} {in_words(before[field])} before, {in_words(now[field])} now" for field in fields]
    return f" ({'; '.join(changed)})" if changed else ""


def _entries(field: str) -> tuple[str, ...]:
    """The entries that hold a field."""
    kind = TrainConfig.__dataclass_fields__[field].metadata["identity"]
    return (field,) if kind == VALUE else () if kind == APART else kind


def _way_out(settings: TrainConfig, fields: Sequence[str]) -> str:
    """What to say of a change that one of these fields may have caused: the first that is not as by default."""
    if not fields:
        return ""
    defaults = {each.name: each.default for each in dataclasses.fields(settings)}
    changed = next((field for field in fields if getattr(settings, field) != defaults[field]), fields[0])
    return f"; --allow-change {changed} continues with the new value"


def as_json(settings: TrainConfig) -> dict[str, Any]:
    """The settings as JSON holds them; paths are text."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))


def write_run_file(settings: TrainConfig, identity: Mapping[str, Any]) -> None:
    """Writes settings, identity and the versions of what the run depends on into the output folder."""
    packages = ("jaxmoe", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    content = {
        "settings": as_json(settings),
        "identity": identity,
        "versions": environment.versions(("python", *packages)),
        "device": str(jax.devices()[0].device_kind),
    }
    with output_file(settings.output / RUN_FILE) as draft:
        draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def record_changes(
    settings: TrainConfig, identity: Mapping[str, Any], changes: Mapping[str, list[Any]], after_step: int
) -> None:
    """Writes into the run's record that a resumed run differs from `after_step` on; nothing if it does not."""
    if not changes:
        return
    path = settings.output / RUN_FILE
    content = read_json(path)
    before = content.get("changes")
    content |= {
        "settings": as_json(settings),
        "identity": identity,
        "changes": [*(before if isinstance(before, list) else []), {"after_step": after_step, **changes}],
    }
    with output_file(path) as draft:
        draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_config_file(settings: TrainConfig) -> None:
    """Writes the settings as `--config` reads them into the output folder; of a resumed run, those of its last part."""
    comments = [
        "The settings of this run. Repeat it with: python -m jaxmoe.train --config run.toml --output NEW",
        f"Paths that are not absolute belong to {shown(os.getcwd())}.",
    ]
    with output_file(settings.output / CONFIG_FILE) as draft:
        # A path need not be Unicode.
        draft.write_text(settings_text(settings, comments), encoding="utf-8", errors="surrogateescape")
