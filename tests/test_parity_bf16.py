"""In bfloat16 jaxmoe is at least as close to a float64 run as transformers is, with 8 experts per token.

If all 8 of 8 experts are chosen, the routing cannot differ, and whole prompts are compared. If 8 of 32 are chosen,
near-ties fall either way in both frameworks. Then the errors are compared over the tokens for which every side makes
the float64 run's choice, and the number of other choices is compared as well. Weights are rounded to bfloat16 first,
for the oracle too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxmoe.model.decoder
import jaxmoe.ops.linear
import jaxmoe.ops.rotary
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM
from peers.configs import CONFIGS, config_of, random_parameters
from peers.reference import Reference, ReferenceOutput
from tests import oracle
from tests.parity import CHECKPOINT, Batch, ProductOutput, checkpoint_batch, make_batch, product, relative_error
from tests.tolerances import bound

# transformers' most exact settings on a CPU: eager adds the k experts' outputs one by one in bfloat16, grouped_mm does
# not.
WAYS = (("eager", "eager"), ("sdpa", "eager"), ("sdpa", "grouped_mm"))
CASES = {
    "every_expert": {"600 tokens": [[600]], "packed": [[48], [13, 1, 34], [-3, 45]]},
    "top_8_of_32": {"short": [[4]] * 160},
    "top_8_of_32_unnormalised": {"short": [[4]] * 160},
}


@functools.cache
def parameters(name: str) -> dict[str, np.ndarray]:
    """Float32 arrays that bfloat16 holds exactly."""
    random = random_parameters(config_of(name))
    return {path: array.astype(ml_dtypes.bfloat16).astype(np.float32) for path, array in random.items()}


def batch_of(name: str, layout: str) -> Batch:
    return make_batch(config_of(name), CASES[name][layout])


@functools.cache
def others(name: str, layout: str) -> tuple[oracle.OracleOutput, list[ReferenceOutput]]:
    """The float64 run, and transformers' bfloat16 runs."""
    batch, config = batch_of(name, layout), config_of(name)
    runs = [
        Reference(CONFIGS[name], parameters(name), dtype="bfloat16", attention=attention, experts=experts).forward(
            *batch
        )
        for attention, experts in WAYS
    ]
    return oracle.forward(config, parameters(name), *batch), runs


def check(name: str, layout: str, found: ProductOutput) -> None:
    """The claim that every test of this module asserts, negative controls included."""
    exact, runs = others(name, layout)
    valid = batch_of(name, layout).valid
    differs = [(np.sort(run.selected) != np.sort(exact.selected)).any(-1) & valid for run in (found, *runs)]
    flips = [d.sum() for d in differs]
    assert flips[0] <= min(flips[1:])
    # The stream between layers is not rounded: few of its numbers happen to be bfloat16 numbers. (The embeddings, its
    # first state, and the last norm's output are.)
    stream = found.hidden[1:-1][:, valid]
    assert (stream.astype(ml_dtypes.bfloat16) == stream).mean() < 0.01
    same = ~np.any(differs, axis=(0, 1, 3))
    assert same.sum() >= len(same) / 8  # enough tokens to judge by
    valid &= same[:, None]
    for what in ("logits", "hidden", "router_logits"):
        expected = getattr(exact, what)[..., valid, :]
        errors = [relative_error(getattr(run, what)[..., valid, :], expected) for run in (found, *runs)]
        assert errors[0] <= bound("bf16_against_transformers") * min(errors[1:]), what


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name in CASES for layout in CASES[name]])
def test_at_least_as_exact_as_transformers(name: str, layout: str) -> None:
    check(name, layout, product(config_of(name), parameters(name), batch_of(name, layout), dtype="bfloat16"))


def test_at_least_as_exact_on_the_trained_checkpoint() -> None:
    """With free routing: every error, including that of flipped near-ties, over 4 x 300 tokens of Python."""
    batch = checkpoint_batch(300)
    config = Qwen3MoeConfig.from_pretrained(CHECKPOINT)
    params = {
        path: np.asarray(a, np.float32) for path, a in Qwen3MoeForCausalLM.from_pretrained(CHECKPOINT).params.items()
    }
    exact = oracle.forward(config, params, *batch)
    runs: list[ProductOutput | ReferenceOutput] = [product(config, params, batch, dtype="bfloat16")]
    for attention, experts in WAYS:
        theirs = Reference.from_pretrained(CHECKPOINT, dtype="bfloat16", attention=attention, experts=experts)
        runs.append(theirs.forward(*batch))
    for what in ("logits", "hidden", "router_logits"):
        errors = [relative_error(getattr(run, what), getattr(exact, what)) for run in runs]
        assert errors[0] <= bound("bf16_against_transformers") * min(errors[1:]), what
    flips = [(np.sort(run.selected) != np.sort(exact.selected)).any(-1).mean() for run in runs]
    assert flips[0] <= min(flips[1:])


def norm_in_bfloat16(patch: pytest.MonkeyPatch) -> None:
    def rms_norm(x, weight, eps):
        x = x.astype(weight.dtype)
        return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight

    for module in (jaxmoe.model.decoder, jaxmoe.ops.rotary):
        patch.setattr(module, "rms_norm", rms_norm)


def stream_in_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """The residual stream rounded at each sum, as transformers does."""

    layer, attention = jaxmoe.model.decoder.decoder_layer, jaxmoe.model.decoder.attention
    # On a GPU XLA would remove a conversion to 16 bits and back, and the fault with it.
    rounded = lambda h: jax.lax.reduce_precision(h, exponent_bits=8, mantissa_bits=7)

    def rounded_layer(h: Any, *arguments: Any) -> Any:
        def rounded_sum(*arguments: Any) -> Any:
            update, cache = attention(*arguments)
            return rounded(h + update) - h, cache

        patch.setattr(jaxmoe.model.decoder, "attention", rounded_sum)
        out, *rest = layer(h, *arguments)
        return rounded(out), *rest

    patch.setattr(jaxmoe.model.decoder, "decoder_layer", rounded_layer)


def coarse_linear_maps(patch: pytest.MonkeyPatch) -> None:
    """A quarter of bfloat16's precision in what each linear map returns."""
    linear = jaxmoe.ops.linear.linear

    def coarse(*arguments):
        y = linear(*arguments)
        return y.astype(jnp.float8_e4m3fn).astype(y.dtype)

    patch.setattr(jaxmoe.ops.linear, "linear", coarse)


@pytest.mark.parametrize(
    ("fault", "name", "layout"),
    [
        (norm_in_bfloat16, "every_expert", "600 tokens"),
        (norm_in_bfloat16, "every_expert", "packed"),
        (coarse_linear_maps, "top_8_of_32", "short"),
        (stream_in_bfloat16, "every_expert", "packed"),
        (stream_in_bfloat16, "top_8_of_32_unnormalised", "short"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_planted_fault_is_found(
    fault: Callable[[pytest.MonkeyPatch], None], name: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(name, layout)
    check(name, layout, product(config_of(name), parameters(name), batch, dtype="bfloat16"))
    fault(monkeypatch)
    worse = product(config_of(name), parameters(name), batch, dtype="bfloat16", fresh=True)
    with pytest.raises(AssertionError):
        check(name, layout, worse)
