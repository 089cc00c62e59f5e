"""Every form of file gives the same records; forms of records; damaged and hostile files end in one line."""

from __future__ import annotations

import contextlib
import datetime
import gzip
import json
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
from huggingface_hub import errors

from jaxmoe.data import compressed, datasets_library, json_records
from jaxmoe.data.chat import load_tokenizer
from jaxmoe.data.inputs import check_split, opened
from jaxmoe.data.record_forms import FORMS, recognised
from jaxmoe.data.records import digest, read_records, tokenize_record
from jaxmoe.errors import UserError
from peers.make_checkpoint import write_tokenizer

datasets = pytest.importorskip("datasets", reason="the extra data is not installed")
zstandard = pytest.importorskip("zstandard", reason="the extra data is not installed")
pyarrow = pytest.importorskip("pyarrow", reason="the extra data is not installed")
parquet = pytest.importorskip("pyarrow.parquet", reason="the extra data is not installed")

VOCAB = 320
TEMPLATE = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') ~ (m.tool_calls or '') + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def chat(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


RECORDS: list[dict[str, Any]] = [
    *({"text": f"{'é' * i} text {i}", "id": i} for i in range(40)),
    {"messages": chat("a", "b", "c", "d"), "id": None},
    {"messages": [*chat("a"), {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}, *chat("x", "y")]},
    {"prompt": "p", "completion": "c"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {"instruction": "i", "input": "", "output": "o"},
]


def write_lines(path: pathlib.Path) -> None:
    path.write_text("\ufeff" + "".join(json.dumps(record, ensure_ascii=False) + "\r\n\n" for record in RECORDS))


def write_array(path: pathlib.Path) -> None:
    path.write_text("\ufeff \n" + json.dumps(RECORDS, indent=1))


def table() -> Any:
    columns = {name: None for record in RECORDS for name in record}
    return datasets.Dataset.from_list([columns | record for record in RECORDS])


def gzipped(write: Callable[[pathlib.Path], None]) -> Callable[[pathlib.Path], None]:
    def writes(path: pathlib.Path) -> None:
        write(path)
        content = path.read_bytes()  # in two members, as a file that was appended to
        path.write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]))

    return writes


def zstd(write: Callable[[pathlib.Path], None]) -> Callable[[pathlib.Path], None]:
    def writes(path: pathlib.Path) -> None:
        write(path)
        content = path.read_bytes()
        path.write_bytes(zstandard.compress(content[:1000]) + zstandard.compress(content[1000:]))

    return writes


def write_folder(path: pathlib.Path) -> None:
    path.mkdir()
    half = len(RECORDS) // 2
    table().select(range(half)).to_parquet(path / "train-00000-of-00002.parquet")
    table().select(range(half, len(RECORDS))).to_parquet(path / "train-00001-of-00002.parquet")


INPUTS: dict[str, Callable[[pathlib.Path], Any]] = {
    "a.jsonl": write_lines,
    "a.json": write_array,
    "a.jsonl.gz": gzipped(write_lines),
    "a.json.gz": gzipped(write_array),
    "a.jsonl.zst": zstd(write_lines),
    "array": zstd(write_array),  # what a file is shows in its content
    "a.parquet": lambda path: table().to_parquet(path, batch_size=7),
    "saved": lambda path: table().save_to_disk(path),
    "splits": lambda path: datasets.DatasetDict({"train": table(), "test": table().select([0])}).save_to_disk(path),
    "folder": write_folder,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def expected(tokenizer: Any) -> str:
    return digest(tokenize_record(record, tokenizer) for record in RECORDS)


@pytest.mark.parametrize("name", INPUTS)
def test_the_form_of_the_file_changes_nothing(name, expected, tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(json_records, "_CHUNK", 64)
    INPUTS[name](tmp_path / name)
    assert digest(read_records(tmp_path / name, tokenizer, VOCAB)) == expected
    notices = [line for line in caplog.messages if "not used" in line]
    assert len(notices) == 1
    assert notices[0].endswith("columns that are not used: id")
    source = opened(tmp_path / name)
    whole = [(raw.where, raw.value) for raw in source.read(0)]
    for first in (1, 7, 21, 43, 44, 60):
        assert [(raw.where, raw.value) for raw in source.read(first)] == whole[first:]


def test_columns_of_structs_lists_and_maps(tmp_path):
    """Turns as tables have them: a list of structs, a struct of lists, a list of maps, and a string of JSON."""
    strings = pyarrow.map_(pyarrow.string(), pyarrow.string())
    columns = {
        "a": pyarrow.array([[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 1}]]),
        "b": pyarrow.array([{"from": ["human", "gpt"], "value": ["a", "b"]}]),
        "c": pyarrow.array([[[*turn.items()] for turn in chat("a", "b")]], pyarrow.list_(strings)),
        "d": pyarrow.array([json.dumps(chat("a", "b"))], pyarrow.large_string()),
        "e": pyarrow.array([[turn | {"at": datetime.datetime(2026, 1, 1)} for turn in chat("a", "b")]]),
    }
    for name, column in columns.items():
        parquet.write_table(pyarrow.table({"conversations": column, "id": [1]}), tmp_path / name)
        (raw,) = opened(tmp_path / name).read(0)
        assert recognised(raw.value).record == {"messages": chat("a", "b")}, name


def test_a_folder_of_several_subsets(tmp_path):
    lines = ["---", "configs:"]
    for name in ("en", "de"):
        (tmp_path / "a" / name).mkdir(parents=True)
        (tmp_path / "a" / name / "train.jsonl").write_text(json.dumps({"text": name}) + "\n")
        lines += [f"- config_name: {name}", f"  data_files: {name}/*.jsonl"]
    (tmp_path / "a" / "README.md").write_text("\n".join([*lines, "---", ""]))
    with pytest.raises(UserError, match=r"a: expected one subset, found several: de, en; name one, as .*a/de$"):
        opened(tmp_path / "a")
    assert [raw.value for raw in opened(tmp_path / "a" / "de").read(0)] == [{"text": "de"}]


def test_splits(tokenizer, tmp_path):
    INPUTS["splits"](tmp_path / "a")
    assert len(list(opened(tmp_path / "a", "test").read(0))) == 1
    with pytest.raises(UserError, match=r"a: split: expected one of train, test; found 'dev'"):
        opened(tmp_path / "a", "dev")
    datasets.DatasetDict({name: table().select([0]) for name in ("train_sft", "test_sft")}).save_to_disk(tmp_path / "c")
    with pytest.raises(UserError, match=r"c: split: expected one of train_sft, test_sft; found 'train'"):
        opened(tmp_path / "c")
    INPUTS["saved"](tmp_path / "b")
    with pytest.raises(UserError, match="split: expected none"):
        opened(tmp_path / "b", "test")


def test_a_split_is_not_ignored_silently(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.parquet"):
        (tmp_path / name).touch()
    check_split(["a.jsonl", "owner/name"], None, "split")
    assert not caplog.messages
    check_split(["a.jsonl", "owner/name", "b.parquet"], "test", "split")
    assert caplog.messages == ["split: read as a whole, since files have no parts: a.jsonl, b.parquet"]
    for names, split, message in (
        (["a.jsonl", "b.parquet"], "test", "eval_split: expected none, since a file has no parts; found 'test' for a"),
        (["owner/name"], "", "eval_split: expected the name of a part, found an empty text"),
    ):
        with pytest.raises(UserError, match=message):
            check_split(names, split, "eval_split")


def test_a_data_set_of_the_hub(expected, tokenizer, tmp_path, monkeypatch):
    """The hub is stood in for by a folder; whether it is streamed or downloaded changes nothing."""
    write_folder(tmp_path / "hub")
    build = datasets.load_dataset_builder
    asked = []

    def builder(name: str, *subset: str) -> Any:
        asked.append((name, *subset))
        return build(str(tmp_path / "hub"), cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.HfFileSystem", lambda: __import__("fsspec").filesystem("file"))
    assert digest(read_records("owner/name", tokenizer, VOCAB)) == expected
    streamed = opened("owner/name/subset", "train", streaming=True)
    assert asked == [("owner/name",), ("owner/name", "subset")]
    assert [raw.value for raw in streamed.read(0)] == [raw.value for raw in opened("owner/name").read(0)]
    assert streamed.name == "owner/name/subset (train)"


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_that_does_not_answer(kept, streaming, tmp_path, monkeypatch):
    """It is asked once. What was read before is read again, without the network."""
    asked = []

    def unreachable(self: Any, name: str, timeout: float) -> None:
        asked.append(name)
        raise ConnectionError("[Errno -2] Name or service not known")

    build = datasets.load_dataset_builder
    folder = tmp_path / "cache" / "owner___name" / "default" / "0.0.0" / "hash"
    if kept:
        folder.mkdir(parents=True)
        write_folder(tmp_path / "hub")
        build(str(tmp_path / "hub"), cache_dir=str(tmp_path / "made")).download_and_prepare(output_dir=str(folder))
        for file in folder.glob("*.arrow"):
            file.rename(folder / file.name.replace("parquet", "name").replace("hub", "name"))
        (folder / "dataset_info.json").write_text(
            (folder / "dataset_info.json").read_text().replace('"parquet"', '"name"').replace('"hub"', '"name"')
        )
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setattr("huggingface_hub.hf_api.HfApi.hf_hub_download", None)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if kept and not streaming:
        assert len(list(opened("owner/name").read(0))) == len(RECORDS)
    else:
        message = r"^owner/name: no file or folder of this name, and the hub does not answer: \[Errno -2\] Name"
        with pytest.raises(UserError, match=message):
            opened("owner/name", streaming=streaming)
    assert asked == ["owner/name"]
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_data_set_that_the_hub_does_not_have(monkeypatch):
    def unknown(*_: Any, **__: Any) -> None:
        answer: Any = types.SimpleNamespace(headers={}, request=None)
        raise errors.RepositoryNotFoundError("404", response=answer)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unknown)
    with pytest.raises(UserError, match=r"^owner/name: no file or folder of this name, and the hub has no such data"):
        opened("owner/name")


def test_what_is_no_data_set_of_records(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    for name in ("nowhere.jsonl", "there/a", "a/b.jsonl", "/a/b", "a"):
        with pytest.raises(UserError, match=f"file not found: {name}"):
            opened(name)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.md").write_text("# a")
    with pytest.raises(UserError, match="texts: expected records, found a folder without any"):
        opened("texts")


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    INPUTS["a.parquet"](tmp_path / "a.parquet")
    INPUTS["a.jsonl.zst"](tmp_path / "a.jsonl.zst")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    for name, library in (("a.parquet", "pyarrow.parquet"), ("a.jsonl.zst", "zstandard"), ("saved", "datasets")):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, library, None)
            with pytest.raises(UserError, match=rf"{name}: to read .*: expected the package {library}, found .*pip"):
                opened(tmp_path / name)


# Forms of records

CALL = {"name": "f", "arguments": "{}"}

SAME = {
    "speakers": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q", "weight": 0},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "7"},
                {"from": "gpt", "value": "a", "weight": 1.0},
            ]
        },
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
                {"role": "tool", "content": "7"},
                {"role": "assistant", "content": "a"},
            ]
        },
    ),
    "roles under ShareGPT's name": ({"conversations": chat("a", "b"), "source": "x"}, {"messages": chat("a", "b")}),
    "one conversation": ({"conversation": chat("a", "b"), "model": "x"}, {"messages": chat("a", "b")}),
    "a system column": (
        {"messages": chat("a", "b"), "system": "s", "tools": '[{"name": "f"}]'},
        {"messages": [{"role": "system", "content": "s"}, *chat("a", "b")], "tools": [{"name": "f"}]},
    ),
    "an empty system column": ({"messages": chat("a", "b"), "system": "", "tools": ""}, {"messages": chat("a", "b")}),
    "Alpaca": ({"instruction": "i", "input": "x", "output": "o", "text": "i x o"}, {"messages": chat("i\nx", "o")}),
    "Alpaca with a history": (
        {"instruction": "i", "output": "o", "system": "s", "history": [["a", "b"]]},
        {"messages": [{"role": "system", "content": "s"}, *chat("a", "b", "i", "o")]},
    ),
    "OpenAI's logs": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "refusal": None,
                    "function_call": CALL,
                },
                {"role": "function", "name": "f", "content": "7"},
                {"role": "assistant", "content": "a", "reasoning": "t", "train": True},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "q\nr"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": CALL}],
                },
                {"role": "tool", "name": "f", "content": "7"},
                {"role": "assistant", "content": "a", "reasoning_content": "t"},
            ]
        },
    ),
    "messages as a string": ({"messages": json.dumps(chat("a", "b"))}, {"messages": chat("a", "b")}),
    "a list for each key": (
        {"conversations": {"from": ["human", "gpt"], "value": ["a", "b"]}},
        {"messages": chat("a", "b")},
    ),
    "roles beside values": (
        {"conversations": [{"role": "user", "value": "a"}, {"from": "gpt", "content": "b", "markdown": None}]},
        {"messages": chat("a", "b")},
    ),
    "questions with their answers": (
        {"conversation": [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}], "source": "x"},
        {"messages": chat("a", "b", "c", "d")},
    ),
    "calls and responses": (
        {
            "conversations": [
                {"from": "user", "value": "q"},
                {"from": "tool_call", "value": '[{"name": "f", "arguments": {}}]'},
                {"from": "tool_response", "value": "7"},
                {"from": "assistant", "value": "a"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]},
                {"role": "tool", "content": "7"},
                {"role": "assistant", "content": "a"},
            ]
        },
    ),
    "Dolly": (
        {"instruction": "i", "context": "", "response": "o", "category": "x"},
        {"messages": chat("i", "o")},
    ),
    "TRL's prompt and completion": (
        {"prompt": chat("a"), "completion": [{"role": "assistant", "content": "b"}], "label": True},
        {"messages": chat("a", "b")},
    ),
    "a message and a string": ({"prompt": chat("a")[0], "completion": "b"}, {"messages": chat("a", "b")}),
    "several forms": ({"text": "t", "prompt": "p", "messages": chat("a", "b")}, {"messages": chat("a", "b")}),
    "nulls of a table": ({"text": "t", "messages": None, "prompt": None}, {"text": "t"}),
    "a pair beside a text": ({"text": "t", "prompt": "", "completion": "c"}, {"prompt": "", "completion": "c"}),
}


@pytest.mark.parametrize("name", SAME)
def test_forms_of_records(name):
    raw, record = SAME[name]
    found = recognised(raw)
    assert found.record == record
    assert recognised(found.record)[::2] == (record, ())
    assert set(found.ignored) == {key for key in raw if raw[key] is not None} - set(found.form.known)


def test_keys_of_messages_that_are_not_used_are_named():
    """Such as those of WildChat, whose turns have a dozen."""
    turns: list[Any] = chat("a", "b")
    turns[0] |= {"country": "x", "toxic": False}
    turns[1] |= {"n": 0, "header": None}
    found = recognised({"conversation": turns, "model": "m"})
    assert found.record == {"messages": chat("a", "b")}
    assert found.ignored == ("model", "conversation.country", "conversation.toxic", "conversation.n")


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"prompt": chat("a", "b", "c"), "completion": chat("d")}, "prompt: expected none of the answers"),
        ({"prompt": chat("a"), "completion": None}, "completion: expected a string or a list of messages, found noth"),
        ({"prompt": chat("a"), "completion": 3}, "completion: expected a string or a list of messages, found a number"),
        ({"prompt": "p", "completion": "c", "label": False}, "label: expected true .*found false"),
        ({"prompt": "p", "completion": "c", "label": 0}, "label: expected true .*found 0;"),
        ({"prompt": "p", "completion": "c", "label": "False"}, 'label: expected true .*found "False";'),
    ],
)
def test_completions_that_cannot_be_learned(raw, says):
    with pytest.raises(UserError, match=f"^{says}"):
        recognised(raw)


def test_a_conversation_is_learned_as_its_messages_would_be(tokenizer):
    prompt = [{"role": "system", "content": "s"}, *chat("a")]
    answer = {"role": "assistant", "content": "b"}
    found = tokenize_record({"prompt": prompt, "completion": [answer]}, tokenizer)
    expected = tokenize_record({"messages": [*prompt, answer]}, tokenizer)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.weights.tolist() == expected.weights.tolist()


def test_every_form_is_found_by_its_columns():
    values = {"messages": chat("a", "b"), "conversations": chat("a", "b"), "conversation": chat("a", "b")}
    for form in FORMS:
        assert recognised({name: values.get(name, "x") for name in form.columns}).form is form


# Damaged and hostile files


def cut_off(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x55]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [cut_off, flipped])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "saved/data-00000-of-00001.arrow"])
def test_damaged_files(name, damage, tmp_path):
    top = name.partition("/")[0]
    INPUTS[top](tmp_path / top)
    if name.endswith("zst"):
        (tmp_path / name).write_bytes(
            zstandard.ZstdCompressor(write_checksum=True).compress(json.dumps(RECORDS).encode())
        )
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    if damage is flipped and not name.endswith(("gz", "zst")):  # no checksums: what is read must still be records
        with contextlib.suppress(UserError):
            assert all(recognised(raw.value) for raw in opened(tmp_path / top).read(0))
        return
    with pytest.raises(UserError, match=rf"{top}.*: expected .*found") as caught:
        list(opened(tmp_path / top).read(0))
    assert "\n" not in str(caught.value)


ARRAYS = {
    "[": "record 1: expected JSON, found",
    '[{"text": "a"}': "record 1: expected a comma or the end of the array after it, found the end of the file",
    '[{"text": "a"} {"text"': r"""record 1: expected a comma .*found '{"te""",
    '[{"text": "a"},]': "record 2: expected JSON, found",
    '[{"text": "a"}, {"te': "record 2: expected JSON, found a string that does not end at column 2",
    '[{"text" 3, ' + " " * 200: "record 1: expected JSON, found no colon at column 9",
    '[{"text": "a"}] x': "expected nothing after the array, found 'x'",
    "[" + "[" * 5000: "record 1: expected JSON at most 100 levels deep",
    "[" + "1" * 5000 + "]": "record 1: expected JSON, found",
}


@pytest.mark.parametrize("chunk", [3, 2**18])
@pytest.mark.parametrize("content", ARRAYS, ids=range(len(ARRAYS)))
def test_bad_arrays(content, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "_CHUNK", chunk)
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=rf"a\.json: {ARRAYS[content]}"):
        list(opened(tmp_path / "a.json").read(0))


def test_an_array_that_is_not_utf8(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"text": "\xff"}]')
    with pytest.raises(UserError, match=r"a\.json: expected UTF-8, found byte 0xff"):
        list(opened(tmp_path / "a.json").read(0))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("line", ["", '{"text": "a"}'])
def test_a_bomb_does_not_explode(name, line, tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "_FREE", 2**17)
    compress = gzip.compress if name.endswith("gz") else zstandard.compress
    (tmp_path / name).write_bytes(compress((line + "\n").encode() * (2**20 // (len(line) + 1))))
    with pytest.raises(UserError, match=rf"{name}: expected records that are at most 200 times as large as the file"):
        list(opened(tmp_path / name).read(0))


def test_a_parquet_bomb_does_not_explode(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "_FREE", 2**20)
    parquet.write_table(datasets.Dataset.from_dict({"text": ["a" * 1000] * 10_000}).data.table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: expected records that are at most 200 times"):
        list(opened(tmp_path / "a.parquet").read(0))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz"])
def test_a_long_record_is_not_read(name, tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "MAX_LINE", 1000)
    monkeypatch.setattr(json_records, "_CHUNK", 100)
    content = '[{"text": "' + "a" * 3000 if name == "a.json" else '{"text": "' + "a" * 3000 + '"}'
    (tmp_path / name).write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    with pytest.raises(UserError, match=rf"{name}:( record)? ?1: expected .*at most .*MiB"):
        list(opened(tmp_path / name).read(0))


@pytest.mark.parametrize("link", ["../x.arrow", "/etc/passwd", "", None, 3])
def test_a_saved_folder_names_files_of_its_own(link, tmp_path):
    INPUTS["saved"](tmp_path / "a")
    state = tmp_path / "a" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_data_files": [{"filename": link}]}))
    with pytest.raises(UserError, match=r"state\.json: _data_files: expected names of files in this folder"):
        opened(tmp_path / "a")


def test_a_data_set_that_is_none_of_records(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.json").write_text('{"text": "a"}')
    (tmp_path / "a" / "README.md").write_text("---\nconfigs:\n- config_name: x\n  data_files: '*.png'\n---\n")
    with pytest.raises(UserError, match=r"a: expected .*found"):
        opened(tmp_path / "a")


def test_names_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    found = [datasets_library.hub_name(name) for name in ("a/b", "a/b-1.5/main", "data/a", "a/b.jsonl", "../b", "a")]
    assert found == ["a/b", "a/b-1.5/main", None, None, None, None]
