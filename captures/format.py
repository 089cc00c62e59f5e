"""The format of captures: folders with `manifest.json` and shards `routing-00000.safetensors`, ...

`captures.writer` writes them, `captures.reader` reads them.

A capture is a stream of n tokens, divided into shards, so that writers and readers hold one shard at a time:

    token, document, position, domain, role, next [n]   the text (class `Text`)
    experts [Ls, n, k]            the experts that were used, most probable first
    top_experts [Ls, n, t]        the t most probable experts, most probable first
    top_logits [Ls, n, t]         their router logits, float32
    log_sum_exp [Ls, n]           over all E logits: probability of e = exp(logit e - log_sum_exp)
    entropy [Ls, n]               of the router's distribution over all E experts, nats
    probability_sums [Ls, E]      router probabilities summed over the shard's tokens
    predicted, loss [n]           optional: the most probable next token; -log p(next), nats, NaN without a next token

`Chunk` computes everything else (weights, margins) exactly from these. t is 16 by default and at most E. If the routing
was imposed, t is E, because the experts that were used need not be among the most probable. If t is 0, the experts come
from elsewhere (`jaxmoe.routing.imported`): the capture has the arrays of the text and `experts` only.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Integer

from jaxmoe.errors import UserError, check_integer, shown

FORMAT, VERSION = "jaxmoe-capture", 1
MANIFEST = "manifest.json"
DEFAULT_KEEP_LOGITS = 16

# The roles of tokens that jaxmoe writes: plain text; the parts of a prompt/completion record; who speaks in a chat, and
# what the chat template adds; a model's own output.
ROLES = ("text", "prompt", "completion", "template", "system", "user", "assistant", "tool", "generated")

_TEXT = {name: np.dtype(np.int32) for name in ("token", "document", "position", "domain", "role", "next")}
# The safetensors library's names of the dtypes that a shard holds.
CODES = {np.dtype(np.int32): "I32", np.dtype(np.float32): "F32", np.dtype(np.uint8): "U8", np.dtype(np.uint16): "U16"}
PREDICTIONS = {"predicted": np.dtype(np.int32), "loss": np.dtype(np.float32)}


def expert_dtype(num_experts: int) -> np.dtype[Any]:
    """The smallest unsigned integer dtype that holds the index of an expert."""
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)


@dataclass(frozen=True)
class Model:
    """The part of a model's configuration that readers of its routing need; `layers` are indices of MoE layers."""

    layers: tuple[int, ...]
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    vocab_size: int

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_experts_per_tok", "vocab_size"):
            check_integer(name, getattr(self, name), at_least=1)
        if type(self.norm_topk_prob) is not bool:
            raise UserError(f"norm_topk_prob: expected true or false, found {shown(self.norm_topk_prob)}")
        if not self.layers:
            raise UserError("layers: expected a model with mixture-of-experts layers, found none")
        for layer in self.layers:
            check_integer("layers", layer, at_least=0)
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UserError(f"num_experts_per_tok: expected 1 to {self.num_experts}, found {self.num_experts_per_tok}")


class Text(NamedTuple):
    """n tokens with their labels: token id, index of the record, position in its context (0 starts a new context),
    indices of domain and role in the manifest's lists, and the id of the next token (-1: none)."""

    token: Int32[np.ndarray, " n"]
    document: Int32[np.ndarray, " n"]
    position: Int32[np.ndarray, " n"]
    domain: Int32[np.ndarray, " n"]
    role: Int32[np.ndarray, " n"]
    next: Int32[np.ndarray, " n"]

    def contexts(self) -> list[slice]:
        """The slice of the stream for each context, that is for each run of positions 0, 1, 2, ..."""
        starts = np.flatnonzero(self.position == 0).tolist()
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(self.position)], strict=True)]


@dataclass(frozen=True)
class LabelledText:
    """A text as a model reads it: the stream of tokens in contexts of at most `seq_length` tokens, the names of domains
    and roles, and the digest of the tokenizer."""

    text: Text
    domains: tuple[str, ...]
    roles: tuple[str, ...]
    seq_length: int
    tokenizer: str


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of a capture in Ls layers: the arrays of the module's docstring and what they imply."""

    model: Model
    text: Text
    experts: Integer[np.ndarray, "Ls n k"]
    top_experts: Integer[np.ndarray, "Ls n t"]
    top_logits: Float32[np.ndarray, "Ls n t"]
    log_sum_exp: Float32[np.ndarray, "Ls n"]
    entropy: Float32[np.ndarray, "Ls n"]
    predicted: Int32[np.ndarray, " n"] | None
    loss: Float32[np.ndarray, " n"] | None

    def __len__(self) -> int:
        return len(self.text.token)

    @cached_property
    def probabilities(self) -> Float32[np.ndarray, "Ls n t"]:
        """Router probabilities of the t most probable experts."""
        return np.exp(self.top_logits - self.log_sum_exp[..., None])

    @cached_property
    def weights(self) -> Float32[np.ndarray, "Ls n k"]:
        """The weights of the used experts in the sum of their outputs."""
        k = self.model.num_experts_per_tok
        chosen = self.probabilities[..., :k]
        if not np.array_equal(
            self.experts, self.top_experts[..., :k]
        ):  # the routing was imposed, or ties have another order
            match = self.experts[..., :, None] == self.top_experts[..., None, :]
            if not match.any(axis=-1).all():
                raise ValueError("weights: expected the used experts among those whose logits were kept")
            chosen = np.take_along_axis(self.probabilities, match.argmax(axis=-1), axis=-1)
        return chosen / chosen.sum(axis=-1, keepdims=True) if self.model.norm_topk_prob else chosen

    @cached_property
    def margin(self) -> Float32[np.ndarray, "Ls n"]:
        """Probability of the k-th expert minus that of the next: the margin of the choice; 1 if k = E."""
        k = self.model.num_experts_per_tok
        if k == self.model.num_experts:
            return np.ones(self.log_sum_exp.shape, np.float32)
        return self.probabilities[..., k - 1] - self.probabilities[..., k]

    def dense_probabilities(self) -> Float32[np.ndarray, "Ls n E"]:
        """Probabilities of all E experts in the order of their index.

        Raises:
            ValueError: the capture kept only the largest logits.
        """
        E = self.model.num_experts
        if self.top_experts.shape[-1] < E:
            raise ValueError(f"logits: expected all {E} of each token, found the top {self.top_experts.shape[-1]}")
        dense = np.empty_like(self.probabilities)
        np.put_along_axis(dense, self.top_experts.astype(np.intp), self.probabilities, axis=-1)
        return dense


def layout(
    model: Model, keep_logits: int, n: int, predictions: bool
) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Dtype and shape of every array in a shard of n tokens."""
    layers, expert, real = len(model.layers), expert_dtype(model.num_experts), np.dtype(np.float32)
    always = {
        **{name: (dtype, (n,)) for name, dtype in (_TEXT | (PREDICTIONS if predictions else {})).items()},
        "experts": (expert, (layers, n, model.num_experts_per_tok)),
    }
    if keep_logits == 0:
        return always
    return {
        **always,
        "top_experts": (expert, (layers, n, keep_logits)),
        "top_logits": (real, (layers, n, keep_logits)),
        "log_sum_exp": (real, (layers, n)),
        "entropy": (real, (layers, n)),
        "probability_sums": (real, (layers, model.num_experts)),
    }


def token_axis(name: str) -> Literal[0, 1]:
    """The axis of an array along which tokens lie."""
    return 0 if name in _TEXT or name in PREDICTIONS else 1


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 over the vocabulary (token, id) of a `transformers` tokenizer: equal if ids mean the same tokens."""
    content = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.sha256(content.encode()).hexdigest()
