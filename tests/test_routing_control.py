"""Replaying a recorded routing, and biasing the router, through the model's own path."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe import Qwen3MoeForCausalLM
from jaxmoe.ops.router import RoutingControl
from peers.configs import config_of, random_parameters, random_tokens
from tests.tolerances import bound


def loaded(name: str) -> tuple[Qwen3MoeForCausalLM, np.ndarray]:
    config = config_of(name)
    params = {path: jnp.asarray(value) for path, value in random_parameters(config).items()}
    return Qwen3MoeForCausalLM(config, params), random_tokens(config, 2, 9)


def chosen(router_logits, k: int) -> jax.Array:
    """The experts that each layer's logits choose, [Ls, B, T, k]."""
    return jax.lax.top_k(jax.nn.softmax(jnp.stack(router_logits)), k)[1]


@pytest.mark.parametrize("name", ["top_8_of_32", "mlp_only_layers", "every_expert"])
def test_replaying_the_own_routing_changes_no_bit(name):
    model, ids = loaded(name)
    free = model(ids, output_router_logits=True)
    experts = chosen(free.router_logits, model.config.num_experts_per_tok)
    replayed = model(ids, output_router_logits=True, routing_control=RoutingControl(experts=experts))
    assert np.array_equal(free.logits, replayed.logits)


@pytest.mark.parametrize("name", ["top_8_of_32", "mlp_only_layers"])
def test_another_choice_is_followed_where_one_is_given(name):
    model, ids = loaded(name)
    free = model(ids, output_router_logits=True)
    experts = chosen(free.router_logits, model.config.num_experts_per_tok)
    other = (experts + 1) % model.config.num_experts
    moved = model(ids, routing_control=RoutingControl(experts=other)).logits
    assert np.abs(moved - free.logits).max() > 1e-3
    # From the last position on only: causality keeps the others' logits.
    last = jnp.full_like(experts, -1).at[:, :, -1].set(other[:, :, -1])
    late = model(ids, routing_control=RoutingControl(experts=last)).logits
    assert np.allclose(late[:, :-1], free.logits[:, :-1], rtol=0, atol=bound("controlled_logits_fp32"))
    assert np.abs(late[:, -1] - free.logits[:, -1]).max() > 1e-3


def test_a_removed_expert_is_chosen_by_nobody():
    model, ids = loaded("top_8_of_32")
    config = model.config
    bias = jnp.zeros((len(config.sparse_layers), config.num_experts)).at[:, 3].set(-jnp.inf)
    free = model(ids, output_router_logits=True)
    without = model(ids, output_router_logits=True, routing_control=RoutingControl(logit_bias=bias))
    k = config.num_experts_per_tok
    assert (chosen(free.router_logits, k) == 3).any()
    assert not (chosen(without.router_logits, k) == 3).any()
    assert np.isfinite(without.logits).all()
