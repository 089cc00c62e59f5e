"""Text from a model: prefill, a decode loop on the device, sampling, and `python -m jaxmoe.generate`.

Prompts of different length share a batch: each row is padded on the right and has its own position, so a row's tokens
do not depend on its neighbours. Lengths are rounded up to buckets, so that few shapes are compiled.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmoe.cli import xla
from jaxmoe.cli.arguments import ArgumentParser
from jaxmoe.cli.progress import reading_weights
from jaxmoe.config import LoraConfig, Qwen3MoeConfig, read_json
from jaxmoe.control import interventions
from jaxmoe.errors import UserError
from jaxmoe.model.cache import KVCache, NewTokens, empty_cache, forward_cached
from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM
from jaxmoe.model.decoder import head_weight, logits_of
from jaxmoe.model.interface import Options, Params
from jaxmoe.ops.router import CapturedRouting, RoutingControl


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most probable one (temperature 0), or a draw from the softmax of
    logits / temperature over the `top_k` most probable (0: all) of which the smallest set reaching mass `top_p` stays.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature: expected at least 0, found {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top-k: expected at least 0, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p: expected more than 0 and at most 1, found {self.top_p}")


GREEDY = Sampling()


def sample(
    logits: Float[Array, "B V"],
    keys: Array,
    temperature: Float[Array, ""] | float,
    top_k: Int[Array, ""] | int,
    top_p: Float[Array, ""] | float,
) -> Int[Array, " B"]:
    """Draws one token a row: temperature, then top-k, then nucleus (Holtzman et al. 2020), in transformers' order.

    `keys` holds one random key for each row. Among equal logits at the cut the lower token id stays.
    """
    scaled = logits / temperature
    order = jnp.argsort(-scaled, axis=-1, stable=True)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    rank = jnp.arange(ranked.shape[-1])
    ranked = jnp.where((top_k > 0) & (rank >= top_k), -jnp.inf, ranked)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The first token stays even when its own mass exceeds top_p.
    ranked = jnp.where((mass_before >= top_p) & (rank > 0), -jnp.inf, ranked)
    choice = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _next_token(params, hidden, options, draws, *, config: Qwen3MoeConfig, greedy: bool):
    """Token after the position that each row's `hidden` [B, D] stands at; `draws` counts the tokens drawn before."""
    logits = logits_of(hidden, head_weight(params, config))
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    seed, temperature, top_k, top_p = options
    key = jax.random.fold_in(jax.random.key(seed), draws)
    # Keyed by row, not by batch size: a prompt alone and in the first row of a batch draws the same.
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(hidden.shape[0]))
    return sample(logits, keys, temperature, top_k, top_p)


_STATIC = ("config", "lora", "greedy", "capture")


def _at(control: RoutingControl | None, positions: Array) -> RoutingControl | None:
    """The control of the tokens at `positions` [B, T], of one whose experts [Ls, B, S, k] stand for whole rows."""
    if control is None or control.experts is None:
        return control
    return control._replace(experts=jnp.take_along_axis(control.experts, positions[None, :, :, None], axis=2))


@partial(jax.jit, static_argnames=_STATIC, donate_argnames=("cache",))
def _prefill(params, adapters, input_ids, lengths, cache, options, control, *, config, lora, greedy, capture):
    here = _at(control, jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape))
    new = NewTokens(input_ids, None, lengths)
    options_ = Options(lora=lora, keep_logits=capture)
    hidden, cache, routing = forward_cached(params, adapters, new, cache, config=config, options=options_, control=here)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return _next_token(params, last, options, jnp.uint32(0), config=config, greedy=greedy), cache, routing


@partial(jax.jit, static_argnames=_STATIC, donate_argnames=("cache",))
def _decode(params, adapters, token, position, cache, options, draws, control, *, config, lora, greedy, capture):
    one = jnp.ones_like(position)
    new = NewTokens(token[:, None], position, one)
    here = _at(control, position[:, None])
    options_ = Options(lora=lora, keep_logits=capture)
    hidden, cache, routing = forward_cached(params, adapters, new, cache, config=config, options=options_, control=here)
    return _next_token(params, hidden[:, 0], options, draws, config=config, greedy=greedy), cache, routing


def _bucket(length: int, smallest: int = 32) -> int:
    """The next power of two: at most twice the work, and one compiled program for each doubling."""
    return max(smallest, 1 << (length - 1).bit_length())


def _whole_rows(control: RoutingControl | None, slots: int) -> RoutingControl | None:
    """The control with experts for exactly `slots` positions: what is missing is the model's own choice."""
    if control is None or control.experts is None:
        return control
    experts = jnp.asarray(control.experts, jnp.int32)[:, :, :slots]
    missing = slots - experts.shape[2]
    return control._replace(experts=jnp.pad(experts, ((0, 0), (0, 0), (0, missing), (0, 0)), constant_values=-1))


class Generator:
    """Generates from one model; holds its flat parameters, so that the loop touches no module object."""

    def __init__(self, model: Qwen3MoeForCausalLM):
        self.config: Qwen3MoeConfig = model.config
        self.lora: LoraConfig | None = model.lora_config
        self.params: Params = model.params
        self.adapters: Params = model.adapters

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop_tokens: Sequence[int] = (),
        on_token: Callable[[int, int], None] | None = None,
        control: RoutingControl | None = None,
        on_routing: Callable[[CapturedRouting], None] | None = None,
        capture: int = 0,
    ) -> list[list[int]]:
        """Continues each prompt by up to `max_new_tokens` token ids; a stop token ends its row and is included.

        Args:
            prompts: token ids, one list a row, of any lengths.
            max_new_tokens: the most tokens generated for a row.
            sampling: how tokens are chosen; greedy by default.
            stop_tokens: ids that end a row.
            on_token: called with (row, token id) as soon as the token is known.
            control: what is imposed on the routing; experts [Ls, B, S, k] replay rows by position, -1 and what lies
                behind S being the model's own choice.
            on_routing: called with the routing of the prompts [Ls, B, T, ...], then of every token that is fed back
                [Ls, B, 1, ...], on the device.
            capture: how many router logits a token that routing holds.

        Raises:
            UserError: no prompt, an empty one, a token id outside the vocabulary, or `max_new_tokens` below 1.
        """
        self._check(prompts, max_new_tokens)
        lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
        slots = _bucket(int(lengths.max()) + max_new_tokens)
        ids = np.zeros((len(prompts), min(_bucket(int(lengths.max())), slots)), np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt

        static = {"config": self.config, "lora": self.lora, "greedy": sampling.temperature == 0}
        static["capture"] = capture if on_routing is not None else 0
        control = _whole_rows(control, slots)
        options = (
            jnp.uint32(sampling.seed % 2**32),
            jnp.float32(sampling.temperature),
            jnp.int32(sampling.top_k),
            jnp.float32(sampling.top_p),
        )
        dtype = self.params["embed_tokens"].dtype
        cache: KVCache = empty_cache(self.config, len(prompts), slots, dtype)
        token, cache, routing = _prefill(self.params, self.adapters, ids, lengths, cache, options, control, **static)
        if on_routing is not None and routing is not None:
            on_routing(routing)
        outputs: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        stop = frozenset(stop_tokens)
        for step in range(1, max_new_tokens + 1):
            ready = token
            if step < max_new_tokens:
                # The next step is queued before this one's token is read, so that the device never waits for the host.
                position = jnp.asarray(lengths + (step - 1))
                token, cache, routing = _decode(
                    self.params, self.adapters, token, position, cache, options, jnp.uint32(step), control, **static
                )
                if on_routing is not None and routing is not None:
                    on_routing(routing)
            for row, value in enumerate(np.asarray(ready).tolist()):
                if row not in running:
                    continue
                outputs[row].append(value)
                if on_token is not None:
                    on_token(row, value)
                if value in stop:
                    running.discard(row)
            if not running:
                break
        return outputs

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if not prompts:
            raise UserError("prompts: expected at least one, found none")
        if max_new_tokens < 1:
            raise UserError(f"max-new-tokens: expected at least 1, found {max_new_tokens}")
        for row, prompt in enumerate(prompts):
            if not len(prompt):
                raise UserError(f"prompt {row}: expected at least one token, found none")
            if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
                raise UserError(f"prompt {row}: expected token ids below {self.config.vocab_size}, found {max(prompt)}")


class TextStream:
    """Turns token ids into text as they come, holding back bytes that do not yet form a character."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        self._tokenizer, self._write = tokenizer, write
        self._tokens: list[int] = []
        self._shown = 0

    def put(self, token: int) -> None:
        """Takes the next token and writes what has become readable."""
        self._tokens.append(token)
        text = self._text()
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._write(text[self._shown :])
            self._shown = len(text)

    def end(self) -> None:
        """Writes what is left."""
        self._write(self._text()[self._shown :])

    def _text(self) -> str:
        return self._tokenizer.decode(self._tokens, skip_special_tokens=True)


def generation_defaults(folder: pathlib.Path) -> tuple[Sampling, tuple[int, ...]]:
    """Sampling and stop tokens as the folder's generation_config.json states them (greedy and none without one)."""
    path = folder / "generation_config.json"
    raw = read_json(path) if path.is_file() else {}
    eos = raw.get("eos_token_id")
    stop = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    if not raw.get("do_sample", False):
        return Sampling(), stop
    temperature, top_k, top_p = (raw.get(name) for name in ("temperature", "top_k", "top_p"))
    # transformers' defaults for what the file leaves out
    return Sampling(
        1.0 if temperature is None else temperature, 50 if top_k is None else top_k, 1.0 if top_p is None else top_p
    ), stop


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description="Generate text with a Qwen3-MoE checkpoint.")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="HF folder or converted folder")
    parser.add_argument("--adapter", type=pathlib.Path, help="PEFT adapter folder or converted adapter")
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; several make a batch")
    parser.add_argument("--chat", action="store_true", help="put each prompt into the checkpoint's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the generation config's)")
    parser.add_argument("--top-k", type=int, help="0 is no limit (default: the generation config's)")
    parser.add_argument("--top-p", type=float, help="default: the generation config's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    parser.add_argument("--quantize", choices=("nf4",), help="hold projections, dense MLPs and experts in 4 bits")
    parser.add_argument("--capture", type=pathlib.Path, metavar="DIR", help="also write the routing to this folder")
    parser.add_argument("--replay", type=pathlib.Path, metavar="DIR", help="use the experts of this capture's tokens")
    interventions.add_arguments(parser)
    return parser


def main() -> None:
    """`python -m jaxmoe.generate`: prints each prompt's continuation, a single one as it comes."""
    args = _parser().parse_args()
    xla.configure()
    from jaxmoe.data.chat import load_tokenizer

    tokenizer = load_tokenizer(args.model)
    sampling, stop = generation_defaults(args.model)
    stop = tuple({*stop, tokenizer.eos_token_id})
    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    sampling = replace(sampling, **{name: value for name, value in given.items() if value is not None})

    prompts = [_encode(tokenizer, text, args.chat) for text in args.prompt]
    with reading_weights(on_stderr=True) as on_layer:
        model = Qwen3MoeForCausalLM.from_pretrained(args.model, args.dtype, args.quantize, args.adapter, on_layer)
    generator = Generator(model)
    if args.capture or args.replay or args.ablate or args.force or args.bias:
        outputs = _generate_routed(generator, prompts, sampling, stop, args, tokenizer)
        for text, tokens in zip(args.prompt, outputs, strict=True):
            print(f"--- {text}\n{tokenizer.decode(tokens, skip_special_tokens=True)}")
        return
    if len(prompts) == 1:
        stream = TextStream(tokenizer, lambda text: print(text, end="", flush=True))
        generator.generate(prompts, args.max_new_tokens, sampling, stop, lambda _, token: stream.put(token))
        stream.end()
        print()
        return
    for text, tokens in zip(args.prompt, generator.generate(prompts, args.max_new_tokens, sampling, stop), strict=True):
        print(f"--- {text}\n{tokenizer.decode(tokens, skip_special_tokens=True)}")


def _generate_routed(
    generator: Generator,
    prompts: list[list[int]],
    sampling: Sampling,
    stop: Sequence[int],
    args: argparse.Namespace,
    tokenizer: Any,
) -> list[list[int]]:
    """The continuations with the routing captured, replayed or changed, as the flags say."""
    from captures import Capture, tokenizer_digest
    from jaxmoe.routing.generation import capture_generation

    changes = interventions.intervention(args, generator.config)
    return capture_generation(
        generator,
        prompts,
        args.max_new_tokens,
        args.capture,
        tokenizer=tokenizer_digest(tokenizer),
        sampling=sampling,
        stop_tokens=stop,
        control=changes.control(generator.config),
        replay=Capture.open(args.replay) if args.replay else None,
        description=changes.describe(),
        source={"model": str(args.model), "adapter": str(args.adapter) if args.adapter else None},
    )


def _encode(tokenizer: Any, text: str, chat: bool) -> list[int]:
    if not chat:
        return tokenizer(text)["input_ids"]
    if not tokenizer.chat_template:
        raise UserError("chat: expected a tokenizer with a chat template, found none")
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
