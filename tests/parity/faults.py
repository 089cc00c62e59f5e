"""The negative controls: faults that other implementations really had, put into jaxmoe's own path.

Each is a context manager: code that is compiled inside it has the fault. The suite must fail with each fault, and pass
without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

import jaxmoe.config
import jaxmoe.fp8.stack
import jaxmoe.model.decoder
import jaxmoe.nf4.stack
import jaxmoe.ops.attention_chunked
import jaxmoe.ops.experts
import jaxmoe.ops.rotary
import jaxmoe.ops.swiglu
from jaxmoe.ops import implementations

Fault = Callable[[], AbstractContextManager[None]]


def _replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Fault:
    @contextlib.contextmanager
    def planted() -> Iterator[None]:
        with mock.patch.object(owner, name, make(getattr(owner, name))):
            yield

    return planted


def _without_renormalisation(route: Any) -> Any:
    return lambda *args, **kwargs: route(*args, **(kwargs | {"norm_topk_prob": False}))


def _softmax_after_top_k(route: Any) -> Any:
    """Softmax over the chosen logits: a fault only if the model does not renormalise, otherwise it is the same."""

    def routed(*args: Any, **kwargs: Any) -> Any:
        routing = route(*args, **kwargs)
        chosen = jnp.take_along_axis(routing.logits, routing.experts, axis=-1)
        return routing._replace(weights=jax.nn.softmax(chosen, axis=-1))

    return routed


def _rotary_base_off(frequencies: Any) -> Any:
    def off(rope: Any, head_dim: int) -> Any:
        return frequencies(dataclasses.replace(rope, rope_theta=1.1 * rope.rope_theta), head_dim)

    return off


@contextlib.contextmanager
def _without_query_and_key_norm() -> Iterator[None]:
    # The kernel that also rotates must not run: its norm cannot be left out.
    with (
        mock.patch.object(jaxmoe.ops.rotary, "rms_norm", lambda x, weight, eps: x),
        implementations.forced(norm_rotary="xla"),
    ):
        yield


def _two_experts_exchanged(experts: Any) -> Any:
    """The router's choice is unchanged; the weights of expert 0 and of expert 1 are swapped."""

    def exchanged(x: Any, routing: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = jnp.where(routing.experts < 2, 1 - routing.experts, routing.experts)
        return experts(x, routing._replace(experts=chosen), *args, **kwargs)

    return exchanged


def _documents_joined(mask: Any) -> Any:
    return lambda q, k, qs, ks, window: mask(q, k, jnp.minimum(qs, 1), jnp.minimum(ks, 1), window)


@contextlib.contextmanager
def _nibbles_swapped() -> Iterator[None]:
    """In the weights that XLA decodes, and in the codes that Hopper's kernel decodes itself."""
    interleaved = jaxmoe.nf4.stack._interleaved
    with contextlib.ExitStack() as planted:
        swap = mock.patch.object(jaxmoe.nf4.stack, "_interleaved", lambda even, odd: interleaved(odd, even))
        planted.enter_context(swap)
        if jax.__version_info__ >= (0, 11):  # older versions lack the kernel's language
            from jaxmoe.ops.kernels.grouped_matmul import hopper_nf4

            planted.enter_context(mock.patch.object(hopper_nf4, "coded", _with_nibbles_swapped(hopper_nf4.coded)))
        yield


def _with_nibbles_swapped(coded: Any) -> Any:
    def swapped(*args: Any) -> Any:
        found = coded(*args)
        return found._replace(codes=(found.codes << 4) | (found.codes >> 4))

    return swapped


def _scales_off_by_one_block(of: Any) -> Any:
    """Each block has the scale of the one before it in memory, of its own matrix or of the one before."""

    def off(*args: Any) -> Any:
        stack = of(*args)
        return dataclasses.replace(stack, scales=jnp.roll(stack.scales, 1))

    return off


FAULTS: dict[str, Fault] = {
    "gate and up swapped": _replaced(jaxmoe.ops.swiglu, "swiglu", lambda swiglu: lambda gate, up: swiglu(up, gate)),
    "no renormalisation": _replaced(jaxmoe.model.decoder, "route", _without_renormalisation),
    "rotary base 10 % off": _replaced(jaxmoe.ops.rotary, "rotary_frequencies", _rotary_base_off),
    "q and k norm missing": _without_query_and_key_norm,
    "experts permuted": _replaced(jaxmoe.model.decoder, "sorted_experts", _two_experts_exchanged),
    "softmax after top-k": _replaced(jaxmoe.model.decoder, "route", _softmax_after_top_k),
    "adapter scaled by 1 over r": _replaced(
        jaxmoe.config.LoraConfig, "scale", lambda scale: lambda self, *slot: scale(self, *slot) / self.alpha
    ),
    "NF4 nibbles swapped": _nibbles_swapped,
    "NF4 scale of another block": _replaced(
        jaxmoe.nf4.stack.NF4Stack, "scales", lambda scales: lambda self, group: jnp.roll(scales(self, group), 1, -1)
    ),
    "adapter of another expert": _replaced(
        jaxmoe.ops.experts, "LowRankTerm", lambda term: lambda rows, weight: term(rows, jnp.roll(weight, 1, 0))
    ),
    "FP8 scale off by one block": _replaced(jaxmoe.fp8.stack.FP8Stack, "of", _scales_off_by_one_block),
    "documents joined": _replaced(jaxmoe.ops.attention_chunked, "attention_mask", _documents_joined),
}
