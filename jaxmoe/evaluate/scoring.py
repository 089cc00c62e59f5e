"""Log-probabilities of given texts, many at a time.

Letters: B sequences, T tokens, C candidates, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmoe.distributed.mesh import SEQUENCE_AXES, MeshShape
from jaxmoe.distributed.placement import Placement
from jaxmoe.errors import UserError
from jaxmoe.generate.engine import Generator
from jaxmoe.model.decoder import forward, head_weight, logits_of
from jaxmoe.model.interface import Options, Tokens, control_specs
from jaxmoe.ops.router import RoutingControl

_CHUNK = 512  # tokens whose logits exist at a time


class Request(NamedTuple):
    """Token ids, of which the last `scored` are to be predicted from those before them."""

    tokens: tuple[int, ...]
    scored: int


class Score(NamedTuple):
    """The sum of log p of the scored tokens, in nats, and whether each is the most probable one."""

    log_probability: float
    is_greedy: bool


class _Group(NamedTuple):
    """Requests that differ in their last token only, and are therefore answered by one forward pass."""

    tokens: tuple[int, ...]  # without the last one
    requests: list[int]


def padded_length(length: int) -> int:
    """The next of 32, 48, 64, 96, 128, ...: few shapes to compile, and at most a third of the work is padding."""
    power = max(32, 1 << (length - 1).bit_length())
    return power * 3 // 4 if length <= power * 3 // 4 and power > 32 else power


def score(
    generator: Generator,
    requests: Sequence[Request],
    batch: Callable[[int], int],
    on_scored: Callable[[int], None] = lambda count: None,
    control: RoutingControl | None = None,
) -> list[Score]:
    """A score for each request, in their order.

    Args:
        generator: holds the model.
        requests: at least two tokens each, of which at least one is scored and at least one is not.
        batch: how many sequences of a padded length run at once.
        on_scored: called after each batch with its number of requests.
        control: what is imposed on the routing, [Ls, E].

    Raises:
        UserError: a token id outside the vocabulary.
    """
    largest = max((max(request.tokens) for request in requests), default=0)
    if largest >= generator.config.vocab_size:
        wanted = f"token ids below the model's vocab_size {generator.config.vocab_size}"
        raise UserError(f"text: expected {wanted}, found {largest}")
    scores: list[Score | None] = [None] * len(requests)
    groups = _groups(requests)
    most = max((len(group.requests) for group in groups), default=1)
    width = max(4, 1 << (most - 1).bit_length())  # few widths, few shapes to compile
    for together in _batches(groups, batch):
        length = padded_length(len(together[0].tokens))
        shape = _sequences(batch(length), generator.mesh), length
        following, best, last = _run(generator, together, shape, requests, width, control)
        for row, group in enumerate(together):
            for column, index in enumerate(group.requests):
                scores[index] = _score(requests[index], following[row], best[row], last[row, column])
        on_scored(sum(len(group.requests) for group in together))
    assert all(each is not None for each in scores)
    return [each for each in scores if each is not None]


def _sequences(count: int, mesh: MeshShape) -> int:
    """The next number of sequences that the devices of the mesh can share evenly."""
    return count + -count % mesh.product(SEQUENCE_AXES)


def _groups(requests: Sequence[Request]) -> list[_Group]:
    found: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        found.setdefault(request.tokens[:-1], []).append(index)
    return sorted((_Group(*item) for item in found.items()), key=lambda group: -len(group.tokens))


def _batches(groups: Sequence[_Group], batch: Callable[[int], int]) -> Iterator[list[_Group]]:
    """Groups of one padded length, at most as many as `batch` says."""
    together: list[_Group] = []
    for group in groups:
        length = padded_length(len(group.tokens))
        if together and (length < padded_length(len(together[0].tokens)) or len(together) == batch(length)):
            yield together
            together = []
        together.append(group)
    if together:
        yield together


def _run(
    generator: Generator,
    groups: Sequence[_Group],
    shape: tuple[int, int],
    requests: Sequence[Request],
    width: int,
    control: RoutingControl | None,
) -> tuple[Float[np.ndarray, "B T"], Int[np.ndarray, "B T"], Float[np.ndarray, "B C"]]:
    """One forward pass over `groups`, padded to `shape` = (B, T) and to `width` = C candidates."""
    ids, lengths = np.zeros(shape, np.int32), np.ones(shape[0], np.int32)
    candidates = np.zeros((shape[0], width), np.int32)
    for row, group in enumerate(groups):
        ids[row, : len(group.tokens)] = group.tokens
        lengths[row] = len(group.tokens)
        candidates[row, : len(group.requests)] = [requests[index].tokens[-1] for index in group.requests]
    options = Options(lora=generator.lora, packed=False, mesh=generator.mesh)
    weights = generator.weights
    results = _log_probabilities(*weights, ids, lengths, candidates, control, config=generator.config, options=options)
    following, best, last = jax.device_get(results)
    return following, best, last


@partial(jax.jit, static_argnames=("config", "options"))
def _log_probabilities(params, adapters, ids, lengths, candidates, control, *, config, options):
    """For each token the log p of the one after it [B, T] and the most probable one [B, T]; and the log p of the
    candidates [B, C] after the last token of each sequence. The devices of the mesh share the sequences."""
    place = Placement(options.mesh, config, options.lora)
    sequences = place.spec("batch")
    run = place.run(
        partial(_of_sequences, config=config, options=options),
        (place.specs(params), place.specs(adapters), *[sequences] * 3, control_specs(control, place)),
        sequences,
    )
    return run(params, adapters, ids, lengths, candidates, control)


def _of_sequences(params, adapters, ids, lengths, candidates, control, *, config, options):
    """As `_log_probabilities`, for the sequences of one device."""
    batch, length = ids.shape
    positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    tokens = Tokens(ids, positions, segments)
    hidden = forward(params, adapters, tokens, config=config, options=options, control=control).hidden
    head = head_weight(params)
    following, best = _of_labels(hidden.reshape(batch * length, -1), jnp.roll(ids, -1, axis=1).reshape(-1), head)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    at_end = jnp.take_along_axis(jax.nn.log_softmax(logits_of(last, head)), candidates, axis=1)
    return following.reshape(ids.shape), best.reshape(ids.shape), at_end


def _of_labels(
    hidden: Float[Array, "M D"], labels: Int[Array, " M"], head: Float[Array, "V D"]
) -> tuple[Float[Array, " M"], Int[Array, " M"]]:
    """(log p of each label, the most probable token), a chunk of logits at a time."""

    def of_chunk(piece: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, labels = piece
        logits = logits_of(hidden, head)
        label = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return label - jax.nn.logsumexp(logits, axis=1), jnp.argmax(logits, axis=1).astype(jnp.int32)

    tokens, chunk = hidden.shape[0], min(_CHUNK, hidden.shape[0])
    padding = -tokens % chunk
    pieces = jnp.pad(hidden, ((0, padding), (0, 0))), jnp.pad(labels, (0, padding))
    of_label, best = jax.lax.map(
        of_chunk, (pieces[0].reshape(-1, chunk, hidden.shape[1]), pieces[1].reshape(-1, chunk))
    )
    return of_label.reshape(-1)[:tokens], best.reshape(-1)[:tokens]


def _score(
    request: Request, following: Float[np.ndarray, " T"], best: Int[np.ndarray, " T"], last: np.floating
) -> Score:
    """The score of one request, whose last token has the log-probability `last`."""
    end = len(request.tokens) - 1
    start = end - request.scored  # the position that predicts the first scored token
    total = float(np.sum(following[start : end - 1], dtype=np.float64) + last)
    return Score(total, tuple(best[start:end].tolist()) == request.tokens[start + 1 :])
