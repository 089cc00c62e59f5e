"""The cost of capturing the routing over the plain forward pass: `python -m benchmarks.capture_overhead`.

Both sides run the same batches of random tokens through random weights of a published shape, in one process, in turn,
several times. The plain side computes each token's hidden state, and its loss on request. The capture also writes every
token's experts, largest router logits, log-sum-exp and entropy to disk.
"""

from __future__ import annotations

import pathlib
import shutil
import statistics
import tempfile
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import shapes
from captures import LabelledText, Text
from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM
from jaxmoe.model.decoder import forward, head_weight
from jaxmoe.model.init import init_parameters
from jaxmoe.model.interface import Tokens
from jaxmoe.routing.capture import capture, pack_in_order, token_predictions


def random_text(tokens: int, length: int, vocab_size: int) -> LabelledText:
    """`tokens` random tokens in contexts of `length`, so that sequences are full."""
    rng = np.random.default_rng(0)
    token = rng.integers(0, vocab_size, tokens, dtype=np.int32)
    document, position = np.divmod(np.arange(tokens, dtype=np.int32), np.int32(length))
    zero = np.zeros(tokens, np.int32)
    text = Text(token, document, position, zero, zero, np.append(token[1:], -1).astype(np.int32))
    return LabelledText(text, ("random",), ("text",), length, tokenizer="none")


@partial(jax.jit, static_argnames=("config", "predictions"))
def plain_step(params, input_ids, position_ids, segment_ids, following, *, config, predictions):
    """The forward pass without a capture; it returns one number per batch, or each token's loss."""
    out = forward(params, {}, Tokens(input_ids, position_ids, segment_ids), config=config)
    if not predictions:
        return out.hidden.astype(jnp.float32).sum(), out.stats.counts
    hidden = out.hidden.reshape(-1, out.hidden.shape[-1])
    return token_predictions(hidden, head_weight(params), following.reshape(-1)), out.stats.counts


def main() -> None:
    """Measures and prints; the result is the ratio of the medians."""
    parser = ArgumentParser(description="Cost of capturing the routing over the plain forward pass.")
    shapes.add_arguments(parser)
    add = parser.add_argument
    add("--tokens", type=int, default=212_992, metavar="N", help="tokens to capture (default: 212992)")
    add("--batch-size", type=int, default=2, metavar="N", help="sequences per step (default: 2)")
    add("--seq-length", type=int, default=4096, metavar="N", help="tokens per sequence (default: 4096)")
    add("--repeat", type=int, default=3, metavar="N", help="how often each side runs (default: 3)")
    add("--folder", type=pathlib.Path, metavar="DIR", help="where to write (default: the system's temporary folder)")
    args = parser.parse_args()

    config = shapes.config_of(args)
    labels = random_text(args.tokens, args.seq_length, config.vocab_size)
    params = jax.jit(init_parameters, static_argnums=(0, 2))(config, jax.random.key(0), jnp.bfloat16)
    model = Qwen3MoeForCausalLM(config, params)
    params = model.params
    print(
        f"{jax.devices()[0].device_kind}: {args.preset}, {config.num_hidden_layers} layers, {args.tokens:,} tokens, "
        f"{args.batch_size} x {args.seq_length} per step",
        flush=True,
    )

    def plain(text: LabelledText, predictions: bool) -> float:
        start = time.perf_counter()
        results = []
        for batch in pack_in_order(text, args.batch_size):
            results.append(plain_step(params, *batch[:4], config=config, predictions=predictions))
            results = results[-2:]  # as in an evaluation, so that the device's queue stays full
        jax.block_until_ready(results)
        return time.perf_counter() - start

    written = 0

    def captured(text: LabelledText, predictions: bool) -> float:
        nonlocal written
        outer = pathlib.Path(tempfile.mkdtemp(dir=args.folder))
        try:
            start = time.perf_counter()
            capture(model, text, outer / "capture", batch_size=args.batch_size, predictions=predictions)
            seconds = time.perf_counter() - start
            written = sum(file.stat().st_size for file in (outer / "capture").iterdir())
            return seconds
        finally:
            shutil.rmtree(outer)

    record: dict[str, Any] = {"device": jax.devices()[0].device_kind, "tokens": args.tokens}
    warm = random_text(2 * args.batch_size * args.seq_length, args.seq_length, config.vocab_size)
    for predictions in (False, True):
        name = "hidden states and token losses" if predictions else "hidden states"
        first = plain(warm, predictions), captured(warm, predictions)
        print(f"{name}: first calls {first[0]:.1f} and {first[1]:.1f} s", flush=True)
        times = [(plain(labels, predictions), captured(labels, predictions)) for _ in range(args.repeat)]
        for number, (a, b) in enumerate(times, start=1):
            print(
                f"  round {number}: plain {a:.3f} s ({args.tokens / a:,.0f} tokens/s), capture {b:.3f} s, {b / a:.3f}"
            )
        a, b = (statistics.median(side) for side in zip(*times, strict=True))
        print(
            f"  median: plain {a:.3f} s, capture {b:.3f} s: overhead {100 * (b / a - 1):.1f} %, "
            f"{written / 1e6:,.0f} MB written, {written / args.tokens:,.0f} bytes per token",
            flush=True,
        )
        record[name] = {"plain_s": a, "capture_s": b, "rounds": times, "bytes": written}
        shapes.write_json(args.json, record)


if __name__ == "__main__":
    run(main)
