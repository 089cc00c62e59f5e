"""Converting whole checkpoints: exact round trips, dtypes, and every kind of bad input."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import convert.names
from convert.__main__ import main
from convert.adapters import write_peft
from convert.hf2jax import hf2jax, read_hf
from convert.hub import local_folder
from convert.jax2hf import jax2hf, parse_size
from convert.not_finite import first_not_finite
from convert.safetensors_io import Tensor, open_folder, read_header, write_file
from jaxmoe.config import LoraConfig, Qwen3MoeConfig
from jaxmoe.data.chat import chat_text, load_tokenizer
from jaxmoe.errors import UserError
from jaxmoe.store.converted import read_converted
from peers.make_checkpoint import TINY, hf_shapes, make_checkpoint
from tests.conftest import ROOT
from tests.test_adapters import random_adapters
from tests.tolerances import bound

MIXED = TINY.replace(num_hidden_layers=5, decoder_sparse_step=2, mlp_only_layers=(3,))
CASES: dict[str, tuple[Qwen3MoeConfig, dict[str, Any]]] = {
    "plain": (TINY, {}),
    "bfloat16 in shards": (TINY, {"dtype": "bfloat16", "shards": 3}),
    "float16": (TINY, {"dtype": "float16"}),
    "mixed dense and sparse": (MIXED, {"dtype": "bfloat16"}),
    "dense only": (TINY.replace(num_experts=0), {}),
    "tied": (TINY.replace(tie_word_embeddings=True), {"shards": 2}),
    "biases": (TINY.replace(attention_bias=True), {"dtype": "bfloat16"}),
    "fused experts": (MIXED, {"layout": "fused", "shards": 2}),
    "odd sizes": (TINY.replace(hidden_size=33, vocab_size=301, num_experts=7), {"dtype": "bfloat16"}),
}
COPIED = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


def contents(folder: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (t.code, t.shape, t.data.tobytes()) for name, t in open_folder(folder).items()}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_exact(case: str, tmp_path: pathlib.Path) -> None:
    config, options = CASES[case]
    src = make_checkpoint(tmp_path / "hf", config, **options)
    main(["hf2jax", str(src), str(tmp_path / "jax")])
    main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "back"), "--max-shard-size", "150KB"])
    assert contents(tmp_path / "back") == contents(src)
    for name in COPIED:
        assert (tmp_path / "back" / name).read_bytes() == (src / name).read_bytes()
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1
    main(["inspect", str(src)])
    main(["inspect", str(tmp_path / "jax")])


def test_a_wrong_table_would_be_noticed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: gate and up swapped on the way in and not on the way out."""
    src = make_checkpoint(tmp_path / "hf", TINY)
    with monkeypatch.context() as patch:
        patch.setitem(convert.names._EXPERT, "sparse.gate_up_proj", ("up_proj", "gate_proj"))
        hf2jax(src, tmp_path / "jax")
    jax2hf(tmp_path / "jax", tmp_path / "back")
    assert contents(tmp_path / "back").keys() == contents(src).keys()
    assert contents(tmp_path / "back") != contents(src)


def test_arrays_are_those_that_transformers_holds(tmp_path: pathlib.Path) -> None:
    transformers = pytest.importorskip("transformers")
    src = make_checkpoint(tmp_path / "hf", MIXED)
    hf2jax(src, tmp_path / "jax")
    state = transformers.AutoModelForCausalLM.from_pretrained(
        src, use_safetensors=True, trust_remote_code=False
    ).state_dict()
    seen = set()
    for block in read_converted(tmp_path / "jax").blocks():
        for row in convert.names.rows(MIXED, block.layer, "fused"):
            np.testing.assert_array_equal(block.arrays[row.path], state[row.key].numpy(), err_msg=row.key)
            seen.add(row.key)
    assert seen == set(state)


def test_both_layouts_give_the_same_arrays(tmp_path: pathlib.Path) -> None:
    a = read_hf(make_checkpoint(tmp_path / "a", MIXED))
    b = read_hf(make_checkpoint(tmp_path / "b", MIXED, layout="fused"))
    for x, y in zip(a.blocks(), b.blocks(), strict=True):
        assert x.arrays.keys() == y.arrays.keys()
        assert all(np.array_equal(x.arrays[name], y.arrays[name]) for name in x.arrays)


def test_a_tied_head_that_is_stored_comes_back(tmp_path: pathlib.Path) -> None:
    src = make_checkpoint(tmp_path / "hf", TINY.replace(tie_word_embeddings=True))
    edit_tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))(src)
    hf2jax(src, tmp_path / "jax")
    assert "lm_head" not in read_converted(tmp_path / "jax").dtypes
    jax2hf(tmp_path / "jax", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(src)


def test_parameters_may_differ_in_dtype_between_stacks(tmp_path: pathlib.Path) -> None:
    """A router in float32 beside bfloat16 experts: each keeps its dtype, and every tensor stays aligned."""
    src = make_checkpoint(tmp_path / "hf", TINY.replace(hidden_size=33), dtype="bfloat16")
    edit_tensors(lambda t: t.update({k: v.astype(np.float32) for k, v in t.items() if ".mlp.gate." in k}))(src)
    hf2jax(src, tmp_path / "jax")
    assert read_converted(tmp_path / "jax").dtypes["sparse.gate"] == np.float32
    jax2hf(tmp_path / "jax", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(src)
    from safetensors.numpy import load_file

    assert load_file(tmp_path / "back" / "model.safetensors").keys() == contents(src).keys()


@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
def test_a_cast_is_that_of_torch(source: str, target: str, tmp_path: pathlib.Path) -> None:
    torch = pytest.importorskip("torch")
    src = make_checkpoint(tmp_path / "hf", TINY, dtype=source)

    def plant_ties(tensors: dict[str, np.ndarray]) -> None:
        # values half-way between two bfloat16 numbers, on either side of an even one, and denormal ones
        row = np.array([0x3F808000, 0x3F818000, 0x3F80FFFF, 0xBF808001, 0x00000001, 0x33000000], np.uint32)
        tensors["lm_head.weight"][0, : row.size] = row.view(np.float32).astype(tensors["lm_head.weight"].dtype)

    edit_tensors(plant_ties)(src)
    main(["hf2jax", str(src), str(tmp_path / "jax"), "--dtype", target])
    jax2hf(tmp_path / "jax", tmp_path / "back")
    from safetensors.torch import load_file

    before = load_file(src / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == getattr(torch, target)
        assert torch.equal(after[name].view(torch.uint8), tensor.to(getattr(torch, target)).view(torch.uint8)), name
    raw = json.loads((src / "config.json").read_text())
    assert json.loads((tmp_path / "jax" / "config.json").read_text()) == raw | {"dtype": target}
    for checkpoint in (read_hf(src, target), read_converted(tmp_path / "jax", "float32")):
        wanted = np.dtype(target if checkpoint.path == src else "float32")
        assert all(array.dtype == wanted for block in checkpoint.blocks() for array in block.arrays.values())


NOT_FINITE: dict[str, tuple[dict[str, Any], list[str], str, float]] = {
    # options of make_checkpoint, flags, the tensor that is changed, its value
    "an expert's up_proj": ({"dtype": "bfloat16"}, [], "model.layers.0.mlp.experts.2.up_proj.weight", np.nan),
    "fused experts": ({"layout": "fused"}, [], "model.layers.0.mlp.experts.down_proj", -np.inf),
    "a norm": ({"dtype": "float16"}, [], "model.norm.weight", np.inf),
    "quantised on the way": (
        {"dtype": "bfloat16"},
        ["--quantize", "nf4"],
        "model.layers.0.mlp.experts.3.down_proj.weight",
        np.nan,
    ),
    "cast on the way": ({}, ["--dtype", "bfloat16"], "model.layers.0.mlp.gate.weight", np.nan),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_the_first_tensor_that_is_not_finite_is_named(
    case: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    options, flags, key, value = NOT_FINITE[case]
    src = make_checkpoint(tmp_path / "hf", TINY, **options)
    hf2jax(src, tmp_path / "finite")
    assert not caplog.messages

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[key].reshape(-1)[-1] = value
        tensors["model.layers.1.self_attn.o_proj.weight"][...] = value  # a later one is not named

    edit_tensors(change)(src)
    main(["hf2jax", str(src), str(tmp_path / "jax"), *flags])
    (line,) = [line for line in caplog.messages if "finite" in line]
    assert line == f"{src}: {key}: holds {value}, the first value that is not finite; the conversion goes on"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
def test_values_that_are_not_finite_are_found(dtype: str) -> None:
    largest = float(ml_dtypes.finfo(np.dtype(dtype)).max)
    array = np.full((3, 100_000), -largest, dtype)
    assert first_not_finite(array) is None
    for value in (np.nan, -np.nan, *(() if dtype == "float8_e4m3fn" else (np.inf, -np.inf))):
        array[:] = largest
        array[2, 70_001] = array[2, 70_005] = value
        assert first_not_finite(array) == (2, 70_001)


def test_the_config_of_transformers_4_keeps_its_spelling(tmp_path: pathlib.Path) -> None:
    src = make_checkpoint(tmp_path / "hf", TINY)
    raw = json.loads((src / "config.json").read_text())
    raw["torch_dtype"] = raw.pop("dtype")
    raw["num_local_experts"] = raw.pop("num_experts")
    (src / "config.json").write_text(json.dumps(raw))
    hf2jax(src, tmp_path / "jax", "bfloat16")
    assert json.loads((tmp_path / "jax" / "config.json").read_text()) == raw | {"torch_dtype": "bfloat16"}


def test_a_merge_on_the_way_out(tmp_path: pathlib.Path) -> None:
    """jax2hf --adapter: the targeted weights change by the delta; no bit of the others changes."""
    src = make_checkpoint(tmp_path / "hf", MIXED)
    lora = LoraConfig(r=2, alpha=4.0, targets=("q_proj", "experts.down_proj"))
    adapters = random_adapters(MIXED, lora)
    write_peft(tmp_path / "peft", MIXED, lora, adapters)
    hf2jax(src, tmp_path / "jax")
    main(["peft2jax", str(tmp_path / "peft"), str(tmp_path / "adapter"), "--model", str(src)])
    main(["jax2peft", str(tmp_path / "adapter"), str(tmp_path / "peft2")])
    assert (tmp_path / "peft2" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "peft" / "adapter_model.safetensors"
    ).read_bytes()
    for adapter, out in (("peft", "a"), ("adapter", "b")):
        main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / out), "--adapter", str(tmp_path / adapter)])
    merged, before = open_folder(tmp_path / "a"), open_folder(src)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    for name, tensor in before.items():
        delta = merged[name].read() - tensor.read()
        if ".q_proj." in name:
            layer = int(name.split(".")[2])
            a, b = (adapters[f"attention.q_proj.lora_{x}"][layer] for x in "AB")
        elif ".experts." in name and "down_proj" in name:
            layer, expert = int(name.split(".")[2]), int(name.split(".")[5])
            a, b = (adapters[f"sparse.down_proj.lora_{x}"][MIXED.sparse_layers.index(layer), expert] for x in "AB")
        else:
            assert not delta.any(), name
            continue
        np.testing.assert_allclose(delta, 2 * b @ a, rtol=0, atol=bound("merge_delta_fp32"))
    main(["inspect", str(tmp_path / "peft")])
    main(["inspect", str(tmp_path / "adapter"), "--json"])


def test_inspect_counts(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = make_checkpoint(tmp_path / "hf", MIXED, dtype="bfloat16")
    expected = sum(int(np.prod(shape)) for shape in hf_shapes(MIXED).values())
    main(["hf2jax", str(src), str(tmp_path / "jax")])
    capsys.readouterr()
    for folder in (src, tmp_path / "jax"):
        main(["inspect", str(folder), "--json"])
        report = json.loads(capsys.readouterr().out)
        assert (report["parameters"], report["bytes"]) == (expected, 2 * expected)
        assert (report["config"]["sparse_layers"], report["config"]["dense_layers"]) == (1, 4)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("2GiB", 2**31), ("1.5 mb", 1_500_000), ("300", 300)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5XB", "0", "5GB5"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UserError):
        parse_size(text)


def test_shards_are_filled_in_order_and_a_large_tensor_has_its_own(tmp_path: pathlib.Path) -> None:
    src = make_checkpoint(tmp_path / "hf", TINY)
    hf2jax(src, tmp_path / "jax")
    jax2hf(tmp_path / "jax", tmp_path / "back", max_shard_size=30_000)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.data.nbytes for t in open_folder(src).values())
    for file in (tmp_path / "back").glob("*.safetensors"):
        tensors = read_header(file)
        assert sum(t.data.nbytes for t in tensors.values()) <= 30_000 or len(tensors) == 1


# --- bad input


def edit_tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[pathlib.Path], None]:
    """Rewrites the shard that `change` applies to: the last one, or the only one."""

    def apply(folder: pathlib.Path) -> None:
        file = sorted(folder.glob("*.safetensors"))[-1]
        tensors = {name: tensor.read().copy() for name, tensor in read_header(file).items()}
        change(tensors)
        write_file(file, tensors, {"format": "pt"})

    return apply


def edit_json(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[pathlib.Path], None]:
    def apply(folder: pathlib.Path) -> None:
        raw = json.loads((folder / name).read_text())
        change(raw)
        (folder / name).write_text(json.dumps(raw))

    return apply


def edit_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[pathlib.Path], None]:
    """Changes the header of the last shard but not the bytes of its tensors."""

    def apply(folder: pathlib.Path) -> None:
        file = sorted(folder.glob("*.safetensors"))[-1]
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        encoded = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])

    return apply


def edit_bytes(change: Callable[[bytes], bytes]) -> Callable[[pathlib.Path], None]:
    def apply(folder: pathlib.Path) -> None:
        file = sorted(folder.glob("*.safetensors"))[-1]
        file.write_bytes(change(file.read_bytes()))

    return apply


def point_index(key: str, file: str) -> Callable[[pathlib.Path], None]:
    return edit_json("model.safetensors.index.json", lambda raw: raw["weight_map"].update({key: file}))


def only_pickles(folder: pathlib.Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def remove(name: str) -> Callable[[pathlib.Path], None]:
    return lambda folder: (folder / name).unlink()


def shift(header: dict[str, Any], by: int) -> None:
    entry = header["lm_head.weight"]
    entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]


SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
UP = "model.layers.2.mlp.experts.7.up_proj.weight"
# what is done to a checkpoint of two shards, and what the one-line error must say
BAD: dict[str, tuple[Callable[[pathlib.Path], Any], tuple[str, ...]]] = {
    "no folder": (shutil.rmtree, ("hf",)),
    "no weights": (remove("model.safetensors.index.json"), ("model.safetensors",)),
    "only pickles": (only_pickles, ("pytorch_model.bin", "are not read", "save_pretrained")),
    "missing key": (edit_tensors(lambda t: t.pop(UP)), (UP, SHARD_2)),
    "missing key, also from the index": (
        lambda folder: (
            edit_tensors(lambda t: t.pop(UP))(folder),
            edit_json("model.safetensors.index.json", lambda raw: raw["weight_map"].pop(UP))(folder),
        ),
        (UP, "missing tensor"),
    ),
    "key that the index lacks": (edit_tensors(lambda t: t.update({"extra": np.zeros(3, np.float32)})), ("extra",)),
    "unexpected key": (
        lambda folder: (
            edit_tensors(lambda t: t.update({"extra": np.zeros(3, np.float32)}))(folder),
            point_index("extra", SHARD_2)(folder),
        ),
        ("unexpected", "extra"),
    ),
    "layer too many": (edit_json("config.json", lambda raw: raw.update(num_hidden_layers=2)), ("model.layers.2.",)),
    "expert too few": (edit_json("config.json", lambda raw: raw.update(num_experts=9)), ("experts.8.", "missing")),
    "duplicate key": (
        edit_tensors(lambda t: t.update({"model.embed_tokens.weight": np.zeros((320, 32), np.float32)})),
        ("model.embed_tokens.weight", SHARD_1, SHARD_2),
    ),
    "duplicate key in a header": (
        edit_bytes(lambda data: data[:8] + data[8:].replace(b'"model.norm.weight"', b'"lm_head.weight"   ', 1)),
        ("lm_head.weight", "twice"),
    ),
    "wrong shape": (edit_tensors(lambda t: t.update({UP: t[UP].T.copy()})), (UP, "[24, 32]", "[32, 24]")),
    "wrong dtype": (edit_tensors(lambda t: t.update({UP: t[UP].view(np.float16)})), (UP,)),
    "integers": (edit_header(lambda h: h[UP].update(dtype="I32")), (UP, "I32")),
    "float8": (
        edit_header(lambda h: h["model.norm.weight"].update(dtype="F8_E4M3", shape=[128])),
        ("model.norm.weight",),
    ),
    "unknown dtype": (edit_header(lambda h: h[UP].update(dtype="F7")), (UP, "F7")),
    "dtypes mixed in a stack": (
        edit_tensors(lambda t: t.update({UP: t[UP].astype(ml_dtypes.bfloat16)})),
        (UP, "BF16", "model.layers.0.mlp.experts.0.gate_proj.weight", "F32"),
    ),
    "truncated shard": (edit_bytes(lambda data: data[:-1]), (SHARD_2, "truncated")),
    "shard with a tail": (edit_bytes(lambda data: data + b"x"), (SHARD_2, "too long")),
    "shard cut in its header": (edit_bytes(lambda data: data[:100]), (SHARD_2, "header")),
    "empty shard": (edit_bytes(lambda data: b""), (SHARD_2, "an empty one")),
    "header too long": (edit_bytes(lambda data: struct.pack("<Q", 2**63) + data[8:]), (SHARD_2, "header")),
    "header of no JSON": (edit_bytes(lambda data: data[:8] + b"x" + data[9:]), (SHARD_2, "JSON")),
    "header with a list": (edit_bytes(lambda data: struct.pack("<Q", 2) + b"[]"), (SHARD_2, "object")),
    "overlapping tensors": (edit_header(lambda h: shift(h, -4)), (SHARD_2, "overlap")),
    "a gap": (edit_header(lambda h: shift(h, 4)), (SHARD_2, "gap")),
    "offsets out of range": (edit_header(lambda h: shift(h, 10**9)), (SHARD_2, "gap")),
    "offsets that do not fit": (edit_header(lambda h: h[UP].update(shape=[24, 31])), (SHARD_2, UP)),
    "negative offsets": (edit_header(lambda h: h[UP].update(data_offsets=[-4, 8])), (SHARD_2, UP)),
    "an entry of no form": (edit_header(lambda h: h.update({UP: 3})), (SHARD_2, UP)),
    "index above the folder": (point_index(UP, "../hf/" + SHARD_2), ("index.json", "files in its folder", "../hf/")),
    "index with an absolute path": (
        point_index(UP, "/etc/passwd"),
        ("index.json", "files in its folder", "/etc/passwd"),
    ),
    "index names a missing shard": (point_index(UP, "model-00003-of-00002.safetensors"), ("model-00003",)),
    "index names the wrong shard": (point_index(UP, SHARD_1), (UP, SHARD_1, SHARD_2)),
    "index of no form": (
        edit_json("model.safetensors.index.json", lambda raw: raw.update(weight_map=[])),
        ("weight_map",),
    ),
    "index of no JSON": (lambda f: (f / "model.safetensors.index.json").write_text("{"), ("JSON",)),
    "index and single file": (lambda f: shutil.copy(f / SHARD_1, f / "model.safetensors"), ("both",)),
    "no config": (remove("config.json"), ("config.json",)),
    "config of no JSON": (lambda f: (f / "config.json").write_bytes(b"\xff"), ("config.json",)),
    "another model type": (
        edit_json("config.json", lambda raw: raw.update(model_type="llama")),
        ("model_type", "llama"),
    ),
    "a sister's field": (
        edit_json("config.json", lambda raw: raw.update(shared_expert_intermediate_size=8)),
        ("shared_expert_intermediate_size",),
    ),
    "quantised": (
        edit_json("config.json", lambda raw: raw.update(quantization_config={"quant_method": "fp8"})),
        ("quantization_config", "FP8", "remove quantization_config"),
    ),
    "tied, with another head": (
        edit_json("config.json", lambda raw: raw.update(tie_word_embeddings=True)),
        ("lm_head",),
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The checkpoint that is damaged below; undamaged, it converts."""
    folder = tmp_path_factory.mktemp("sound")
    hf2jax(make_checkpoint(folder / "hf", TINY, shards=2), folder / "jax")
    return folder / "hf"


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(bad: str, sound: pathlib.Path, tmp_path: pathlib.Path) -> None:
    damage, says = BAD[bad]
    src = tmp_path / "hf"
    shutil.copytree(sound, src)
    damage(src)
    with pytest.raises(UserError) as caught:
        main(["hf2jax", str(src), str(tmp_path / "out" / "jax")])
    message = str(caught.value)
    assert all(text in message for text in says), message
    assert "\n" not in message
    assert {entry.name for entry in tmp_path.iterdir()} <= {"hf", "elsewhere.safetensors"}


def convert_in_a_process(
    *arguments: object, program: Sequence[str] = ("-m", "convert")
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *program, *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def test_the_command_line(tmp_path: pathlib.Path) -> None:
    src = make_checkpoint(tmp_path / "hf", TINY, shards=2)
    assert convert_in_a_process("hf2jax", src, tmp_path / "jax").returncode == 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert "new or empty" in one_line(convert_in_a_process("hf2jax", src, tmp_path / "full"))
    assert "new or empty" in one_line(convert_in_a_process("hf2jax", src, tmp_path / "jax"))
    assert "manifest.json" in one_line(convert_in_a_process("jax2hf", src, tmp_path / "x"))
    assert "float8" in one_line(convert_in_a_process("hf2jax", src, tmp_path / "x", "--dtype", "float8"))
    assert "COMMAND" in one_line(convert_in_a_process())
    assert "nobody/nothing" in one_line(convert_in_a_process("hf2jax", "nobody/nothing", tmp_path / "x"))
    edit_bytes(lambda data: data[:-1])(src)
    assert "truncated" in one_line(convert_in_a_process("hf2jax", src, tmp_path / "x"))
    assert {entry.name for entry in tmp_path.iterdir()} == {"hf", "jax", "full"}


@pytest.mark.parametrize("direction", ["hf2jax", "jax2hf"])
def test_a_full_disk_leaves_nothing(direction: str, tmp_path: pathlib.Path) -> None:
    """The process may not write files above a few KiB, so a write fails in the middle, as on a full disk."""
    pytest.importorskip("resource")
    src = make_checkpoint(tmp_path / "hf", TINY, shards=2)
    hf2jax(src, tmp_path / "jax")
    limited = "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); "
    limited += "runpy.run_module('convert', run_name='__main__', alter_sys=True)"
    source = src if direction == "hf2jax" else tmp_path / "jax"
    one_line(convert_in_a_process(direction, source, tmp_path / "out", program=("-c", limited)))
    assert {entry.name for entry in tmp_path.iterdir()} == {"hf", "jax"}


def test_a_termination_leaves_nothing(tmp_path: pathlib.Path) -> None:
    src = make_checkpoint(tmp_path / "hf", TINY.replace(num_hidden_layers=48, hidden_size=256))
    command = [sys.executable, "-m", "convert", "hf2jax", str(src), str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list(tmp_path.glob(".out.*/content/layers/*")):
            time.sleep(0.01)
        process.terminate()
        assert process.stderr is not None
        line = "SIGTERM: stopped; what it had begun to write was removed\n"
        assert (process.stderr.read(), process.wait()) == (line, 128 + 15)
    assert {entry.name for entry in tmp_path.iterdir()} == {"hf"}


def test_an_interrupted_write_leaves_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = make_checkpoint(tmp_path / "hf", TINY)
    read, calls = Tensor.read, iter(range(60))

    def fail(self: Tensor) -> np.ndarray:
        if next(calls, None) is None:
            raise OSError(5, "Input/output error")
        return read(self)

    monkeypatch.setattr(Tensor, "read", fail)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="Input/output"):
        hf2jax(src, tmp_path / "out")
    assert {entry.name for entry in tmp_path.iterdir()} == {"hf", "out"}
    assert not list((tmp_path / "out").iterdir())


def test_an_empty_folder_may_be_filled(tmp_path: pathlib.Path) -> None:
    src = make_checkpoint(tmp_path / "hf", TINY)
    (tmp_path / "out").mkdir()
    hf2jax(src, tmp_path / "out")
    assert read_converted(tmp_path / "out").config == read_hf(src).config


def renamed(usual: Callable[[str], str]) -> Callable[[pathlib.Path], None]:
    return edit_tensors(lambda t: [t.update({usual(name): t.pop(name)}) for name in list(t)])


# names that transformers reads as its own
USUAL: dict[str, Callable[[pathlib.Path], None]] = {
    "no prefix": renamed(lambda name: name.removeprefix("model.")),
    "a prefix twice": renamed(lambda name: f"model.{name}"),
    "rotary frequencies": edit_tensors(
        lambda t: t.update(
            {f"model.{part}rotary_emb.inv_freq": np.ones(4, np.float32) for part in ("", "layers.0.self_attn.")}
        )
    ),
}


@pytest.mark.parametrize("names", USUAL)
def test_other_names_that_transformers_reads(
    names: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    src = make_checkpoint(tmp_path / "hf", TINY)
    before = [{name: array.copy() for name, array in block.arrays.items()} for block in read_hf(src).blocks()]
    USUAL[names](src)
    caplog.clear()
    for old, block in zip(before, read_hf(src).blocks(), strict=True):
        assert old.keys() == block.arrays.keys()
        assert all(np.array_equal(old[name], array) for name, array in block.arrays.items())
    (notice,) = [record.message for record in caplog.records]
    assert ("inv_freq (2 such tensors)" if names == "rotary frequencies" else "read as model.embed_tokens") in notice


def test_a_tied_embedding_may_be_stored_as_the_head_alone(tmp_path: pathlib.Path) -> None:
    src = make_checkpoint(tmp_path / "hf", TINY.replace(tie_word_embeddings=True))
    embedding = read_hf(src).block(None).arrays["embed_tokens"].copy()
    renamed(lambda name: "lm_head.weight" if name == "model.embed_tokens.weight" else name)(src)
    assert np.array_equal(read_hf(src).block(None).arrays["embed_tokens"], embedding)
    edit_json("config.json", lambda raw: raw.update(tie_word_embeddings=False))(src)
    with pytest.raises(UserError, match=r"missing tensor model\.embed_tokens\.weight"):
        read_hf(src)


# what is done to a checkpoint in one file, and what the message must say
WAYS_OUT: dict[str, tuple[Callable[[pathlib.Path], Any], str]] = {
    "torch.compile": (
        renamed(lambda name: f"_orig_mod.{name}"),
        r"missing tensor lm_head\.weight .*, found _orig_mod\.lm_head\.weight: rename",
    ),
    "a text model among others": (
        renamed(lambda name: name.replace("model.", "model.language_model.", 1)),
        r"missing tensor model\.embed_tokens\.weight .*, found model\.language_model\.embed_tokens\.weight: rename",
    ),
    "a layer of another head": (
        edit_tensors(lambda t: t.update({"mtp.norm.weight": np.ones(32, np.float32)})),
        r"unexpected tensor mtp\.norm\.weight \(1 .*save it again",
    ),
    "a head in NF4": (
        edit_tensors(lambda t: t.update({"lm_head.weight.absmax": np.ones(8, np.float32)})),
        r"unexpected tensor lm_head\.weight\.absmax .*dequantize",
    ),
    "a folder that is converted": (
        lambda f: (f / "model.safetensors").rename(f / "manifest.json"),
        r"found a converted folder, which needs no conversion$",
    ),
    "an adapter": (
        lambda f: (f / "model.safetensors").rename(f / "adapter_config.json"),
        r"found a PEFT adapter \(python -m convert peft2jax reads it\)$",
    ),
    "a pointer of Git": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 3\n"),
        r"model\.safetensors: expected a safetensors file, found a Git LFS pointer: .*git lfs pull",
    ),
    "a pointer of Git as config": (
        lambda f: (f / "config.json").write_text("version https://git-lfs.github.com/spec/v1\nsize 3\n"),
        r"config\.json: expected JSON, found a Git LFS pointer",
    ),
}


@pytest.mark.parametrize("case", WAYS_OUT)
def test_a_refusal_says_the_way_out(case: str, tmp_path: pathlib.Path) -> None:
    change, says = WAYS_OUT[case]
    src = make_checkpoint(tmp_path / "hf", TINY)
    change(src)
    with pytest.raises(ValueError, match=says) as caught:
        read_hf(src)
    assert "\n" not in str(caught.value)


def test_values_that_float16_cannot_hold_are_refused(tmp_path: pathlib.Path) -> None:
    src = make_checkpoint(tmp_path / "hf", TINY)
    edit_tensors(lambda t: t["model.layers.1.mlp.gate.weight"].__setitem__((0, 0), 1e6))(src)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.gate.*float16.*1e\+06"):
        hf2jax(src, tmp_path / "jax", "float16")


def test_chat_templates_with_names_are_copied(tmp_path: pathlib.Path) -> None:
    """transformers keeps all but the default one in a folder inside; the one for tools would be rendered otherwise."""
    folder = make_checkpoint(tmp_path / "hf", TINY)
    name = "additional_chat_templates/tool_use.jinja"
    (folder / name).parent.mkdir()
    (folder / name).write_text("tools: {{ messages[0].content }}")
    hf2jax(folder, tmp_path / "jax")
    jax2hf(tmp_path / "jax", tmp_path / "back")
    assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    messages = [{"role": "user", "content": "a"}]
    for each in ("hf", "jax", "back"):
        assert chat_text(messages, [{"name": "f"}], load_tokenizer(tmp_path / each)) == "tools: a"


@pytest.mark.parametrize("left", [(), ("tokenizer_config.json",), ("vocab.json",)], ids=str)
def test_a_model_without_a_tokenizer_converts_and_says_so(
    left: tuple[str, ...], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    src = make_checkpoint(tmp_path / "hf", TINY)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (src / name).unlink()
    for name in left:
        (src / name).write_text("{}")
    main(["hf2jax", str(src), str(tmp_path / "jax")])
    assert [line for line in caplog.messages if f"{src}: no tokenizer" in line] == caplog.messages
    main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "back")])
    assert contents(tmp_path / "back") == contents(src)
    assert {path.name for path in (tmp_path / "back").iterdir()} == {path.name for path in src.iterdir()}
    with pytest.raises(UserError, match=f"{re.escape(str(src))}: expected a tokenizer"):
        load_tokenizer(src)


def test_only_safetensors_are_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert local_folder("Qwen/Qwen3-30B-A3B") == tmp_path
    assert asked["name"] == "Qwen/Qwen3-30B-A3B"
    files = ["model-00001-of-00016.safetensors", "model.safetensors.index.json", "config.json", "merges.txt"]
    files += ["pytorch_model.bin", "model.pt", "README.md"]
    kept = hub.utils.filter_repo_objects(files, allow_patterns=asked["allow_patterns"])
    assert list(kept) == files[:4]
    assert local_folder("no/such/folder") == pathlib.Path("no/such/folder")
