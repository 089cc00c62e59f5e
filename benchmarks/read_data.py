"""How fast records are read, tokenised and packed, beside the tokens that a training step needs.

`python -m benchmarks.read_data --model DIR [--records N] [--step TOKENS_PER_SECOND]`

The records are conversations and texts of English words, the same in every form of file. `--step` is the speed of the
training step that the reader has to keep up with.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import pathlib
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from jaxmoe.cli.arguments import ArgumentParser, run, whole_number
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.data.chat import load_tokenizer
from jaxmoe.data.inputs import opened
from jaxmoe.data.records import Tokenising, read_input
from jaxmoe.data.stream import Stream

_WORDS = (
    "the of and a to in is that it was for on are with as his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so these"
).split()
SEQ_LENGTH, BATCH = 2048, 4


def main(argv: Sequence[str] | None = None) -> None:
    """Prints one line for each kind of record and form of file."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, metavar="DIR", help="its tokenizer and template")
    parser.add_argument("--records", type=whole_number, default=4000, metavar="N", help="of each kind (default: 4000)")
    parser.add_argument("--step", type=whole_number, default=22_395, metavar="N", help="tokens/s (default: 22395)")
    arguments = parser.parse_args(argv)
    config = Qwen3MoeConfig.from_pretrained(arguments.model)
    how = Tokenising(load_tokenizer(arguments.model), config.vocab_size)
    print(f"{len(os.sched_getaffinity(0))} cores; a step takes {arguments.step:,} tokens/s")
    print(f"{'records':24} {'file':12} {'MB':>6} {'records/s':>10} {'tokens/s':>11} {'of a step':>10}")
    with tempfile.TemporaryDirectory() as name:
        for kind, make in _KINDS.items():
            rng = random.Random(0)
            records = [make(rng) for _ in range(arguments.records)]
            for form, write in _FORMS.items():
                path = pathlib.Path(name) / f"data{form}"
                write(path, records)
                _line(kind, form, path, *_read(path, how), arguments.step)
            path = pathlib.Path(name) / "data.jsonl"
            _line(kind, "streamed", path, *_stream(path, how, arguments.records), arguments.step)


def _line(kind: str, form: str, path: pathlib.Path, records: int, tokens: int, seconds: float, step: int) -> None:
    size = path.stat().st_size / 1e6
    speed = f"{records / seconds:10,.0f} {tokens / seconds:11,.0f} {tokens / seconds / step:9.1f}x"
    print(f"{kind:24} {form:12} {size:6.1f} {speed}", flush=True)


def _read(path: pathlib.Path, how: Tokenising) -> tuple[int, int, float]:
    """(records, tokens, seconds) of reading a file before the first step."""
    start = time.perf_counter()
    records = read_input(opened(path), how)
    return len(records), sum(len(record.tokens) for record in records), time.perf_counter() - start


def _stream(path: pathlib.Path, how: Tokenising, records: int) -> tuple[int, int, float]:
    """(records, tokens, seconds) of the batches of one pass over a file that is streamed, packing included."""
    start = time.perf_counter()
    stream = Stream([opened(path)], how, SEQ_LENGTH, window=max(1, records // 4))
    tokens = step = 0
    while sum(stream.position()["taken"]) < 3 * records // 4 or tokens == 0:
        tokens += int((stream.batch(step, (BATCH,)).segment_ids > 0).sum())
        step += 1
    seconds = time.perf_counter() - start
    stream.close()
    return sum(stream.position()["taken"]), tokens, seconds


def _text(rng: random.Random, mean: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(1 + int(rng.expovariate(1 / mean))))


def _chat(turns: int) -> Callable[[random.Random], dict[str, Any]]:
    def make(rng: random.Random) -> dict[str, Any]:
        roles = ("user", 40), ("assistant", 200)
        return {"messages": [{"role": role, "content": _text(rng, mean)} for role, mean in roles * turns]}

    return make


_KINDS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "texts": lambda rng: {"text": _text(rng, 250)},
    "chats of one turn": _chat(1),
    "chats of four turns": _chat(4),
}


def _lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _write_parquet(path: pathlib.Path, records: list[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), path)


_FORMS: dict[str, Callable[[pathlib.Path, list[dict[str, Any]]], Any]] = {
    ".jsonl": lambda path, records: path.write_bytes(_lines(records)),
    ".json": lambda path, records: path.write_text(json.dumps(records)),
    ".jsonl.gz": lambda path, records: path.write_bytes(gzip.compress(_lines(records))),
    ".parquet": _write_parquet,
}


if __name__ == "__main__":
    run(main)
