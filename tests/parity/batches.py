"""Inputs for every implementation: token ids with positions and documents."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import pathlib
import statistics
import textwrap
from typing import NamedTuple

import numpy as np

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.data.chat import load_tokenizer
from peers.configs import random_tokens


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
        """[B, T]: the next token of the same document, -100 if there is none."""
        labels = np.full_like(self.input_ids, -100)
        follows = self.valid[:, 1:] & (self.segment_ids[:, 1:] == self.segment_ids[:, :-1])
        labels[:, :-1] = np.where(follows, self.input_ids[:, 1:], -100)
        return labels

    def labels_of(self, part: int, parts: int) -> np.ndarray:
        """[B, T]: the labels of one of `parts` equal pieces of the batch's tokens, -100 elsewhere."""
        tokens = np.arange(self.input_ids.size).reshape(self.input_ids.shape)
        return np.where(tokens * parts // tokens.size == part, self.labels, -100)


def make_batch(config: Qwen3MoeConfig, layout: list[list[int]], seed: int = 0) -> Batch:
    """One sequence per list of lengths: n > 0 is a document of n tokens, n < 0 is -n tokens of padding."""
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


# Sequences of 48 tokens, so that each configuration is compiled once for all of them.
LAYOUTS = {
    "plain": [[48], [48]],
    "left_padded": [[-11, 37], [48]],
    "right_padded": [[29, -19], [47, -1]],
    "packed": [[48], [13, 1, 34]],
    "packed_and_padded": [[20, 17, -11], [-3, 5, 40]],
}
LONG = {"plain_600": [[600]], "packed_600": [[217, 383]]}


CHECKPOINT = pathlib.Path(__file__).parent.parent / "checkpoints" / "qwen3-moe-stdlib"


def checkpoint_batch(length: int = 600, checkpoint: pathlib.Path = CHECKPOINT) -> Batch:
    """The beginnings of four modules of the standard library, as tokens of a trained checkpoint."""
    tokenizer = load_tokenizer(checkpoint)
    texts = [inspect.getsource(module) for module in (argparse, dataclasses, statistics, textwrap)]
    ids = np.asarray([tokenizer(text[: 8 * length])["input_ids"][:length] for text in texts], np.int32)
    return Batch(ids, np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape).copy(), np.ones_like(ids))
