"""Scores of given texts, and what the evaluation harness may ask for; tests/test_harness.py runs the harness itself."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe import LoraConfig, Qwen3MoeForCausalLM
from jaxmoe.control.interventions import Intervention
from jaxmoe.data.chat import load_tokenizer
from jaxmoe.errors import UserError
from jaxmoe.evaluate.__main__ import main
from jaxmoe.evaluate.arguments import ModelArguments, sampling_of
from jaxmoe.evaluate.scoring import Request, padded_length, score
from jaxmoe.evaluate.stop_texts import AllStopped, StopTexts
from jaxmoe.generate.engine import Generator
from jaxmoe.generate.sampling import Sampling
from peers.configs import config_of, random_adapters, random_parameters, random_tokens
from tests.conftest import ROOT
from tests.tolerances import bound

CHECKPOINT = ROOT / "tests" / "checkpoints" / "qwen3-moe-stdlib"


def adapted():
    config = config_of("plain")
    lora = LoraConfig(r=4, targets=("q_proj", "experts.gate_up_proj"))
    weights = {path: jnp.asarray(array) for path, array in random_parameters(config).items()}
    adapters = {path: jnp.asarray(array) for path, array in random_adapters(config, lora).items()}
    return Qwen3MoeForCausalLM(config, weights, lora, adapters)


# name -> (the model, how close); in bfloat16 a sum depends on the shape of the batch
MODELS = {
    "adapters in float32": (adapted, {"rtol": bound("log_probabilities")}),
    "NF4 with bfloat16": (
        lambda: Qwen3MoeForCausalLM.from_pretrained(CHECKPOINT, None, "nf4"),
        {"rtol": 0, "atol": bound("log_probabilities_bf16")},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_the_model_s_logits(name):
    """Sequences of several lengths and batches, against the log-softmax of one sequence alone, in float64; experts are
    chosen with a bias."""
    make, close = MODELS[name]
    model = make()
    tokens = random_tokens(model.config, 1, 24)[0].tolist()
    shape = len(model.config.sparse_layers), model.config.num_experts
    bias = np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)
    control = Intervention(choice_bias=bias).control(model.config)
    logits = np.asarray(model(np.asarray([tokens]), routing_control=control).logits[0], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    greedy = int(logits[19].argmax())
    continuations = [[*tokens[:20], 5], [*tokens[:20], 7], [*tokens[:20], greedy], tokens, tokens[:9]]
    requests = [Request(tuple(each), scored) for each, scored in zip(continuations, (1, 6, 1, 23, 4), strict=True)]
    done = []
    found = score(Generator(model), requests, lambda length: 2, done.append, control)
    for (ids, scored), each in zip(requests, found, strict=True):
        at = np.arange(len(ids) - 1 - scored, len(ids) - 1)
        expected = log_p[at, np.asarray(ids)[at + 1]].sum()
        np.testing.assert_allclose(each.log_probability / scored, expected / scored, **close)
        assert each.is_greedy == bool((logits[at].argmax(1) == np.asarray(ids)[at + 1]).all())
    assert found[2].is_greedy and not found[0].is_greedy
    assert done == [4, 1]  # three requests differ in their last token only and share a row


def test_scoring_refuses_a_token_outside_the_vocabulary():
    with pytest.raises(UserError, match="99999"):
        score(Generator(adapted()), [Request((1, 99999), 1)], lambda length: 1)


def test_padded_lengths():
    assert [padded_length(n) for n in (1, 32, 33, 48, 49, 64, 65, 97, 2000)] == [32, 32, 48, 48, 64, 64, 96, 128, 2048]


def test_generation_ends_when_each_sequence_has_met_a_stop_text():
    tokenizer = load_tokenizer(CHECKPOINT)
    ids = lambda text: tokenizer(text)["input_ids"]
    stops = StopTexts(tokenizer, ["\nélan", "", "zzz"], [2047], 2)
    first, second = ids("a = 1\n\nélan vital"), [*ids("b = 2"), 2047]
    received = [(0, token) for token in first[:-1]] + [(1, token) for token in second[:-1]]
    for sequence, token in received:
        stops(sequence, token)
    with pytest.raises(AllStopped):
        stops(1, second[-1])
    text = tokenizer.decode(stops.outputs[0])
    assert "\nélan" in text and "vital" not in text
    assert stops.outputs[1] == second


def test_model_arguments():
    given = ModelArguments.of({"pretrained": "x", "batch_size": "auto", "device": "cuda:0", "adapter": None})
    assert (given.sequences_of(1024), given.sequences_of(64), given.sequences_of(40000)) == (16, 64, 1)
    assert ModelArguments.of({"pretrained": "x", "batch_size": "8"}).sequences_of(40000) == 8
    thinking = ModelArguments("x", enable_thinking=False, chat_template_args={"tools": []})
    assert thinking.template_arguments() == {"enable_thinking": False, "tools": []}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "pretrained=DIR"),
        ({"pretrained": "x", "parallelize": True}, "found parallelize"),
        ({"pretrained": "x", "dtype": 16}, "dtype: expected a text"),
        ({"pretrained": "x", "dequantize": "yes"}, "dequantize: expected true or false"),
        ({"pretrained": "x", "max_length": -1}, "max_length: expected a whole number"),
        ({"pretrained": "x", "batch_size": 0}, "batch_size: expected auto"),
        ({"pretrained": "x", "batch_size": "many"}, "batch_size: expected auto"),
    ],
)
def test_wrong_model_arguments(given, message):
    with pytest.raises(UserError, match=message):
        ModelArguments.of(given)


def test_generation_arguments():
    defaults = Sampling(temperature=0.7, top_k=20, repetition_penalty=1.1)
    assert sampling_of({}, defaults, 3) == Sampling(top_k=20, seed=3, repetition_penalty=1.1)
    drawn = sampling_of({"do_sample": True, "temperature": 0.5, "top_p": 0.9}, defaults, 0)
    assert drawn == Sampling(temperature=0.5, top_k=20, top_p=0.9, repetition_penalty=1.1)
    with pytest.raises(UserError, match="found num_beams"):
        sampling_of({"num_beams": 4}, defaults, 0)
    with pytest.raises(UserError, match="temperature: expected a number above 0"):
        sampling_of({"do_sample": True}, defaults, 0)


def test_the_command_without_the_harness(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lm_eval: not installed; pip install 'jaxmoe\[eval\]'"):
        main(["--tasks", "x"])
