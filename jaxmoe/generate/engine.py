"""The generation engine: prefill, then a decode loop on the device.

Prompts of different lengths share a batch. Each sequence is padded on the right and has its own positions, so its
tokens do not depend on the other sequences. Lengths are rounded up to buckets, so that few shapes are compiled.

The host calls the loop for as many tokens as the device generates in a fraction of a second, and hands them on. The
loop ends early when all sequences have ended. How many tokens a call generates changes none of them.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxmoe.config import LoraConfig, Qwen3MoeConfig
from jaxmoe.distributed.collectives import first_of_share, on_any_device
from jaxmoe.distributed.mesh import SEQUENCE_AXES, MeshShape
from jaxmoe.distributed.placement import Placement
from jaxmoe.errors import UserError
from jaxmoe.generate.processors import History, Processors, process
from jaxmoe.generate.sampling import GREEDY, Sampling, SamplingArrays, sample
from jaxmoe.memory import device_bytes, format_bytes
from jaxmoe.model.adapted import low_rank_factors, weights_of
from jaxmoe.model.cache import KVCache, NewTokens, empty_cache, forward_cached
from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM
from jaxmoe.model.decoder import head_weight, logits_of
from jaxmoe.model.interface import Options, Params
from jaxmoe.ops.router import CapturedRouting, RoutingControl

EVERYWHERE = PartitionSpec()  # whole on every device
_MOST_TOKENS = 64  # that one call of the decode loop generates
_SECONDS = 0.1  # that one call should take


class Weights(NamedTuple):
    """A model's arrays by path."""

    params: Params
    adapters: Params


class Step(NamedTuple):
    """One step of the decode loop: the token and position of each sequence, and how many tokens were drawn before."""

    token: Int[Array, " B"]
    position: Int[Array, " B"]
    draws: UInt32[Array, ""]


class Choice(NamedTuple):
    """How the next token is chosen, as arrays; without `processors` the scores are the logits."""

    sampling: SamplingArrays
    processors: Processors | None


@dataclass(frozen=True)
class Program:
    """What the compiled functions depend on."""

    config: Qwen3MoeConfig
    options: Options
    greedy: bool

    @property
    def placement(self) -> Placement:
        """Where the arrays lie. The devices of a mesh share the sequences of a batch, and each decodes its own."""
        return Placement(self.options.mesh, self.config, self.options.lora)

    @property
    def sequences(self) -> PartitionSpec:
        """How arrays over sequences are shared."""
        return self.placement.spec("batch")

    @property
    def stacks(self) -> PartitionSpec:
        """How arrays whose second axis is that of sequences are shared: layers' caches, tokens, routing."""
        return self.placement.spec(None, "batch")

    def held(self, weights: Weights) -> Weights:
        """How the weights are shared."""
        return Weights._make(map(self.placement.specs, weights))

    def imposed(self, control: RoutingControl | None) -> RoutingControl | None:
        """How what is imposed on the routing is shared."""
        return None if control is None else RoutingControl._make([self.stacks, *[EVERYWHERE] * 3])


@dataclass
class RoutingLog:
    """The routing of one call of `Generator.generate`, on the device, with `keep_logits` router logits per token.

    `steps` holds the routing of the prompts [Ls, B, T, ...], then of every token fed back [Ls, B, 1, ...].
    """

    keep_logits: int
    steps: list[CapturedRouting] = field(default_factory=list)


def _forward(weights: Weights, new: NewTokens, cache: KVCache, control: RoutingControl | None, program: Program):
    """The model's forward pass over the new tokens: (hidden [B, T, D], cache, routing or None)."""
    positions = jnp.broadcast_to(jnp.arange(new.input_ids.shape[1]), new.input_ids.shape)
    positions = positions if new.start is None else new.start[:, None] + positions
    return forward_cached(
        weights.params,
        weights.adapters,
        new,
        cache,
        config=program.config,
        options=program.options,
        control=_control_at(control, positions),
    )


def _next_token(
    weights: Weights,
    hidden: Float[Array, "B D"],
    choice: Choice,
    history: History | None,
    length: Int[Array, " B"],
    draws: UInt32[Array, ""],
    program: Program,
):
    """The token after each sequence's `hidden`, its `length` tokens so far; `draws` counts the tokens drawn before."""
    logits = logits_of(hidden, head_weight(weights.params))
    if choice.processors is not None:
        logits = process(logits, choice.processors, history, length, draws)
    if program.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    key = jax.random.fold_in(jax.random.key(choice.sampling.seed), draws)
    # Keys depend on the sequence's index, not on the batch size: a prompt draws the same alone as first in a batch.
    index = first_of_share(hidden.shape[0], program.options.mesh) + jnp.arange(hidden.shape[0])
    keys = jax.vmap(partial(jax.random.fold_in, key))(index)
    return sample(logits, keys, choice.sampling)


def _control_at(control: RoutingControl | None, positions: Int[Array, "B T"]) -> RoutingControl | None:
    """`control` with its experts, given for whole sequences [Ls, B, S, k], reduced to the given `positions`."""
    if control is None or control.experts is None:
        return control
    return control._replace(experts=jnp.take_along_axis(control.experts, positions[None, :, :, None], axis=2))


@partial(jax.jit, static_argnames="program", donate_argnames="cache")
def _prefill(weights, ids, lengths, cache, choice: Choice, control, *, program: Program):
    """The prompts `ids` [B, T]: (first token of each sequence [B], cache, history or None, routing or None)."""
    split, stacks = program.sequences, program.stacks
    run = program.placement.run(
        partial(_prefill_share, program=program),
        (program.held(weights), split, split, stacks, EVERYWHERE, program.imposed(control)),
        (split, stacks, split, stacks),
    )
    token, cache, history, routing = run(weights, ids, lengths, cache, choice, control)
    token, routing = program.placement.readable((token, routing))
    return token, cache, history, routing


def _prefill_share(weights, ids, lengths, cache, choice: Choice, control, *, program: Program):
    """As `_prefill`, for the sequences of one device."""
    hidden, cache, routing = _forward(weights, NewTokens(ids, None, lengths), cache, control, program)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    history = History.of(choice.processors, ids, lengths, cache.key.shape[2], program.config.vocab_size)
    token = _next_token(weights, last, choice, history, lengths, jnp.uint32(0), program)
    return token, cache, history, routing


class State(NamedTuple):
    """What a step of the decode loop takes over from the one before it."""

    step: Step
    cache: KVCache
    history: History | None
    running: Bool[Array, " B"]


class Generated(NamedTuple):
    """What one call of the decode loop generated: `count` tokens of each sequence, and their routing or None."""

    tokens: Int[Array, "n B"]
    count: Int[Array, ""]
    routing: CapturedRouting | None  # of the tokens that were fed back, [n, Ls, B, 1, ...]


def _decode_step(
    weights: Weights, state: State, choice: Choice, stop: Bool[Array, " V"], control, *, program: Program
) -> tuple[State, CapturedRouting | None]:
    """Feeds back each sequence's token and chooses the next one: (the new state, routing or None)."""
    token, position, draws = state.step
    new = NewTokens(token[:, None], position, jnp.ones_like(position))
    hidden, cache, routing = _forward(weights, new, state.cache, control, program)
    history = None if state.history is None else state.history.with_token(token, position)
    token = _next_token(weights, hidden[:, 0], choice, history, position + 1, draws, program)
    step = Step(token, position + 1, draws + 1)
    return State(step, cache, history, state.running & ~stop[token]), routing


@partial(jax.jit, static_argnames="program", donate_argnames="state")
def _decode(
    weights: Weights,
    state: State,
    choice: Choice,
    stop: Bool[Array, " V"],
    control: RoutingControl | None,
    most: Int[Array, ""],
    *,
    program: Program,
) -> tuple[State, Generated]:
    """Up to `most` tokens (at most `_MOST_TOKENS`) of each sequence, fewer if all have ended."""
    split, stacks = program.sequences, program.stacks
    specs = State._make([Step._make([split, split, EVERYWHERE]), stacks, split, split])
    routing = program.placement.spec(None, None, "batch")
    run = program.placement.run(
        partial(_decode_share, program=program),
        (program.held(weights), specs, EVERYWHERE, EVERYWHERE, program.imposed(control), EVERYWHERE),
        (specs, Generated._make([stacks, EVERYWHERE, routing])),
    )
    state, generated = run(weights, state, choice, stop, control, most)
    return state, program.placement.readable(generated)


def _decode_share(
    weights: Weights,
    state: State,
    choice: Choice,
    stop: Bool[Array, " V"],
    control: RoutingControl | None,
    most: Int[Array, ""],
    *,
    program: Program,
) -> tuple[State, Generated]:
    """As `_decode`, for the sequences of one device; all devices take the same number of steps."""
    step = partial(_decode_step, program=program)
    _, routing = jax.eval_shape(step, weights, state, choice, stop, control)
    room = lambda each: jnp.zeros((_MOST_TOKENS, *each.shape), each.dtype)
    generated = Generated(room(state.step.token), jnp.int32(0), jax.tree.map(room, routing))

    def continues(carry: tuple[State, Generated, Array]) -> Array:
        _, generated, running = carry
        return (generated.count < most) & running

    def one(carry: tuple[State, Generated, Array]) -> tuple[State, Generated, Array]:
        state, (tokens, count, routings), _ = carry
        state, routing = step(weights, state, choice, stop, control)
        put = lambda stack, new: jax.lax.dynamic_update_index_in_dim(stack, new, count, 0)
        generated = Generated(put(tokens, state.step.token), count + 1, jax.tree.map(put, routings, routing))
        return state, generated, on_any_device(state.running, program.options.mesh)

    start = state, generated, on_any_device(state.running, program.options.mesh)
    state, generated, _ = jax.lax.while_loop(continues, one, start)
    return state, generated


def _bucket(length: int, smallest: int = 32) -> int:
    """The next power of two: at most twice the work, and one compiled program per doubling."""
    return max(smallest, 1 << (length - 1).bit_length())


def _for_all_slots(control: RoutingControl | None, slots: int, idle: int) -> RoutingControl | None:
    """`control` with experts for exactly `slots` positions and `idle` more sequences; -1 (the model's own choice) where
    it has none."""
    if control is None or control.experts is None:
        return control
    experts = jnp.asarray(control.experts, jnp.int32)[:, :, :slots]
    missing = slots - experts.shape[2]
    return control._replace(experts=jnp.pad(experts, ((0, 0), (0, idle), (0, missing), (0, 0)), constant_values=-1))


class _Receiver:
    """Collects the tokens of each sequence up to its stop token, and hands them on in order."""

    def __init__(self, sequences: int, stop: frozenset[int], on_token: Callable[[int, int], None] | None):
        self.outputs: list[list[int]] = [[] for _ in range(sequences)]
        self._running = np.ones(sequences, bool)
        self._stop, self._on_token = stop, on_token

    def __call__(self, tokens: Int[np.ndarray, " B"]) -> Bool[np.ndarray, " B"]:
        """Takes one token of each sequence; returns which sequences go on."""
        for sequence, token in enumerate(tokens.tolist()):
            if not self._running[sequence]:
                continue
            self.outputs[sequence].append(token)
            if self._on_token is not None:
                self._on_token(sequence, token)
            self._running[sequence] = token not in self._stop
        return self._running.copy()


class _Pace:
    """How many tokens the device is asked for at once: what it generates in `_SECONDS`, so that text keeps flowing.

    Several processes must all ask for equally many, and their clocks differ: they ask for as many as there can be.
    """

    def __init__(self) -> None:
        self._fixed = jax.process_count() > 1
        self._most = _MOST_TOKENS if self._fixed else 1  # the first call may compile

    def tokens(self, left: int) -> int:
        """The number to ask for, of `left` tokens."""
        return min(self._most, left)

    def took(self, seconds: float, tokens: int) -> None:
        """The last call took so long for so many tokens."""
        if self._fixed:
            return
        fitting = int(_SECONDS * tokens / max(seconds, 1e-6))
        self._most = max(1, min(fitting, 4 * self._most, _MOST_TOKENS))


class Generator:
    """Generates text with one model. It holds the model's flat parameters, not the module object."""

    def __init__(self, model: Qwen3MoeForCausalLM):
        self.config: Qwen3MoeConfig = model.config
        self.mesh: MeshShape = model.mesh
        self.mesh.check_sequences_whole()
        lora: LoraConfig | None = model.lora_config
        # Weights that the adapter holds in full are cast here, once, and not again for every token.
        self.weights = Weights(weights_of(model.params, model.adapters, lora), low_rank_factors(model.adapters))
        self.lora = lora and replace(lora, modules_to_save=(), ensure_weight_tying=False, full_router=False)

    @property
    def params(self) -> Params:
        """The model's parameters by path, those that the adapter holds in full included."""
        return self.weights.params

    @property
    def adapters(self) -> Params:
        """The adapters' low-rank factors by path; empty if there are none."""
        return self.weights.adapters

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop_tokens: Sequence[int] = (),
        on_token: Callable[[int, int], None] | None = None,
        control: RoutingControl | None = None,
        routing: RoutingLog | None = None,
    ) -> list[list[int]]:
        """Continues each prompt by up to `max_new_tokens` token ids.

        Args:
            prompts: token ids, one list per sequence, of any lengths.
            max_new_tokens: the largest number of tokens generated per sequence.
            sampling: how tokens are chosen; greedy by default. What it says about the text so far is about each
                prompt and its continuation, never about padding.
            stop_tokens: ids that end a sequence; the stop token is part of the result.
            on_token: called with (sequence, token id) as soon as the token is known.
            control: what is imposed on the routing. Its experts [Ls, B, S, k] apply by position; where they are -1,
                and from position S on, the model chooses.
            routing: filled with the routing of every token that the model reads.

        Raises:
            UserError: no prompt, an empty one, a token id outside the vocabulary, or `max_new_tokens` below 1.
        """
        self.check(prompts, max_new_tokens)
        idle = -len(prompts) % self.mesh.product(SEQUENCE_AXES)  # all devices have equally many sequences
        lengths = np.asarray([*map(len, prompts), *[1] * idle], np.int32)
        slots = _bucket(int(lengths.max()) + max_new_tokens)
        ids = np.zeros((len(lengths), min(_bucket(int(lengths.max())), slots)), np.int32)
        for sequence, prompt in enumerate(prompts):
            ids[sequence, : len(prompt)] = prompt

        keep_logits = 0 if routing is None else routing.keep_logits
        options = Options(lora=self.lora, keep_logits=keep_logits, mesh=self.mesh)
        program = Program(self.config, options, sampling.greedy)
        control = _for_all_slots(control, slots, idle)
        processors = Processors.of(sampling, stop_tokens, self.config.vocab_size, max_new_tokens)
        choice = Choice(SamplingArrays.of(sampling), processors)
        dtype = self.params["embed_tokens"].dtype
        cache: KVCache = program.placement.zeros(
            partial(empty_cache, self.config, len(lengths), slots, dtype), program.stacks
        )
        stop = jnp.asarray(np.isin(np.arange(self.config.vocab_size), list(stop_tokens)))
        token, cache, history, step_routing = _prefill(
            self.weights, ids, lengths, cache, choice, control, program=program
        )
        if routing is not None and step_routing is not None:
            routing.steps.append(step_routing)
        receive = _Receiver(len(prompts), frozenset(stop_tokens), on_token)
        running = receive(np.asarray(token)[: len(prompts)])
        step = Step(token, jnp.asarray(lengths), jnp.uint32(1))
        state = State(step, cache, history, jnp.asarray(np.pad(running, (0, idle))))
        pace = _Pace()
        left = max_new_tokens - 1
        while left and running.any():
            start, most = time.perf_counter(), jnp.int32(pace.tokens(left))
            state, generated = _decode(self.weights, state, choice, stop, control, most, program=program)
            count = int(generated.count)
            pace.took(time.perf_counter() - start, count)
            for tokens in np.asarray(generated.tokens)[:count]:
                running = receive(tokens[: len(prompts)])
            if routing is not None and generated.routing is not None:
                routing.steps += [jax.tree.map(operator.itemgetter(i), generated.routing) for i in range(count)]
            left -= count
        return receive.outputs

    def check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """Raises UserError for arguments that `generate` refuses."""
        if not prompts:
            raise UserError("prompts: expected at least one, found none")
        if max_new_tokens < 1:
            raise UserError(f"max-new-tokens: expected at least 1, found {max_new_tokens}")
        vocabulary = self.config.vocab_size
        longest = max(map(len, prompts))
        sequences = -(-len(prompts) // self.mesh.product(SEQUENCE_AXES))  # of a device
        config, positions = self.config, sequences * (longest + max_new_tokens)
        if longest + max_new_tokens >= 2**31 // 2:
            raise UserError(f"max-new-tokens: expected less than {2**30:,} tokens in all, found {max_new_tokens:,}")
        width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        needed = positions * width * self.params["embed_tokens"].dtype.itemsize
        available = device_bytes(jax.local_devices()[0])
        if available is not None and needed > available:
            raise UserError(
                f"max-new-tokens: the KV cache for {positions:,} tokens needs {format_bytes(needed)}, "
                f"the device has {format_bytes(available)}"
            )
        for index, prompt in enumerate(prompts):
            if not len(prompt):
                raise UserError(f"prompt {index}: expected at least one token, found none")
            if wrong := [token for token in prompt if not 0 <= token < vocabulary]:
                raise UserError(f"prompt {index}: expected token ids from 0 to {vocabulary - 1}, found {wrong[0]}")
