"""Losses over pairs of answers: direct preference optimisation (DPO), and odds ratio preference optimisation (ORPO).

Lines 2i and 2i + 1 of a batch hold the chosen and the rejected sides of the same pairs, in the same order
(`jaxmoe.data.packing`). Losses, rewards and the names of what is reported are those of TRL 1.16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxmoe.data.packing import Batch
from jaxmoe.train.log_probs import label_log_probs, learned_log_probs
from jaxmoe.train.loss import BatchTotal, Outputs, Total

Sums = dict[str, Float[Array, ""]]


def _number_of_pairs(batch: Batch) -> Float[Array, ""]:
    """Documents of a sequence are numbered from 1."""
    return jnp.sum(jnp.max(batch.segment_ids[..., 0::2, :], axis=-1)).astype(jnp.float32)


def _predicted(batch: Batch) -> Float[Array, "*lead T"]:
    """1 for a token that another one of its document follows, whether that one is learned or not, else 0."""
    following = jnp.roll(batch.segment_ids, -1, axis=-1).at[..., -1].set(0)
    return ((batch.segment_ids == following) & (batch.segment_ids > 0)).astype(jnp.float32)


def _chosen_tokens(batch: Batch) -> Float[Array, ""]:
    return jnp.sum(_predicted(batch)[..., 0::2, :])


@dataclass(frozen=True)
class DirectPreference:
    """Direct preference optimisation: the mean over the pairs of -log sigmoid(beta * margin).

    The margin says how much more the model prefers the chosen answer than the reference model does: the log-ratio of
    the two models' probabilities of the chosen answer, minus that of the rejected answer.

    `label_smoothing` e is for data in which a share e of the pairs is the wrong way round. With L(margin) the loss
    above, it is ((1 - e) L(margin) - e L(-margin)) / (1 - 2 e), whose mean over such data is that of L over right data.

    Sources: Rafailov et al. 2023 (arXiv 2305.18290), equation 7; Chowdhury et al. 2024 (arXiv 2403.00409); in TRL
    `loss_type="sigmoid"`, and with label smoothing `loss_type="robust"`.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    @property
    def needs(self) -> Mapping[str, Total]:
        """No totals."""
        return {}

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """The number of pairs."""
        return _number_of_pairs(batch)

    def __call__(self, outputs: Outputs, batch: Batch, totals: Mapping[str, PyTree]) -> tuple[Float[Array, ""], Sums]:
        """The sum over the pairs of a micro-batch; rewards, and log-probabilities of the answers."""
        if outputs.reference is None:
            raise ValueError("reference: expected the log-probabilities of a reference model, found none")
        pairs = _Pairs.of(batch)
        log_probs = pairs.add_up(learned_log_probs(outputs, batch))
        ratios = log_probs - pairs.add_up(outputs.reference)
        margins = self.beta * (ratios[:, 0] - ratios[:, 1])
        e = self.label_smoothing
        losses = (e * jax.nn.log_sigmoid(-margins) - (1 - e) * jax.nn.log_sigmoid(margins)) / (1 - 2 * e)
        return pairs.total(losses), pairs.report(self.beta * ratios, log_probs)


@dataclass(frozen=True)
class OddsRatioPreference:
    """Odds ratio preference optimisation: cross-entropy of the chosen side, minus beta * log sigmoid(log odds ratio).

    The odds of an answer are p / (1 - p), p the geometric mean of its tokens' probabilities; the log odds ratio is that
    of the chosen answer to the rejected one. The cross-entropy is the mean over all tokens of the chosen sides, prompts
    included, the other part the mean over the pairs. There is no reference model.

    Source: Hong et al. 2024 (arXiv 2403.07691), equations 6 and 7; `trl.experimental.orpo`.
    """

    beta: float = 0.1

    @property
    def needs(self) -> Mapping[str, Total]:
        """What turns a mean over the tokens into one over the pairs."""
        return {"chosen_tokens": BatchTotal(_chosen_tokens), "pairs": BatchTotal(_number_of_pairs)}

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """The number of pairs."""
        return _number_of_pairs(batch)

    def __call__(self, outputs: Outputs, batch: Batch, totals: Mapping[str, PyTree]) -> tuple[Float[Array, ""], Sums]:
        """The sum over the pairs of a micro-batch, with its share of the cross-entropy; what TRL reports."""
        pairs = _Pairs.of(batch)
        of_tokens = label_log_probs(outputs, batch)
        learned = jnp.where(pairs.there[:, None], pairs.add_up(batch.weights), 1.0)
        log_probs = jnp.where(pairs.there[:, None], pairs.add_up(of_tokens * batch.weights) / learned, -1.0)
        log_odds = log_probs - _log_of_1_minus_exp(log_probs)
        ratios = log_odds[:, 0] - log_odds[:, 1]
        agreements = jax.nn.log_sigmoid(ratios)
        # Sums are divided by the number of pairs, the cross-entropy is a mean over tokens.
        nll = -jnp.sum((of_tokens * _predicted(batch))[0::2]) * totals["pairs"] / totals["chosen_tokens"]
        further = {
            "nll_loss": nll,
            "log_odds_ratio": pairs.total(agreements),
            "log_odds_chosen": pairs.total(ratios),
        }
        return nll - self.beta * pairs.total(agreements), further | pairs.report(self.beta * log_probs, log_probs)


class _Pairs(NamedTuple):
    """Where the P pairs of sequences of a micro-batch hold up to S documents each, of which some are `there`."""

    segment_ids: Int[Array, "B T"]
    there: Bool[Array, "P S"]

    @classmethod
    def of(cls, batch: Batch) -> _Pairs:
        numbers = jnp.arange(1, batch.segment_ids.shape[-1] + 1)
        return cls(batch.segment_ids, numbers <= jnp.max(batch.segment_ids[0::2], axis=-1, keepdims=True))

    def add_up(self, values: Float[Array, "B T"]) -> Float[Array, "P 2 S"]:
        """Sums over each document, of the chosen and the rejected sides; undefined for those that are not there."""
        sums = _document_sums(values, self.segment_ids)
        return sums.reshape(-1, 2, sums.shape[-1])

    def total(self, values: Float[Array, "P S"]) -> Float[Array, ""]:
        """The sum over the pairs."""
        return jnp.sum(jnp.where(self.there, values, 0.0))

    def report(self, rewards: Float[Array, "P 2 S"], log_probs: Float[Array, "P 2 S"]) -> Sums:
        """Sums over the pairs under TRL's names."""
        chosen, rejected = rewards[:, 0], rewards[:, 1]
        return {
            "rewards/chosen": self.total(chosen),
            "rewards/rejected": self.total(rejected),
            "rewards/margins": self.total(chosen - rejected),
            "rewards/accuracies": self.total((chosen > rejected).astype(jnp.float32)),
            "logps/chosen": self.total(log_probs[:, 0]),
            "logps/rejected": self.total(log_probs[:, 1]),
        }


@jax.custom_vjp
def _document_sums(values: Float[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Float[Array, "B S"]:
    """The sum over each document, the first in the first place; S = T. In a fixed order, unlike a scatter on a GPU."""

    def add(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return second[0] + jnp.where(first[1] == second[1], first[0], 0.0), second[1]

    running, _ = jax.lax.associative_scan(add, (values, segment_ids), axis=1)
    length = segment_ids.shape[1]
    in_order = jnp.where(segment_ids == 0, length + 1, segment_ids)  # padding is at the end
    find = lambda line: jnp.searchsorted(line, jnp.arange(1, length + 1), side="right") - 1
    return jnp.take_along_axis(running, jax.vmap(find)(in_order), axis=1, mode="clip")


def _document_sums_forward(values: Array, segment_ids: Array) -> tuple[Array, Array]:
    return _document_sums(values, segment_ids), segment_ids


def _document_sums_backward(segment_ids: Array, d_sums: Array) -> tuple[Array, None]:
    of_tokens = jnp.take_along_axis(d_sums, segment_ids - 1, axis=1, mode="clip")
    return jnp.where(segment_ids > 0, of_tokens, 0.0), None


_document_sums.defvjp(_document_sums_forward, _document_sums_backward)


def _log_of_1_minus_exp(x: Float[Array, "*lead"]) -> Float[Array, "*lead"]:
    """log(1 - exp(x)) for x < 0, in the form that is exact on either side of -log 2 (Mächler 2012)."""
    threshold = -0.6931471805599453
    far, near = jnp.minimum(x, threshold), jnp.maximum(x, threshold)
    return jnp.where(x < threshold, jnp.log1p(-jnp.exp(far)), jnp.log(-jnp.expm1(near)))
