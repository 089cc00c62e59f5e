"""Files from strangers: their code never runs, they cannot ask for time or memory, and every error is one line."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from convert.__main__ import main as convert
from convert.adapters import read_peft, write_peft
from convert.hf2jax import hf2jax, read_hf
from convert.safetensors_io import INDEX, SINGLE, read_header, write_file
from jaxmoe import limited
from jaxmoe.cli import arguments as cli
from jaxmoe.config import LoraConfig, Qwen3MoeConfig
from jaxmoe.data import forms
from jaxmoe.data.chat import load_tokenizer, render_chat
from jaxmoe.data.inputs import opened
from jaxmoe.data.json_records import MAX_LINE
from jaxmoe.errors import ConfigError, UserError, check_integer, check_number, shown
from jaxmoe.generate.__main__ import main as generate
from jaxmoe.generate.settings import generation_defaults
from jaxmoe.json_text import MAX_DEPTH, parse_json, read_json
from jaxmoe.routing import report
from jaxmoe.store.converted import read_converted, write_converted
from jaxmoe.store.files import check_links, output_folder
from jaxmoe.store.items import check_stored_array, read_item, write_item
from jaxmoe.train.metrics import MetricsLog
from peers.configs import random_adapters
from peers.make_checkpoint import TINY, make_checkpoint, write_tokenizer
from tests.conftest import ROOT

MODEL = TINY.replace(num_hidden_layers=1, num_experts=4)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_checkpoint(tmp_path_factory.mktemp("strangers") / "hf", MODEL)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    lora = LoraConfig(r=2, targets=("q_proj",))
    folder = tmp_path_factory.mktemp("strangers") / "peft"
    write_peft(folder, MODEL, lora, random_adapters(MODEL, lora))
    return folder


def copy(folder: pathlib.Path, to: pathlib.Path, **config: Any) -> pathlib.Path:
    shutil.copytree(folder, to)
    file = to / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return to


# Code


@pytest.mark.parametrize("config", [None, {}, {"model_type": "llama"}, {"model_type": "mine"}])
def test_code_of_a_checkpoint_never_runs(config, tmp_path, monkeypatch, caplog):
    write_tokenizer(tmp_path)
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    code += "from transformers import PreTrainedTokenizerFast as Mine\n"
    (tmp_path / "mine.py").write_text(code)
    mapped = {"auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"], "AutoConfig": "mine.Mine"}}
    settings = tmp_path / "tokenizer_config.json"
    raw = json.loads(settings.read_text()) | mapped | {"tokenizer_class": "Mine"}
    settings.write_text(json.dumps(raw))
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config | mapped))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    with contextlib.suppress(UserError):
        load_tokenizer(tmp_path)
    assert "auto_map: ignored, because code from a checkpoint never runs" in caplog.text
    assert not (tmp_path / "ran").exists()
    assert sys.stdin.read() == "y\n" * 100  # nothing was asked


def test_generation_checks_the_config_before_the_tokenizer(tmp_path):
    write_tokenizer(tmp_path)
    for content, found in ((None, "file not found: .*config.json"), ("{}", "model_type: expected 'qwen3_moe'")):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=found):
            generate(["--model", str(tmp_path), "--prompt", "x"])


# Time and memory

TEMPLATES = {
    "{{ 'a' * 10**11 }}": "more than 1 GiB of memory",
    "{{ 'a' * 17000000 }}": "more than 16,777,216 characters",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}": "1 GiB of memory",
    "{{ 'x'.center(10**10) }}": "more than 1 GiB of memory",
    "{{ 1 / 0 }}": "division by zero",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "nested too deeply",
    "{% for %}": "[Ee]xpected",
    "{{ messages.x.y }}": "has no attribute",
    "{{ raise_exception(messages) }}": "role",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_is_bounded(template, hf):
    tokenizer = load_tokenizer(hf)
    tokenizer.chat_template = template
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"^chat template: cannot render these messages: .*({TEMPLATES[template]})"):
        render_chat(tokenizer, [{"role": "user", "content": "a"}])
    assert time.monotonic() - start < 20


def test_time_is_bounded():
    worker = limited._Worker(seconds=1)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    backtracks = {"task": "first_match", "patterns": ["(a+)+$x"], "names": ["a" * 60]}
    for request in ({"task": "render", "template": loops, "variables": {}}, backtracks):
        with pytest.raises(UserError, match="needs too much time or memory"):
            worker.ask(request)
    # The next one starts a new process.
    assert worker.ask({"task": "first_match", "patterns": ["b", r".*\.q"], "names": ["a.q"]}) == 1
    worker._end()


def test_time_is_bounded_where_the_system_does_not_count_it(monkeypatch):
    monkeypatch.setattr(limited, "WALL_SECONDS", 0.5)
    worker = limited._Worker(seconds=600)
    backtracks = {"task": "first_match", "patterns": ["(a+)+$x"], "names": ["a" * 60]}
    for request in (backtracks, backtracks):  # the second one has a process, and a limit, of its own
        with pytest.raises(UserError, match="needs too much time or memory"):
            worker.ask(request)
    worker._end()


def test_patterns_match_as_peft_matches_them():
    for pattern, name in (("q", "a.q"), ("q", "aq"), ("a.q", "a.q"), ("a|b", "x.b"), (".*q", "zq"), ("^q", "q")):
        found = limited.first_match([pattern], [name])
        assert (found == 0) == bool(re.match(rf"(.*\.)?({pattern})$", name))
    with pytest.raises(UserError, match="expected a regular expression, found '\\('"):
        limited.first_match(["("], ["a"])


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_experts"])
@pytest.mark.parametrize("value", [900, 60_000, 10**9, 10**30])
def test_a_config_cannot_ask_for_more_than_there_is(name, value, hf, tmp_path):
    start = time.monotonic()
    with pytest.raises(UserError, match=f"expected .*{name}|{name}: expected"):
        read_hf(copy(hf, tmp_path / "hf", **{name: value}))
    assert time.monotonic() - start < 5


def test_a_long_line_is_not_read(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'{"text": "' + b"a" * MAX_LINE + b'"}\n')
    with pytest.raises(UserError, match=r"data.jsonl:1: expected a line of at most 16 MiB, found a longer one"):
        list(opened(tmp_path / "data.jsonl").read(0))


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt", "generation_config.json", "chat_template.jinja"])
def test_an_endless_file_beside_the_weights_is_not_copied(name, tmp_path):
    make_checkpoint(tmp_path / "hf", MODEL)
    with open(tmp_path / "hf" / name, "ab") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=rf"{name}: expected at most 100 MiB"):
        hf2jax(tmp_path / "hf", tmp_path / "jax")
    assert not (tmp_path / "jax").exists()


def test_an_array_is_compared_before_memory_is_taken(tmp_path):
    entries = write_item(tmp_path / "item", {"a": np.ones((3, 4), np.float32)})
    check_stored_array(tmp_path / "item" / "a", [3, 4], "float32")
    chunk = next(file for file in (tmp_path / "item" / "a").iterdir() if file.name != ".zarray")
    size = chunk.stat().st_size
    os.truncate(chunk, 2**40)
    with pytest.raises(UserError, match="expected files of at most"):
        check_stored_array(tmp_path / "item" / "a", [3, 4], "float32")
    os.truncate(chunk, size)
    file = tmp_path / "item" / "a" / ".zarray"
    raw = json.loads(file.read_text())
    huge = {"shape": [2 * 10**11], "dtype": "float32", "digest": ""}
    for change, entry, found in (
        ({"shape": [2 * 10**11]}, entries["a"], "shape: expected"),
        ({"shape": [2 * 10**11], "chunks": [10**6]}, huge, "files with chunks"),
        ({"shape": [2 * 10**11], "chunks": [2 * 10**11]}, huge, "expected chunks that can hold"),
        ({"chunks": [0, 4]}, entries["a"], "chunks: expected"),
        ({"chunks": 5}, entries["a"], "chunks: expected"),
    ):
        file.write_text(json.dumps(raw | change))
        with pytest.raises(UserError, match=found):
            read_item(tmp_path / "item", {"a": entry}, verify=True)


@pytest.mark.parametrize("text", ["1" * 5000, str(2**63), "-" + "9" * 30, "1e3", ""])
def test_a_whole_number_of_a_flag_has_63_bits(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number"):
        cli.whole_number(text)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
def test_a_number_of_a_flag_is_finite(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a finite number"):
        cli.finite_number(text)


# One line

JSON_TEXTS = {
    "deep lists": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "just too deep": "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
    "a long integer": "1" * 5000,
    "no JSON": "{",
    "no UTF-8": b"\xff",
}


@pytest.mark.parametrize("name", JSON_TEXTS)
def test_json_of_strangers(name):
    with pytest.raises(ConfigError, match=r"^file\.json: expected JSON"):
        parse_json(JSON_TEXTS[name], "file.json")


def test_json_as_deep_as_allowed():
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x") != parse_json("[[1], {}]" + " " * 200, "x")
    assert parse_json("[" + "{}," * 300 + "1]", "x")[-1] == 1


def test_numbers_that_python_cannot_show_or_hold():
    for value in (10**400, True, "1", None, float("nan"), 10**5000):
        with pytest.raises(ConfigError, match="field: expected a number"):
            check_number("field", value)
        with pytest.raises(ConfigError, match="field: expected a whole number"):
            check_integer("field", value, at_least=0)
    assert len(shown("x" * 10**6)) == 300


LONG = "x" * 5000
FIELDS = {
    "config.json": "dtype torch_dtype model_type hidden_act mlp_only_layers layer_types num_local_experts rope_scaling"
    " rope_theta use_sliding_window vocab_size tie_word_embeddings quantization_config eos_token_id head_dim",
    "generation_config.json": "eos_token_id temperature do_sample num_beams bad_words_ids sequence_bias max_new_tokens",
    "adapter_config.json": "peft_type task_type bias init_lora_weights modules_to_save r use_dora target_modules",
}


@pytest.mark.parametrize(("file", "name"), [(file, name) for file in FIELDS for name in FIELDS[file].split()])
def test_long_values_are_cut(file, name, hf, adapter, tmp_path):
    shutil.copytree(adapter if file == "adapter_config.json" else hf, tmp_path / "x")
    path = tmp_path / "x" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: LONG}))
    readers = {
        "config.json": read_hf,
        "generation_config.json": generation_defaults,
        "adapter_config.json": lambda folder: read_peft(folder, MODEL),
    }
    with pytest.raises(UserError, match="expected") as caught:
        readers[file](tmp_path / "x")
    assert len(str(caught.value)) < 1500
    assert str(caught.value).startswith(str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"added_tokens_decoder": 3}'),
        ("tokenizer_config.json", '{"chat_template": 3, "eos_token": "a"}'),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": ' + "[" * 100_000),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'),
    ],
)
def test_wrong_types_in_a_tokenizer_are_one_line(file, content, tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}[^\n]*$"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_git_did_not_download(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 11\n")
    with pytest.raises(UserError, match=r"tokenizer\.json: expected a tokenizer, found a Git LFS pointer[^\n]*$"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"r": 10**400},
        {"r": "8"},
        {"lora_alpha": True},
        {"rank_pattern": {"q_proj": "x"}},
        {"alpha_pattern": {"q_proj": 10**400}},
        {"rank_pattern": ["q_proj"]},
        {"peft_type": {"a": 1}},
        {"base_model_name_or_path": 5},
    ],
)
def test_wrong_types_in_an_adapter_are_one_line(change, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=rf"adapter_config\.json.*{next(iter(change))}"):
        read_peft(tmp_path / "peft", MODEL)


def test_a_bad_line_of_the_metrics_is_named(tmp_path):
    for line, found in (
        ('{"step": 1e400}', "expected an object with a step"),
        ('{"loss": 1}', "expected an object with a step"),
        ("[1]", "expected an object with a step"),
        ("{", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ("a" * 2**21, "expected a line of at most"),
    ):
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": 0}}\n{line}\n')
        with pytest.raises(UserError, match=rf"metrics.jsonl:2: {found}"):
            MetricsLog(tmp_path, keep_to=5)


@pytest.mark.parametrize(
    "line", ["a,1,0.5", "1,-1,0.5", "1,1,x", "1,1,nan", "1", "99999999999,1,0.5", "1," + "9" * 5000 + ",0", "1,65000,0"]
)
def test_a_bad_line_of_the_effects_is_named(line, tmp_path):
    file = tmp_path / "effects.csv"
    more = "".join(f"{layer},65000,0.1\n" for layer in range(20)) if line == "1,65000,0" else ""
    file.write_text(f"layer,expert,change\n{line}\n{more}")
    with pytest.raises(UserError, match=rf"{re.escape(str(file))}(:2)?: .*expected"):
        report._read_effects(file)


def test_a_data_folder_is_not_searched_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(forms.os, "walk", lambda path: itertools.repeat((path, [], ["a.txt"])))
    assert not forms.holds_data(tmp_path)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e400", "-1" + "0" * 400])
def test_numbers_that_the_library_refuses(number, tmp_path):
    from safetensors import SafetensorError, safe_open

    file = tmp_path / "x.safetensors"
    header = f'{{"a": {{"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "more": {number}}}}}'.encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    with pytest.raises(SafetensorError), safe_open(file, framework="numpy"):
        pass
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}: safetensors header: .*expected finite numbers"):
        read_header(file)


@pytest.mark.parametrize("metadata", [[], {"a": 1}, "x", None, {"a": ["x"]}])
def test_metadata_that_the_library_refuses(metadata, tmp_path):
    from safetensors import SafetensorError, safe_open

    file = tmp_path / "x.safetensors"
    header = json.dumps({"__metadata__": metadata, "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    refused = False
    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError:
        refused = True
    if refused:
        with pytest.raises(UserError, match="__metadata__: expected an object of texts"):
            read_header(file)
    else:
        assert set(read_header(file)) == {"a"}


# Model folders


def shards(folder: pathlib.Path, to: pathlib.Path) -> dict[str, str]:
    """Copies a model with two shards; returns the weight_map of its index."""
    shutil.copytree(folder, to)
    tensors = {name: tensor.read().copy() for name, tensor in read_header(to / SINGLE).items()}
    (to / SINGLE).unlink()
    names = list(tensors)
    parts = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, part in parts.items():
        write_file(to / file, {name: tensors[name] for name in part}, {})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (to / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize(
    "name", ["../b.safetensors", "/etc/passwd", "x/b.safetensors", "", "..", "a\0b", "\ud800", "x" * 256]
)
def test_an_index_names_files_of_its_folder(name, hf, tmp_path):
    weight_map = shards(hf, tmp_path / "hf")
    read_hf(tmp_path / "hf")
    (tmp_path / "hf" / INDEX).write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": name}}))
    with pytest.raises(UserError, match=rf"{INDEX}: expected names of files in its folder, found .*, which is none$"):
        read_hf(tmp_path / "hf")


INDEXES = {
    "a tensor of the other shard": (
        {"model.norm.weight": "a.safetensors"},
        "model.norm.weight: expected it in a.safeten",
    ),
    "a tensor of no shard": (
        {"model.more": "a.safetensors"},
        "model.more: expected it in a.safetensors, as weight_map",
    ),
    "a tensor that is not listed": ({"model.norm.weight": None}, "model.norm.weight: expected it in weight_map"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_does_not_fit_is_named(case, hf, tmp_path):
    changes, says = INDEXES[case]
    weight_map = shards(hf, tmp_path / "hf") | changes
    kept = {key: file for key, file in weight_map.items() if file is not None}
    (tmp_path / "hf" / INDEX).write_text(json.dumps({"weight_map": kept}))
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / 'hf' / INDEX))}: {says}"):
        read_hf(tmp_path / "hf")


def test_a_tensor_in_two_shards_is_named(hf, tmp_path):
    shards(hf, tmp_path / "hf")
    both = {
        name: tensor.read()
        for file in "ab"
        for name, tensor in read_header(tmp_path / "hf" / f"{file}.safetensors").items()
    }
    write_file(tmp_path / "hf" / "b.safetensors", both, {})
    with pytest.raises(
        UserError, match=r"b\.safetensors: .*: expected it in one file, found it in a\.safetensors too$"
    ):
        read_hf(tmp_path / "hf")


@pytest.mark.parametrize(
    ("renamed", "says"),
    [
        ({SINGLE: "model.fp16.safetensors"}, r"only model\.fp16\.safetensors \(if it is the whole model, rename it"),
        (
            {SINGLE: "model-1.safetensors", "config.json": "model-2.safetensors"},
            "2 files such as model-1.*, but no index",
        ),
    ],
)
def test_weights_under_other_names_are_named(renamed, says, hf, tmp_path):
    shutil.copytree(hf, tmp_path / "hf")
    for name, other in renamed.items():
        (tmp_path / "hf" / name).rename(tmp_path / "hf" / other)
    with pytest.raises(UserError, match=says):
        read_hf(tmp_path / "hf")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty one"),
        (b"abc", "a file that starts with 'abc'"),
        (b"<!DOCTYPE html>" + b" " * 100, "a file that starts with '<!DOCTYP'"),
        (b"Entry not found" + b" " * 100, "a file that starts with 'Entry no'"),
    ],
)
def test_what_was_downloaded_in_place_of_weights_is_named(content, found, tmp_path):
    file = tmp_path / SINGLE
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}: expected a safetensors file, found {found}$"):
        read_header(file)


WEIGHTS: dict[str, tuple[Any, str]] = {
    "shape": (lambda w: w[:-1], r"expected shape \[\d+, \d+\], as config\.json says, found \[\d+, \d+\]"),
    "no elements": (lambda w: w[:0], r"expected shape \[\d+, \d+\], as config\.json says, found \[0, \d+\]"),
    "dtype": (lambda w: w.astype(np.float16), "expected F32 as in .*, found F16"),
    "codes": (lambda w: w.astype(np.uint8), "expected one of F32, BF16, F16, found U8"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_weight_that_does_not_fit_is_named_with_its_file(case, hf, tmp_path):
    change, says = WEIGHTS[case]
    shutil.copytree(hf, tmp_path / "hf")
    file, name = tmp_path / "hf" / SINGLE, "model.layers.0.mlp.experts.3.up_proj.weight"
    tensors = {key: tensor.read().copy() for key, tensor in read_header(file).items()}
    write_file(file, tensors | {name: change(tensors[name])}, {})
    with pytest.raises(UserError, match=f"^{re.escape(f'{file}: {name}')}: {says}"):
        read_hf(tmp_path / "hf")


def test_a_head_that_may_be_tied_is_told_of(hf, tmp_path):
    shutil.copytree(hf, tmp_path / "hf")
    tensors = {key: tensor.read().copy() for key, tensor in read_header(tmp_path / "hf" / SINGLE).items()}
    del tensors["lm_head.weight"]
    write_file(tmp_path / "hf" / SINGLE, tensors, {})
    with pytest.raises(
        UserError, match=r"missing tensor lm_head\.weight .*set tie_word_embeddings to true in config\.json$"
    ):
        read_hf(tmp_path / "hf")


def test_a_folder_of_something_else_is_named(adapter, tmp_path):
    with pytest.raises(
        UserError, match=r"config\.json \(the folder holds an adapter: give the folder of its base model"
    ):
        generate(["--model", str(adapter), "--prompt", "x"])
    (tmp_path / "x-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"config\.json \(the folder holds x-Q4_K_M\.gguf: GGUF is not supported"):
        generate(["--model", str(tmp_path), "--prompt", "x"])


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_base_model_that_no_path_can_name(name, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))
    with pytest.raises(UserError, match=r"expected a path, found a text that is none$"):
        convert(["peft2jax", str(tmp_path / "peft"), str(tmp_path / "jax")])
    assert not (tmp_path / "jax").exists()


def test_the_file_of_a_tokenizer_that_is_broken_is_named(tmp_path):
    for name in ("tokenizer.json", "special_tokens_map.json", "added_tokens.json"):
        folder = tmp_path / name
        folder.mkdir()
        write_tokenizer(folder)
        (folder / name).write_text("[")
        with pytest.raises(UserError, match=rf"^{re.escape(str(folder / name))}: expected JSON, found no value"):
            load_tokenizer(folder)


def test_what_a_template_raises_is_one_line(hf):
    tokenizer = load_tokenizer(hf)
    tokenizer.chat_template = "{{ raise_exception('no\n\nway') }}"
    with pytest.raises(UserError, match=r"^chat template: cannot render these messages: no way$"):
        render_chat(tokenizer, [{"role": "user", "content": "a"}])


# Links


def test_links_out_of_our_folders_are_refused(hf, tmp_path):
    write_converted(tmp_path / "jax", read_hf(hf), {"config.json": hf / "config.json"})
    read_converted(tmp_path / "jax")
    inner = tmp_path / "jax" / "layers" / "00000"
    inside = tmp_path / "jax" / "again"
    inside.symlink_to("config.json")
    check_links(tmp_path / "jax")
    for target, place in ((tmp_path / "elsewhere", inner / "x"), (hf / "config.json", tmp_path / "jax" / "y")):
        place.symlink_to(target)
        with pytest.raises(UserError, match=f"{place}: expected a file of this folder, found a link to "):
            read_converted(tmp_path / "jax")
        place.unlink()


def test_links_in_a_circle_are_one_line(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises((UserError, OSError)), output_folder(loop / "x"):
        pass
    with pytest.raises((UserError, OSError)):
        Qwen3MoeConfig.from_pretrained(loop)
    with pytest.raises((UserError, OSError)):
        read_json(loop)
    with pytest.raises((UserError, OSError)):
        read_hf(loop)
    with pytest.raises((UserError, OSError)):
        read_peft(loop, MODEL)


# Streams


def test_closed_and_narrow_streams():
    code = "from jaxmoe.cli.arguments import run\ndef main():\n    print('\\u4e2d', '\\udcff')\nrun(main)\n"
    command = [sys.executable, "-S", "-c", code]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\u4e2d \\udcff\n", b"")
    shell = ["sh", "-c", '"$0" -S -c "$1" >&- 2>&-', sys.executable, code]
    closed = subprocess.run(shell, env=environment, check=False)
    assert closed.returncode == 0


def test_a_sample_of_the_trials(capsys, tmp_path):
    """Eight kinds of `make fuzz` once each, in this process."""
    import random

    from reliability import fuzz

    fuzz.prepare(tmp_path)
    for number, kind in enumerate(name for name in fuzz._KINDS if name not in ("training checkpoint", "environment")):
        own = tmp_path / f"trial-{number}"
        own.mkdir()
        found = fuzz._KINDS[kind](own, tmp_path, random.Random(number), kind)
        assert found.verdict != "wrong", found


def test_the_trials_notice_what_is_wrong(tmp_path):
    """The controls: a traceback, a second line, another exit code and other numbers are wrong."""
    from reliability.fuzz import _difference
    from reliability.observe import judge, observe

    def bug() -> None:
        raise KeyError("x")

    def refusal() -> None:
        raise UserError("field: expected a, found b")

    assert "KeyError" in observe(bug, tmp_path).wrong
    assert observe(refusal, tmp_path)[::2] == (2, "") and observe(lambda: None, tmp_path).accepted
    assert judge(2, "a\nb\n", 0, 0).wrong and judge(1, "", 0, 0).wrong and judge(0, "", 99, 0).wrong
    assert judge(0, "", 0, 2**31).wrong and not judge(2, "a\n", 0, 0).wrong
    one = {"a": np.zeros(2)}
    assert not _difference(one, {"a": np.zeros(2)}) and _difference(one, {"a": np.ones(2)}) and _difference(one, {})
