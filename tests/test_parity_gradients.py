"""Loss and the gradient of every adapter against transformers + PEFT in float32, from random A and B."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe.model.decoder
import jaxmoe.ops.experts
import jaxmoe.train.loss
import jaxmoe.train.optimizers
import jaxmoe.train.step
from jaxmoe.config import LoraConfig, expand_targets
from jaxmoe.data.packing import Batch as TrainingBatch
from jaxmoe.memory import Remat
from jaxmoe.ops.dispatch import Local
from jaxmoe.parameters import lora_specs, parameter_specs
from peers.configs import CONFIGS, config_of, random_adapters, random_parameters
from peers.reference import Reference
from tests.parity import COMPILER_OPTIONS, Batch, make_batch, product, relative_error
from tests.tolerances import bound

# With this coefficient the load-balancing loss matters in the router's gradient.
AUX_COEFFICIENT = 0.5
OBJECTIVE = jaxmoe.train.loss.next_token_objective(AUX_COEFFICIENT)
LAYOUT = [[48], [-3, 30, 15]]
NAMES = (
    "plain",
    "top_8_of_32",
    "top_8_of_32_unnormalised",
    "sparse_step_2",
    "attention_bias",
    "rope_yarn_v4",
    "every_expert",
    "odd_sizes",
    "all_dense",
)


def lora_of(name: str) -> LoraConfig:
    """Adapters on everything that the model has."""
    config = config_of(name)
    groups = [*(["router", "experts"] if config.sparse_layers else []), *(["dense"] if config.dense_layers else [])]
    return LoraConfig(r=3, alpha=5.0, targets=expand_targets(["attention", *groups]))


@functools.cache
def reference(name: str) -> tuple[float, dict[str, np.ndarray]]:
    """(loss, gradients) of transformers and PEFT."""
    batch = make_batch(config_of(name), LAYOUT)
    adapters = random_adapters(config_of(name), lora_of(name))
    model = Reference(CONFIGS[name], random_parameters(config_of(name)), lora=lora_of(name), adapters=adapters)
    return model.loss_and_gradients(
        batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids, aux_coef=AUX_COEFFICIENT
    )


def training_batch(batch: Batch) -> TrainingBatch:
    """One step without accumulation; a label of -100 becomes a weight of zero."""
    arrays = {
        "input_ids": batch.input_ids,
        "labels": np.maximum(batch.labels, 0),
        "weights": (batch.labels >= 0).astype(np.float32),
        "position_ids": batch.position_ids,
        "segment_ids": batch.segment_ids,
    }
    return TrainingBatch(**{name: jnp.asarray(array)[None] for name, array in arrays.items()})


def run_product(name: str, lora: LoraConfig, remat: Remat) -> tuple[float, dict[str, np.ndarray]]:
    """(loss, gradients) of the training step's own function, compiled again."""
    config = config_of(name)
    model = jaxmoe.train.step.Model(config, lora, remat=remat)

    @functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def run(frozen, trainable, batch):
        found = jaxmoe.train.step.loss_and_gradients(model, frozen, trainable, batch, OBJECTIVE)
        stats, aux = found.stats, 0.0
        if config.sparse_layers:
            aux = jaxmoe.train.step.load_balancing_loss(stats.counts, stats.prob_sums, stats.tokens)
        return found.loss + AUX_COEFFICIENT * aux, found.gradients

    arrays = random_parameters(config), random_adapters(config, lora)
    frozen, trainable = ({path: jnp.asarray(array) for path, array in part.items()} for part in arrays)
    loss, gradients = run(frozen, trainable, training_batch(make_batch(config, LAYOUT)))
    return float(loss), {path: np.asarray(array) for path, array in gradients.items()}


@functools.cache
def product_gradients(name: str, remat: Remat = "low-memory") -> tuple[float, dict[str, np.ndarray]]:
    """`run_product` with adapters on everything, once for all tests that do not change jaxmoe."""
    return run_product(name, lora_of(name), remat)


def check(name: str, found: tuple[float, dict[str, np.ndarray]]) -> None:
    """The parity that every test of this module asserts, negative controls included."""
    (loss, gradients), (expected_loss, expected) = found, reference(name)
    assert loss == pytest.approx(expected_loss, rel=bound("parity_loss"))
    assert set(gradients) == set(expected) == set(lora_specs(config_of(name), lora_of(name)))
    # Layer by layer, because a later layer's larger gradient would hide an earlier one's error.
    errors = {
        (path, layer): relative_error(gradients[path][layer], expected[path][layer])
        for path in expected
        for layer in range(len(expected[path]))
    }
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= bound("parity_gradients"), f"{worst}: {errors[worst]:.1e}"


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_those_of_peft(name: str) -> None:
    check(name, product_gradients(name))


def test_gradients_do_not_depend_on_what_is_recomputed() -> None:
    check("sparse_step_2", product_gradients("sparse_step_2", "fast"))


def sizes(gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Largest entry of each gradient matrix: [layers], or [layers, E] for experts."""
    return {path: np.abs(gradient).max(axis=(-2, -1)) for path, gradient in gradients.items()}


@pytest.mark.parametrize("name", ["top_8_of_32", "sparse_step_2"])
def test_every_adapter_that_saw_tokens_has_a_gradient(name: str) -> None:
    config, lora = config_of(name), lora_of(name)
    batch = make_batch(config, LAYOUT)
    used = product(config, random_parameters(config), batch, lora=lora, adapters=random_adapters(config, lora)).counts
    for path, size in sizes(product_gradients(name)[1]).items():
        assert ((size > 0) == (used > 0 if size.ndim == 2 else True)).all(), path


def test_an_expert_without_tokens_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    route = jaxmoe.model.decoder.route

    def starved(x, weight, **options):
        # One more input, always 1, that only the last two experts weigh, and heavily against themselves.
        bias = jnp.where(jnp.arange(weight.shape[0]) >= 6, -1e4, 0.0)[:, None]
        return route(jnp.concatenate([x, jnp.ones_like(x[:, :1])], 1), jnp.concatenate([weight, bias], 1), **options)

    monkeypatch.setattr(jaxmoe.model.decoder, "route", starved)
    lora = LoraConfig(r=3, alpha=5.0, targets=expand_targets(["experts"]))
    for path, size in sizes(run_product("plain", lora, "low-memory")[1]).items():
        assert (size[:, :6] > 0).all() and (size[:, 6:] == 0).all(), path


def test_frozen_weights_have_neither_gradient_nor_optimizer_state() -> None:
    config, lora = config_of("plain"), lora_of("plain")
    model = jaxmoe.train.step.Model(config, lora)
    specs = parameter_specs(config), lora_specs(config, lora)
    frozen, trainable = ({p: jax.ShapeDtypeStruct(s.shape, jnp.float32) for p, s in part.items()} for part in specs)
    gradients = jax.eval_shape(
        lambda f, t, b: jaxmoe.train.step.loss_and_gradients(model, f, t, b, OBJECTIVE).gradients,
        *(frozen, trainable, training_batch(make_batch(config, LAYOUT))),
    )
    assert {path: g.shape for path, g in gradients.items()} == {path: t.shape for path, t in trainable.items()}
    rate = jaxmoe.train.optimizers.learning_rate("constant", 1e-3, 0, 1)
    settings = {"max_grad_norm": 1.0, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8}
    state = jax.eval_shape(jaxmoe.train.optimizers.adamw(rate, model, **settings).init, trainable)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(trainable))


def detach_router(patch: pytest.MonkeyPatch) -> None:
    route = jaxmoe.model.decoder.route
    patch.setattr(jaxmoe.model.decoder, "route", lambda *a, **k: jax.lax.stop_gradient(route(*a, **k)))


def detach_expert_adapters(patch: pytest.MonkeyPatch) -> None:
    experts = jaxmoe.model.decoder.sorted_experts

    def detached(x, routing, weights, *adapters, **options):
        return experts(x, routing, weights, *jax.lax.stop_gradient(adapters), **options)

    patch.setattr(jaxmoe.model.decoder, "sorted_experts", detached)


def forget_the_weight_in_the_backward_pass(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Local, "weights", lambda self, weights: jnp.sign(self.schedule.source + 1.0)[:, None])


def forget_the_balancing_loss(patch: pytest.MonkeyPatch) -> None:
    balance = jaxmoe.train.loss.load_balancing_loss
    patch.setattr(jaxmoe.train.loss, "load_balancing_loss", lambda *a: jax.lax.stop_gradient(balance(*a)))


def reverse_the_experts_adapters(patch: pytest.MonkeyPatch) -> None:
    experts = jaxmoe.model.decoder.sorted_experts

    def reversed_experts(x, routing, weights, *adapters, **options):
        return experts(x, routing, weights, *(a._replace(lora_B=a.lora_B[::-1]) for a in adapters), **options)

    patch.setattr(jaxmoe.model.decoder, "sorted_experts", reversed_experts)


@pytest.mark.parametrize(
    "fault",
    [
        detach_router,
        detach_expert_adapters,
        forget_the_weight_in_the_backward_pass,
        forget_the_balancing_loss,
        reverse_the_experts_adapters,
    ],
)
def test_a_planted_fault_is_found(fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    check("plain", product_gradients("plain"))
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check("plain", run_product("plain", lora_of("plain"), "low-memory"))
