"""Sampling, streaming, and the command; tests/test_parity_generation.py compares greedy text with transformers."""

from __future__ import annotations

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe import Qwen3MoeForCausalLM
from jaxmoe.data.chat import load_tokenizer
from jaxmoe.errors import UserError
from jaxmoe.generate import engine
from jaxmoe.generate.__main__ import main
from jaxmoe.generate.engine import Generator
from jaxmoe.generate.sampling import Sampling, SamplingArrays, sample
from jaxmoe.generate.stream import TextStream
from tests.conftest import ROOT
from tests.tolerances import bound

CHECKPOINT = ROOT / "tests" / "checkpoints" / "qwen3-moe-stdlib"
PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.25, 0.2])


def drawn(temperature=1.0, top_k=0, top_p=1.0, draws=4000):
    """Share of each token among many draws from `PROBABILITIES`."""
    logits = jnp.broadcast_to(jnp.log(PROBABILITIES).astype(jnp.float32), (draws, 5))
    arrays = SamplingArrays.of(Sampling(temperature, top_k, top_p))
    tokens = sample(logits, jax.random.split(jax.random.key(0), draws), arrays)
    return np.bincount(tokens, minlength=5) / draws


def expected(kept, temperature=1.0):
    weights = np.where(np.isin(np.arange(5), kept), PROBABILITIES ** (1 / temperature), 0)
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("options", "kept", "temperature"),
    [
        ({}, range(5), 1.0),
        ({"temperature": 0.5}, range(5), 0.5),
        ({"top_k": 2}, [1, 3], 1.0),
        ({"top_k": 1}, [1], 1.0),
        ({"top_p": 0.6}, [1, 3], 1.0),  # 0.4 < 0.6 <= 0.65
        ({"top_p": 0.3}, [1], 1.0),  # the first token stays although its probability alone exceeds top_p
        ({"top_p": 0.0}, [1], 1.0),
        ({"top_k": 3, "top_p": 0.5}, [1, 3], 1.0),  # top_p applies to the probabilities after top-k: 0.4 / 0.85 < 0.5
        ({"temperature": 2.0, "top_k": 3}, [1, 3, 4], 2.0),
    ],
)
def test_draws_follow_the_distribution(options, kept, temperature):
    # Three standard deviations of a share drawn 4,000 times are at most 0.024.
    np.testing.assert_allclose(drawn(**options), expected(kept, temperature), rtol=0, atol=bound("sampled_shares"))


def test_the_distribution_test_can_fail():
    assert abs(drawn(temperature=0.5) - expected(range(5), 1.0)).max() > 0.05


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_k": -1}, {"top_p": -0.1}, {"top_p": 1.5}])
def test_options_out_of_range(options):
    with pytest.raises(UserError, match="expected"):
        Sampling(**options)


@pytest.fixture(scope="module")
def generator():
    return Generator(Qwen3MoeForCausalLM.from_pretrained(CHECKPOINT, dtype="float32"))


def test_seed_decides(generator):
    prompts = [[5, 6, 7], [300, 301]]
    run = lambda seed: generator.generate(prompts, 12, Sampling(temperature=1.0, seed=seed))
    assert run(1) == run(1)
    assert run(1) != run(2)
    assert generator.generate(prompts[:1], 12, Sampling(temperature=1.0, seed=1)) == run(1)[:1]


def test_on_token_sees_what_is_returned(generator):
    seen = [[], []]
    out = generator.generate([[5, 6, 7], [8]], 6, on_token=lambda row, token: seen[row].append(token))
    assert seen == out and [len(row) for row in out] == [6, 6]


class _Whole(engine._Pace):
    def tokens(self, left: int) -> int:
        return min(left, 64)


def _step_by_step(weights, state, choice, stop, control, most, *, program):
    """As `engine._decode`, but one program for each token, and the loop in Python."""
    step = jax.jit(engine._decode_step, static_argnames="program")
    tokens, routings = [], []
    while len(tokens) < most and bool(state.running.any()):
        state, routing = step(weights, state, choice, stop, control, program=program)
        tokens.append(state.step.token)
        routings.append(routing)
    routing = jax.tree.map(lambda *each: jnp.stack(each), *routings)
    return state, engine.Generated(jnp.stack(tokens), jnp.int32(len(tokens)), routing)


def test_a_loop_on_the_device_changes_no_bit(generator, monkeypatch):
    """All tokens in one call against one call for each: tokens, their order, and the routing's logits."""

    def run(stop):
        log, seen = engine.RoutingLog(keep_logits=2), []
        sampling = Sampling(temperature=1.0, seed=3, repetition_penalty=1.1)
        out = generator.generate([[5, 6, 7], [8]], 12, sampling, stop, lambda *each: seen.append(each), routing=log)
        return out, seen, jax.device_get(log.steps)

    monkeypatch.setattr(engine, "_Pace", _Whole)
    (short, long), *_ = run(())
    stop = short[5], next(token for token in long[8:] if token not in long[:8])
    together = run(stop)
    monkeypatch.setattr(engine, "_decode", _step_by_step)
    apart = run(stop)
    jax.tree.map(np.testing.assert_array_equal, together, apart)
    out, seen, steps = together
    assert len(steps) == max(map(len, out)) <= 12  # the loop ends with the last sequence
    assert seen == [(row, out[row][at]) for at in range(12) for row in (0, 1) if at < len(out[row])]


def test_pace():
    pace = engine._Pace()
    asked = []
    for seconds in (30.0, 0.01, 0.04, 0.04, 0.16, 2.0, 4.0):  # the first call compiles; later the device slows down
        asked.append(pace.tokens(left=100))
        pace.took(seconds, asked[-1])
    assert asked == [1, 1, 4, 10, 25, 15, 1]
    assert pace.tokens(left=0) == 0


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [([], 4, "at least one"), ([[1], []], 4, "prompt 1"), ([[99999]], 4, "99999"), ([[1]], 0, "max-new-tokens")],
)
def test_bad_prompts(generator, prompts, count, message):
    with pytest.raises(UserError, match=message):
        generator.generate(prompts, count)


def test_stream_never_writes_half_a_character():
    tokenizer = load_tokenizer(CHECKPOINT)
    text = "naïve – 你好, done"
    pieces = []
    stream = TextStream(tokenizer, pieces.append)
    for token in tokenizer(text)["input_ids"]:
        stream.put(token)
    stream.end()
    assert "".join(pieces) == text
    assert len(pieces) > 5 and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_command_streams_one_prompt_and_lists_several(capsys):
    def run(*prompts):
        words = [word for prompt in prompts for word in ("--prompt", prompt)]
        main(["--model", str(CHECKPOINT), "--max-new-tokens", "8", "--dtype", "float32", *words])
        return capsys.readouterr().out

    alone = run("import os")
    assert alone.strip()
    both = run("import os", "class A:")
    assert both.startswith("--- import os\n" + alone.rstrip("\n")) and "--- class A:\n" in both


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere", "--prompt", "x"], "nowhere"),
        (["--model", str(CHECKPOINT), "--prompt", ""], "prompt 0"),
        (["--model", str(CHECKPOINT), "--prompt", "x", "--adapter", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(run_module, arguments, message):
    done = run_module("jaxmoe.generate", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_chat_needs_a_template(run_module, tmp_path: pathlib.Path):
    copy = tmp_path / "model"
    shutil.copytree(CHECKPOINT, copy)
    (copy / "chat_template.jinja").unlink()
    done = run_module("jaxmoe.generate", "--model", copy, "--chat", "--prompt", "x")
    assert done.returncode == 2 and "chat template" in done.stderr and done.stderr.count("\n") == 1
