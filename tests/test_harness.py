# The harness is an optional extra, and its decorators hide signatures.
# pyright: reportMissingImports=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportTypedDictNotRequiredAccess=false
"""The evaluation harness with this project's model beside its own `hf`, on the tasks in examples/evaluate."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from jaxmoe.errors import UserError
from tests.conftest import ROOT
from tests.tolerances import bound

pytest.importorskip("lm_eval", reason="the harness is not installed: pip install '.[eval]'")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from jaxmoe.evaluate.__main__ import main
from jaxmoe.evaluate.harness import JaxmoeLM

CHECKPOINT = str(ROOT / "tests" / "checkpoints" / "qwen3-moe-stdlib")
TASKS = ["stdlib_choices", "stdlib_texts", "stdlib_completions"]
SHARED = {"dtype": "float32", "batch_size": 4, "max_length": 64}  # texts of more tokens are scored in windows


@pytest.fixture(scope="module")
def ours():
    return JaxmoeLM(pretrained=CHECKPOINT, **SHARED)


@pytest.fixture(scope="module")
def theirs():
    return HFLM(pretrained=CHECKPOINT, device="cpu", **SHARED)


@pytest.fixture(autouse=True)
def in_a_clone(monkeypatch, tmp_path_factory):
    """The tasks name their files from the repository's root; their copies in Arrow's form go to a temporary folder."""
    import datasets

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


def evaluated(model, tasks, **options):
    """(numbers by task, the answer to every request by task)."""
    manager = TaskManager(include_path=str(ROOT / "examples" / "evaluate"), include_defaults=False)
    results = simple_evaluate(model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **options)
    assert results is not None
    numbers = {task: {k: v for k, v in results["results"][task].items() if isinstance(v, float)} for task in tasks}
    return numbers, {task: [sample["resps"] for sample in results["samples"][task]] for task in tasks}


def assert_same(ours, theirs):
    """Equal texts, and equal numbers to rounding."""
    if isinstance(theirs, dict | list | tuple):
        assert len(ours) == len(theirs)
        pairs = (
            [(ours[key], theirs[key]) for key in theirs] if isinstance(theirs, dict) else zip(ours, theirs, strict=True)
        )
        for pair in pairs:
            assert_same(*pair)
    elif isinstance(theirs, float):
        np.testing.assert_allclose(ours, theirs, rtol=bound("log_probabilities"))
    else:
        assert ours == theirs


def test_scores_are_those_of_the_harness_s_own_model(ours, theirs):
    numbers, responses = evaluated(ours, TASKS)
    expected_numbers, expected_responses = evaluated(theirs, TASKS)
    assert_same(numbers, expected_numbers)
    assert_same(responses, expected_responses)
    choices = [score for sample in responses["stdlib_choices"] for response in sample for score in response]
    assert {greedy for _, greedy in choices} == {True, False}


def test_generation_in_the_chat_template(ours, theirs):
    options = {"apply_chat_template": True, "system_instruction": "Code.", "limit": 4}
    found = evaluated(ours, TASKS[2:], **options)
    assert_same(found, evaluated(theirs, TASKS[2:], **options))
    assert found != evaluated(ours, TASKS[2:], limit=4)


def test_arguments_count_more_than_the_harness_s_flags():
    flags = {"batch_size": 8, "max_batch_size": None, "device": "cpu"}
    model = get_model("jaxmoe").create_from_arg_string(f"pretrained={CHECKPOINT},batch_size=2", flags)
    assert model.arguments.batch_size == 2
    assert get_model("jaxmoe").create_from_arg_obj({"pretrained": CHECKPOINT}, flags).arguments.batch_size == 8


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_arguments_of_generation(ours, theirs):
    kwargs = {"until": ["zzz", ")"], "max_new_tokens": 24, "do_sample": False}
    asked = [request("generate_until", context, kwargs) for context in ("def f(x):\n", "import os\n" * 30)]
    assert ours.generate_until(asked, disable_tqdm=True) == theirs.generate_until(asked, disable_tqdm=True)
    with pytest.raises(UserError, match="max_gen_toks: expected a number of new tokens from 1 to 63"):
        ours.generate_until([request("generate_until", "a", {"max_gen_toks": 64})], disable_tqdm=True)


def test_scores_of_single_requests(ours, theirs):
    asked = [request("loglikelihood", *pair) for pair in [("", "import os"), ("x ", "= 1"), ("a" * 200, " = b")]]
    assert_same(ours.loglikelihood(asked, disable_tqdm=True), theirs.loglikelihood(asked, disable_tqdm=True))
    with pytest.raises(UserError, match="continuation: expected 1 to 64 tokens"):
        ours.loglikelihood([request("loglikelihood", "a", "")], disable_tqdm=True)


def test_a_message_to_be_continued(ours, theirs):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "It is "}]
    assert ours.apply_chat_template(chat, False) == theirs.apply_chat_template(chat, False)
    assert ours.apply_chat_template(chat[:1]) == theirs.apply_chat_template(chat[:1])


def test_what_follows_a_thought(ours, monkeypatch):
    from dataclasses import replace

    tokens = ours.tok_encode("thought</t> \n answer\nmore")
    for end in ("</t>", ours.tok_encode("thought</t>")[-1]):
        monkeypatch.setattr(ours, "arguments", replace(ours.arguments, think_end_token=end))
        assert ours._answer(tokens, ["\n"]) == "answer"


def test_the_command_registers_the_model(monkeypatch):
    seen = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(sys.argv[1:]))
    before = sys.argv
    main(["--model", "jaxmoe", "--tasks", "x"])
    assert seen == [["--model", "jaxmoe", "--tasks", "x"]] and sys.argv is before
    assert get_model("jaxmoe") is JaxmoeLM and get_model("hf") is HFLM
