"""The measures of the routing of a probe, on the device, against plain loops in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import LoraConfig
from jaxmoe.data.packing import Document, Sequences
from jaxmoe.model.decoder import forward
from jaxmoe.model.interface import Options, Tokens
from jaxmoe.routing.metrics import jensen_shannon
from jaxmoe.train.step import ProbeRouting
from jaxmoe.train.watch import (
    CHANGED,
    DEAD,
    DIVERGENCE,
    LOAD_CV,
    compared,
    divergence,
    even_batches,
    of_base,
    shortened,
    watch_in_words,
    watched,
)
from peers.configs import random_parameters, random_tokens
from peers.make_checkpoint import TINY
from tests.test_train import CONFIG, adapted, random_batch
from tests.tolerances import bound

LAYERS, SEQUENCES, LENGTH, EXPERTS, CHOSEN = 2, 3, 5, 6, 2


def routing(seed: int) -> ProbeRouting:
    logits = np.random.default_rng(seed).normal(size=(LAYERS, SEQUENCES, LENGTH, EXPERTS)).astype(np.float32)
    logits[..., -1] -= 100  # an expert that no token uses
    return ProbeRouting(logits, np.argsort(-logits, axis=-1)[..., :CHOSEN].astype(np.uint8))


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()


def plainly(now: ProbeRouting, base: ProbeRouting, valid: np.ndarray) -> dict[str, list[float]]:
    """The four measures, token by token, as their definitions say."""
    found: dict[str, list[float]] = {name: [] for name in (CHANGED, DIVERGENCE, LOAD_CV, DEAD)}
    tokens = [(line, place) for line in range(SEQUENCES) for place in range(LENGTH) if valid[line, place]]
    for layer in range(LAYERS):
        changed, total, load = 0, 0.0, [0] * EXPERTS
        for line, place in tokens:
            at = layer, line, place
            changed += {*now.experts[at].tolist()} != {*base.experts[at].tolist()}
            p, q = softmax(np.asarray(now.logits[at])), softmax(np.asarray(base.logits[at]))
            m = (p + q) / 2
            total += sum(p * np.log(p / m)) / 2 + sum(q * np.log(q / m)) / 2
            for expert in now.experts[at].tolist():
                load[expert] += 1
        mean = sum(load) / EXPERTS
        found[CHANGED].append(changed / len(tokens))
        found[DIVERGENCE].append(total / len(tokens))
        found[LOAD_CV].append((sum((each - mean) ** 2 for each in load) / EXPERTS) ** 0.5 / mean)
        found[DEAD].append(load.count(0))
    return found


def inputs() -> tuple[ProbeRouting, ProbeRouting, np.ndarray]:
    now, base = routing(0), routing(1)
    now.experts[:, 0], now.logits[:, 0] = base.experts[:, 0, :, ::-1], base.logits[:, 0]  # another order, the same set
    valid = np.ones((SEQUENCES, LENGTH), bool)
    valid[1, 3:] = False
    return now, base, valid


def check(now: ProbeRouting, base: ProbeRouting, valid: Any) -> None:
    expected = plainly(*inputs())
    found = watched(*jax.device_get(jax.jit(compared)(*jax.tree.map(jnp.asarray, (now, base, valid)))))
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=bound("watch_fp32"))
    assert min(expected[CHANGED]) > 0 and max(expected[CHANGED]) < 1 and min(expected[DEAD]) >= 1
    assert f"{np.mean(expected[CHANGED]):.1%} of the probe's tokens" in watch_in_words(found)


def test_the_measures_are_those_of_plain_loops() -> None:
    check(*inputs())


@pytest.mark.parametrize("fault", ["padding counts", "experts in order", "base and model alike"])
def test_other_measures_are_noticed(fault: str) -> None:
    now, base, valid = inputs()
    if fault == "padding counts":
        valid[:] = True
    elif fault == "experts in order":  # not as sets
        now, base = (routing._replace(experts=routing.experts * [1, 2]) for routing in (now, base))
    else:
        base = now
    with pytest.raises(AssertionError):
        check(now, base, valid)


def test_small_divergences_keep_their_digits() -> None:
    """They grow with the square of the difference of the logits, down to what float32 logits can tell apart."""
    logits = jnp.asarray(routing(0).logits[0, 0, :, :-1])
    compiled = jax.jit(divergence)  # as in a run, with all of XLA's optimisations
    assert float(jnp.max(compiled(logits, logits))) == 0
    step = 2.0**-10 * jnp.asarray([1, -1, 1, 0, 1])
    for token in range(LENGTH):
        p, q = softmax(np.asarray(logits[token] + step)), softmax(np.asarray(logits[token]))
        m = (p + q) / 2
        expected = (sum(p * np.log(p / m)) + sum(q * np.log(q / m))) / 2
        found = float(compiled(logits + step, logits)[token])
        assert 0 < expected < step[0] ** 2 and found == pytest.approx(expected, rel=bound("small_divergence_fp32"))


def rows_softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def test_the_divergence_of_many_tokens_in_a_compiled_program() -> None:
    """XLA for CPUs may vectorise it there; the measure of captures says the same in float64."""
    rng = np.random.default_rng(0)
    base = (3 * rng.normal(size=(6, 4, 128, 32))).astype(np.float32)
    logits = base + (0.1 * rng.normal(size=base.shape)).astype(np.float32)
    expected = jensen_shannon(*map(rows_softmax, (logits, base)))
    np.testing.assert_allclose(jax.jit(divergence)(logits, base), expected, rtol=bound("compiled_divergence_fp32"))


def test_the_divergence_where_float32_cannot_hold_a_probability() -> None:
    rng = np.random.default_rng(1)
    logits, base = (rng.choice([-500.0, -90.0, -75.0, 0.0], (64, 3)).astype(np.float32) for _ in range(2))
    expected = jensen_shannon(*map(rows_softmax, (logits, base)))
    zero = bound("vanishing_divergence")
    assert expected.min() < zero and expected.max() > 0.6
    found = jax.jit(divergence)(logits, base)
    np.testing.assert_allclose(found, expected, rtol=bound("compiled_divergence_fp32"), atol=zero)


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("most", [4, 8, 64])
def test_as_few_batches_and_empty_sequences_as_possible(most: int, multiple: int) -> None:
    for sequences in range(1, 40):
        size = even_batches(sequences, most, multiple)
        batches = -(-sequences // size)
        assert size <= most and size % multiple == 0 and batches == -(-sequences // most)
        assert batches * (size - multiple) < sequences  # a smaller size would not hold all of them


@pytest.mark.parametrize(
    ("documents", "multiple", "length"),
    [
        ([512] * 6, 2, 512),  # one document per sequence
        ([300] * 6, 2, 1024),  # one in each of 512 would leave more places empty
        ([2048, 100], 2, 2048),
        ([60] * 9, 2, 128),  # whole tiles
        ([512] * 6, 3, 2048),
        ([512] * 6, 2 * 8, 512),
    ],
)
def test_the_probe_lies_in_the_sequences_that_take_least_time(documents: list[int], multiple: int, length: int) -> None:
    ids = lambda n: np.zeros(n, np.int32)
    made = [Document(ids(n), ids(n), np.ones(n, np.float32)) for n in documents]
    found = shortened(Sequences(made, 2048), multiple)
    assert found.seq_length == length
    assert sorted(index for sequence in found.epoch(0) for index in sequence) == [*range(len(documents))]


@pytest.mark.parametrize("dense", [(), (1,), (0, 3)], ids=["all sparse", "one dense", "the last one dense"])
def test_a_pass_that_ends_at_the_last_router_has_the_same_routing(dense: tuple[int, ...]) -> None:
    """Bit by bit, in every MoE layer."""
    config = TINY.replace(num_hidden_layers=4, mlp_only_layers=dense)
    params = {path: jnp.asarray(array) for path, array in random_parameters(config).items()}
    ids = jnp.asarray(random_tokens(config, 2, 24))
    tokens = Tokens(ids, jnp.broadcast_to(jnp.arange(24), ids.shape), jnp.ones_like(ids))

    @partial(jax.jit, static_argnames="ends")
    def run(params: Any, ends: bool) -> ProbeRouting:
        options = Options(router_logits=True, keep_logits=1, packed=False, until_last_router=ends)
        out = forward(params, {}, tokens, config=config, options=options)
        assert out.router_logits is not None and out.routing is not None
        return ProbeRouting(out.router_logits, out.routing.experts)

    whole, ends = run(params, False), run(params, True)
    for expected, found in zip(whole, ends, strict=True):
        assert expected.shape[0] == 4 - len(dense) and np.array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_without_an_effect_route_as_the_base(dtype: str) -> None:
    """Bit by bit as fresh adapters do, so the first measurement of a run finds no change, in 16 bits too."""
    lora = LoraConfig(r=2, targets=("q_proj", "experts.gate_up_proj"))
    model, frozen, trained = adapted(CONFIG, lora)
    frozen = {path: array.astype(dtype) for path, array in frozen.items()}
    full = replace(lora, modules_to_save=("embed_tokens",), full_router=True)
    held = {path: frozen[path].astype("float32") for path in full.saved_paths}
    model = model._replace(dtype=dtype, lora=full)
    batch = jax.tree.map(jnp.asarray, random_batch(CONFIG, 2, 24))
    routed = lambda arrays: jax.device_get(jax.jit(model.routing)(frozen, arrays, batch))

    fresh = {path: jnp.zeros_like(array) if path.endswith("lora_B") else array for path, array in trained.items()}
    trained |= {path: 1.5 * array for path, array in held.items()}
    expected = routed(fresh | held)
    assert all(map(np.array_equal, routed(of_base(model, frozen, trained)), expected))
    assert not np.array_equal(routed(trained).experts, expected.experts)
    alone = jax.jit(model._replace(lora=None).routing)({}, frozen, batch)
    assert dtype == "bfloat16" or np.array_equal(alone.experts, expected.experts)
