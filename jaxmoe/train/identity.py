"""The identity of a run: the entries that must be the same for `--resume` to continue it.

The identity is stored in `train_config.json`. Each field of `TrainConfig` says how it enters the identity.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe import environment
from jaxmoe.config import Qwen3MoeConfig, read_json
from jaxmoe.errors import UserError, shown
from jaxmoe.model.interface import Params
from jaxmoe.train.settings import APART, VALUE, TrainConfig

RUN_FILE = "train_config.json"
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


def model_content(config: Qwen3MoeConfig, params: Params) -> list[Any]:
    """The entry "model": its config, and SHA-256 over the first and last vector of every parameter.

    This tells two models of one shape apart without a pass over all weights.
    """

    @jax.jit
    def ends(params: Params) -> Params:
        return {path: a.reshape(-1, a.shape[-1])[jnp.asarray([0, -1])] for path, a in params.items()}

    total = hashlib.sha256()
    for path, vectors in sorted(jax.device_get(ends(params)).items()):
        total.update(path.encode() + vectors.tobytes())
    return [config.to_hf(), total.hexdigest()]


def previous_identity(settings: TrainConfig) -> Identity | None:
    """The identity of the run that --resume continues, or None if the output folder is new or empty.

    Raises:
        UserError: the folder holds something else, or --resume is missing.
    """
    output = settings.output
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: expected a folder, found a file")
    if not output.exists() or not any(output.iterdir()):
        return None
    if not settings.resume:
        raise UserError(f"{output}: expected a new or empty folder, or --resume; found a folder with files in it")
    identity = read_json(output / RUN_FILE).get("identity", {})
    if not isinstance(identity, dict):
        raise UserError(f"{output / RUN_FILE}: identity: expected an object, found {shown(identity)}")
    return identity


def check_same_run(output: pathlib.Path, previous: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raises UserError, which names the first entry in which the run in `output` and this one differ."""
    now = json.loads(json.dumps(identity))
    for name in [*now, *previous]:
        before, after = previous.get(name), now.get(name)
        if before != after:
            shown = f"{before!r}, found {after!r}"
            if name in CONTENT:
                shown = "the same content as before, found different content"
            raise UserError(f"{name}: to resume {output}, expected {shown}")


def write_run_file(settings: TrainConfig, identity: Mapping[str, Any]) -> None:
    """Writes settings, identity and the versions of what the run depends on into the output folder."""
    flags = {
        name: str(value) if isinstance(value, pathlib.Path) else value
        for name, value in dataclasses.asdict(settings).items()
    }
    packages = ("jaxmoe", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    content = {
        "settings": flags,
        "identity": identity,
        "versions": environment.versions(("python", *packages)),
        "device": str(jax.devices()[0].device_kind),
    }
    (settings.output / RUN_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
