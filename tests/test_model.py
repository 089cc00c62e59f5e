"""The model as an object, the chunked loss, and the memory of the compiled step."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.adapters import write_peft
from convert.hf2jax import hf2jax
from jaxmoe import LoraConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from jaxmoe.errors import UserError
from jaxmoe.memory import Remat
from jaxmoe.model import causal_lm
from jaxmoe.model.decoder import forward
from jaxmoe.model.init import init_adapters, init_parameters
from jaxmoe.model.interface import Options, Tokens
from jaxmoe.model.layer import Layer
from jaxmoe.parameters import lora_specs, parameter_specs
from jaxmoe.store.adapter import write_adapter
from jaxmoe.train import loss
from jaxmoe.train.loss import cross_entropy
from peers.make_checkpoint import TINY, make_checkpoint
from tests.parity import relative_error
from tests.tolerances import bound

LORA = LoraConfig(r=2, targets=("q_proj", "gate", "experts.gate_up_proj", "experts.down_proj"))


@pytest.fixture(scope="module")
def folder(shared_tmp):
    return make_checkpoint(shared_tmp / "model-test", TINY)


def equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_every_parameter_is_named_and_has_logical_axes():
    made = Qwen3MoeForCausalLM(
        TINY, init_parameters(TINY, jax.random.key(0)), LORA, init_adapters(TINY, LORA, jax.random.key(1))
    )
    state = {".".join(map(str, path[1:])): variable for path, variable in nnx.to_flat_state(nnx.state(made))}
    specs = parameter_specs(TINY) | lora_specs(TINY, LORA)
    assert set(state) == set(specs)
    for path, variable in state.items():
        assert variable.get_metadata("out_sharding") == specs[path].axes
        assert len(specs[path].axes) == variable[...].ndim
        assert isinstance(variable, nnx.LoRAParam) == (".lora_" in path)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_wrong_arrays_are_refused(fault):
    params = init_parameters(TINY, jax.random.key(0))
    if fault == "missing":
        del params["norm"]
    elif fault == "unexpected":
        params["attention.extra"] = jnp.zeros(1)
    else:
        params["norm"] = jnp.zeros(1)
    with pytest.raises(ValueError, match={"missing": "norm", "unexpected": "extra", "shape": "norm"}[fault]):
        Qwen3MoeForCausalLM(TINY, params)


def test_both_forms_of_a_folder_give_the_same_arrays(folder, tmp_path):
    hf2jax(folder, tmp_path / "converted")
    first, second = (Qwen3MoeForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "converted"))
    equal(first.params, second.params)
    assert first.config == second.config


def test_both_forms_of_an_adapter_give_the_same_arrays(folder, tmp_path):
    config = Qwen3MoeConfig.from_pretrained(folder)
    arrays = {name: np.asarray(a) for name, a in init_adapters(config, LORA, jax.random.key(3)).items()}
    write_peft(tmp_path / "peft", config, LORA, arrays)
    write_adapter(tmp_path / "converted", config, LORA, arrays)
    for form in ("peft", "converted"):
        loaded = Qwen3MoeForCausalLM.from_pretrained(folder, adapter=tmp_path / form)
        equal(loaded.adapters, arrays)
        assert loaded.lora_config is not None
        assert [loaded.lora_config.scale(t) for t in LORA.targets] == [LORA.scale(t) for t in LORA.targets]


def test_dtype_casts_every_parameter(folder):
    loaded = Qwen3MoeForCausalLM.from_pretrained(folder, dtype="bfloat16")
    assert {a.dtype for a in loaded.params.values()} == {jnp.dtype("bfloat16")}
    assert loaded.config.dtype == "bfloat16"
    with pytest.raises(UserError, match="int8"):
        Qwen3MoeForCausalLM.from_pretrained(folder, dtype="int8")


def test_segment_ids_exclude_an_attention_mask(folder):
    loaded, ids = Qwen3MoeForCausalLM.from_pretrained(folder), np.ones((1, 4), np.int32)
    with pytest.raises(ValueError, match="at most one"):
        loaded(ids, attention_mask=ids, segment_ids=ids)


def noisy_adapters(config):
    """All adapters are random: B is zero at first, and a constant added to a router's logits changes nothing."""
    adapters = init_adapters(config, LORA, jax.random.key(0))
    return {p: a + 0.1 * jax.random.normal(jax.random.key(n), a.shape) for n, (p, a) in enumerate(adapters.items())}


def gradients_of(loaded, remat, unroll=False):
    """Gradients of all adapters, for two sequences."""
    ids = jnp.asarray(np.random.default_rng(0).integers(0, loaded.config.vocab_size, (2, 24)))
    positions = jnp.broadcast_to(jnp.arange(24), ids.shape)
    adapters = noisy_adapters(loaded.config)
    options = Options(lora=LORA, trainable="adapters", remat=remat, unroll=unroll)

    def value(adapters):
        tokens = Tokens(ids, positions, jnp.ones_like(ids))
        out = forward(loaded.params, adapters, tokens, config=loaded.config, options=options)
        return jnp.sum(out.hidden * jnp.cos(jnp.arange(out.hidden.size)).reshape(out.hidden.shape))

    return jax.jit(jax.grad(value)).trace(adapters), adapters


@pytest.mark.parametrize("remat", get_args(Remat))
def test_what_is_kept_changes_no_gradient(remat, folder):
    """Every policy gives the gradients of "low-memory"; only "offload" keeps anything in the host's memory."""
    loaded = Qwen3MoeForCausalLM.from_pretrained(folder)
    traced, adapters = gradients_of(loaded, remat)
    expected, _ = gradients_of(loaded, "low-memory")
    found, plain = (t.lower().compile()(adapters) for t in (traced, expected))
    for path, gradient in plain.items():
        assert relative_error(found[path], gradient) <= bound("remat_gradients_fp32"), path
    L, D = loaded.config.num_hidden_layers, loaded.config.hidden_size
    assert (f"f32<host>[{L},2,24,{D}]" in str(traced.jaxpr)) == (remat == "offload")


@pytest.mark.parametrize("remat", ["fast", "low-memory"])
def test_unrolled_layers_change_no_gradient(remat, folder):
    """Layers one after the other, whatever their kinds, give what the scan gives; no loop is left in the program."""
    loaded = Qwen3MoeForCausalLM.from_pretrained(folder)
    scanned, adapters = gradients_of(loaded, remat)
    unrolled, _ = gradients_of(loaded, remat, unroll=True)
    expected, found = (t.lower().compile()(adapters) for t in (scanned, unrolled))
    for path, gradient in expected.items():
        assert relative_error(found[path], gradient) <= bound("unrolled_gradients_fp32"), path
    loops = [f"length={loaded.config.num_hidden_layers}" in str(t.jaxpr) for t in (scanned, unrolled)]
    assert loops == [True, False]


def test_what_else_the_unrolled_layers_give(folder):
    """Router logits, layers' inputs and statistics as from the scan."""
    loaded = Qwen3MoeForCausalLM.from_pretrained(folder)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, loaded.config.vocab_size, (2, 24)))
    positions = jnp.broadcast_to(jnp.arange(24), ids.shape)
    run = partial(forward, loaded.params, {}, Tokens(ids, positions, jnp.ones_like(ids)), config=loaded.config)
    scanned, unrolled = (
        jax.tree.leaves(run(options=Options(router_logits=True, layer_inputs=True, keep_logits=4, unroll=unroll)))
        for unroll in (False, True)
    )
    assert len(scanned) == len(unrolled)
    for expected, found in zip(scanned, unrolled, strict=True):
        assert found.shape == expected.shape
        limit = bound("unrolled_outputs_fp32")
        np.testing.assert_allclose(found, expected, rtol=limit, atol=limit)


def one_document_rows(folder, packed: bool, documents: int = 1):
    """Hidden states of the tokens, and gradients of a loss over them, for sequences with padding after the tokens."""
    loaded = Qwen3MoeForCausalLM.from_pretrained(folder)
    lengths = np.asarray([30, 17, 1])[:, None]
    index = np.broadcast_to(np.arange(30), (3, 30))
    segments = np.where(index < lengths, 1 + index * documents // 30, 0)
    ids = np.random.default_rng(0).integers(0, loaded.config.vocab_size, segments.shape)
    adapters = noisy_adapters(loaded.config)

    @partial(jax.value_and_grad, has_aux=True)
    def run(adapters):
        options = Options(lora=LORA, trainable="adapters", packed=packed)
        batch = Tokens(*map(jnp.asarray, (ids, index, segments)))
        out = forward(loaded.params, adapters, batch, config=loaded.config, options=options)
        tokens = out.hidden[segments > 0]
        return jnp.sum(tokens * jnp.cos(jnp.arange(tokens.size)).reshape(tokens.shape)), (tokens, out.stats)

    return run(adapters)


def test_rows_of_one_document_need_no_segments(folder):
    """Causality keeps what follows a sequence's end from its tokens, and statistics leave padding out."""
    (_, apart), gradients = one_document_rows(folder, packed=True)
    (_, joined), other_gradients = one_document_rows(folder, packed=False)
    equal(apart, joined)
    for a, b in zip(*map(jax.tree.leaves, (gradients, other_gradients)), strict=True):
        assert relative_error(b, a) <= bound("unpacked_gradients_fp32")
    (_, (apart, _)), _ = one_document_rows(folder, packed=True, documents=2)
    (_, (joined, _)), _ = one_document_rows(folder, packed=False, documents=2)
    assert np.abs(apart - joined).max() > 1e-2


@pytest.mark.parametrize(
    ("segments", "packed"),
    [
        ([[1, 1, 1], [1, 1, 1]], False),
        ([[1, 1, 0], [4, 0, 0]], False),
        ([[0, 0, 0], [1, 1, 1]], False),
        ([[1, 1, 1], [1, 2, 2]], True),
        ([[0, 1, 1], [1, 1, 1]], True),
        ([[1, 0, 2], [1, 1, 1]], True),
    ],
    ids=str,
)
def test_which_rows_are_packed(segments, packed):
    assert causal_lm._packed(np.asarray(segments)) == packed


def losses_and_gradients(chunk):
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=(n, 8)), jnp.float32) for n in (37, 50))
    labels, weights = jnp.asarray(rng.integers(0, 50, 37)), jnp.asarray(rng.random(37) < 0.7, jnp.float32)
    found = jax.value_and_grad(loss.cross_entropy, argnums=(0, 1))(hidden, head, labels, weights, chunk)

    def plain(hidden, head):
        return -jnp.sum(weights * jnp.take_along_axis(jax.nn.log_softmax(hidden @ head.T), labels[:, None], 1)[:, 0])

    expected = jax.value_and_grad(plain, argnums=(0, 1))(hidden, head)
    return [
        np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True)
    ]


@pytest.mark.parametrize("chunk", [1, 10, 37, 1000])
def test_chunked_loss_equals_the_plain_one(chunk):
    assert max(losses_and_gradients(chunk)) <= bound("dispatch_fp32")


def test_the_loss_comparison_sees_a_planted_fault(monkeypatch):
    def forgets_weights(hidden, head, labels, weights, chunk=1024):
        return cross_entropy(hidden, head, labels, jnp.ones_like(weights), chunk)

    monkeypatch.setattr(loss, "cross_entropy", forgets_weights)
    assert max(losses_and_gradients(10)) > 1e-2


@pytest.mark.parametrize("order", ["random", "rising", "falling", "equal", "one large"])
def test_the_sum_that_is_read_once_equals_the_exact_one(order):
    logits = np.random.default_rng(1).normal(0, 30, (3, 1001)).astype(np.float32)
    if order in ("rising", "falling"):
        logits = np.sort(logits, axis=1)[:, :: 1 if order == "rising" else -1]
    if order == "equal":
        logits = np.full_like(logits, -1e4)
    if order == "one large":
        logits[:, 700] += 1e4
    exact = np.logaddexp.reduce(logits.astype(np.float64), axis=1)
    found = jax.jit(loss.log_sum_exp)(logits)
    assert np.abs(found - exact).max() <= np.finfo(np.float32).eps * (4 + np.abs(exact).max())


def traced_step(config, remat, unroll=False) -> Any:
    """The traced loss and gradients over few tokens."""
    specs = parameter_specs(config)
    params = {path: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for path, spec in specs.items()}
    adapters = {path: jax.ShapeDtypeStruct(s.shape, jnp.float32) for path, s in lora_specs(config, LORA).items()}
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)

    def value(adapters, params, ids):
        options = Options(lora=LORA, trainable="adapters", remat=remat, unroll=unroll)
        return jnp.sum(forward(params, adapters, Tokens(ids, ids, ids), config=config, options=options).hidden)

    return jax.jit(jax.grad(value)).trace(adapters, params, ids)


def temporaries(config, remat, unroll=False) -> int:
    return traced_step(config, remat, unroll).lower().compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("remat", "unroll"), [("low-memory", False), ("fast", False), ("fast", True)])
def test_no_temporary_holds_a_layers_experts(remat, unroll, monkeypatch):
    """Frozen experts are indexed in place: neither copied by the loops nor saved for the backward pass."""
    # Compiled, never run: wide enough that a GPU's matmul workspace (32 MiB) is small beside a layer.
    config = TINY.replace(hidden_size=1024, moe_intermediate_size=512, num_experts=64, mlp_only_layers=())
    down_proj = 4 * config.num_experts * config.moe_intermediate_size * config.hidden_size  # the smaller stack
    assert temporaries(config, remat, unroll) < down_proj

    original = Layer.experts

    def sliced(layer):  # the obvious way, which copies
        weights: Any = original(layer)
        here = partial(jax.lax.dynamic_slice_in_dim, start_index=weights.offset, slice_size=config.num_experts)
        return weights._replace(gate_up_proj=here(weights.gate_up_proj), down_proj=here(weights.down_proj), offset=0)

    monkeypatch.setattr(Layer, "experts", sliced)
    assert temporaries(config, remat, unroll) > down_proj


def test_no_recomputation_still_keeps_no_copy_of_the_weights():
    """Remat "fast" saves results that are expensive to recompute, but not the slices of frozen attention weights."""
    config = TINY.replace(hidden_size=1024, head_dim=256, num_hidden_layers=12, num_experts=2, moe_intermediate_size=8)
    config = config.replace(num_experts_per_tok=1, mlp_only_layers=())
    attention = sum(math.prod(s.shape) for path, s in parameter_specs(config).items() if path.endswith("_proj")) * 4
    assert temporaries(config, "fast") < attention / 2


@pytest.mark.parametrize(("remat", "choices"), [("low-memory", 2), ("balanced", 1), ("fast", 1)])
def test_kept_routing_is_not_chosen_again(remat, choices):
    assert str(traced_step(TINY.replace(mlp_only_layers=()), remat).jaxpr).count("top_k[") == choices
