"""Several sources with weights, and records that are read while a run trains."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections import Counter
from typing import Any

import numpy as np
import pytest

from jaxmoe.cli.arguments import ArgumentParser, add_dataclass_arguments, dataclass_from_arguments, flag_kinds
from jaxmoe.cli.config_file import read_settings
from jaxmoe.data.chat import load_tokenizer
from jaxmoe.data.inputs import opened
from jaxmoe.data.mixture import Mixture, apportioned, next_source
from jaxmoe.data.packing import Batch, Document, Sequences
from jaxmoe.data.records import Tokenising, hold_out, hold_out_of_parts
from jaxmoe.data.sources import Source, sources, weights_of
from jaxmoe.data.stream import Stream
from jaxmoe.errors import UserError
from jaxmoe.train.settings import TrainConfig
from peers.make_checkpoint import write_tokenizer

VOCAB = 320


@pytest.fixture(scope="module")
def how(tmp_path_factory: pytest.TempPathFactory) -> Tokenising:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenising(load_tokenizer(folder), VOCAB)


# Sources


def test_sources_and_their_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b:3", "c:2:x.jsonl"):
        (tmp_path / name).touch()
    for texts, expected in {
        ("a.jsonl", "b.jsonl"): [("a.jsonl", None), ("b.jsonl", None)],
        ("a.jsonl:2", "b.parquet:1"): [("a.jsonl", 2.0), ("b.parquet", 1.0)],
        ("a.jsonl:0.5", "owner/name"): [("a.jsonl", 0.5), ("owner/name", 1.0)],
        ("b:3", "b:3:2"): [("b:3", 1.0), ("b:3", 2.0)],
        ("c:2:x.jsonl",): [("c:2:x.jsonl", None)],
        ("owner/name/sub:1e1",): [("owner/name/sub", 10.0)],
        ("nowhere:train",): [("nowhere:train", None)],
    }.items():
        assert sources(texts, "data") == [Source(*each) for each in expected]
    assert sources(tmp_path / "a.jsonl", "data") == [Source(str(tmp_path / "a.jsonl"))]
    assert weights_of(sources(("a", "b:2"), "data")) == [1.0, 2.0]
    assert weights_of(sources(("a", "b"), "data")) is None


@pytest.mark.parametrize("text", ["a:0", "a:-1", "a:nan", "a:inf", "a:1e999", "a:1-2"])
def test_a_weight_is_a_number_above_0(text):
    with pytest.raises(UserError, match=f"data: expected FILE:WEIGHT with a weight above 0, found '{text}'"):
        sources((text,), "data")


def test_the_flag_takes_several():
    parser = ArgumentParser()
    add_dataclass_arguments(parser, TrainConfig)
    argv = "--data a:2 b:1 --output o --model m --data c --eval-data d e".split()
    settings = dataclass_from_arguments(TrainConfig, parser.parse_args(argv))
    assert settings.sources == [Source("a", 2.0), Source("b", 1.0), Source("c", 1.0)]
    assert settings.eval_sources == [Source("d"), Source("e")]


@pytest.mark.parametrize("text", ['data = ["a:2", "b"]', "data = 'a:2'"])
def test_a_file_of_settings_may_name_one_or_several(text, tmp_path):
    (tmp_path / "run.toml").write_text(f"{text}\nmodel = 'm'\noutput = 'o'\n")
    given = read_settings(tmp_path / "run.toml", flag_kinds(TrainConfig))
    parser = ArgumentParser()
    add_dataclass_arguments(parser, TrainConfig, given)
    settings = dataclass_from_arguments(TrainConfig, parser.parse_args([]))
    assert settings.sources == [Source("a", 2.0), Source("b", 1.0)][: 1 + ("b" in text)]
    assert dataclass_from_arguments(TrainConfig, parser.parse_args(["--data", "c"])).sources == [Source("c")]


STREAMING = {"streaming": True, "max_steps": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streaming": True}, "streaming: expected max_steps with it"),
        ({"streaming": True, "epochs": 2}, "streaming: expected max_steps with it"),
        (STREAMING | {"eval_fraction": 0.1}, "streaming and eval_fraction: .*use eval_data"),
        (STREAMING | {"replay": pathlib.Path("c")}, "streaming and replay"),
        (STREAMING | {"shuffle_buffer": 0}, "shuffle_buffer: expected at least 1, found 0"),
        ({"shuffle_buffer": 5}, "shuffle_buffer: only valid with streaming"),
        ({"eval_data": ("a:2",)}, "eval_data: expected sources without weights"),
        ({"eval_split": "x"}, "eval_split: only valid with eval_data"),
        ({"data": ()}, "data: expected at least one file, folder or data set, found none"),
        ({"data": ("a", "")}, "data: expected the name of a file, a folder or a data set, found an empty text"),
        ({"eval_data": ""}, "eval_data: expected the name of a file, a folder or a data set, found an empty text"),
    ],
    ids=str,
)
def test_settings_that_exclude_each_other(changes, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**{"data": "d", "model": pathlib.Path("m"), "output": pathlib.Path("o")} | changes)


# Mixtures


def document(number: int) -> Document:
    return Document(np.full(2, number, np.int32), np.full(2, number, np.int32), np.ones(2, np.float32))


def test_an_epoch_of_a_mixture():
    mixture = Mixture([10, 40], [2, 1], seed=3)
    epochs = [mixture.epoch(epoch) for epoch in range(5)]
    for epoch in epochs:
        counts = Counter(i >= 10 for i in epoch)
        assert (counts[False], counts[True]) == (33, 17)
        assert all(2 <= count <= 5 for i, count in Counter(epoch).items() if i < 10)
    # A source is gone through as a whole before it begins again, over epochs.
    second = [i for epoch in epochs for i in epoch if i >= 10]
    assert sorted(second[:40]) == sorted(second[40:80]) == list(range(10, 50))
    assert second[:40] != second[40:80]
    assert mixture.epoch(2) == Mixture([10, 40], [4, 2], seed=3).epoch(2) != Mixture([10, 40], [2, 1], seed=4).epoch(2)


def test_sequences_of_a_mixture():
    documents = [document(i) for i in range(50)]
    mixed = Sequences(documents, 2, epochs=1, mixture=Mixture([10, 40], [2, 1], seed=0))
    plan = mixed.epoch(0)
    assert sorted(itertools.chain(*plan)) == sorted(Mixture([10, 40], [2, 1], seed=0).epoch(0))
    found = mixed.batch(0, (len(plan),)).input_ids[:, 0].tolist()
    assert found == [sequence[0] for sequence in plan]
    assert found != sorted(found)


def test_shares():
    assert apportioned(10, [1, 1, 1]) == [4, 3, 3]
    assert apportioned(3, [1e308, 1e308, 1e-300]) == [2, 1, 1]  # every source is there
    for weights in ([2, 1], [0.1, 0.7, 0.2], [5]):
        taken = [0] * len(weights)
        for count in range(1, 200):
            taken[next_source(taken, weights)] += 1
            assert all(abs(t - count * w / sum(weights)) < 1 for t, w in zip(taken, weights, strict=True))


def test_records_are_held_out_of_all_sources_together():
    parts = [list(range(10)), list(range(10, 40))]
    kept, held = hold_out_of_parts(parts, 0.25)
    assert (kept[0] + kept[1], held) == hold_out(list(range(40)), 0.25)
    assert set(kept[0]) < set(parts[0])
    with pytest.raises(UserError, match="found a source without any"):
        hold_out_of_parts([[1], [2], [3]], 0.5)


# Streams

SHAPE = (2, 3)


def write(path: pathlib.Path, name: str, count: int, *, array: bool = False) -> pathlib.Path:
    records = [{"text": name * (1 + i * 7 % 23) + str(i)} for i in range(count)]
    text = json.dumps(records) if array else "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(text)
    return path


def stream(how: Tokenising, *paths: pathlib.Path, **options: Any) -> Stream:
    given: dict[str, Any] = {"window": 16, "seed": 5, "weights": [2.0, 1.0][: len(paths)]} | options
    return Stream([opened(path) for path in paths], how, 32, **given)


def same(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a[:5], b[:5], strict=True))


def texts(batch: Batch, how: Tokenising) -> list[str]:
    """The documents of a batch."""
    found = []
    for ids, segments in zip(batch.input_ids.reshape(-1, 32), batch.segment_ids.reshape(-1, 32), strict=True):
        found += [how.tokenizer.decode(ids[segments == number]) for number in range(1, segments.max() + 1)]
    return found


@pytest.fixture
def files(tmp_path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    return write(tmp_path / "a.jsonl", "a", 30), write(tmp_path / "b.jsonl", "b", 50)


@pytest.mark.parametrize("pack", [True, False])
def test_a_stream_does_not_depend_on_the_form_or_on_when_it_is_read(pack, files, how, tmp_path):
    arrays = write(tmp_path / "a.json", "a", 30, array=True), write(tmp_path / "b.json", "b", 50, array=True)
    first, second = stream(how, *files, pack=pack), stream(how, *arrays, pack=pack)
    batches = [first.batch(step, SHAPE) for step in range(12)]
    assert all(same(batch, second.batch(step, SHAPE)) for step, batch in enumerate(batches))
    for step in (0, 11, 5, 5, 6, 3):  # any step may be asked for
        assert same(second.batch(step, SHAPE), batches[step])
    assert not same(stream(how, *files, seed=6).batch(0, SHAPE), stream(how, *files).batch(0, SHAPE))
    assert not same(stream(how, *files, window=17).batch(0, SHAPE), stream(how, *files).batch(0, SHAPE))


def test_a_stream_goes_on_in_the_middle(files, how):
    whole = stream(how, *files)
    batches, positions = [], []
    for step in range(15):
        batches.append(whole.batch(step, SHAPE))
        positions.append(json.loads(json.dumps(whole.position())))
    assert positions[-1]["taken"][0] > 30, "the test should go through a source more than once"
    for stopped in (0, 4, 9, 13):
        resumed = stream(how, *files)
        resumed.batch(0, SHAPE)  # as the compilation of the step does
        resumed.restore(positions[stopped])
        assert same(resumed.batch(stopped + 1, SHAPE), batches[stopped + 1])
        assert resumed.position() == positions[stopped + 1]


def test_a_stream_holds_each_record_once_in_a_pass(files, how):
    alone = stream(how, files[0], window=15)
    found = texts(alone.batch(0, (len(alone._window.sequences),)), how)
    assert len(found) == len(set(found)) == 15
    mixed = stream(how, *files, window=30)
    first = texts(mixed.batch(0, (len(mixed._window.sequences),)), how)
    assert Counter(text[0] for text in first) == {"a": 20, "b": 10}


def test_a_stream_without_anything_to_learn(how, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxmoe.data.stream._FRUITLESS", 20)
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "%s", "completion": "b"}\n' % ("a" * 40))
    with pytest.raises(UserError, match="data: expected at least one record with a token to learn, found none within"):
        stream(how, path, weights=None)
    path.write_text("\n")
    with pytest.raises(UserError, match=r"a\.jsonl: expected at least one record, found none"):
        stream(how, path, weights=None)


def test_a_bad_record_later_in_a_stream_is_named(files, how, monkeypatch):
    monkeypatch.setattr("jaxmoe.data.records._TOGETHER", 1)
    with files[0].open("a") as file:
        file.write('{"texts": 1}\n')
    late = stream(how, files[0], window=4)
    with pytest.raises(UserError, match=r"a\.jsonl:31: expected the keys"):
        [late.batch(step, SHAPE) for step in range(9)]
