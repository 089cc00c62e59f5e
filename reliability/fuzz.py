"""`make fuzz`: mutated files, odd flags and odd environments; a command refuses them in one line, or reads them right.

What a command accepts is compared with an independent reader: the safetensors library, the tokenizers library, Python's
own JSON, or the arrays before the mutation where a checksum guards them.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import transformers  # noqa: F401 - before any trial: its log keeps the stream that is standard error now
from safetensors.numpy import load_file

from captures import ROLES, Capture, CaptureWriter, LabelledText, Model, Text
from convert.__main__ import main as convert
from convert.hf2jax import hf2jax
from jaxmoe.config import LoraConfig
from jaxmoe.data.chat import load_tokenizer
from jaxmoe.data.records import read_records
from jaxmoe.doctor.__main__ import main as doctor
from jaxmoe.generate.__main__ import main as generate
from jaxmoe.routing.__main__ import main as routing
from jaxmoe.store.converted import read_converted
from jaxmoe.store.train_state import TrainCheckpoints
from jaxmoe.train.__main__ import main as train
from peers.configs import random_adapters
from peers.make_checkpoint import TINY, make_checkpoint
from reliability.mutate import mutate
from reliability.observe import Seen, judge, observe
from reliability.trials import Outcome, run_trials

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODEL = TINY.replace(num_hidden_layers=2, num_experts=4, mlp_only_layers=(1,))
LORA = LoraConfig(r=2, targets=("q_proj", "experts.gate_up_proj", "experts.down_proj"))
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_LINES = (
    {"text": "one two three"},
    {"prompt": "1+1=", "completion": "2"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
)


def prepare(shared: pathlib.Path) -> None:
    """One good folder of each kind."""
    from convert.adapters import write_peft

    make_checkpoint(shared / "hf", MODEL)
    write_peft(shared / "adapter", MODEL, LORA, random_adapters(MODEL, LORA))
    hf2jax(shared / "hf", shared / "converted")
    _write_capture(shared / "capture")
    (shared / "data").mkdir()
    (shared / "data" / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in _LINES))
    if WITH_TABLES:
        _write_forms(shared / "forms")
    checkpoints = TrainCheckpoints(shared / "state" / "checkpoints")
    checkpoints.save(1, _state(), {"eval_loss_before": None})
    checkpoints.close()


# What reads tables is an extra.
WITH_TABLES = all(map(importlib.util.find_spec, ("datasets", "pyarrow", "zstandard")))


def trial(folder: pathlib.Path, shared: pathlib.Path, number: int, rng: random.Random) -> Outcome:
    """One mutation, one odd flag or one odd environment."""
    _load_libraries(shared)
    kinds = list(_KINDS)
    kind = kinds[number % len(kinds)]
    return _KINDS[kind](folder, shared, rng, kind)


@functools.cache
def _load_libraries(shared: pathlib.Path) -> None:
    """Loads what tokenizers need, once per process: libraries of gigabytes are no memory of the first trial's."""
    load_tokenizer(shared / "hf")
    if WITH_TABLES:
        _read_forms(shared / "forms", shared)


def _mutated(
    source: str, only: tuple[str, ...], command: Callable[[pathlib.Path, pathlib.Path], Any], check: Callable[..., str]
) -> Callable[..., Outcome]:
    """A kind of trial: a copy of a good folder is mutated, `command` runs, and `check` compares what it accepted."""

    def run_one(folder: pathlib.Path, shared: pathlib.Path, rng: random.Random, kind: str) -> Outcome:
        copy = folder / "src"
        shutil.copytree(shared / source, copy)
        what = mutate(copy, rng, only)
        seen = observe(lambda: command(copy, shared), folder)
        return _outcome(kind, what, seen, lambda: check(copy, shared))

    return run_one


def _outcome(kind: str, what: str, seen: Seen, check: Callable[[], str] = lambda: "") -> Outcome:
    if seen.wrong:
        return Outcome("wrong", kind, f"{what}: {seen.wrong}")
    if seen.code == 2:
        return Outcome("refused", kind, f"{what}: {seen.stderr.strip()}")
    difference = check()
    return Outcome("wrong" if difference else "accepted", kind, f"{what}: {difference}")


# What each kind runs, and what its result is compared with


def _round_trip(src: pathlib.Path, shared: pathlib.Path) -> None:
    convert(["hf2jax", str(src), str(src.parent / "jax")])
    convert(["jax2hf", str(src.parent / "jax"), str(src.parent / "again")])


def _same_weights(src: pathlib.Path, shared: pathlib.Path) -> str:
    """The safetensors library reads the same from the mutated folder and from the one that was written."""
    return _difference(_weights(src), _weights(src.parent / "again"))


def _weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def _difference(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> str:
    if before.keys() != after.keys():
        return f"other names: {sorted(before.keys() ^ after.keys())[:3]}"
    # Bytes, since NaN is not equal to itself.
    differing = [name for name in before if before[name].tobytes() != after[name].tobytes()]
    return f"other values: {differing[:3]}" if differing else ""


def _adapter(src: pathlib.Path, shared: pathlib.Path) -> None:
    convert(["peft2jax", str(src), str(src.parent / "jax"), "--model", str(shared / "hf")])
    convert(["jax2peft", str(src.parent / "jax"), str(src.parent / "again")])


def _same_adapter(src: pathlib.Path, shared: pathlib.Path) -> str:
    settings = [json.loads((folder / "adapter_config.json").read_text()) for folder in (src, src.parent / "again")]
    for name in ("r", "lora_alpha"):
        # Integers beyond 2^53 are rounded: every reader divides them as floats.
        if float(settings[0][name]) != float(settings[1][name]):
            return f"{name}: {settings[0][name]!r}, {settings[1][name]!r}"
    if bool(settings[0].get("use_rslora")) != bool(settings[1].get("use_rslora")):
        return "use_rslora differs"
    return _difference(_weights(src), _weights(src.parent / "again"))


def _inspect(src: pathlib.Path, shared: pathlib.Path) -> None:
    convert(["inspect", str(src)])


def _arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    blocks = read_converted(folder).blocks()
    return {f"{block.layer}.{name}": array for block in blocks for name, array in block.arrays.items()}


def _same_arrays(src: pathlib.Path, shared: pathlib.Path) -> str:
    return _difference(_arrays(shared / "converted"), _arrays(src))


def _state() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"weights": rng.normal(size=(16, 33)).astype(np.float32), "step": np.asarray(7, np.int32)}


def _restore(src: pathlib.Path, shared: pathlib.Path) -> None:
    checkpoints = TrainCheckpoints(src / "checkpoints")
    try:
        restored = checkpoints.restore_latest(_state())
    finally:
        checkpoints.close()
    state = {} if restored is None else restored[1]
    np.savez(src.parent / "state.npz", **state)


def _same_state(src: pathlib.Path, shared: pathlib.Path) -> str:
    found = dict(np.load(src.parent / "state.npz"))
    return _difference(_state(), found) if found else ""  # no checkpoint left: the run starts anew, and says so


def _write_capture(folder: pathlib.Path) -> None:
    n, rng = 6, np.random.default_rng(0)
    logits = -np.sort(-rng.normal(size=(2, n, 8)).astype(np.float32), axis=-1)
    total = np.logaddexp.reduce(logits, axis=-1).astype(np.float32)
    order = np.tile(np.arange(8, dtype=np.uint8), (2, n, 1))
    zero, count = np.zeros(n, np.int32), np.arange(n, dtype=np.int32)
    text = Text(count, zero, count, (count > 2).astype(np.int32), zero, count)
    model = Model((0, 1), 8, 2, True, 300)
    with CaptureWriter(folder, model, labels=LabelledText(text, ("a", "b"), ROLES, n, "t"), source={}) as writer:
        sums = np.exp(logits - total[..., None]).sum(1)
        arrays = {"experts": order[..., :2], "top_experts": order, "top_logits": logits, "log_sum_exp": total}
        writer.put(text, arrays | {"entropy": total, "probability_sums": sums})


def _compare(src: pathlib.Path, shared: pathlib.Path) -> None:
    routing(["compare", str(src)])
    for _ in Capture.open(src).chunks():
        pass


def _same_routing(src: pathlib.Path, shared: pathlib.Path) -> str:
    chunk = next(Capture.open(src).chunks())
    stored = _weights(src)
    found = {"experts": chunk.experts, "top_logits": chunk.top_logits, "entropy": chunk.entropy} | chunk.text._asdict()
    return _difference({name: stored[name] for name in found}, found)


def _data(src: pathlib.Path, shared: pathlib.Path) -> None:
    read_records(src / "data.jsonl", load_tokenizer(shared / "hf"), MODEL.vocab_size)


def _same_records(src: pathlib.Path, shared: pathlib.Path) -> str:
    """Texts as Python's JSON reads them, encoded as the tokenizers library encodes them."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(shared / "hf" / "tokenizer.json")).encode
    text = (src / "data.jsonl").read_bytes().decode("utf-8-sig")
    lines = [json.loads(line) for line in text.split("\n") if line.strip()]
    records = read_records(src / "data.jsonl", load_tokenizer(shared / "hf"), MODEL.vocab_size)
    if len(lines) != len(records):
        return f"{len(lines)} lines, {len(records)} records"
    for line, record in zip(lines, records, strict=True):
        if "text" in line and record.tokens[:-1].tolist() != encode(line["text"], add_special_tokens=False).ids:
            return f"other tokens of {line}"
    return ""


def _write_forms(folder: pathlib.Path) -> None:
    """The records in every form of file."""
    import datasets
    import zstandard

    datasets.disable_progress_bars()
    folder.mkdir()
    lines = "".join(json.dumps(line) + "\n" for line in _LINES).encode()
    (folder / "a.json").write_text(json.dumps(_LINES))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    columns = dict.fromkeys(name for line in _LINES for name in line)
    table = datasets.Dataset.from_list([columns | line for line in _LINES])
    table.to_parquet(folder / "a.parquet")
    table.save_to_disk(folder / "saved")


_FORMS = ("a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "saved")


def _read_forms(src: pathlib.Path, shared: pathlib.Path) -> None:
    for name in _FORMS:
        read_records(src / name, load_tokenizer(shared / "hf"), MODEL.vocab_size)


def _same_forms(src: pathlib.Path, shared: pathlib.Path) -> str:
    """Texts as other readers of the same files find them."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(shared / "hf" / "tokenizer.json")).encode
    for name in _FORMS:
        lines = _read_otherwise(src / name)
        records = read_records(src / name, load_tokenizer(shared / "hf"), MODEL.vocab_size)
        if len(lines) != len(records):
            return f"{name}: {len(lines)} records, {len(records)} were read"
        for line, record in zip(lines, records, strict=True):
            text = line["text"] if {name for name in line if line[name] is not None} == {"text"} else None
            if text is not None and record.tokens[:-1].tolist() != encode(text, add_special_tokens=False).ids:
                return f"{name}: other tokens of {line}"
    return ""


def _read_otherwise(path: pathlib.Path) -> list[dict[str, Any]]:
    import pyarrow
    import zstandard
    from pyarrow import parquet

    if path.is_dir():
        (file,) = path.glob("*.arrow")
        with pyarrow.memory_map(str(file)) as source:
            return pyarrow.ipc.open_stream(source).read_all().to_pylist()
    if path.suffix == ".parquet":
        return parquet.read_table(path, use_threads=False).to_pylist()
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    elif path.suffix == ".zst":
        content = zstandard.ZstdDecompressor().stream_reader(content, read_across_frames=True).read()
    text = content.decode("utf-8-sig")
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _tokenize(src: pathlib.Path, shared: pathlib.Path) -> None:
    from jaxmoe.data.chat import render_chat

    tokenizer = load_tokenizer(src)
    tokenizer("one two")
    if tokenizer.chat_template:
        render_chat(tokenizer, [{"role": "user", "content": "a"}], add_generation_prompt=True)


def _same_tokens(src: pathlib.Path, shared: pathlib.Path) -> str:
    from tokenizers import Tokenizer

    text = "one two three"
    expected = Tokenizer.from_file(str(src / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    found = load_tokenizer(src)(text, add_special_tokens=False)["input_ids"]
    return "" if found == expected else f"{found}, {expected}"


# Flags and environments

_ODD = (
    "nan inf -inf 1e400 -1 0 1000000000 9223372036854775807 9223372036854775808 1.5 x [] . .. / /dev/null \udcff \u4e2d"
).split() + ["", " ", "9" * 5000, "1" + "0" * 30, "-" + "9" * 30, "a" * 5000, "../" * 100]
_COMMANDS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "generate": (
        generate,
        "--model {hf} --prompt a --max-new-tokens 1 --adapter nowhere",
        "--model --adapter --prompt --max-new-tokens --temperature --top-k --top-p --seed --dtype --quantize --capture"
        " --replay --bias --force --ablate",
    ),
    "train": (
        train,
        "--model {hf} --data nowhere --output {out} --max-steps 1",
        "--model --adapter --from-scratch --tokenizer --data --batch-size --accumulation --seq-length --max-steps"
        " --epochs --lora-r --lora-alpha --lora-targets --learning-rate --seed --warmup-steps"
        " --adam-beta1 --remat --save-every",
    ),
    "convert": (convert, "jax2hf {converted} {out}", "--max-shard-size --adapter"),
    "routing": (
        routing,
        "capture --model {hf} --data nowhere --out {out}",
        "--model --adapter --data --seq-length --max-tokens --batch-size --top --dtype --replay --bias",
    ),
    "doctor": (doctor, "--json", "--model --batch-size --seq-length --lora-r --preset"),
}


def _flags(folder: pathlib.Path, shared: pathlib.Path, rng: random.Random, kind: str) -> Outcome:
    name = rng.choice(list(_COMMANDS))
    command, usual, flags = _COMMANDS[name]
    paths = {"hf": shared / "hf", "converted": shared / "converted", "out": folder / "out"}
    odd = [f"{rng.choice(flags.split())}={rng.choice(_ODD)}" for _ in range(rng.choice((1, 1, 2)))]
    argv = [*usual.format(**paths).split(), *odd]
    seen = observe(lambda: command(argv), folder)
    return _outcome(kind, f"{name} {' '.join(odd)[:200]!r}", seen)


_ENVIRONMENTS: dict[str, tuple[dict[str, str | None], str]] = {
    "closed output": ({}, ">&-"),
    "closed errors": ({}, "2>&-"),
    "all closed": ({}, "<&- >&- 2>&-"),
    "ASCII": ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}, ""),
    "Latin-1": ({"PYTHONIOENCODING": "latin-1"}, ""),
    "no home": ({"HOME": None}, ""),
    "home without rights": ({"HOME": "/proc/1"}, ""),
    "no path": ({"PATH": ""}, ""),
    "narrow terminal": ({"COLUMNS": "1", "TERM": "dumb"}, ""),
    "odd columns": ({"COLUMNS": "x", "LINES": "-1"}, ""),
    "answers on standard input": ({}, "</dev/zero"),
    "odd XLA flags for jaxmoe": ({"JAXMOE_XLA_FLAGS": "\u4e2d", "JAXMOE_COMPILATION_CACHE": "/proc/x"}, ""),
    "full device": ({}, ">/dev/full"),
    "few files": ({}, ""),
}


def _environment(folder: pathlib.Path, shared: pathlib.Path, rng: random.Random, kind: str) -> Outcome:
    name = rng.choice(list(_ENVIRONMENTS))
    variables, streams = _ENVIRONMENTS[name]
    source = rng.choice(("hf", "adapter", "converted", "nowhere", "\u4e2d\udcff"))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **variables}
    environment = {key: value for key, value in environment.items() if value is not None}
    limit = "ulimit -n 64; " if name == "few files" else ""
    script = f'{limit}exec "$0" -m convert inspect "$1" {streams}'
    command = ["/bin/sh", "-c", script, sys.executable, str(shared / source)]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, cwd=folder, env=environment, timeout=300, check=False)
    seen = judge(done.returncode, done.stderr.decode(errors="replace"), time.monotonic() - start, 0)
    if seen.wrong.startswith("0 lines") and "2>&-" in streams:
        seen = seen._replace(wrong="")
    return _outcome(kind, f"{name}, {source!r}", seen)


_KINDS: dict[str, Callable[..., Outcome]] = {
    "HF folder": _mutated("hf", (), _round_trip, _same_weights),
    "config": _mutated("hf", ("config.json",), _round_trip, _same_weights),
    "adapter": _mutated("adapter", (), _adapter, _same_adapter),
    "converted folder": _mutated("converted", (), _inspect, _same_arrays),
    "training checkpoint": _mutated("state", (), _restore, _same_state),
    "capture": _mutated("capture", (), _compare, _same_routing),
    "data": _mutated("data", (), _data, _same_records),
    **({"forms of data": _mutated("forms", (), _read_forms, _same_forms)} if WITH_TABLES else {}),
    "tokenizer": _mutated("hf", _TOKENIZER, _tokenize, _same_tokens),
    "flags": _flags,
    "environment": _environment,
}


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(run_trials(trial, prepare, description=__doc__ or "", number=1000))
