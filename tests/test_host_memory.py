"""What `--remat offload` holds in the host's memory: the same training, with moments and embedding elsewhere."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmoe.data.packing import Batch
from jaxmoe.store.train_state import TrainCheckpoints
from jaxmoe.train.host_memory import in_host_memory, looked_up
from tests.parity import COMPILER_OPTIONS
from tests.tolerances import bound


def test_the_state_s_structure_and_place() -> None:
    """A checkpoint of one fits the other; shapes are enough to make it."""
    adapters = {"attention.q_proj.lora_A": jnp.ones((3, 2, 4)), "lm_head": jnp.ones((8, 4))}
    plain = optax.adamw(1e-3)
    shapes: Any = jax.eval_shape(lambda: adapters)
    states = plain.init(adapters), in_host_memory(plain).init(adapters), in_host_memory(plain).init(shapes)
    one, *others = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) for state in states)
    assert others == [one, one]
    for leaf in jax.tree.leaves(states[2]):
        assert leaf.sharding.memory_kind == ("pinned_host" if leaf.ndim else jax.devices()[0].default_memory().kind)


def test_updates_are_the_same_with_moments_on_the_host() -> None:
    """Three steps with decay of the weights and of the rate, on stacks of two heights and on a head in full."""
    start = {
        "attention.q_proj.lora_A": jnp.ones((3, 2, 4)),
        "sparse.down_proj.lora_B": jnp.ones((2, 5, 4, 2)),
        "lm_head": jnp.ones((8, 4)),
    }
    plain = optax.adamw(optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.1)

    def trained(optimizer: optax.GradientTransformation) -> Any:
        def step(state: Any, seed: Any) -> Any:
            params, moments = state
            draw = lambda array: jax.random.normal(
                jax.random.fold_in(jax.random.key(0), seed + array.size), array.shape
            )
            updates, moments = optimizer.update(jax.tree.map(draw, params), moments, params)
            return jax.tree.map(jnp.add, params, updates), moments

        state = jax.tree.map(jnp.copy, start), optimizer.init(start)
        compiled = jax.jit(step, donate_argnums=0).lower(state, 0).compile(COMPILER_OPTIONS)
        for seed in range(3):
            state = compiled(state, seed)
        return state

    found, expected = trained(in_host_memory(plain)), trained(plain)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(found[1]) if leaf.ndim} == {"pinned_host"}
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.linalg.norm(one - other) <= bound("accumulation") * np.linalg.norm(other)


def test_a_batch_brings_the_vectors_of_its_tokens() -> None:
    table = np.arange(12, dtype=np.float32).reshape(6, 2)
    ids = np.asarray([[[5, 0, 5], [2, 2, 1]]], np.int32)
    batch = Batch(ids, ids, ids, ids, ids)
    frozen, fed = looked_up({"norm": 1, "embed_tokens": table}, batch)
    np.testing.assert_array_equal(frozen["embed_tokens"][fed.input_ids], table[ids])
    assert frozen["norm"] == 1
    np.testing.assert_array_equal(fed.labels, ids)
    shapes, _ = looked_up({"embed_tokens": jax.ShapeDtypeStruct(table.shape, "bfloat16")}, batch)
    assert shapes["embed_tokens"].shape == frozen["embed_tokens"].shape


def test_a_saved_state_returns_to_the_host(tmp_path: pathlib.Path) -> None:
    optimizer = in_host_memory(optax.adamw(1e-3))
    state = optimizer.init({"attention.q_proj.lora_A": jnp.ones((3, 2, 4))})
    checkpoints = TrainCheckpoints(tmp_path)
    checkpoints.save(1, state, {})
    restored = checkpoints.restore_latest(state)
    checkpoints.close()
    assert restored is not None
    kinds = [jax.tree.map(lambda leaf: leaf.sharding.memory_kind, each) for each in (state, restored[1])]
    assert kinds[0] == kinds[1]
