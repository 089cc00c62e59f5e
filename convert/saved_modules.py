"""The weights that a PEFT adapter stores in full: its `modules_to_save`, and embeddings that lie beside it.

Besides embedding and head these may be the routers of all layers, which are one array here.

PEFT stores embeddings beside an adapter if it is told to (`save_embedding_layers`), or if it believes that the
vocabulary was resized. When it loads the adapter, it copies them into the base model. Here, those that equal the base's
are dropped, and the others are treated as modules to save: the logits are the same.
"""

from __future__ import annotations

import logging
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.errors import ConfigError, UserError, shown
from jaxmoe.lora import LORA_TARGETS, ROUTER, SAVED_MODULES, LoraConfig, saved_modules
from jaxmoe.store.checkpoint import Block, Checkpoint, cast

_log = logging.getLogger("jaxmoe")
KEYS = {f"base_model.model.{module}.weight": name for name, module in SAVED_MODULES.items()}
_ROUTER_MODULE = LORA_TARGETS["gate"].peft_module
_ROUTER_KEY = re.compile(rf"base_model\.model\.model\.layers\.(\d{{1,9}})\.{re.escape(_ROUTER_MODULE)}\.weight")
# What PEFT stores beside `X.weight` where X is a module to save and embeddings are saved too.
_COPY = re.compile(r"(.+)\.(modules_to_save|original_module)(?:\.[^.]+)?\.weight")


class SavedModules(NamedTuple):
    """Weights by path, and whether the one embedding stands for a tied head too (`LoraConfig.ensure_weight_tying`)."""

    arrays: dict[str, np.ndarray]
    tied: bool


def is_saved(key: str) -> bool:
    """Whether a key is that of a weight that the adapter stores in full."""
    return key in KEYS or _ROUTER_KEY.fullmatch(key) is not None


def without_copies(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of an adapter, each trained module once.

    If embeddings that are modules to save are stored as embeddings too, as PEFT does after a change of the vocabulary,
    the file also holds the trained weight as `modules_to_save` and the replaced one as `original_module`.
    """
    copies = {key: match for key in tensors if (match := _COPY.fullmatch(key))}
    once = {key: tensor for key, tensor in tensors.items() if key not in copies}
    for key, match in copies.items():
        if match[2] == "modules_to_save":
            once.setdefault(f"{match[1]}.weight", tensors[key])
    return once


def read_saved(
    path: pathlib.Path,
    config: Qwen3MoeConfig,
    raw: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    base: Checkpoint | None,
) -> SavedModules:
    """The weights among the `tensors` of the adapter in the folder `path` that are stored in full.

    `raw` is the adapter's config. Without the checkpoint `base`, no embedding can be recognised as the base's, and all
    are kept.

    Raises:
        UserError: a module that is not in `SAVED_MODULES`, a tensor that is missing, a resized vocabulary, or two
            different tensors for a tied embedding.
    """
    listed, lists_router = _listed(path, raw)
    stored = {name: tensors[key] for key, name in KEYS.items() if key in tensors}
    for name, array in stored.items():
        _check_shape(path, config, name, array)
    tied = config.tie_word_embeddings and (not listed or bool(raw.get("ensure_weight_tying")))
    if tied:
        stored = _one_for_both(path, stored)
    if missing := [name for name in listed if name not in stored and not (tied and stored)]:
        raise UserError(f"{path}: modules_to_save: expected the weight of {missing[0]}, found none")
    beside = [name for name in stored if name not in listed and not (tied and listed)]
    for name in _equal_to_base(beside, stored, base):
        _log.debug(f"{path}: {name} equals the base's and is ignored")
        del stored[name]
    for name in (name for name in beside if name in stored and base is not None):
        _log.info(f"{path}: {name} differs from the base's; it replaces it, and further training changes it")
    routers = _routers(path, config, tensors, listed=lists_router)
    return SavedModules(stored | routers, tied and bool(stored))


def _routers(
    path: pathlib.Path, config: Qwen3MoeConfig, tensors: Mapping[str, np.ndarray], *, listed: bool
) -> dict[str, np.ndarray]:
    """The routers of all layers as one array, if the adapter stores them."""
    found = {int(match[1]): tensors[key] for key in tensors if (match := _ROUTER_KEY.fullmatch(key))}
    if not found and not listed:
        return {}
    if sorted(found) != list(config.sparse_layers):
        raise UserError(
            f"{path}: {_ROUTER_MODULE}: expected the routers of all {len(config.sparse_layers)} MoE layers in full, "
            f"found those of {len(found)}"
        )
    expected = config.num_experts, config.hidden_size
    for layer, array in found.items():
        if array.shape != expected:
            where = f"{path}: layers.{layer}.{_ROUTER_MODULE}"
            raise UserError(f"{where}: expected shape {list(expected)}, found {list(array.shape)}")
    return {ROUTER: np.stack([found[layer] for layer in config.sparse_layers])}


def _listed(path: pathlib.Path, raw: Mapping[str, Any]) -> tuple[tuple[str, ...], bool]:
    """The names in `modules_to_save` that `SAVED_MODULES` knows, and whether the router is among them."""
    names = raw.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: modules_to_save: expected a list of names, found {shown(names)}")
    routers = ("gate", _ROUTER_MODULE)
    try:
        return saved_modules([name for name in names if name not in routers]), any(name in routers for name in names)
    except ConfigError as error:
        raise UserError(f"{path}: {error}") from None


def _one_for_both(path: pathlib.Path, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of a tied embedding, stored under either name or both, as embed_tokens."""
    arrays = list(stored.values())
    if not all(np.array_equal(array, arrays[0]) for array in arrays[1:]):
        raise UserError(f"{path}: lm_head: expected the values of embed_tokens, to which it is tied, found others")
    return dict(zip(("embed_tokens",), arrays, strict=False))


def _check_shape(path: pathlib.Path, config: Qwen3MoeConfig, name: str, array: np.ndarray) -> None:
    expected = config.vocab_size, config.hidden_size
    if array.shape == expected:
        return
    way_out = ""
    if array.shape[1:] == expected[1:]:
        way_out = (
            "; the adapter was trained with a resized vocabulary: load its base with transformers, call "
            f"resize_token_embeddings({array.shape[0]}), save the model, and use that folder as the base"
        )
    raise UserError(f"{path}: {name}: expected shape {list(expected)}, found {list(array.shape)}{way_out}")


def _equal_to_base(names: list[str], stored: Mapping[str, np.ndarray], base: Checkpoint | None) -> list[str]:
    """Those of `names` whose stored values are the base's, in the dtype in which they are stored."""
    if not names or base is None:
        return []
    own = base.block(None).arrays
    weights = {name: own.get(name, own["embed_tokens"]) for name in names}
    with np.errstate(over="ignore"):
        return [name for name in names if np.array_equal(stored[name], weights[name].astype(stored[name].dtype))]


def saved_tensors(
    config: Qwen3MoeConfig, lora: LoraConfig, adapters: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The weights that the adapter holds in full, by PEFT's keys. PEFT stores a tied weight under both names."""
    tensors = {key: adapters[name] for key, name in KEYS.items() if name in lora.modules_to_save}
    if lora.ensure_weight_tying:
        tensors |= dict.fromkeys(KEYS, adapters["embed_tokens"])
    if lora.full_router:
        routers = zip(config.sparse_layers, adapters[ROUTER], strict=True)
        tensors |= {f"base_model.model.model.layers.{at}.{_ROUTER_MODULE}.weight": array for at, array in routers}
    return tensors


def saved_settings(lora: LoraConfig) -> dict[str, Any]:
    """The entries of adapter_config.json that belong to them."""
    if not lora.saved_paths:
        return {}
    tying = {"ensure_weight_tying": True} if lora.ensure_weight_tying else {}
    router = [_ROUTER_MODULE] if lora.full_router else []
    return {"modules_to_save": [*lora.modules_to_save, *router]} | tying


def merge_saved(config: Qwen3MoeConfig, block: Block, lora: LoraConfig, adapters: Mapping[str, np.ndarray]) -> None:
    """Replaces weights of the top level by those that the adapter holds in full, cast to the dtype of the replaced."""
    embedding = block.arrays["embed_tokens"]
    if lora.unties_head(config):
        block.arrays["lm_head"] = embedding
    for name in lora.modules_to_save:
        block.arrays[name] = cast(name, adapters[name], block.arrays[name].dtype)


class MergedForm(NamedTuple):
    """What a checkpoint becomes when an adapter is merged into it. It differs from the base only if the adapter
    separates a tied head from the embedding; `config_changes` are those of config.json."""

    config: Qwen3MoeConfig
    dtypes: dict[str, np.dtype]
    stored_tied_head: bool
    config_changes: dict[str, Any]


def merged_form(base: Checkpoint, lora: LoraConfig | None) -> MergedForm:
    """The form of `base` with the adapter `lora` (None: no adapter) merged."""
    if lora is None or not lora.unties_head(base.config):
        return MergedForm(base.config, base.dtypes, base.stored_tied_head, {})
    changes = {"tie_word_embeddings": False}
    dtypes = base.dtypes | {"lm_head": base.dtypes["embed_tokens"]}
    return MergedForm(base.config.replace(**changes), dtypes, False, changes)
