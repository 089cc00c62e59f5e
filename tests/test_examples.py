"""The pieces of the demo and of the pretraining recipe."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from examples import capture, demo, stdlib_corpus, train_tokenizer
from jaxmoe import memory
from jaxmoe.config import Qwen3MoeConfig, read_json
from jaxmoe.data.chat import load_tokenizer
from jaxmoe.data.records import read_records, tokenize_record
from jaxmoe.errors import UserError
from tests.conftest import ROOT

SOURCE = '''
class Stack:
    """A stack."""

    def push(self, item, *, times: int = 1) -> None:
        """Put an item on top of the stack.

        More than that is left out.
        """
        def inner():
            """A function inside a function is left out."""

    def _hidden(self):
        """Private functions are left out."""

    def nothing(self):
        pass

async def fetch(url):
    """Fetch what is
    behind a URL."""

def terse():
    """Short."""

def accent():
    """Not in ASCII: caf\u00e9 au lait."""
'''


def library(root: pathlib.Path, count: int = 60) -> pathlib.Path:
    for number in range(count):
        path = root / "package" / f"module_{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'def f{number}(x):\n    """Return x plus the number {number}."""\n    return x + {number}\n')
    return root


def test_signatures_and_docstrings() -> None:
    assert list(stdlib_corpus.signatures(SOURCE)) == [
        ("class Stack: def push(self, item, *, times: int=1) -> None", "Put an item on top of the stack."),
        ("async def fetch(url)", "Fetch what is behind a URL."),
    ]
    assert list(stdlib_corpus.signatures("def broken(:")) == []


@pytest.mark.parametrize(
    "name",
    [
        "encodings/cp1252.py",
        "site-packages/numpy/a.py",
        "html/entities.py",
        "_sysconfigdata__linux_.py",
    ],
)
def test_what_is_not_the_library_is_skipped(name: str, tmp_path: pathlib.Path) -> None:
    library(tmp_path, 1)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("x = 1\n")
    assert stdlib_corpus.source_files(tmp_path) == ["package/module_0.py"]


@pytest.mark.parametrize("name", ["test/test_json.py", "package/tests/a.py", "idlelib/idle_test/a.py"])
def test_docstrings_of_tests_are_left_out(name: str) -> None:
    source = 'def f():\n    """Say what this function does."""\n'
    assert stdlib_corpus.docstring_records({name: source}) == ([], [])
    train, held_out = stdlib_corpus.docstring_records({name.replace("test", "tools"): source})
    assert len(train + held_out) == 1


def test_topics_of_the_reference(tmp_path: pathlib.Path) -> None:
    assert stdlib_corpus.read_topics(tmp_path) == {}
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data/topics.py").write_text("topics = {'while': 'The while statement.', 'empty': ' '}\n")
    assert stdlib_corpus.read_topics(tmp_path) == {"topics/while": "The while statement."}


def test_unreadable_and_empty_modules_are_skipped(tmp_path: pathlib.Path) -> None:
    library(tmp_path, 1)
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'\n")
    assert list(stdlib_corpus.read_sources(tmp_path)) == ["package/module_0.py"]


def test_the_corpus_is_deterministic_and_split_by_module(tmp_path: pathlib.Path) -> None:
    (tmp_path / "library").mkdir()
    root = library(tmp_path / "library")
    counts = stdlib_corpus.write_corpus(tmp_path / "first", root)
    stdlib_corpus.write_corpus(tmp_path / "second", root)
    files = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    assert sum(counts[name] for name in ("text.jsonl", "text.heldout.jsonl")) == 60
    assert 0 < counts["text.heldout.jsonl"] < 10
    assert counts["docstrings.heldout.jsonl"] == counts["text.heldout.jsonl"]

    texts = {name: {json.loads(line)["text"] for line in files[name].splitlines()} for name in files if "text" in name}
    assert not texts["text.jsonl"] & texts["text.heldout.jsonl"]


def test_a_repeated_docstring_is_never_held_out() -> None:
    names = [f"m{i}.py" for i in range(100)]
    held_out = next(name for name in names if stdlib_corpus.is_held_out(name))
    kept = next(name for name in names if not stdlib_corpus.is_held_out(name))
    source = 'def f():\n    """Say the same thing twice."""\n'
    train, evaluation = stdlib_corpus.docstring_records({held_out: source, kept: source})
    assert (len(train), evaluation) == (1, [])
    assert len(stdlib_corpus.docstring_records({held_out: source})[1]) == 1


def test_the_tokenizer_loads_and_reads_every_record(tmp_path: pathlib.Path) -> None:
    texts = [path.read_text() for path in sorted((ROOT / "jaxmoe").glob("*.py"))]
    for folder in ("first", "second"):
        train_tokenizer.train_tokenizer(texts, 600).save_pretrained(tmp_path / folder)
    assert (tmp_path / "first/tokenizer.json").read_bytes() == (tmp_path / "second/tokenizer.json").read_bytes()

    tokenizer = load_tokenizer(tmp_path / "first")
    assert len(tokenizer) == 600
    assert tokenizer.convert_tokens_to_ids(list(train_tokenizer.SPECIAL_TOKENS)) == [597, 598, 599]
    text = "def f(x):\n    return x  # caf\u00e9 \U0001f600"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    record = tokenize_record(stdlib_corpus.chat("def f(x)", "Return x."), tokenizer)
    learned = record.tokens[record.weights > 0]
    assert tokenizer.decode(learned) == "Return x.<|im_end|>"
    assert tokenizer.decode(record.tokens).startswith("<|im_start|>user\ndef f(x)<|im_end|>\n<|im_start|>assistant\n")


def test_a_vocabulary_without_room_for_bytes() -> None:
    with pytest.raises(UserError, match="vocab_size: expected at least 259, found 258"):
        train_tokenizer.train_tokenizer(["x"], 258)


@pytest.mark.parametrize(("name", "layers", "parameters"), [("small", 6, 3_532_800), ("deep", 24, 25_527_456)])
def test_recipes(name: str, layers: int, parameters: int) -> None:
    config = Qwen3MoeConfig.from_hf(read_json(ROOT / f"examples/pretrain/{name}.json"))
    assert (config.num_hidden_layers, config.num_experts, config.num_experts_per_tok) == (layers, 32, 8)
    assert config.num_attention_heads > config.num_key_value_heads
    assert memory.parameter_count(config) == parameters
    assert config.max_position_embeddings == train_tokenizer.CONTEXT


def test_the_small_recipe_is_below_8_mb_in_bfloat16() -> None:
    config = Qwen3MoeConfig.from_hf(read_json(ROOT / "examples/pretrain/small.json"))
    assert 2 * memory.parameter_count(config) < 8e6


def test_chosen_experts_and_margin() -> None:
    probabilities = np.array([[[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]]])
    chosen, margin = capture.chosen_experts(np.log(probabilities), 2)
    np.testing.assert_array_equal(chosen, [[[True, True, False, False], [False, False, True, True]]])
    np.testing.assert_allclose(margin, [[0.15, 0.1]])
    assert (capture.chosen_experts(np.log(probabilities), 4)[1] == 1).all()


def test_what_is_compared_ends_before_the_first_unclear_token() -> None:
    valid = np.array([[True, True, True, True], [True, True, False, False]])
    margin = np.full((2, 2, 4), 0.1)
    margin[1, 0, 2] = capture.MARGIN / 2
    np.testing.assert_array_equal(
        capture.comparable(valid, margin), [[True, True, False, False], [True, True, False, False]]
    )


def test_the_picture_is_a_png(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    capture.draw_expert_load(np.random.default_rng(0).integers(1, 50, (3, 8)), tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_questions_are_spread_over_the_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(stdlib_corpus.chat(f"def f{i}()", f"Do {i}.")) + "\n" for i in range(10)))
    assert demo.examples(path, 3) == {"def f1()": "Do 1.", "def f4()": "Do 4.", "def f7()": "Do 7."}


def test_padding(tmp_path: pathlib.Path) -> None:
    train_tokenizer.train_tokenizer(["a b c"], 259).save_pretrained(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"text": "abc"}\n{"text": "a"}\n')
    records = read_records(tmp_path / "data.jsonl", load_tokenizer(tmp_path), 259)
    input_ids, mask = capture.pad(records)
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1], [1, 1, 0, 0]])
    np.testing.assert_array_equal(input_ids[0], records[0].tokens)


def test_a_failing_step_stops_the_demo() -> None:
    with pytest.raises(UserError, match="demo: FAILED at step 1, Convert: exit code 2"):
        demo.Demo(total=1).step("Convert", "convert", "inspect", "no-such-folder")


def test_demo_deletes_only_its_own_output(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "output"
    demo.clear(output)
    (output / "left.txt").touch()
    demo.clear(output)
    assert [path.name for path in output.iterdir()] == [".demo"]
    (tmp_path / "precious.txt").touch()
    with pytest.raises(UserError, match="other files"):
        demo.clear(tmp_path)
    assert (tmp_path / "precious.txt").exists()
