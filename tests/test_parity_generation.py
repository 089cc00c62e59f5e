"""Greedy generation against transformers token by token, a batch against single prompts, with and without the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe.generate.engine
import jaxmoe.ops.cached_attention
from jaxmoe.config import LoraConfig, expand_targets
from jaxmoe.generate.engine import Generator
from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM
from peers.configs import CONFIGS, config_of, random_adapters, random_parameters
from peers.reference import Reference
from tests.parity import Batch, product

NEW_TOKENS = 24
# One cache shape for all: lengths that end within a bucket and at its edge, and one beyond a sliding window.
LENGTHS = (5, 1, 32, 17)
NAMES = ("plain", "top_8_of_32", "sparse_step_2", "rope_yarn_v4", "sliding_window")


def prompts_of(name: str) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(1, config_of(name).vocab_size, length).tolist() for length in LENGTHS]


@functools.cache
def generator(name: str) -> Generator:
    params = {path: jnp.asarray(array) for path, array in random_parameters(config_of(name)).items()}
    return Generator(Qwen3MoeForCausalLM(config_of(name), params))


@functools.cache
def expected(name: str) -> list[list[int]]:
    return Reference(CONFIGS[name], random_parameters(config_of(name))).generate(prompts_of(name), NEW_TOKENS)


def check(name: str) -> None:
    """The parity that this module asserts, negative controls included."""
    found = generator(name).generate(prompts_of(name), NEW_TOKENS)
    assert found == expected(name)
    # A model that repeats one token would agree trivially.
    assert len({token for row in found for token in row}) > 10


@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_transformers(name: str) -> None:
    check(name)


def test_greedy_with_adapters_equals_peft() -> None:
    config = config_of("plain")
    lora = LoraConfig(r=3, alpha=5.0, targets=expand_targets(["attention", "router", "experts"]))
    params, adapters = random_parameters(config), random_adapters(config, lora)
    reference = Reference(CONFIGS["plain"], params, lora=lora, adapters=adapters)
    ours, theirs = ({path: jnp.asarray(a) for path, a in part.items()} for part in (params, adapters))
    found = Generator(Qwen3MoeForCausalLM(config, ours, lora, theirs)).generate(prompts_of("plain"), NEW_TOKENS)
    assert found == reference.generate(prompts_of("plain"), NEW_TOKENS)
    assert found != expected("plain")


def test_a_batch_equals_its_prompts_alone() -> None:
    name = "sliding_window"
    together = generator(name).generate(prompts_of(name), NEW_TOKENS)
    alone = [generator(name).generate([prompt], NEW_TOKENS)[0] for prompt in prompts_of(name)]
    assert together == alone


@pytest.mark.parametrize("name", ["plain", "sparse_step_2", "sliding_window"])
def test_the_cache_equals_no_cache(name: str) -> None:
    """Each token is the most probable one after all tokens before it, which run at once without a cache."""
    config = config_of(name)
    for prompt, continuation in zip(
        prompts_of(name), generator(name).generate(prompts_of(name), NEW_TOKENS), strict=True
    ):
        ids = np.zeros((1, max(LENGTHS) + NEW_TOKENS), np.int32)
        length = len(prompt) + NEW_TOKENS
        ids[0, :length] = prompt + continuation
        positions = np.arange(ids.shape[1], dtype=np.int32)[None]
        batch = Batch(ids, positions, (positions < length).astype(np.int32))
        logits = product(config, random_parameters(config), batch).logits[0]
        assert logits[len(prompt) - 1 : length - 1].argmax(-1).tolist() == continuation


def test_a_stop_token_ends_its_row_alone() -> None:
    full = generator("plain").generate(prompts_of("plain"), NEW_TOKENS)
    stop = full[0][3]
    stopped = generator("plain").generate(prompts_of("plain"), NEW_TOKENS, stop_tokens=(stop,))
    assert stopped == [row[: row.index(stop) + 1] if stop in row else row for row in full]
    assert len(stopped[0]) <= 4 < max(map(len, stopped))
    reference = Reference(CONFIGS["plain"], random_parameters(config_of("plain")))
    assert stopped == reference.generate(prompts_of("plain"), NEW_TOKENS, stop)


def shift_positions(patch: pytest.MonkeyPatch) -> None:
    """Keys of the prompt as they are, keys of generated tokens one position late."""
    forward = jaxmoe.generate.engine.forward_cached

    def late(params, adapters, new, cache, **options):
        late_start = new.start + 1 if new.input_ids.shape[1] == 1 else new.start
        return forward(params, adapters, new._replace(start=late_start), cache, **options)

    patch.setattr(jaxmoe.generate.engine, "forward_cached", late)


def read_a_stale_cache(patch: pytest.MonkeyPatch) -> None:
    forward = jaxmoe.generate.engine.forward_cached

    def stale(params, adapters, new, cache, **options):
        hidden, written, routing = forward(params, adapters, new, cache, **options)
        return hidden, cache if new.input_ids.shape[1] == 1 else written, routing

    patch.setattr(jaxmoe.generate.engine, "forward_cached", stale)


def forget_the_window(patch: pytest.MonkeyPatch) -> None:
    mask = jaxmoe.ops.cached_attention.attention_mask
    patch.setattr(jaxmoe.ops.cached_attention, "attention_mask", lambda q, k, qs, ks, window: mask(q, k, qs, ks, None))


@pytest.fixture
def recompile() -> Iterator[Callable[[], None]]:
    """Drops the compiled prefill and decode functions when called, and again when the test has ended."""

    def drop() -> None:
        for compiled in (jaxmoe.generate.engine._prefill, jaxmoe.generate.engine._decode):
            compiled.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]

    yield drop
    drop()


@pytest.mark.parametrize(
    ("fault", "name"),
    [(shift_positions, "plain"), (read_a_stale_cache, "plain"), (forget_the_window, "sliding_window")],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_planted_fault_is_found(
    fault: Callable[[pytest.MonkeyPatch], None],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    recompile: Callable[[], None],
) -> None:
    check(name)
    fault(monkeypatch)
    recompile()
    with pytest.raises(AssertionError):
        check(name)
