"""Every change to the scores of the next token against transformers: one step, greedy text, and many draws."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.stats import chi2
from transformers import GenerationConfig

from jaxmoe.errors import UserError
from jaxmoe.generate.engine import Generator
from jaxmoe.generate.processors import History, Processors, process
from jaxmoe.generate.sampling import Sampling, SamplingArrays, ranked_logits, sample
from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM
from peers.configs import CONFIGS, config_of, random_parameters
from peers.reference import Reference
from tests.tolerances import bound

pytestmark = pytest.mark.usefixtures("quick_compilation")

VOCAB = CONFIGS["plain"]["vocab_size"]
STOP = (7, 9)
LAST = 6  # tokens of a continuation in the tests of one step
NEW_TOKENS = 24


@functools.cache
def reference() -> Reference:
    return Reference(CONFIGS["plain"], random_parameters(config_of("plain")))


@pytest.fixture(scope="module")
def generator(quick_compilation: None) -> Generator:
    params = {path: jnp.asarray(array) for path, array in random_parameters(config_of("plain")).items()}
    return Generator(Qwen3MoeForCausalLM(config_of("plain"), params))


def in_transformers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings as transformers takes them: lists, not tuples."""
    as_lists = lambda value: [as_lists(item) for item in value] if isinstance(value, tuple) else value
    found = {name: as_lists(value) for name, value in settings.items()}
    if "exponential_decay_length_penalty" in found:
        found["exponential_decay_length_penalty"] = settings["exponential_decay_length_penalty"]
    return found


def their_scores(settings: Mapping[str, Any], text: list[int], prompt: int, logits: np.ndarray) -> np.ndarray:
    """The scores [V] that transformers makes of `logits` [V] after `text`, whose first `prompt` tokens were given."""
    config = GenerationConfig(**in_transformers(settings), max_length=prompt + LAST)
    config._eos_token_tensor = torch.tensor(STOP)
    ids = torch.tensor([text])
    processors = reference().model._get_logits_processor(
        config,
        input_ids_seq_length=prompt,
        encoder_input_ids=ids[:, :prompt],
        model_kwargs={"attention_mask": torch.ones(1, prompt)},
        device="cpu",
    )
    scores = processors(ids, torch.from_numpy(logits)[None])[0].numpy()
    # An excluded stop token whose score is to grow: -inf + inf in transformers 5.17, still -inf in 5.23 and here.
    scores[list(STOP)] = np.where(np.isnan(scores[list(STOP)]), -np.inf, scores[list(STOP)])
    return scores


def our_scores(settings: Mapping[str, Any], texts: list[list[int]], new: int, logits: np.ndarray) -> np.ndarray:
    """The scores [B, V] of one batch of texts of different lengths, `new` tokens of each generated."""
    sampling = Sampling(**settings)
    processors = Processors.of(sampling, STOP, VOCAB, LAST)
    scores = jnp.asarray(logits)
    if processors is not None:
        prompts = [len(text) - new for text in texts]
        ids = np.zeros((len(texts), max(prompts)), np.int32)
        for row, text, n in zip(ids, texts, prompts, strict=True):
            row[:n] = text[:n]
        history = History.of(processors, jnp.asarray(ids), jnp.asarray(prompts), 64, VOCAB)
        for step in range(new):
            token = jnp.asarray([text[n + step] for text, n in zip(texts, prompts, strict=True)])
            history = history and history.with_token(token, jnp.asarray(prompts) + step)
        scores = process(scores, processors, history, jnp.asarray(prompts) + new, jnp.uint32(new))
    if sampling.greedy:
        return np.asarray(scores)
    ranked, order = ranked_logits(scores, SamplingArrays.of(sampling))
    return np.take_along_axis(np.asarray(ranked), np.argsort(np.asarray(order), axis=-1), axis=-1)


SCORES: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "a reward for repetition": {"repetition_penalty": 0.6},
    "no_repeat_ngram_size 1": {"no_repeat_ngram_size": 1},
    "no_repeat_ngram_size 2": {"no_repeat_ngram_size": 2},
    "no_repeat_ngram_size 3": {"no_repeat_ngram_size": 3},
    "sequence_bias": {"sequence_bias": (((5,), -3.0), ((11, 12), 4.0), ((1, 3, 4, 5, 6, 7), 9.0))},
    "bad_words_ids": {"bad_words_ids": ((30,), (7,), (12, 20), (11, 12, 21), (3, 12, 22))},
    "min_length": {"min_length": 9},
    "min_new_tokens": {"min_new_tokens": 3},
    "forced_eos_token_id": {"forced_eos_token_id": (7, 31)},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 1.3)},
    "suppress_tokens": {"suppress_tokens": (1, 50, 96)},
    "begin_suppress_tokens": {"begin_suppress_tokens": (2, 51)},
    "all, in their order": {
        "sequence_bias": (((11, 12), 4.0), ((13,), -2.0)),
        "repetition_penalty": 1.7,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": ((12, 20), (40,)),
        "min_length": 8,
        "exponential_decay_length_penalty": (0, 1.2),
        "suppress_tokens": (1, 50),
        "begin_suppress_tokens": (2,),
    },
}
DRAWS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top_h": {"top_h": 0.5},
    "top_k": {"top_k": 9},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "typical_p": {"typical_p": 0.6},
    "epsilon_cutoff": {"epsilon_cutoff": 0.02},
    "eta_cutoff": {"eta_cutoff": 0.05},
    "all, in their order": {
        "repetition_penalty": 1.4,
        "temperature": 1.6,
        "top_h": 0.95,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "typical_p": 0.9,
        "epsilon_cutoff": 0.01,
        "eta_cutoff": 0.012,
    },
}
# 12 follows 11 twice, and once 3; the texts differ in length, and no prompt holds the padding's id 0
TEXTS = [[3, 12, 40, 11, 12, 20, 11, 12], [1, 11, 12], [5, 3, 12, 22, 5, 1, 2, 11, 12, 21, 3, 12]]


@functools.cache
def logits_of_a_step() -> np.ndarray:
    """Logits [3, V] of which some are negative, with a few clear favourites."""
    return (3 * np.random.default_rng(0).standard_normal((3, VOCAB))).astype(np.float32)


def check_scores(settings: Mapping[str, Any], new: int, ours: Mapping[str, Any] | None = None) -> None:
    logits = logits_of_a_step()
    sampled = {"do_sample": True} if "temperature" in settings else {}
    theirs = np.stack(
        [
            their_scores({"top_k": 0, **settings, **sampled}, text, len(text) - new, row)
            for text, row in zip(TEXTS, logits, strict=True)
        ]
    )
    found = our_scores(settings if ours is None else ours, TEXTS, new, logits)
    assert (np.isneginf(found) == np.isneginf(theirs)).all()
    np.testing.assert_allclose(found, theirs, rtol=bound("processed_scores"), atol=bound("processed_scores"))


@pytest.mark.parametrize("new", [0, 2])
@pytest.mark.parametrize("name", SCORES)
def test_scores_equal_transformers(name: str, new: int) -> None:
    check_scores(SCORES[name], new)


def test_the_last_token_is_forced() -> None:
    texts = [text + [60, 61, 62] for text in TEXTS]
    settings = SCORES["forced_eos_token_id"]
    found = our_scores(settings, texts, LAST - 1, logits_of_a_step())
    for row, text in zip(found, texts, strict=True):
        expected = their_scores(settings, text, len(text) - LAST + 1, logits_of_a_step()[0])
        assert row.tolist() == expected.tolist()
        assert np.isfinite(row).sum() == 2


@pytest.mark.parametrize("name", DRAWS)
def test_restricted_scores_equal_transformers(name: str) -> None:
    settings: dict[str, Any] = {"temperature": 1.0} | DRAWS[name]
    check_scores(settings, 0)
    if name != "temperature":
        assert np.isneginf(our_scores(settings, TEXTS, 0, logits_of_a_step())).any()


@pytest.mark.parametrize(
    ("settings", "ours"),
    [
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.6}),
        ({"repetition_penalty": 1.7}, {}),
        ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 3}),
        ({"sequence_bias": (((11, 12), 4.0),)}, {"sequence_bias": (((12, 12), 4.0),)}),
        ({"temperature": 1.0, "min_p": 0.2}, {"temperature": 1.0, "min_p": 0.3}),
        ({"temperature": 1.0, "typical_p": 0.6}, {"temperature": 1.0, "top_p": 0.6}),
    ],
)
def test_other_scores_are_noticed(settings: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    with pytest.raises(AssertionError):
        check_scores(settings, 0, ours)


def test_padding_is_not_part_of_the_history() -> None:
    processors = Processors.of(Sampling(repetition_penalty=2.0, no_repeat_ngram_size=2), (), 10, 4)
    history = History.of(processors, jnp.asarray([[3, 4, 3], [5, 0, 0]]), jnp.asarray([3, 1]), 8, 10)
    assert history is not None and history.seen is not None and history.tokens is not None
    assert [np.flatnonzero(row).tolist() for row in history.seen] == [[3, 4], [5]]
    later = history.with_token(jnp.asarray([6, 1]), jnp.asarray([3, 1]))
    assert later.seen is not None and later.tokens is not None
    assert [np.flatnonzero(row).tolist() for row in later.seen] == [[3, 4, 6], [1, 5]]
    assert later.tokens.tolist() == [[3, 4, 3, 6, 0, 0, 0, 0], [5, 1, 0, 0, 0, 0, 0, 0]]


def test_nothing_is_added_to_the_program_unless_it_is_used() -> None:
    assert Processors.of(Sampling(temperature=0.6, top_k=20, top_p=0.95, min_p=0.1), STOP, VOCAB, 8) is None
    assert len(jax.tree.leaves(SamplingArrays.of(Sampling(temperature=0.6, top_k=20, top_p=0.95)))) == 4
    without_history = Processors.of(Sampling(min_new_tokens=3), STOP, VOCAB, 8)
    assert without_history is not None
    assert History.of(without_history, jnp.ones((1, 2), int), jnp.asarray([2]), 8, VOCAB) is None


PROMPTS = [[5, 6, 7, 5, 6], [11], list(range(20, 52)), [13, 60, 61] * 5 + [13, 60]]
GREEDY: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "biases": {"sequence_bias": (((5,), 2.5), ((61, 13), -9.0)), "bad_words_ids": ((60,), (61, 13), (5, 5))},
    "length": {"min_new_tokens": 5, "exponential_decay_length_penalty": (8, 1.1), "forced_eos_token_id": (9,)},
    "suppressed": {"suppress_tokens": tuple(range(30)), "begin_suppress_tokens": tuple(range(60, 97))},
}


@functools.cache
def continuations(name: str | None, stop: int | None = None) -> list[list[int]]:
    """What transformers writes after each prompt alone."""
    settings = in_transformers(GREEDY[name]) if name else {}
    return [reference().generate([prompt], NEW_TOKENS, stop, **settings)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_text_equals_transformers(name: str, generator: Generator) -> None:
    """A batch of prompts of different lengths writes what transformers writes after each alone."""
    stop = continuations(None)[0][2] if name == "length" else None
    found = generator.generate(PROMPTS, NEW_TOKENS, Sampling(**GREEDY[name]), () if stop is None else (stop,))
    assert found == continuations(name, stop)
    assert found != continuations(None, stop)


def p_value(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    """Of the hypothesis that `tokens` were drawn from `probabilities` [V]; 0 if one of them is impossible."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    if counts[probabilities == 0].any():
        return 0.0
    expected = len(tokens) * probabilities.astype(np.float64)
    common = expected >= 5  # chi-square's rule of thumb; rare tokens are counted together
    observed, wanted = [*counts[common], counts[~common].sum()], [*expected[common], expected[~common].sum()]
    terms = [(o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True) if w]
    return float(chi2.sf(sum(terms), len(terms) - 1))


def probabilities_of(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores.astype(np.float64) - scores.max())
    return weights / weights.sum()


@pytest.mark.parametrize("name", DRAWS)
def test_draws_follow_the_distribution_of_transformers(name: str) -> None:
    settings: dict[str, Any] = {"temperature": 1.0} | DRAWS[name]
    row = logits_of_a_step()[0]
    scores = their_scores({"top_k": 0, "do_sample": True, **settings}, TEXTS[0], len(TEXTS[0]), row)
    changed = our_scores({k: v for k, v in settings.items() if k == "repetition_penalty"}, TEXTS, 0, logits_of_a_step())
    many = jnp.broadcast_to(changed[0], (4096, VOCAB))
    tokens = np.asarray(
        sample(many, jax.random.split(jax.random.key(1), 4096), SamplingArrays.of(Sampling(**settings)))
    )
    assert p_value(tokens, probabilities_of(scores)) > bound("p_value_of_draws")
    assert p_value(tokens, probabilities_of(row)) < bound("p_value_of_draws"), "the test can fail"


def test_text_follows_the_distribution_of_transformers(generator: Generator) -> None:
    """The whole path: one prompt in every sequence of a batch, the first token of each, over several seeds."""
    prompt = PROMPTS[2]
    settings: dict[str, Any] = {"temperature": 1.5, "top_k": 30, "min_p": 0.3, "repetition_penalty": 4.0}
    draw = lambda seed: generator.generate([prompt] * 512, 1, Sampling(**settings, seed=seed))
    tokens = np.asarray([draw(seed) for seed in range(4)]).reshape(-1)
    logits = reference().forward(np.asarray([prompt])).logits[0, -1]
    expected = lambda **changes: probabilities_of(
        their_scores({**settings, **changes, "do_sample": True}, prompt, len(prompt), logits)
    )
    assert p_value(tokens, expected()) > bound("p_value_of_draws")
    for changes in ({"repetition_penalty": 1.0}, {"min_p": 0.0}, {"temperature": 1.2}):
        assert p_value(tokens, expected(**changes)) < bound("p_value_of_draws"), changes


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"epsilon_cutoff": 1},
        {"no_repeat_ngram_size": -1},
        {"suppress_tokens": (-1,)},
        {"suppress_tokens": (2**31,)},
        {"bad_words_ids": ((),)},
        {"sequence_bias": (((1,), float("nan")),)},
        {"exponential_decay_length_penalty": (1, 0)},
    ],
    ids=str,
)
def test_settings_out_of_range(settings: Mapping[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(settings))}: expected .*, found"):
        Sampling(**settings)


def test_huge_numbers_and_tiny_temperatures_have_no_effect() -> None:
    assert SamplingArrays.of(Sampling(1.0, top_k=10**30)).top_k == 2**31 - 1
    assert Sampling(1e-30).greedy and not Sampling(0.01).greedy
