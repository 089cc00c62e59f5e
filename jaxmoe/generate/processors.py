"""Changes to the scores of the next token that apply at any temperature, such as the repetition penalty.

What each does is that of transformers' logits processors, and so is their order; padding never counts as text.
Source: transformers, src/transformers/generation/logits_process.py; repetition penalty, Keskar et al. 2019
(arXiv 1909.05858).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxmoe.generate.sampling import Sampling

_ANY = -1  # in a sequence of ids: whatever token stands there
_NOTHING = -2  # before the start of a text


class Biased(NamedTuple):
    """Sequences of W token ids, right-aligned and filled with -1, and what is added to the score of each last one."""

    ids: Int[Array, "W n"]
    bias: Float[Array, " W"]


class Decay(NamedTuple):
    """After `start` new tokens the score of a stop token grows by `factor` per token."""

    start: Int[Array, ""]
    factor: Float[Array, ""]


class Processors(NamedTuple):
    """The fields of `Sampling` that change scores, as arrays; None, and no part of the compiled program, if unused.

    `stop` marks the stop tokens; `last_draw` is the number of the last token if no stop token comes before.
    """

    stop: Bool[Array, " V"]
    last_draw: UInt32[Array, ""]
    sequence_bias: Biased | None = None
    repetition_penalty: Float[Array, ""] | None = None
    no_repeat_ngram_size: Int[Array, ""] | None = None
    bad_words: Biased | None = None
    min_length: Int[Array, ""] | None = None
    min_new_tokens: Int[Array, ""] | None = None
    forced_eos: Bool[Array, " V"] | None = None
    decay: Decay | None = None
    suppressed: Bool[Array, " V"] | None = None
    suppressed_at_begin: Bool[Array, " V"] | None = None

    @classmethod
    def of(
        cls, sampling: Sampling, stop_tokens: Sequence[int], vocab_size: int, max_new_tokens: int
    ) -> Processors | None:
        """The processors that `sampling` asks for; None if it asks for none."""
        mask = lambda ids: _mask(ids, vocab_size) if ids else None
        count = lambda value: jnp.int32(min(value, 2**31 - 1)) if value else None
        penalty, decay = sampling.repetition_penalty, sampling.exponential_decay_length_penalty
        stop_alone = {(token,) for token in stop_tokens}
        bad_words = [ids for ids in sampling.bad_words_ids if ids not in stop_alone]
        stop, last_draw = _mask(stop_tokens, vocab_size), jnp.uint32(max_new_tokens - 1)
        found = cls(
            stop,
            last_draw,
            sequence_bias=_biased(list(dict(sampling.sequence_bias).items())),
            repetition_penalty=None if penalty == 1 else jnp.float32(penalty),
            no_repeat_ngram_size=count(sampling.no_repeat_ngram_size),
            bad_words=_biased([(ids, -np.inf) for ids in dict.fromkeys(bad_words)]),
            min_length=None if sampling.min_new_tokens else count(sampling.min_length),
            min_new_tokens=count(sampling.min_new_tokens),
            forced_eos=mask(sampling.forced_eos_token_id),
            decay=None if decay is None else Decay(jnp.int32(min(decay[0], 2**31 - 1)), jnp.float32(decay[1])),
            suppressed=mask(sampling.suppress_tokens),
            suppressed_at_begin=mask(sampling.begin_suppress_tokens),
        )
        return found if any(part is not None for part in found[2:]) else None

    @property
    def read_order(self) -> bool:
        """Whether the order of earlier tokens matters."""
        longest = max(
            (part.ids.shape[1] for part in (self.sequence_bias, self.bad_words) if part is not None), default=1
        )
        return self.no_repeat_ngram_size is not None or longest > 1


class History(NamedTuple):
    """The tokens of prompt and continuation; a part that no processor reads is None.

    `seen` marks the ids that occur; `tokens` holds them by position, S as in the KV cache.
    """

    seen: Bool[Array, "B V"] | None
    tokens: Int[Array, "B S"] | None

    @classmethod
    def of(
        cls,
        processors: Processors | None,
        ids: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        slots: int,
        vocab_size: int,
    ) -> History | None:
        """The history of the prompts `ids`, of which the first `lengths` tokens are real; None if none is read."""
        if processors is None or (processors.repetition_penalty is None and not processors.read_order):
            return None
        B, T = ids.shape
        seen = tokens = None
        if processors.repetition_penalty is not None:
            real = jnp.where(jnp.arange(T) < lengths[:, None], ids, vocab_size)
            seen = jnp.zeros((B, vocab_size), bool).at[jnp.arange(B)[:, None], real].set(True, mode="drop")
        if processors.read_order:
            tokens = jnp.pad(ids, ((0, 0), (0, slots - T)))
        return cls(seen, tokens)

    def with_token(self, token: Int[Array, " B"], position: Int[Array, " B"]) -> History:
        """The history with one more token per sequence."""
        sequences = jnp.arange(token.shape[0])
        seen = None if self.seen is None else self.seen.at[sequences, token].set(True)
        tokens = None if self.tokens is None else self.tokens.at[sequences, position].set(token, mode="drop")
        return History(seen, tokens)


def process(
    logits: Float[Array, "B V"],
    processors: Processors,
    history: History | None,
    length: Int[Array, " B"],
    draws: UInt32[Array, ""],
) -> Float[Array, "B V"]:
    """The scores of the token that follows `length` tokens, of which `draws` were generated."""
    p, seen, tokens = processors, *(history or History(None, None))
    without = lambda excluded, scores: jnp.where(excluded, -jnp.inf, scores)
    new = draws.astype(jnp.int32)
    scores = logits
    if p.sequence_bias is not None:
        scores = scores + _bias_of(p.sequence_bias, tokens, length, scores)
    if p.repetition_penalty is not None:
        assert seen is not None
        penalised = jnp.where(scores < 0, scores * p.repetition_penalty, scores / p.repetition_penalty)
        scores = jnp.where(seen, penalised, scores)
    if p.no_repeat_ngram_size is not None:
        assert tokens is not None
        scores = without(_completes_ngram(tokens, length, p.no_repeat_ngram_size, scores.shape[-1]), scores)
    if p.bad_words is not None:
        scores = scores + _bias_of(p.bad_words, tokens, length, scores)
    if p.min_length is not None:
        scores = without((length < p.min_length)[:, None] & p.stop, scores)
    if p.min_new_tokens is not None:
        scores = without((new < p.min_new_tokens) & p.stop, scores)
    if p.forced_eos is not None:
        scores = jnp.where(draws == p.last_draw, without(~p.forced_eos, jnp.zeros_like(scores)), scores)
    if p.decay is not None:
        growth = jnp.power(p.decay.factor, jnp.maximum(new - p.decay.start, 0)) - 1
        grown = jnp.where(jnp.isfinite(scores), scores + jnp.abs(scores) * growth, scores)
        scores = jnp.where(p.stop, grown, scores)
    if p.suppressed is not None:
        scores = without(p.suppressed, scores)
    if p.suppressed_at_begin is not None:
        scores = without((new == 0) & p.suppressed_at_begin, scores)
    return scores


def _bias_of(
    biased: Biased, tokens: Int[Array, "B S"] | None, length: Int[Array, " B"], scores: Float[Array, "B V"]
) -> Float[Array, "B V"]:
    """What is added to each score: the biases of all sequences whose last token it would be."""
    B, n = length.shape[0], biased.ids.shape[1] - 1
    matches = jnp.ones((B, biased.ids.shape[0]), bool)
    if n:
        assert tokens is not None
        at = length[:, None] - n + jnp.arange(n)
        before = jnp.take_along_axis(tokens, jnp.maximum(at, 0), axis=1)
        before = jnp.where(at < 0, _NOTHING, before)
        prefix = biased.ids[:, :-1]
        matches = ((prefix == _ANY) | (before[:, None] == prefix)).all(axis=-1)
    added = jnp.where(matches, biased.bias, 0.0)
    return jnp.zeros_like(scores).at[:, biased.ids[:, -1]].add(added, mode="drop")


def _completes_ngram(
    tokens: Int[Array, "B S"], length: Int[Array, " B"], n: Int[Array, ""], vocab_size: int
) -> Bool[Array, "B V"]:
    """Which tokens would be the last of n tokens that have occurred before."""
    end = jnp.arange(tokens.shape[1])  # where an earlier occurrence ends

    def same_at(distance: Array, matches: Array) -> Array:
        last = jnp.take_along_axis(tokens, jnp.maximum(length - distance, 0)[:, None], axis=1)
        return matches & (jnp.roll(tokens, distance, axis=1) == last)

    inside = (end >= n - 1) & (end < length[:, None])
    matches = jax.lax.fori_loop(1, n, same_at, inside)
    banned = jnp.where(matches, tokens, vocab_size)
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], vocab_size), bool).at[rows, banned].set(True, mode="drop")


def _mask(ids: Iterable[int], vocab_size: int) -> Bool[Array, " V"]:
    known = [token for token in ids if token < vocab_size]
    return jnp.asarray(np.isin(np.arange(vocab_size), known))


def _biased(pairs: Sequence[tuple[Sequence[int], float]]) -> Biased | None:
    if not pairs:
        return None
    ids = np.full((len(pairs), max(len(sequence) for sequence, _ in pairs)), _ANY, np.int32)
    for line, (sequence, _) in zip(ids, pairs, strict=True):
        line[len(line) - len(sequence) :] = sequence
    return Biased(jnp.asarray(ids), jnp.asarray([bias for _, bias in pairs], jnp.float32))
