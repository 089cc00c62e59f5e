"""How the next token is chosen: the settings of a generation, and the draw from the scores of one step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from jaxmoe.errors import UserError, shown

_LARGEST_ID = 2**31 - 1  # token ids and counts are int32 on the device
_COLDEST = 1e-5  # below it, scores divided by the temperature overflow float32
_TOP_H_TOKENS = 100  # transformers' bound on the tokens among which top_h chooses

# field -> (what is expected, whether a number is that)
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("a number of at least 0", lambda x: x >= 0),
    "top_p": ("a number from 0 to 1", lambda x: 0 <= x <= 1),  # 0: the most probable token alone
    "min_p": ("a number from 0 to 1", lambda x: 0 <= x <= 1),
    "top_h": ("a number above 0 and at most 1", lambda x: 0 < x <= 1),
    "typical_p": ("a number above 0 and at most 1", lambda x: 0 < x <= 1),
    "epsilon_cutoff": ("a number of at least 0 and below 1", lambda x: 0 <= x < 1),
    "eta_cutoff": ("a number of at least 0 and below 1", lambda x: 0 <= x < 1),
    "repetition_penalty": ("a number above 0", lambda x: x > 0),
}
_COUNTS = ("top_k", "no_repeat_ngram_size", "min_length", "min_new_tokens")
_TOKEN_IDS = ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The fields have transformers' names and effects; by default they have none.

    At temperature 0 the token with the highest score is taken. Otherwise a token is drawn from
    softmax(scores / temperature), restricted by the fields below `seed`. The fields after those change the scores
    first, at any temperature. They are applied in transformers' order.

    Attributes:
        temperature: 0 is greedy.
        top_k: only the `top_k` most probable tokens (0: all).
        top_p: of these, only the smallest set whose probability reaches `top_p`.
        seed: of the random draws.
        min_p: only tokens whose probability is at least `min_p` times that of the most probable one.
        top_h: only the most probable tokens, of 100, whose entropy adds up to at most `top_h` of the whole.
        typical_p: only the most typical tokens, up to this probability.
        epsilon_cutoff: only tokens of at least this probability.
        eta_cutoff: the same, with a lower bound where the distribution is flat.
        repetition_penalty: divides positive and multiplies negative scores of every token of the prompt and the
            continuation.
        no_repeat_ngram_size: no sequence of so many tokens occurs twice (0: no limit).
        min_length: no stop token before prompt and continuation have so many tokens.
        min_new_tokens: no stop token before the continuation has so many tokens; `min_length` is then not used.
        suppress_tokens: ids that are never chosen.
        begin_suppress_tokens: ids that are not chosen first.
        forced_eos_token_id: ids, one of which is the last token if the continuation reaches its largest length.
        bad_words_ids: sequences of ids that never occur; one that is a single stop token has no effect.
        sequence_bias: (sequence of ids, number) pairs: the number is added to the score of the token that would
            complete the sequence.
        exponential_decay_length_penalty: (start, factor): after `start` new tokens the score s of a stop token grows by
            |s| (factor^n - 1), n tokens later.

    Raises:
        UserError: a value of another type or out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    top_h: float = 1.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_length: int = 0
    min_new_tokens: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_eos_token_id: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    exponential_decay_length_penalty: tuple[int, float] | None = None

    def __post_init__(self) -> None:
        check_settings({field.name: getattr(self, field.name) for field in fields(self)})

    @property
    def greedy(self) -> bool:
        """Whether the token with the highest score is taken; also at temperatures that float32 cannot tell from 0."""
        return self.temperature < _COLDEST


def check_settings(values: Mapping[str, Any]) -> None:
    """Checks values of fields of `Sampling`, of any types.

    Raises:
        UserError: a value of another type or out of range.
    """
    for name, value in values.items():
        if name in _NUMBERS:
            expected, holds = _NUMBERS[name]
            if not is_number(value) or not holds(value):
                raise UserError(f"{name}: expected {expected}, found {shown(value)}")
        elif name in _COUNTS:
            check_count(name, value)
        elif name in _TOKEN_IDS:
            check_token_ids(name, value)
        elif name == "seed":
            if isinstance(value, bool) or not isinstance(value, int):
                raise UserError(f"seed: expected a whole number, found {shown(value)}")
        elif name == "bad_words_ids":
            for ids in value:
                check_token_ids(name, ids, empty=False)
        elif name == "sequence_bias":
            _check_biases(value)
        elif name == "exponential_decay_length_penalty" and value is not None:
            _check_decay(value)


def is_number(value: Any) -> bool:
    """Whether `value` is a finite int or float; a bool is not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond float64
        return False


def check_count(name: str, value: Any, *, at_least: int = 0) -> int:
    """Returns `value`, or raises UserError with `name` unless it is a whole number of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise UserError(f"{name}: expected a whole number of at least {at_least}, found {shown(value)}")
    return value


def check_token_ids(name: str, ids: Any, *, empty: bool = True) -> tuple[int, ...]:
    """Returns the tuple `ids`, or raises UserError with `name` unless it holds whole numbers that fit an int32."""
    if not isinstance(ids, tuple) or not (ids or empty):
        raise UserError(f"{name}: expected a list of token ids, found {shown(ids)}")
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= _LARGEST_ID:
            raise UserError(f"{name}: expected token ids (whole numbers from 0 to {_LARGEST_ID}), found {shown(token)}")
    return ids


def _check_biases(value: Any) -> None:
    name = "sequence_bias"
    for pair in value:
        if not isinstance(pair, tuple) or len(pair) != 2 or not is_number(pair[1]):
            raise UserError(f"{name}: expected pairs of token ids and a finite number, found {shown(pair)}")
        check_token_ids(name, pair[0], empty=False)


def _check_decay(value: Any) -> None:
    name = "exponential_decay_length_penalty"
    if not isinstance(value, tuple) or len(value) != 2 or not is_number(value[1]) or value[1] <= 0:
        raise UserError(f"{name}: expected a whole number and a factor above 0, found {shown(value)}")
    check_count(name, value[0])


GREEDY = Sampling()


class SamplingArrays(NamedTuple):
    """The fields of `Sampling` that a draw reads, as arrays: changing one does not recompile anything.

    A restriction that few checkpoints use is None unless it is set: then it is no part of the compiled program.
    """

    seed: UInt32[Array, ""]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""] | None = None
    top_h: Float[Array, ""] | None = None
    typical_p: Float[Array, ""] | None = None
    epsilon_cutoff: Float[Array, ""] | None = None
    eta_cutoff: Float[Array, ""] | None = None

    @classmethod
    def of(cls, sampling: Sampling) -> SamplingArrays:
        """The scalars, on the device; where nothing is drawn, no more than the first four."""
        optional = cls._fields[4:]
        neutral = {field.name: field.default for field in fields(Sampling)}
        used = {} if sampling.greedy else {name: getattr(sampling, name) for name in optional}
        return cls(
            jnp.uint32(sampling.seed % 2**32),
            jnp.float32(sampling.temperature),
            jnp.int32(min(sampling.top_k, _LARGEST_ID)),
            jnp.float32(sampling.top_p),
            **{name: jnp.float32(value) for name, value in used.items() if value != neutral[name]},
        )


def sample(logits: Float[Array, "B V"], keys: Array, sampling: SamplingArrays) -> Int[Array, " B"]:
    """Draws one token per sequence from the distribution of `ranked_logits`; `keys` holds one random key for each."""
    ranked, order = ranked_logits(logits, sampling)
    choice = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


def ranked_logits(
    logits: Float[Array, "B V"], sampling: SamplingArrays
) -> tuple[Float[Array, "B V"], Int[Array, "B V"]]:
    """Logits over the temperature in descending order, and the token of each; excluded tokens have -inf.

    The restrictions are those of transformers, in its order. Among equal logits at the cut, the lower token ids are
    kept.

    Sources: top-p, Holtzman et al. 2020 (arXiv 1904.09751); min-p, Nguyen et al. 2024 (arXiv 2407.01082); top-H,
    Potraghloo et al. 2025 (arXiv 2509.02510); typical, Meister et al. 2022 (arXiv 2202.00666); epsilon and eta,
    Hewitt et al. 2022 (arXiv 2210.15191).
    """
    scaled = logits / sampling.temperature
    order = jnp.argsort(-scaled, axis=-1, stable=True)
    return _restricted(jnp.take_along_axis(scaled, order, axis=-1), sampling), order


def _restricted(ranked: Float[Array, "B V"], sampling: SamplingArrays) -> Float[Array, "B V"]:
    """Logits in descending order, -inf where a restriction excludes the token. The first token is always kept."""
    rank = jnp.arange(ranked.shape[-1])
    without = lambda excluded: jnp.where(excluded & (rank > 0), -jnp.inf, ranked)
    if sampling.top_h is not None:
        ranked = without(_beyond_top_h(ranked, sampling.top_h))
    ranked = without((sampling.top_k > 0) & (rank >= sampling.top_k))
    probabilities = jax.nn.softmax(ranked, axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # At top_p = 1 a sum that rounds up to 1 would exclude the rarest tokens.
    ranked = without((sampling.top_p < 1) & (mass_before >= sampling.top_p))
    if sampling.min_p is not None:
        probabilities = jax.nn.softmax(ranked, axis=-1)
        ranked = without(probabilities < sampling.min_p * probabilities[:, :1])
    if sampling.typical_p is not None:
        ranked = _typical(ranked, sampling.typical_p)
    if sampling.epsilon_cutoff is not None:
        ranked = without(_rare(ranked, sampling.epsilon_cutoff))
    if sampling.eta_cutoff is not None:
        epsilon = sampling.eta_cutoff
        flat = jnp.sqrt(epsilon) * jnp.exp(-_entropy_terms(ranked).sum(axis=-1, keepdims=True))
        ranked = without(_rare(ranked, jnp.minimum(epsilon, flat)))
    return ranked


def _beyond_top_h(ranked: Float[Array, "B V"], top_h: Float[Array, ""]) -> Array:
    """Whether each token lies beyond the share `top_h` of the entropy of the first 100."""
    first = ranked[:, :_TOP_H_TOKENS]
    reached = jnp.cumsum(_entropy_terms(first), axis=-1)
    beyond = reached > top_h * reached[:, -1:]
    return jnp.pad(beyond, ((0, 0), (0, ranked.shape[-1] - first.shape[-1])), constant_values=True)


def _typical(ranked: Float[Array, "B V"], mass: Float[Array, ""]) -> Float[Array, "B V"]:
    """-inf where a token's surprise is further from the entropy than that of the last one within `mass`."""
    surprise = -jax.nn.log_softmax(ranked, axis=-1)
    distance = jnp.abs(surprise - _entropy_terms(ranked).sum(axis=-1, keepdims=True))
    order = jnp.argsort(distance, axis=-1, stable=True)
    reached = jnp.cumsum(jnp.take_along_axis(jnp.exp(-surprise), order, axis=-1), axis=-1)
    last = jnp.minimum((reached < mass).sum(axis=-1, keepdims=True), ranked.shape[-1] - 1)
    furthest = jnp.take_along_axis(jnp.take_along_axis(distance, order, axis=-1), last, axis=-1)
    # Nothing else is kept by force: the most typical token always lies within.
    return jnp.where(distance > furthest, -jnp.inf, ranked)


def _rare(ranked: Float[Array, "B V"], least: Array) -> Array:
    return jax.nn.softmax(ranked, axis=-1) < least


def _entropy_terms(ranked: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """-p log p of each token, 0 for an excluded one."""
    logarithms = jax.nn.log_softmax(ranked, axis=-1)
    return jnp.where(jnp.isneginf(logarithms), 0.0, -jnp.exp(logarithms) * logarithms)
