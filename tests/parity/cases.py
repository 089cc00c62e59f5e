"""The parts of a case: random adapters, unusual configurations written as checkpoints, inputs."""

from __future__ import annotations

import json
import pathlib
import tempfile
from collections.abc import Sequence

import numpy as np

from convert.adapters import write_peft
from convert.hf2jax import hf2jax
from convert.jax2hf import jax2hf
from jaxmoe.config import LoraConfig, Qwen3MoeConfig, expand_targets
from jaxmoe.data.chat import load_tokenizer
from peers.configs import CONFIGS, config_of, random_adapters, random_parameters, random_tokens
from peers.make_checkpoint import write_tokenizer
from tests.parity.batches import Batch, checkpoint_batch

LENGTH = 600
QUANTIZED_FAULTS = {
    "nf4": ("NF4 nibbles swapped", "NF4 scale of another block"),
    "fp8": ("FP8 scale off by one block",),
}
SHORTEST = 8  # tokens of a sequence: two documents, and labels for each of four gradients


def write_random_adapter(
    folder: pathlib.Path, checkpoint: str | pathlib.Path, groups: Sequence[str] | None = None, r: int = 4
) -> pathlib.Path:
    """A PEFT adapter with random A and B on `groups` (None: all that the model has); alpha differs from r."""
    config = Qwen3MoeConfig.from_pretrained(checkpoint)
    if groups is None:
        sparse, dense = config.sparse_layers, config.dense_layers
        groups = ["attention", *(["router", "experts"] if sparse else []), *(["dense"] if dense else [])]
    lora = LoraConfig(r=r, alpha=1.5 * r, targets=expand_targets(list(groups)))
    write_peft(folder, config, lora, random_adapters(config, lora))
    return folder


def write_odd_checkpoint(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The configuration `name` with random weights, written by transformers itself; config.json stays as it is in
    `peers.configs`, in the form of transformers 4 or 5."""
    from peers.reference import Reference

    Reference(CONFIGS[name], random_parameters(config_of(name))).model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name], indent=1) + "\n", encoding="utf-8")
    write_tokenizer(folder)
    return folder


def write_fp8(checkpoint: str | pathlib.Path, target: str | pathlib.Path) -> None:
    """The checkpoint in FP8, in the form in which Qwen publishes; every side reads these bytes."""
    with tempfile.TemporaryDirectory() as folder:
        hf2jax(checkpoint, f"{folder}/jax", quantize="fp8")
        jax2hf(f"{folder}/jax", target)


def packed_batch(rows: np.ndarray) -> Batch:
    """Sequences [B, T] of tokens; the last one consists of two documents."""
    B, T = rows.shape
    positions, segments = np.tile(np.arange(T, dtype=np.int32), (B, 1)), np.ones((B, T), np.int32)
    first = (2 * T) // 5
    positions[-1, first:] -= first
    segments[-1, first:] = 2
    return Batch(np.ascontiguousarray(rows, np.int32), positions, segments)


def random_batch(config: Qwen3MoeConfig, rows: int = 2, length: int = LENGTH) -> Batch:
    """Random tokens; the last sequence is packed."""
    return packed_batch(random_tokens(config, rows, length))


def text_batch(checkpoint: pathlib.Path, rows: int = 4, length: int = LENGTH) -> Batch:
    """Up to four sequences of Python, as tokens of the checkpoint; the last one is packed."""
    return packed_batch(checkpoint_batch(length, checkpoint).input_ids[:rows])


def prompt_batch(checkpoint: pathlib.Path, prompt: str) -> Batch:
    """One sequence: the text `prompt`, as tokens of the checkpoint."""
    ids = np.asarray([load_tokenizer(checkpoint)(prompt)["input_ids"]], np.int32)
    return Batch(ids, np.arange(ids.shape[1], dtype=np.int32)[None], np.ones_like(ids))


def faults_of(config: Qwen3MoeConfig, batch: Batch, adapter: bool, form: str | None = None) -> tuple[str, ...]:
    """The planted faults that change what this model, quantised in this form, computes for this batch."""
    return (
        *(("gate and up swapped", "experts permuted") if config.sparse_layers else ()),
        *(("no renormalisation" if config.norm_topk_prob else "softmax after top-k",) if config.sparse_layers else ()),
        "rotary base 10 % off",
        "q and k norm missing",
        *(("documents joined",) if (batch.segment_ids > 1).any() else ()),
        *(("adapter scaled by 1 over r",) if adapter else ()),
        *(("adapter of another expert",) if adapter and config.sparse_layers else ()),
        *(QUANTIZED_FAULTS[form] if form else ()),
    )
