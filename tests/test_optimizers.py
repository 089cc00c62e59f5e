"""Optimizers: what they keep, that it is stored, and that they see each matrix alone.

A run with Muon resumes bit for bit in `tests/test_preferences.py`.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import muon

from jaxmoe import memory
from jaxmoe.config import LoraConfig, Qwen3MoeConfig, expand_targets
from jaxmoe.errors import UserError
from jaxmoe.lora import modules_to_save
from jaxmoe.parameters import ParameterSpec, lora_specs, parameter_specs
from jaxmoe.presets import PRESETS
from jaxmoe.store.train_state import TrainCheckpoints
from jaxmoe.train.optimizers import make_optimizer
from jaxmoe.train.settings import TrainConfig
from jaxmoe.train.step import Model, initial_state
from tests.parity import COMPILER_OPTIONS, relative_error
from tests.test_train import CONFIG
from tests.tolerances import bound

OPTIMIZERS = get_args(memory.OptimizerName)
LARGE = PRESETS["qwen3-30b-a3b"].replace(num_hidden_layers=3, mlp_only_layers=(1,))
RATE = optax.constant_schedule(1e-2)


def settings(optimizer: str, **changes: Any) -> TrainConfig:
    paths = {name: pathlib.Path("x") for name in ("model", "data", "output")}
    return TrainConfig(**paths, optimizer=optimizer, **changes)  # pyright: ignore[reportArgumentType]


def bytes_of_state(state: Any, paths: Any) -> int:
    """Bytes of what stands under the path of a trained array, without counters."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    under = lambda where: any(getattr(key, "key", None) in paths for key in where)
    return sum(leaf.size * leaf.dtype.itemsize for where, leaf in leaves if under(where) and leaf.ndim)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("config", [CONFIG, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("what", ["full", "adapters"])
def test_the_forecast_counts_what_the_optimizer_keeps(optimizer: Any, config: Qwen3MoeConfig, what: str) -> None:
    lora = None
    if what == "adapters":
        saved = modules_to_save(("lm_head",), config)
        lora = LoraConfig(r=8, targets=expand_targets(["attention", "router", "experts"]), **saved)
    specs = lora_specs(config, lora) if lora else parameter_specs(config)
    trained = {path: jax.ShapeDtypeStruct(spec.shape, "float32") for path, spec in specs.items()}
    made = make_optimizer(settings(optimizer), Model(config, lora, optimizer=optimizer), RATE)
    state = jax.eval_shape(made.init, trained)
    work = memory.Workload(config, lora, 1, 8, "float32", optimizer=optimizer)
    assert bytes_of_state(state, trained) == memory.optimizer_bytes(work) > 0
    (part,) = (part for part in memory.training_forecast(work).parts if part.name == "optimizer state")
    assert part.bytes == memory.optimizer_bytes(work)


def test_smaller_states_are_smaller() -> None:
    of = lambda optimizer: memory.optimizer_bytes(memory.Workload(LARGE, None, 1, 8, "float32", optimizer=optimizer))
    assert of("adafactor") < of("adamw") / 100 < of("lion") < of("muon") < of("adamw")


def stacks() -> dict[str, jax.Array]:
    """A stack of experts' matrices, one of norms, and an embedding."""
    rng = np.random.default_rng(0)
    shapes = {"sparse.down_proj": (2, 2, 130, 128), "attention.q_norm": (2, 16), "embed_tokens": (130, 140)}
    return {path: jnp.asarray(rng.standard_normal(shape), jnp.float32) for path, shape in shapes.items()}


def second_update(rule: optax.GradientTransformation, gradients: Any, weights: Any) -> Any:
    """The second of two updates with the same gradients."""

    @functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def twice(gradients: Any, weights: Any) -> Any:
        _, kept = rule.update(gradients, rule.init(weights), weights)
        return rule.update(gradients, kept, weights)[0]

    return twice(gradients, weights)


@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_each_matrix_of_a_stack_is_alone(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, gradients = stacks(), {path: 0.1 + array for path, array in stacks().items()}
    axes = {
        "sparse.down_proj": ("layers", "experts", "embed", "expert_mlp"),
        "attention.q_norm": ("layers", "head_dim"),
    }
    axes["embed_tokens"] = ("vocab", "embed")
    kinds = {"attention.q_norm": "ones"}
    specs = {path: ParameterSpec(a.shape, axes[path], kinds.get(path, "normal")) for path, a in weights.items()}
    monkeypatch.setattr("jaxmoe.train.optimizers.parameter_specs", lambda config: specs)
    made = make_optimizer(settings(optimizer, max_grad_norm=0.0, weight_decay=0.1), Model(CONFIG, None), RATE)
    found = second_update(made, gradients, weights)
    alone = lambda rule, path, at: second_update(rule, gradients[path][at], weights[path][at])

    adafactor = optax.adafactor(RATE, multiply_by_parameter_scale=False)
    adam = optax.adamw(RATE, weight_decay=0.0)
    for path, at in (("sparse.down_proj", (1, 0)), ("attention.q_norm", (1,)), ("embed_tokens", ())):
        if optimizer == "adafactor":
            expected = alone(adafactor, path, at)
        elif path == "sparse.down_proj":
            of_optax = muon(RATE, consistent_rms=0.2)  # which takes [in, out]
            expected = second_update(of_optax, gradients[path][at].T, weights[path][at].T).T
        else:
            expected = alone(adam, path, at)
        if path != "attention.q_norm":  # matrices decay
            expected = expected - 1e-2 * 0.1 * weights[path][at]
        assert relative_error(found[path][at], expected) <= bound("optimizer_alone")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_an_optimizer_keeps_is_stored_bit_for_bit(optimizer: Any, tmp_path: pathlib.Path) -> None:
    lora = LoraConfig(r=2, targets=("q_proj", "experts.down_proj"))
    trained = {path: jnp.zeros(spec.shape) for path, spec in lora_specs(CONFIG, lora).items()}
    made = make_optimizer(settings(optimizer), Model(CONFIG, lora, optimizer=optimizer), RATE)
    fresh = initial_state(trained, made)
    rng = np.random.default_rng(1)
    kept = jax.tree.map(lambda a: jnp.asarray(100 * rng.random(a.shape), a.dtype), fresh.optimizer)
    checkpoints = TrainCheckpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(1, fresh._replace(optimizer=kept), {})
    restored = checkpoints.restore_latest(fresh)
    checkpoints.close()
    assert restored is not None
    found, expected = (jax.tree.leaves(tree) for tree in (restored[1].optimizer, kept))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_adams_numbers_are_for_adam() -> None:
    with pytest.raises(UserError, match=r"^adam_beta2: only valid with --optimizer adamw or muon, found lion"):
        settings("lion", adam_beta2=0.9)
