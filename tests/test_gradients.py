"""Gradients through the model object equal transformers' for every parameter; a frozen one raises an error."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from convert.names import blocks_of, rows
from jaxmoe import LoraConfig, Qwen3MoeForCausalLM
from jaxmoe.model.decoder import forward
from jaxmoe.model.interface import Options, Tokens
from jaxmoe.ops.router import RoutingControl
from jaxmoe.parameters import layer_paths
from jaxmoe.train.loss import cross_entropy
from peers.configs import CONFIGS, config_of, random_adapters, random_parameters, random_tokens
from peers.make_checkpoint import TINY, make_checkpoint
from peers.reference import Reference
from tests.parity import relative_error
from tests.tolerances import bound

LORA = LoraConfig(r=3, alpha=5.0, targets=("q_proj", "o_proj", "gate", "experts.gate_up_proj", "experts.down_proj"))
# every kind of parameter: both kinds of layers, biases, tied and untied heads
NAMES = ("plain", "tied", "mlp_only_layers", "attention_bias")


def model_of(name: str, lora: LoraConfig | None = None) -> Qwen3MoeForCausalLM:
    config = config_of(name)
    adapters = random_adapters(config, lora) if lora else {}
    params, adapters = jax.tree.map(jnp.asarray, (random_parameters(config), adapters))
    return Qwen3MoeForCausalLM(config, params, lora, adapters)


def loss_of(logits: Any, ids: Any, library: Any) -> Any:
    """A loss in which every logit has a different weight."""
    weights = np.cos(np.arange(np.prod(logits.shape), dtype=np.float32)).reshape(logits.shape)
    return (logits * library.asarray(weights)).mean()


def expected_gradients(name: str, ids: np.ndarray) -> dict[str, np.ndarray]:
    """transformers' autograd: HF key -> gradient, the experts fused as transformers holds them."""
    model: Any = Reference(CONFIGS[name], random_parameters(config_of(name))).model
    model.requires_grad_(True)
    loss_of(model(torch.tensor(ids)).logits, ids, torch).backward()
    return {key: p.grad.numpy() for key, p in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_the_gradient_of_transformers(name: str) -> None:
    config, model = config_of(name), model_of(name)
    ids = random_tokens(config, 2, 20)
    gradients = nnx.grad(lambda model: loss_of(model(ids).logits, ids, jnp))(model)
    found = {".".join(map(str, path[1:])): np.asarray(v[...]) for path, v in nnx.to_flat_state(gradients)}
    expected = expected_gradients(name, ids)
    compared = set()
    for layer in blocks_of(config):
        slots = {} if layer is None else dict(layer_paths(config, layer))
        for row in rows(config, layer, "fused"):
            gradient = found[row.path] if layer is None else found[row.path][slots[row.path]]
            assert relative_error(gradient, expected[row.key]) <= bound("parity_gradients"), row.key
            assert np.abs(expected[row.key]).max() > 0, row.key
            compared.add(row.path)
    assert compared == set(found)


def test_adapters_and_weights_together_are_each_other_s_check() -> None:
    """d loss / dB = scale * d loss / dW A^T for every adapter, in one call that asks for both."""
    model = model_of("plain", LORA)
    ids = random_tokens(model.config, 2, 20)
    both = nnx.grad(
        lambda model: loss_of(model(ids).logits, ids, jnp), argnums=nnx.DiffState(0, (nnx.Param, nnx.LoRAParam))
    )(model)
    found = {".".join(map(str, path)): np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(both)}
    for target in LORA.targets:
        stack = {"q_proj": "attention", "o_proj": "attention"}.get(target, "sparse")
        path = f"{stack}.{target.removeprefix('experts.')}"
        a = np.asarray(model.adapters[f"{path}.lora_A"], np.float64)
        expected = LORA.scale(target) * np.einsum("...oi,...ri->...or", found[f"weights.{path}"], a)
        assert relative_error(found[f"lora_weights.{path}.lora_B"], expected) <= bound("parity_gradients"), path


@pytest.mark.parametrize("where", ["grad of jit", "jit of grad"])
def test_inside_jit_the_gradient_is_the_same(where: str) -> None:
    model = model_of("plain")
    ids = random_tokens(model.config, 1, 12)
    loss = lambda model: loss_of(model(ids).logits, ids, jnp)
    plain = nnx.grad(loss)(model)
    jitted = nnx.grad(nnx.jit(loss))(model) if where == "grad of jit" else nnx.jit(nnx.grad(loss))(model)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(jitted), strict=True):
        assert relative_error(b, a) <= bound("oracle_fp32")


def test_the_auxiliary_loss_has_a_gradient_too() -> None:
    model = model_of("plain")
    ids = random_tokens(model.config, 2, 20)
    gradients = nnx.grad(lambda model: model(ids, output_router_logits=True).aux_loss)(model)
    found = {".".join(map(str, path[1:])): np.asarray(v[...]) for path, v in nnx.to_flat_state(gradients)}
    reference = Reference(CONFIGS["plain"], random_parameters(model.config)).model.requires_grad_(True)
    reference(torch.tensor(ids), output_router_logits=True).aux_loss.backward()
    expected = {key: p.grad for key, p in reference.named_parameters()}
    for layer in range(model.config.num_hidden_layers):
        gate = expected[f"model.layers.{layer}.mlp.gate.weight"].numpy()
        assert relative_error(found["sparse.gate"][layer], gate) <= bound("parity_gradients")


def test_a_frozen_parameter_raises_and_the_others_are_as_before() -> None:
    model = model_of("plain", LORA)
    ids = random_tokens(model.config, 1, 12)
    loss = lambda model: loss_of(model(ids).logits, ids, jnp)
    adapters_only = nnx.DiffState(0, nnx.LoRAParam)
    before = nnx.grad(loss, argnums=adapters_only)(model)
    model.freeze("weights")
    after = nnx.grad(loss, argnums=adapters_only)(model)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(
        ValueError, match=r"^weights\.attention\.input_layernorm: frozen, but its gradient was asked for"
    ):
        nnx.grad(loss)(model)
    model.unfreeze("weights")
    model.freeze("weights.sparse.gate_up_proj")
    with pytest.raises(ValueError, match=r"^weights\.sparse\.gate_up_proj: frozen, but its gradient was asked for"):
        nnx.grad(loss)(model)
    model.unfreeze()
    nnx.grad(loss)(model)
    with pytest.raises(
        ValueError, match=r"expected a path in the model such as 'weights.attention', found 'weights.q'"
    ):
        model.freeze("weights.q")


def test_weights_in_nf4_are_frozen(shared_tmp: Any) -> None:
    folder = make_checkpoint(shared_tmp / "gradients-nf4", TINY)
    model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype="float32", quantize="nf4")
    ids = random_tokens(model.config, 1, 12)

    def loss(arrays: dict[str, jax.Array]) -> jax.Array:
        changed = Qwen3MoeForCausalLM(model.config, model.params | arrays)
        return loss_of(changed(ids).logits, ids, jnp)

    norms = {path: array for path, array in model.params.items() if path.endswith("norm")}
    gradients = jax.grad(loss)(norms)  # what is not in NF4 has its gradient
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))
    offsets = {path: array for path, array in model.params.items() if path.endswith("nested_offset")}
    with pytest.raises(ValueError, match=r"nested_offset: frozen \(NF4\), but its gradient was asked for"):
        jax.grad(loss)(offsets)


@pytest.mark.parametrize("trainable", ["none", "adapters"])
def test_the_pure_function_never_gives_a_silent_zero(trainable: Any) -> None:
    """The options say what can be differentiated; asking for another gradient raises an error."""
    model = model_of("plain", LORA)
    ids = random_tokens(model.config, 1, 12)
    tokens = Tokens(*map(jnp.asarray, (ids, np.arange(12)[None], np.ones_like(ids))))
    options = Options(lora=LORA, trainable=trainable)

    def loss(params: Any) -> Any:
        return forward(params, model.adapters, tokens, config=model.config, options=options).hidden.sum()

    with pytest.raises(ValueError, match=r"^experts' weights: frozen, but its gradient was asked for"):
        jax.grad(loss)(model.params)


def test_a_frozen_head_raises() -> None:
    hidden, head = jnp.ones((4, 8)), jnp.ones((16, 8))
    labels, weights = jnp.zeros(4, jnp.int32), jnp.ones(4)
    loss = lambda hidden, head: cross_entropy(hidden, head, labels, weights, frozen_head=True)
    assert jax.grad(loss)(hidden, head).shape == hidden.shape
    with pytest.raises(ValueError, match=r"^the head: frozen, but its gradient was asked for"):
        jax.grad(loss, argnums=1)(hidden, head)


def test_a_bias_on_the_router_logits_has_a_gradient() -> None:
    """Against a difference quotient, with the choice of experts fixed."""
    model = model_of("plain")
    ids = random_tokens(model.config, 1, 12)
    chosen = model(ids, output_router_logits=True).router_logits
    assert chosen is not None
    experts = jax.lax.top_k(jnp.stack(chosen), model.config.num_experts_per_tok)[1]

    def loss(bias: jax.Array) -> jax.Array:
        control = RoutingControl(experts=experts, logit_bias=bias)
        return loss_of(model(ids, routing_control=control).logits, ids, jnp)

    gradient = jax.grad(loss)(jnp.zeros((len(chosen), model.config.num_experts)))
    direction = 1e-2 * jnp.sign(gradient)
    measured = (loss(direction) - loss(-direction)) / 2e-2
    assert float(measured) == pytest.approx(float(jnp.abs(gradient).sum()), rel=bound("difference_quotient"))


def test_recomputation_and_loops_around_a_call_change_nothing() -> None:
    """`jax.checkpoint` around the loss, and a scan over micro-batches whose gradient is taken outside."""
    model = model_of("plain")
    ids = random_tokens(model.config, 2, 12)

    def loss(params: Any, ids: Any) -> jax.Array:
        return jnp.mean(jnp.sin(Qwen3MoeForCausalLM(model.config, params)(ids).logits))

    def in_turn(params: Any) -> jax.Array:
        step = lambda total, one: (total + loss(params, one[None]), None)
        return jax.lax.scan(step, jnp.zeros(()), jnp.asarray(ids))[0] / 2

    expected = jax.grad(loss)(model.params, ids)
    for found in (jax.grad(jax.checkpoint(loss))(model.params, ids), jax.grad(in_turn)(model.params)):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert relative_error(a, b) <= bound("oracle_fp32")


def test_what_is_frozen_stays_frozen_in_copies_and_under_jit() -> None:
    model = model_of("plain", LORA)
    ids = random_tokens(model.config, 1, 12)
    model.freeze("weights")
    assert nnx.merge(*nnx.split(model)).frozen == nnx.clone(model).frozen == model.frozen != frozenset()
    with pytest.raises(ValueError, match=r"^weights\.attention\.input_layernorm: frozen"):
        nnx.jit(nnx.grad(lambda model: loss_of(model(ids).logits, ids, jnp)))(model)


def test_an_experts_stack_beside_one_in_nf4_raises(shared_tmp: Any) -> None:
    """Both are read by one kernel, so one cannot be trained while the other is in NF4."""
    folder = make_checkpoint(shared_tmp / "gradients-half-nf4", TINY)
    plain = Qwen3MoeForCausalLM.from_pretrained(folder, dtype="float32")
    packed = Qwen3MoeForCausalLM.from_pretrained(folder, dtype="float32", quantize="nf4")
    kept = {path: array for path, array in packed.params.items() if not path.startswith("sparse.gate_up_proj.")}
    mixed = kept | {"sparse.gate_up_proj": plain.params["sparse.gate_up_proj"]}
    ids = random_tokens(plain.config, 1, 12)

    def loss(array: jax.Array) -> jax.Array:
        params = mixed | {"sparse.gate_up_proj": array}
        return loss_of(Qwen3MoeForCausalLM(plain.config, params)(ids).logits, ids, jnp)

    assert np.isfinite(loss(mixed["sparse.gate_up_proj"]))
    with pytest.raises(ValueError, match=r"^sparse\.down_proj: frozen \(NF4\)"):
        jax.grad(loss)(mixed["sparse.gate_up_proj"])
