"""What a checkpoint says about generation: generation_config.json, or the same fields in config.json.

Every field that changes what transformers' `generate` returns is honoured or refused by name. The others, such as the
kind of cache, are listed here. A field that is not listed is announced.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxmoe.config import read_json
from jaxmoe.errors import UserError, shown
from jaxmoe.generate.sampling import Sampling, check_count, check_settings, check_token_ids, is_number

# Transformers samples with these values where the file says nothing; those of the other fields are `Sampling`'s.
_DEFAULTS: dict[str, Any] = {"temperature": 1.0, "top_k": 50}
_NUMBERS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_NUMBERS += ("repetition_penalty", "no_repeat_ngram_size", "min_length", "min_new_tokens")

_ONE = lambda value: value in (None, 1) and not isinstance(value, bool)
_ZERO = lambda value: value in (None, 0) and not isinstance(value, bool)
_ZERO_OR_ONE = lambda value: value in (None, 0, 1) and not isinstance(value, bool)
_OFF = lambda value: value is None or value is False
_NONE = lambda value: value is None
# field -> (whether a value has no effect, what it asks for); Python has none of these, so another value is refused
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "assistant_early_exit": (_NONE, "drafting by an early layer"),
    "constraints": (_NONE, "constrained beam search"),
    "dola_layers": (_NONE, "DoLa decoding"),
    "encoder_no_repeat_ngram_size": (
        lambda value: value in (None, 0) and value is not False,
        "a ban on the prompt's n-grams",
    ),
    "encoder_repetition_penalty": (_ONE, "a penalty on tokens outside the prompt"),
    "force_words_ids": (_NONE, "constrained beam search"),
    "forced_bos_token_id": (_NONE, "a forced first token"),
    "guidance_scale": (_ONE, "classifier-free guidance"),
    "max_time": (_NONE, "a time limit"),
    "num_beam_groups": (_ZERO_OR_ONE, "group beam search"),
    "num_beams": (_ONE, "beam search"),
    "num_return_sequences": (_ONE, "more than one continuation of a prompt"),
    "penalty_alpha": (_ZERO, "contrastive search"),
    "stop_strings": (lambda value: value in (None, []), "stopping at a text"),
    "token_healing": (_OFF, "token healing"),
    "watermarking_config": (_NONE, "a watermark"),
}
# These change how transformers computes or what else it returns, or only matter with one of the fields above.
_WITHOUT_EFFECT = frozenset(
    """_commit_hash _from_model_config assistant_confidence_threshold assistant_ensemble_weight assistant_lookbehind
    cache_config cache_implementation compile_config continuous_batching_config decoder_start_token_id disable_compile
    diversity_penalty early_stopping is_assistant length_penalty low_memory max_cache_len max_matching_ngram_size
    num_assistant_tokens num_assistant_tokens_schedule output_attentions output_hidden_states output_logits
    output_scores prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values renormalize_logits
    return_dict_in_generate speculation_type target_lookbehind transformers_version use_cache use_mtp""".split()
)
_HONOURED = frozenset(
    """bad_words_ids begin_suppress_tokens bos_token_id do_sample eos_token_id exponential_decay_length_penalty
    forced_eos_token_id max_length max_new_tokens pad_token_id sequence_bias suppress_tokens""".split()
).union(_NUMBERS)
_SPECIAL_TOKENS = ("bos_token_id", "pad_token_id", "eos_token_id")
_LEGACY_MAX_LENGTH = 20  # transformers 4 wrote this default into every config.json


class Settings(NamedTuple):
    """What every way of generating is told."""

    max_new_tokens: int
    sampling: Sampling
    stop_tokens: tuple[int, ...]


class GenerationDefaults(NamedTuple):
    """What a checkpoint asks for; `notices` are lines for the user.

    `stop_tokens` is empty, and `max_new_tokens` None, where it says nothing about them.
    """

    sampling: Sampling
    stop_tokens: tuple[int, ...]
    max_new_tokens: int | None
    notices: tuple[str, ...] = ()


def generation_defaults(folder: pathlib.Path, *, use_file: bool = True) -> GenerationDefaults:
    """The settings in the folder's generation_config.json; without that file, as in transformers, in its config.json.

    Stop tokens that generation_config.json leaves out come from config.json. Unless `do_sample` is true the temperature
    is 0, and the other fields stay as they are. With `use_file=False` only the stop tokens of config.json are read.

    Raises:
        UserError: a value of another type or out of range, or one that asks for what is not supported.
    """
    own, model = folder / "generation_config.json", folder / "config.json"
    in_model = read_json(model) if model.is_file() else {}
    if not use_file:
        return GenerationDefaults(Sampling(), _stop_tokens(in_model, model), None)
    if own.is_file():
        found = _settings(read_json(own), own)
    else:
        legacy = {name: value for name, value in in_model.items() if name in _HONOURED or name in _REFUSED}
        found = _settings(legacy, model)
    return found if found.stop_tokens else found._replace(stop_tokens=_stop_tokens(in_model, model))


def without_effect(sampling: Sampling) -> list[str]:
    """The fields that restrict a draw and are set, although nothing is drawn."""
    if not sampling.greedy:
        return []
    neutral = {"top_k": (0, _DEFAULTS["top_k"]), "min_p": (0,), "epsilon_cutoff": (0,), "eta_cutoff": (0,)}
    names = ("top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
    return [name for name in names if getattr(sampling, name) not in neutral.get(name, (1,))]


def _settings(raw: Mapping[str, Any], path: pathlib.Path) -> GenerationDefaults:
    given = _given(raw)
    try:
        for name, (neutral, what) in _REFUSED.items():
            if name in given and not neutral(given[name]):
                way_out = "remove the field, or use --no-generation-config"
                raise UserError(
                    f"{name}: expected no value, found {shown(given[name])} ({what} is not supported; {way_out})"
                )
        for name in ("bos_token_id", "pad_token_id"):  # not needed here, but a wrong type points at a broken file
            _token_ids(given, name)
        sampling = _sampling(given)
        for name in ("max_new_tokens", "max_length"):
            if name in given:
                check_count(name, given[name], at_least=1)
        stop_tokens = _token_ids(given, "eos_token_id")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return GenerationDefaults(sampling, stop_tokens, given.get("max_new_tokens"), tuple(_notices(given, path)))


def _sampling(given: Mapping[str, Any]) -> Sampling:
    do_sample = given.get("do_sample", False)
    if not isinstance(do_sample, bool):
        raise UserError(f"do_sample: expected true or false, found {shown(do_sample)}")
    values = _DEFAULTS | {name: given[name] for name in _NUMBERS if name in given}
    for name in ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id"):
        values[name] = _token_ids(given, name)
    if "bad_words_ids" in given:
        values["bad_words_ids"] = _sequences("bad_words_ids", given["bad_words_ids"])
    if "sequence_bias" in given:
        values["sequence_bias"] = _sequence_bias(given["sequence_bias"])
    if "exponential_decay_length_penalty" in given:
        decay = given["exponential_decay_length_penalty"]
        values["exponential_decay_length_penalty"] = tuple(decay) if isinstance(decay, list) else decay
    check_settings(values)  # the temperature too, even if it is not used
    if not do_sample:
        values["temperature"] = 0.0
    return Sampling(**values)


def _notices(given: Mapping[str, Any], path: pathlib.Path) -> Iterator[str]:
    if unknown := sorted(set(given) - _HONOURED - _REFUSED.keys() - _WITHOUT_EFFECT):
        yield f"{path}: not known and not used: {', '.join(unknown)}"
    if given.get("max_length", _LEGACY_MAX_LENGTH) != _LEGACY_MAX_LENGTH and "max_new_tokens" not in given:
        yield f"{path}: max_length {given['max_length']} is not used; --max-new-tokens sets the limit"
    if not given.get("do_sample", False) and given.get("temperature", 1.0) not in (0, 1):
        yield f"{path}: temperature {given['temperature']} is not used, because do_sample is not true"


def _stop_tokens(raw: Mapping[str, Any], path: pathlib.Path) -> tuple[int, ...]:
    try:
        return _token_ids(_given(raw), "eos_token_id")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _given(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with a value. Older files say -1 for "no such token"."""
    absent = lambda name, value: value is None or (name in _SPECIAL_TOKENS and value == -1)
    return {name: value for name, value in raw.items() if not absent(name, value)}


def _token_ids(given: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """A token id, or a list of them; empty if the field is absent."""
    value = given.get(name, [])
    return check_token_ids(name, tuple(value) if isinstance(value, list) else (value,))


def _sequences(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list) or not all(isinstance(ids, list) for ids in value):
        raise UserError(f"{name}: expected a list of lists of token ids, found {shown(value)}")
    return tuple(map(tuple, value))


def _sequence_bias(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    pair = lambda item: isinstance(item, list) and len(item) == 2 and isinstance(item[0], list) and is_number(item[1])
    if not isinstance(value, list) or not all(map(pair, value)):
        raise UserError(f"sequence_bias: expected a list of [token ids, number], found {shown(value)}")
    return tuple((tuple(ids), float(bias)) for ids, bias in value)
