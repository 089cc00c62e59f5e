"""What the parity tests share: batches, the product's forward pass under jit, and measures of distance."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import pathlib
import statistics
import textwrap
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe import model
from jaxmoe.config import LoraConfig, Qwen3MoeConfig
from jaxmoe.data import load_tokenizer
from tests import oracle
from tests.configs import random_tokens

# On a CPU nearly all of the suite's time is spent in LLVM; less optimisation halves it and reorders no sum.
COMPILER_OPTIONS = (
    {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    if jax.default_backend() == "cpu"
    else {}
)


class Batch(NamedTuple):
    """One input for every implementation; segment 0 is padding, positions restart with each document."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray

    @property
    def valid(self) -> np.ndarray:
        """[B, T], true outside padding."""
        return self.segment_ids != 0

    @property
    def labels(self) -> np.ndarray:
        """[B, T] next token of the same document, -100 where there is none."""
        labels = np.full_like(self.input_ids, -100)
        follows = self.valid[:, 1:] & (self.segment_ids[:, 1:] == self.segment_ids[:, :-1])
        labels[:, :-1] = np.where(follows, self.input_ids[:, 1:], -100)
        return labels


def make_batch(config: Qwen3MoeConfig, layout: list[list[int]], seed: int = 0) -> Batch:
    """One row per list of run lengths: n > 0 is a document of n tokens, n < 0 is -n tokens of padding."""
    length = sum(map(abs, layout[0]))
    segments = np.zeros((len(layout), length), np.int32)
    positions = np.zeros((len(layout), length), np.int32)
    for b, runs in enumerate(layout):
        assert sum(map(abs, runs)) == length
        start, document = 0, 0
        for run in runs:
            if run > 0:
                document += 1
                segments[b, start : start + run] = document
                positions[b, start : start + run] = np.arange(run)
            start += abs(run)
    return Batch(random_tokens(config, len(layout), length, seed), positions, segments)


# Rows of 48 tokens, so that each configuration is compiled once for all of them.
LAYOUTS = {
    "plain": [[48], [48]],
    "left_padded": [[-11, 37], [48]],
    "right_padded": [[29, -19], [47, -1]],
    "packed": [[48], [13, 1, 34]],
    "packed_and_padded": [[20, 17, -11], [-3, 5, 40]],
}
LONG = {"plain_600": [[600]], "packed_600": [[217, 383]]}


CHECKPOINT = pathlib.Path(__file__).parent / "checkpoints" / "qwen3-moe-stdlib"


def checkpoint_batch(length: int = 600) -> Batch:
    """The beginnings of four modules of the standard library, as tokens of the trained checkpoint."""
    tokenizer = load_tokenizer(CHECKPOINT)
    texts = [inspect.getsource(module) for module in (argparse, dataclasses, statistics, textwrap)]
    ids = np.asarray([tokenizer(text[: 8 * length])["input_ids"][:length] for text in texts], np.int32)
    return Batch(ids, np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape).copy(), np.ones_like(ids))


class ProductOutput(NamedTuple):
    """As `oracle.OracleOutput`, with what the product counted while routing."""

    logits: np.ndarray
    hidden: np.ndarray
    router_logits: np.ndarray
    selected: np.ndarray
    counts: np.ndarray
    aux_loss: float


def product(
    config: Qwen3MoeConfig,
    params: Mapping[str, np.ndarray],
    batch: Batch,
    *,
    dtype: str = "float32",
    lora: LoraConfig | None = None,
    adapters: Mapping[str, np.ndarray] | None = None,
    fresh: bool = False,
) -> ProductOutput:
    """Runs `jaxmoe`; `fresh` compiles anew, which a test that patches the product needs."""
    step = _compiled.__wrapped__(config, lora) if fresh else _compiled(config, lora)
    cast = {path: jnp.asarray(array, dtype) for path, array in params.items()}
    logits, out, aux = step(cast, {k: jnp.asarray(v) for k, v in (adapters or {}).items()}, *map(jnp.asarray, batch))
    logits, out = jax.tree.map(lambda x: np.asarray(x, np.float32 if x.dtype == jnp.bfloat16 else None), (logits, out))
    hidden = np.concatenate([out.layer_inputs, out.hidden[None]])
    # The choice is made from float32 probabilities, lowest index first where they tie.
    probabilities = np.asarray(jax.nn.softmax(out.router_logits, axis=-1))
    selected = oracle.top_k(probabilities, config.num_experts_per_tok)
    return ProductOutput(logits, hidden, out.router_logits, selected, out.stats.counts, float(aux))


@functools.cache
def _compiled(config: Qwen3MoeConfig, lora: LoraConfig | None):
    @functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def run(params, adapters, input_ids, position_ids, segment_ids):
        out = model.forward(
            params,
            adapters,
            input_ids,
            position_ids,
            segment_ids,
            config=config,
            lora=lora,
            capture_router_logits=True,
            capture_hidden=True,
        )
        aux = model.load_balancing_loss(*out.stats) if config.sparse_layers else jnp.zeros(())
        return model.logits_of(out.hidden, model.head_weight(params, config)), out, aux

    return run


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected| in L2, in double; 0 for two empty arrays."""
    expected = np.asarray(expected, np.float64)
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / norm) if norm else 0.0
