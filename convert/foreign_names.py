"""Names of tensors that are not those of transformers: which are read all the same, and what is said of the others."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping

from convert.safetensors_io import Tensor
from jaxmoe.errors import UserError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FREQUENCIES = re.compile(r"(?:.*\.)?rotary_emb\.(?:original_)?inv_freq")
# What the embedding is called -> what the names have, and the usual name of each. Transformers reads these too.
_PREFIXES: dict[str, tuple[str, Callable[[str], str]]] = {
    "embed_tokens.weight": ("no prefix", lambda name: name if name.startswith("lm_head.") else f"model.{name}"),
    f"model.{EMBEDDING}": ("the prefix model. twice", lambda name: name.removeprefix("model.")),
}
_RENAME = "rename the tensors, or save the text model by itself with transformers"
_DROP = "transformers ignores what it does not know: load the model with it and save it again to drop them"
_IN_NF4 = (
    "only projections, routers and MLPs may be in NF4: load the model with transformers, call dequantize() and save it"
)


def usual_names(where: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names that transformers gives them; a notice says what was changed.

    As for transformers, the prefix `model.` may be missing, as where a base model was saved by itself, or stand twice.
    Frequencies of the rotary embedding, which some tools store, are left out: config.json determines them.
    """
    log = logging.getLogger("jaxmoe")
    frequencies = [name for name in tensors if _FREQUENCIES.fullmatch(name)]
    if frequencies:
        log.warning(f"{where}: {frequencies[0]} ({len(frequencies)} such tensors): not read; config.json determines it")
    kept = {name: tensor for name, tensor in tensors.items() if name not in frequencies}
    for embedding, (found, usual) in _PREFIXES.items():
        if embedding in kept and EMBEDDING not in kept:
            renamed = {usual(name): tensor for name, tensor in kept.items()}
            if len(renamed) == len(kept):
                log.warning(f"{where}: names such as {embedding} have {found}; they are read as {EMBEDDING}")
                return renamed
    return kept


def only_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model with a tied head. If only the head is stored, it becomes the embedding."""
    if EMBEDDING in tensors or HEAD not in tensors:
        return tensors
    return {EMBEDDING if name == HEAD else name: tensor for name, tensor in tensors.items()}


def missing_tensors(where: str, missing: list[str], found: Collection[str]) -> UserError:
    """The error for tensors that a checkpoint lacks; it names one that has the same name under another prefix."""
    name = missing[0].removeprefix("model.")
    under = min((each for each in found if each.endswith(f".{name}")), key=len, default=None)
    instead = f", found {under}: {_RENAME}" if under else ""
    if missing == [HEAD] and not under:
        instead = "; if it is the embedding, set tie_word_embeddings to true in config.json"
    return UserError(f"{where}: missing tensor {missing[0]} ({len(missing)} missing in all){instead}")


def unexpected_tensors(where: str, unexpected: list[str]) -> UserError:
    """The error for tensors that the model does not have."""
    name = unexpected[0]
    way_out = _IN_NF4 if ".weight." in name else _DROP
    return UserError(f"{where}: unexpected tensor {name} ({len(unexpected)} unexpected in all); {way_out}")
