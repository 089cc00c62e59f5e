"""What a PEFT adapter's `adapter_config.json` says: which kinds are read, and the rank and alpha of each weight."""

from __future__ import annotations

import logging
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxmoe.errors import UserError, check_integer, check_number, shown
from jaxmoe.json_text import read_json
from jaxmoe.limited import first_match

SETTINGS = "adapter_config.json"

MERGE = "merge it with PEFT's merge_and_unload and convert the merged model"
# peft_type -> why it is not read, and the way out. Every other type is refused with `MERGE`.
_OTHER_TYPES = {
    "XLORA": "X-LoRA mixes adapters anew for each token; convert one of its LoRA adapters instead",
    **dict.fromkeys(
        (
            "PREFIX_TUNING",
            "PROMPT_TUNING",
            "P_TUNING",
            "MULTITASK_PROMPT_TUNING",
            "ADAPTION_PROMPT",
            "CPT",
            "CARTRIDGE",
        ),
        "it changes the input of the layers and no weight, so it cannot be merged; train a LoRA adapter instead",
    ),
}
# Initialisation -> the way out. Each of them trains against a changed base, which the adapter does not hold.
_CONVERT_TO_LORA = (
    "write it as plain LoRA with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), or " + MERGE
)
_CHANGED_BASES = ("pissa", "olora", "corda", "lora_ga")
# Initialisations that leave the base weights unchanged.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "mica", "orthogonal")
# Field -> the way out if it is set.
_UNSUPPORTED = {
    "use_dora": f"DoRA rescales the whole weight; {MERGE}",
    "use_qalora": f"QALoRA pools the inputs; {MERGE}",
    "lora_bias": f"adapters with a bias are not supported; {MERGE}",
    "alora_invocation_tokens": "an activated LoRA changes only the tokens after its invocation; use it with PEFT",
    "trainable_token_indices": f"single trained token embeddings are not supported; {MERGE}",
    "layer_replication": "it repeats layers of the base; build that model first, e.g. with mergekit, and convert it",
    "arrow_config": "Arrow mixes several adapters for each token; convert one of them instead",
}
_KNOWN_VERSION = (0, 21)  # the newest PEFT all of whose fields are in these tables
# Its other features that change the result.
_OTHER_FEATURES = frozenset("kasa_config monteclora_config use_bdlora velora_config".split())
# PEFT's values of fields that are absent.
_DEFAULTS = {"r": 8, "lora_alpha": 8}
# Fields that do not change what a trained adapter computes.
_HARMLESS = frozenset(
    """auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out
    inference_mode layers_pattern layers_to_transform loftq_config lora_ga_config megatron_config
    megatron_core peft_type peft_version qalora_group_size revision runtime_config target_modules target_parameters
    task_type""".split()
)
_USED = frozenset(
    "r lora_alpha use_rslora lora_dropout rank_pattern alpha_pattern init_lora_weights bias modules_to_save".split()
)


@dataclass
class PeftSettings:
    """A checked `adapter_config.json` (`raw`), and the rank and alpha that it gives to each weight."""

    path: pathlib.Path
    raw: Mapping[str, Any]

    @classmethod
    def read(cls, folder: pathlib.Path) -> PeftSettings:
        """Reads and checks the file in `folder`.

        Raises:
            UserError: no such file, another kind of adapter, or a feature that changes the result and is not supported;
                the message names the way out.
        """
        path = folder / SETTINGS
        if not path.is_file():
            # a Trainer's folder of checkpoints, or what PEFT writes for adapters with names of their own
            inside = sorted(file.parent.name for file in folder.glob(f"*/{SETTINGS}"))
            way_out = f"; its folder {inside[0]} has one" if inside else ""
            raise UserError(f"{folder}: expected a PEFT adapter, found no {SETTINGS}{way_out}")
        raw = _DEFAULTS | read_json(path)
        for check in (_check_kind, _check_start, _check_numbers, _check_targets, _check_fields):
            check(path, raw)
        return cls(path, raw)

    @property
    def use_rslora(self) -> bool:
        """Whether the factor is alpha / sqrt(r) and not alpha / r."""
        return bool(self.raw.get("use_rslora"))

    def scale(self, rank: int, alpha: float) -> float:
        """The factor on the product of an adapter of this rank and alpha."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def alpha_for(self, scale: float, rank: int) -> float:
        """The alpha with which an adapter of this rank has the factor `scale`."""
        return scale * (math.sqrt(rank) if self.use_rslora else rank)

    def rank_and_alpha(self, names: Sequence[str]) -> tuple[int, float]:
        """Rank and alpha of the weight that patterns may call by any of `names`, such as
        `model.layers.0.self_attn.q_proj`.

        Raises:
            UserError: a pattern that is no regular expression, or patterns that take too long to match.
        """
        rank = self._pick("rank_pattern", names, self.raw["r"])
        return rank, float(self._pick("alpha_pattern", names, self.raw["lora_alpha"]))

    def targets_any(self, names: Sequence[str]) -> bool:
        """Whether `target_modules` names one of the modules `names` that `exclude_modules` does not name.

        Raises:
            UserError: a pattern that is no regular expression, or one that takes too long to match.
        """
        left = [name for name in names if not self._names_any("exclude_modules", [name])]
        if isinstance(given := self.raw.get("target_modules"), list):
            left = [name for name in left if name in given or self._in_layers(name)]
        return bool(left) and self._names_any("target_modules", left)

    def _in_layers(self, name: str) -> bool:
        """Whether `layers_to_transform`, which PEFT reads only beside a list of targets, has the layer of `name`.

        `layers_pattern` is that of other architectures: this one has a single list of layers.
        """
        layers = self.raw.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers
        return not layers or int(name.split(".")[2]) in layers

    def loads(self, names: Sequence[str]) -> bool:
        """Whether PEFT would load tensors of the weight that settings may call by any of `names`. If no targets are
        given, which PEFT does not accept, all are loaded.

        Raises:
            UserError: as `targets_any`.
        """
        if not self.raw.get("target_modules") and not self.raw.get("target_parameters"):
            return True
        return self.targets_any(names) or self._names_any("target_parameters", names)

    def targeted(self, names: Sequence[str]) -> Sequence[str]:
        """Those of `names`, which all call one weight, by which PEFT calls it where it looks a pattern up: as a
        parameter or as a module, whichever is a target. If no targets are given, all.

        Raises:
            UserError: as `targets_any`.
        """
        parameters = [name for name in names if self._names_any("target_parameters", [name])]
        return parameters or [name for name in names if self.targets_any([name])] or names

    def _names_any(self, field_name: str, names: Sequence[str]) -> bool:
        # As in PEFT's `check_target_module_exists`: a text is a regular expression, a list holds ends of names.
        given = self.raw.get(field_name)
        if isinstance(given, str):
            return given == "all-linear" or self._first_match(field_name, (given,), names) is not None
        ends = tuple(f".{end}" for end in given) if isinstance(given, list) else ()
        return any(f".{name}".endswith(ends) for name in names)

    def _first_match(self, field_name: str, patterns: Sequence[str], names: Sequence[str]) -> int | None:
        try:
            return first_match(patterns, names)
        except UserError as error:
            raise UserError(f"{self.path}: {field_name}: {error}") from None

    def _pick(self, field_name: str, names: Sequence[str], default: Any) -> Any:
        # As in PEFT's `get_pattern_key`, the first pattern that matches the end of a name counts.
        given = self.raw.get(field_name) or {}
        index = self._first_match(field_name, tuple(given), names)
        return default if index is None else list(given.values())[index]


def _check_kind(path: pathlib.Path, raw: Mapping[str, Any]) -> None:
    if not isinstance(base := raw.get("base_model_name_or_path"), str | None):
        raise UserError(f"{path}: base_model_name_or_path: expected a text, found {shown(base)}")
    kind = raw.get("peft_type")
    if kind is None and "fine_tune_type" in raw:
        way_out = "fuse it with mlx_lm.fuse into a model in 16 bits, and convert that"
        raise UserError(
            f"{path}: fine_tune_type: expected a PEFT adapter, found one of MLX, which is not read: {way_out}"
        )
    if kind != "LORA":
        way_out = _OTHER_TYPES.get(str(kind), MERGE)
        raise UserError(f"{path}: peft_type: expected 'LORA', found {shown(kind)}: {way_out}")
    if raw.get("task_type") not in ("CAUSAL_LM", None):
        way_out = "its base is not a causal language model; set task_type to CAUSAL_LM if it is"
        raise UserError(f"{path}: task_type: expected 'CAUSAL_LM', found {shown(raw['task_type'])}: {way_out}")


def _check_start(path: pathlib.Path, raw: Mapping[str, Any]) -> None:
    start = raw.get("init_lora_weights", True)
    if start in _PLAIN_STARTS:
        return
    changes = str(start).lower().startswith(_CHANGED_BASES)
    what = (
        f"{shown(start)} trains against a changed base; {_CONVERT_TO_LORA}" if changes else f"{shown(start)}; {MERGE}"
    )
    raise UserError(f"{path}: init_lora_weights: expected a start that leaves the base unchanged, found {what}")


def _check_numbers(path: pathlib.Path, raw: Mapping[str, Any]) -> None:
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(raw.get(name) or {}, dict):
            raise UserError(f"{path}: {name}: expected a JSON object, found {shown(raw[name])}")
    for where, rank in _values(raw, "r", "rank_pattern"):
        check_integer(f"{path}: {where}", rank, at_least=1)
    for where, alpha in _values(raw, "lora_alpha", "alpha_pattern"):
        check_number(f"{path}: {where}", alpha)
    check_number(f"{path}: lora_dropout", raw.get("lora_dropout") or 0.0, at_least=0)
    if (dropout := raw.get("lora_dropout") or 0.0) >= 1:
        raise UserError(f"{path}: lora_dropout: expected a probability below 1, found {dropout}")


def _check_targets(path: pathlib.Path, raw: Mapping[str, Any]) -> None:
    """Checks the types of the fields that say which weights have an adapter, and how the products are scaled."""
    for name in ("target_modules", "exclude_modules", "target_parameters"):
        given = raw.get(name)
        texts = isinstance(given, list) and all(isinstance(each, str) for each in given)
        if given is not None and not texts and not isinstance(given, str):
            raise UserError(f"{path}: {name}: expected a list of names or a regular expression, found {shown(given)}")
    layers = raw.get("layers_to_transform")
    for layer in layers if isinstance(layers, list) else [] if layers is None else [layers]:
        check_integer(f"{path}: layers_to_transform", layer, at_least=0)
    if not isinstance(rslora := raw.get("use_rslora"), bool | None):
        raise UserError(f"{path}: use_rslora: expected true or false, found {shown(rslora)}")


def _values(raw: Mapping[str, Any], name: str, pattern: str) -> Iterator[tuple[str, Any]]:
    """The default of a setting and its values in a pattern, each with the place where it stands."""
    yield name, raw.get(name)
    for expression, value in (raw.get(pattern) or {}).items():
        yield f"{pattern}[{shown(expression)}]", value


def _check_fields(path: pathlib.Path, raw: Mapping[str, Any]) -> None:
    """Refuses features that are not supported, and lists stamps of other tools in a notice."""
    stamps = []
    for name, value in raw.items():
        if not value or name in _HARMLESS | _USED:
            continue
        if _is_stamp(name, value, raw.get("peft_version")):
            stamps.append(name)
            continue
        way_out = _UNSUPPORTED.get(name, f"not supported; {MERGE}")
        raise UserError(f"{path}: {name}: expected this option to be off, found {shown(value)}: {way_out}")
    if stamps:
        logging.getLogger("jaxmoe").warning(f"{path}: unknown fields, not used: {', '.join(sorted(stamps))}")


def _is_stamp(name: str, value: Any, version: Any) -> bool:
    """Whether a field is none of PEFT's and does not look like a feature, as the version of another tool does not.

    PEFT ignores any field that it does not know. Here, a file of a newer PEFT may have features that are not known.
    """
    match = re.match(r"(\d{1,9})\.(\d{1,9})", version) if isinstance(version, str) else None
    newer = match is not None and (int(match[1]), int(match[2])) > _KNOWN_VERSION
    feature = isinstance(value, dict | list) or name.startswith("use_")
    return not (newer or feature or name in _OTHER_FEATURES | set(_UNSUPPORTED))
