"""Logits, hidden states, router logits, choice of experts and load-balancing loss against transformers, in float32."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe.model.decoder
import jaxmoe.ops.attention_chunked
import jaxmoe.ops.linear
import jaxmoe.ops.rotary
import jaxmoe.ops.swiglu
from jaxmoe.config import expand_targets
from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM
from peers.configs import CONFIGS, LoraConfig, config_of, random_adapters, random_parameters
from peers.reference import Reference
from tests import oracle
from tests.parity import CHECKPOINT, LAYOUTS, LONG, Batch, checkpoint_batch, make_batch, product, relative_error
from tests.tolerances import bound

# Prompts of 600 tokens where length matters: high positions, yarn beyond its trained context, long sliding windows.
LONG_CONFIGS = (
    "plain_v4",
    "top_8_of_32",
    "sparse_step_2",
    "rope_yarn",
    "rope_yarn_v4",
    "rope_linear_v4",
    "sliding_window",
)


@functools.cache
def parameters(name: str) -> dict[str, np.ndarray]:
    return random_parameters(config_of(name))


@functools.cache
def reference(name: str) -> Reference:
    return Reference(CONFIGS[name], parameters(name))


def distance(name: str, batch: Batch, found: Any, expected: Any) -> float:
    """The largest relative error of logits, every layer's hidden states and router logits, over valid tokens.

    Fails if a token with a clear choice goes to other experts.
    """
    valid = batch.valid
    errors = [relative_error(found.logits[valid], expected.logits[valid])]
    errors += [relative_error(f[valid], e[valid]) for f, e in zip(found.hidden, expected.hidden, strict=True)]
    k = config_of(name).num_experts_per_tok
    for slot, logits in enumerate(expected.router_logits):
        errors.append(relative_error(found.router_logits[slot][valid], logits[valid]))
        clear = oracle.top_k_margin(logits[valid], k) > bound("routing_margin")
        chosen, wanted = (np.sort(x.selected[slot][valid][clear]) for x in (found, expected))
        assert (chosen == wanted).all(), (
            f"layer slot {slot}: other experts in {(chosen != wanted).any(-1).sum()} tokens"
        )
    return max(errors)


def check(name: str, batch: Batch, *, fresh: bool = False) -> None:
    """The parity that every test of this module asserts, negative controls included."""
    found = product(config_of(name), parameters(name), batch, fresh=fresh)
    expected = reference(name).forward(*batch)
    assert distance(name, batch, found, expected) <= bound("parity_fp32")
    aux = reference(name).load_balancing_loss(*batch)
    assert found.aux_loss == pytest.approx(aux, rel=bound("load_balancing_loss"))
    valid = [np.bincount(chosen[batch.valid].ravel(), minlength=found.counts.shape[-1]) for chosen in found.selected]
    assert (found.counts == np.asarray(valid).reshape(found.counts.shape)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_equals_transformers(name: str, layout: str) -> None:
    check(name, make_batch(config_of(name), LAYOUTS[layout]))


@pytest.mark.parametrize("layout", LONG)
@pytest.mark.parametrize("name", LONG_CONFIGS)
def test_forward_equals_transformers_over_600_tokens(name: str, layout: str) -> None:
    check(name, make_batch(config_of(name), LONG[layout]))


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_equals_the_float64_oracle(name: str) -> None:
    batch = make_batch(config_of(name), LAYOUTS["packed_and_padded"])
    exact = oracle.forward(config_of(name), parameters(name), *batch)
    found = product(config_of(name), parameters(name), batch)
    assert distance(name, batch, found, exact) <= bound("oracle_fp32")
    # The two references share no code, so an error in the oracle is found even if jaxmoe repeats it.
    assert distance(name, batch, reference(name).forward(*batch), exact) <= bound("oracle_fp32")


def test_trained_checkpoint_equals_transformers() -> None:
    """Both read the folder themselves; 600 tokens of Python per sequence, one sequence padded."""
    batch = checkpoint_batch()
    batch.segment_ids[0, 500:] = 0
    model = Qwen3MoeForCausalLM.from_pretrained(CHECKPOINT, dtype="float32")
    out = model(batch.input_ids, attention_mask=batch.segment_ids, output_router_logits=True, output_hidden_states=True)
    theirs = Reference.from_pretrained(CHECKPOINT)
    expected = theirs.forward(*batch)
    assert out.router_logits is not None and out.hidden_states is not None and out.aux_loss is not None
    pairs = [(out.logits, expected.logits)]
    pairs += [*zip(out.hidden_states, expected.hidden, strict=True)]
    pairs += [*zip(out.router_logits, expected.router_logits, strict=True)]
    for found, wanted in pairs:
        assert relative_error(np.asarray(found)[batch.valid], wanted[batch.valid]) <= bound("parity_fp32")
    for logits, wanted, chosen in zip(out.router_logits, expected.router_logits, expected.selected, strict=True):
        k = model.config.num_experts_per_tok
        clear = batch.valid & (oracle.top_k_margin(wanted, k) > bound("routing_margin"))
        assert (np.sort(oracle.top_k(np.asarray(logits), k))[clear] == np.sort(chosen)[clear]).all()
    assert float(out.aux_loss) == pytest.approx(theirs.load_balancing_loss(*batch), rel=bound("load_balancing_loss"))
    # The model is trained: its loss is far below the log of the vocabulary's size, 7.6 nats.
    shifted = out.logits[:, :-1] - jax.nn.logsumexp(out.logits[:, :-1], axis=-1, keepdims=True)
    assert -np.take_along_axis(np.asarray(shifted), batch.input_ids[:, 1:, None], axis=-1).mean() < 5


def test_stamps_and_neutral_fields_change_no_logits(tmp_path: pathlib.Path) -> None:
    """A folder as Unsloth saves it: stamps and the fields of Qwen3-Coder in config.json; both frameworks read it."""
    stamps = {"unsloth_fixed": True, "unsloth_version": "2025.8.1", "pad_token_id": 5}
    neutral = {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True, "max_window_layers": 28}
    raw = json.loads((CHECKPOINT / "config.json").read_text()) | stamps | neutral
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").symlink_to(CHECKPOINT / "model.safetensors")
    batch = checkpoint_batch()
    model = Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype="float32")
    found = np.asarray(model(batch.input_ids, attention_mask=batch.segment_ids).logits)
    expected = Reference.from_pretrained(tmp_path).forward(*batch).logits
    assert relative_error(found[batch.valid], expected[batch.valid]) <= bound("parity_fp32")


@pytest.mark.parametrize("name", ["plain", "sparse_step_2", "top_8_of_32_unnormalised"])
def test_adapted_forward_equals_peft(name: str) -> None:
    config, batch = config_of(name), make_batch(config_of(name), LAYOUTS["packed_and_padded"])
    groups = ["attention", "router", "experts", *(["dense"] if config.dense_layers else [])]
    lora = LoraConfig(r=3, alpha=5.0, use_rslora=name == "plain", targets=expand_targets(groups))
    adapters = random_adapters(config, lora)
    expected = Reference(CONFIGS[name], parameters(name), lora=lora, adapters=adapters).forward(*batch)
    found = product(config, parameters(name), batch, lora=lora, adapters=adapters)
    assert distance(name, batch, found, expected) <= bound("parity_fp32")
    # Negative control: without its adapters the model differs.
    base = product(config, parameters(name), batch)
    assert relative_error(base.logits[batch.valid], expected.logits[batch.valid]) > 0.1


def test_changing_one_document_leaves_the_others_untouched() -> None:
    config, params = config_of("top_8_of_32"), parameters("top_8_of_32")
    batch = make_batch(config, [[16, 20, 12], [-5, 30, 13]])
    other = batch.input_ids.copy()
    second = batch.segment_ids == 2
    other[second] = (other[second] + 1) % config.vocab_size
    before = product(config, params, batch)
    after = product(config, params, batch._replace(input_ids=other))
    untouched = batch.valid & ~second
    assert relative_error(after.logits[untouched], before.logits[untouched]) <= bound("packing_isolation")
    assert (after.selected[:, untouched] == before.selected[:, untouched]).all()
    assert relative_error(after.logits[second], before.logits[second]) > 0.1
    # Negative control: without segments the third document sees the second.
    merged = batch._replace(segment_ids=np.minimum(batch.segment_ids, 1))
    before, after = (product(config, params, merged._replace(input_ids=ids)) for ids in (batch.input_ids, other))
    assert relative_error(after.logits[untouched], before.logits[untouched]) > bound("packing_isolation")


def swap_gate_and_up(patch: pytest.MonkeyPatch) -> None:
    swiglu = jaxmoe.ops.swiglu.swiglu
    patch.setattr(jaxmoe.ops.swiglu, "swiglu", lambda gate, up: swiglu(up, gate))


def swap_gate_and_up_of_dense_layers(patch: pytest.MonkeyPatch) -> None:
    swiglu = jaxmoe.model.decoder.swiglu
    patch.setattr(jaxmoe.model.decoder, "swiglu", lambda gate, up: swiglu(up, gate))


def flip_renormalisation(patch: pytest.MonkeyPatch) -> None:
    route = jaxmoe.model.decoder.route
    patch.setattr(
        jaxmoe.model.decoder, "route", lambda *a, norm_topk_prob, **k: route(*a, norm_topk_prob=not norm_topk_prob, **k)
    )


def exchange_two_experts(patch: pytest.MonkeyPatch) -> None:
    route = jaxmoe.model.decoder.route

    def exchanged(*args: Any, **kwargs: Any) -> Any:
        routing = route(*args, **kwargs)
        experts = jnp.where(routing.experts < 2, 1 - routing.experts, routing.experts)
        return routing._replace(experts=experts)

    patch.setattr(jaxmoe.model.decoder, "route", exchanged)


def _patch_frequencies(patch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    frequencies = jaxmoe.ops.rotary.rotary_frequencies
    patch.setattr(jaxmoe.ops.rotary, "rotary_frequencies", lambda rope, head_dim: frequencies(change(rope), head_dim))


def wrong_rotary_base(patch: pytest.MonkeyPatch) -> None:
    _patch_frequencies(patch, lambda rope: dataclasses.replace(rope, rope_theta=1.1 * rope.rope_theta))


def ignore_attention_factor(patch: pytest.MonkeyPatch) -> None:
    _patch_frequencies(patch, lambda rope: dataclasses.replace(rope, attention_factor=None))


def truncate_yarn(patch: pytest.MonkeyPatch) -> None:
    _patch_frequencies(patch, lambda rope: dataclasses.replace(rope, truncate=True))


def rotate_neighbours(patch: pytest.MonkeyPatch) -> None:
    apply_rotary = jaxmoe.ops.rotary.apply_rotary

    def interleaved(x: Any, cos: Any, sin: Any) -> Any:
        paired = jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
        return apply_rotary(paired, cos, sin)

    patch.setattr(jaxmoe.ops.rotary, "apply_rotary", interleaved)


def omit_query_and_key_norm(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(jaxmoe.ops.rotary, "rms_norm", lambda x, w, eps: x)


def omit_biases(patch: pytest.MonkeyPatch) -> None:
    linear = jaxmoe.ops.linear.linear
    patch.setattr(jaxmoe.ops.linear, "linear", lambda x, w, bias=None, adapter=None: linear(x, w, None, adapter))


def _patch_mask(patch: pytest.MonkeyPatch, change: Callable[..., tuple[Any, ...]]) -> None:
    mask = jaxmoe.ops.attention_chunked.attention_mask
    patch.setattr(jaxmoe.ops.attention_chunked, "attention_mask", lambda *args: mask(*change(*args)))


def widen_the_window(patch: pytest.MonkeyPatch) -> None:
    _patch_mask(patch, lambda q, k, qs, ks, window: (q, k, qs, ks, window + 1))


def join_packed_documents(patch: pytest.MonkeyPatch) -> None:
    _patch_mask(patch, lambda q, k, qs, ks, window: (q, k, jnp.minimum(qs, 1), jnp.minimum(ks, 1), window))


def attend_to_padding(patch: pytest.MonkeyPatch) -> None:
    _patch_mask(patch, lambda q, k, qs, ks, window: (q, k, jnp.ones_like(qs), jnp.ones_like(ks), window))


def untie_the_head(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(jaxmoe.model.decoder, "head_weight", lambda params: params["embed_tokens"][::-1])


def count_padding(patch: pytest.MonkeyPatch) -> None:
    counts = jaxmoe.model.decoder.expert_counts
    patch.setattr(jaxmoe.model.decoder, "expert_counts", lambda e, valid, n: counts(e, jnp.ones_like(valid), n))


FAULTS = [
    (swap_gate_and_up, "plain", "plain"),
    (swap_gate_and_up_of_dense_layers, "sparse_step_2", "plain"),
    (flip_renormalisation, "plain", "plain"),
    (flip_renormalisation, "top_8_of_32_unnormalised", "plain"),
    (exchange_two_experts, "top_8_of_32", "plain"),
    (wrong_rotary_base, "plain_v4", "plain"),
    (wrong_rotary_base, "rope_linear_v4", "plain"),
    (ignore_attention_factor, "rope_yarn_v4", "plain"),
    (truncate_yarn, "rope_yarn_tuned", "plain"),
    (rotate_neighbours, "plain", "plain"),
    (omit_query_and_key_norm, "plain", "plain"),
    (omit_biases, "attention_bias", "plain"),
    (widen_the_window, "sliding_window", "plain"),
    (join_packed_documents, "plain", "packed"),
    (attend_to_padding, "plain", "left_padded"),
    (untie_the_head, "tied", "plain"),
    (count_padding, "plain", "right_padded"),
]


@pytest.mark.parametrize(("fault", "name", "layout"), FAULTS, ids=lambda x: getattr(x, "__name__", x))
def test_a_planted_fault_is_found(
    fault: Callable[[pytest.MonkeyPatch], None], name: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch(config_of(name), LAYOUTS[layout])
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check(name, batch, fresh=True)
    monkeypatch.undo()
    check(name, batch)
