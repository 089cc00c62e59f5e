"""`jaxmoe.data show`: the records as the model sees them, the numbers, and the page."""

from __future__ import annotations

import io
import json
import pathlib
from typing import Any

import html5lib
import numpy as np
import pytest
from rich.console import Console

from jaxmoe.data.__main__ import main
from jaxmoe.data.chat import load_tokenizer
from jaxmoe.data.inputs import opened
from jaxmoe.data.overview import CUT, PLAIN, TRAINED, Overview, examples, overview, percent
from jaxmoe.data.records import Tokenising
from jaxmoe.data.show import print_overview
from jaxmoe.errors import UserError
from peers.make_checkpoint import TINY, write_tokenizer

RECORDS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "é<b>"}], "id": 1},
    {"prompt": "p" * 30, "completion": "c" * 30},
    {"text": "t" * 70},
    {"prompt": "x" * 50, "completion": "y"},
]
LENGTH = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(TINY.to_hf()))
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return folder


@pytest.fixture
def how(model: pathlib.Path) -> Tokenising:
    return Tokenising(load_tokenizer(model), TINY.vocab_size)


def numbers(model: pathlib.Path, how: Tokenising, limit: int | None = None) -> Overview:
    return overview([opened(model / "data.jsonl")], how, LENGTH, limit, lambda *_: None)


def test_examples(model, how):
    chat, pair, text, _ = examples(opened(model / "data.jsonl"), how, LENGTH, 4, most=1000)
    assert [(piece.kind, piece.text) for piece in chat.pieces] == [
        (PLAIN, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"),
        (TRAINED, "é<b><|im_end|>"),
        (PLAIN, "\n"),
    ]
    assert (chat.where[-2:], chat.form) == (":1", "messages")
    end = how.tokenizer.eos_token
    # 41 tokens fit: each of the first 40 has a successor to predict.
    assert [(piece.kind, piece.text) for piece in pair.pieces] == [
        (PLAIN, "p" * 30),
        (TRAINED, "c" * 11),
        (CUT, "c" * 19 + end),
    ]
    assert [piece.kind for piece in text.pieces] == [TRAINED]  # it is split, and nothing is lost
    (short, *_) = examples(opened(model / "data.jsonl"), how, LENGTH, 2, most=5)
    assert (sum(len(how.tokenizer(piece.text)["input_ids"]) for piece in short.pieces), short.more) == (
        5,
        short.tokens - 5,
    )


def test_numbers(model, how):
    found = numbers(model, how)
    assert found.lengths.tolist()[1:] == [61, 71, 52]
    assert found.forms == {"messages": 1, "prompt and completion": 2, "text": 1}
    assert found.unused == ["id"]
    # The first token of a text is never predicted; 20 tokens of the pair and both of the last record do not fit.
    chat = found.trained - (31 + 70 + 2)
    assert (found.trained_kept, found.documents) == (chat + 11 + 70, 4)
    assert (found.cut.split, found.cut.truncated, found.cut.dropped) == (1, 2, 1)
    assert found.wasted(found.documents) == pytest.approx(1 - found.used / (4 * LENGTH))
    assert found.sequences <= found.documents
    some = numbers(model, how, limit=2)
    assert (len(some.lengths), some.forms) == (2, {"messages": 1, "prompt and completion": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"txt": "a"}', "bad.jsonl:1: expected the keys"), ("", "bad.jsonl: expected at least one record, found none")],
)
def test_a_bad_input_is_named(content, message, model, tmp_path):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        main(["show", "--model", str(model), "--data", str(model / "data.jsonl"), str(tmp_path / "bad.jsonl")])


def test_what_is_printed(model, how):
    out = io.StringIO()
    shown = examples(opened(model / "data.jsonl"), how, LENGTH, 2, most=1000)
    print_overview(
        Console(file=out, width=200, force_terminal=True, color_system="standard"), shown, numbers(model, how)
    )
    text = out.getvalue()
    assert "\x1b[1;32mé<b><|im_end|>" in text  # trained: bold green
    assert "\x1b[9;31mccc" in text  # cut off: struck out, red
    for line in (
        "columns that are not used",
        "4 (messages: 1, prompt and completion: 2, text: 1)",
        "trained tokens cut off",
        "padding",
    ):
        assert line in text


def test_the_command_and_its_page(model, tmp_path, capsys):
    page = tmp_path / "page.html"
    main(
        ["show", "--model", str(model), "--data", str(model / "data.jsonl"), "--seq-length", "40", "--html", str(page)]
    )
    assert "é<b><|im_end|>" in capsys.readouterr().out
    document = html5lib.parse(page.read_text(encoding="utf-8"), namespaceHTMLElements=False)
    figures = json.loads(next(each.text or "" for each in document.iter("script") if each.get("id") == "figures"))
    assert [figure["kind"] for figure in figures] == ["highlighted", "lines"]
    assert figures[0]["pieces"][0][1] == "é<b><|im_end|>"
    assert figures[0]["kinds"][1] == [PLAIN, TRAINED, CUT]
    assert figures[1]["series"][0]["name"] == "records"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--records", "0"], "records: expected a number from 1 to 100, found 0"),
        (["--seq-length", "0"], "seq_length: expected a number from 1"),
        (["--data", "nowhere.jsonl"], "file not found: nowhere.jsonl"),
        (["--html", "."], "expected a file to write, found a folder"),
        (["--split", "test"], "split: expected none, since a file has no parts; found 'test'"),
    ],
)
def test_what_is_refused(flags, message, model):
    with pytest.raises(UserError, match=message):
        main(["show", "--model", str(model), "--data", str(model / "data.jsonl"), *flags])


def test_a_page_that_cannot_be_written_is_an_error_at_once(model, capsys):
    data = str(model / "data.jsonl")
    with pytest.raises(NotADirectoryError, match=r"data\.jsonl"):
        main(["show", "--model", str(model), "--data", data, "--html", f"{data}/page.html"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("share", "words"), [(0, "0 %"), (1, "100 %"), (0.9999, "99.9 %"), (1e-9, "0.1 %"), (0.125, "12.5 %")]
)
def test_shares(share, words):
    assert percent(share) == words


def test_hostile_text_cannot_command_the_terminal(model, how, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a\x1b[2Jb\u202e [bold]c"}) + "\n")
    out = io.StringIO()
    source = opened(tmp_path / "a.jsonl")
    shown = examples(source, how, LENGTH, 1, most=1000)
    print_overview(Console(file=out, width=100), shown, overview([source], how, LENGTH, None, lambda *_: None))
    assert "a\\x1b[2Jb\\u202e [bold]c" in out.getvalue()
    assert np.all([character.isprintable() or character == "\n" for character in out.getvalue()])
