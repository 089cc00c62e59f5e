"""Dropout of adapters: which elements are dropped, that the mask is the same wherever it is drawn, its gradient."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.adapters import read_peft, write_peft
from jaxmoe.config import LoraConfig
from jaxmoe.errors import ConfigError
from jaxmoe.memory import Remat
from jaxmoe.ops.linear import linear
from jaxmoe.ops.low_rank import Adapter, Dropout
from jaxmoe.parameters import lora_specs
from jaxmoe.train.loss import next_token_objective
from jaxmoe.train.optimizers import adamw, learning_rate
from jaxmoe.train.step import Model, initial_state, loss_and_gradients, make_train_step
from tests.test_train import CONFIG, adapted, compilation_cache, random_batch  # noqa: F401 - a fixture
from tests.tolerances import bound

RATE = 0.25
LORA = LoraConfig(r=2, targets=("q_proj", "o_proj"), dropout=RATE)


def keys(count: int, seed: int = 0) -> Any:
    return jax.random.split(jax.random.key(seed), count)


def distance(a: Any, b: Any) -> float:
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in pairs)


def test_the_share_of_dropped_elements() -> None:
    kept = np.asarray(Dropout(keys(8), RATE)(jnp.ones((8, 32, 64)))) == 1
    deviation = np.sqrt(RATE * (1 - RATE) / kept[0].size)
    for sequence in kept:  # each has its own mask, with the right share
        assert abs(sequence.mean() - (1 - RATE)) < 5 * deviation
    agree = (kept[0] == kept[1]).mean()
    expected = RATE**2 + (1 - RATE) ** 2
    assert abs(agree - expected) < 5 * np.sqrt(expected * (1 - expected) / kept[0].size), "masks depend on each other"


def test_value_and_gradient_use_one_mask() -> None:
    x, a, b, weight, d_y = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys(5, 1), [(2, 6, 8), (3, 8), (5, 3), (5, 8), (2, 6, 5)], strict=True)
    )
    dropout = Dropout(keys(2), RATE)
    kept = jnp.asarray(dropout(jnp.ones_like(x)) == 1, jnp.float32)

    def fast(x: Any, a: Any, b: Any) -> Any:
        return jnp.sum(d_y * linear(x, weight, None, Adapter(a, b, 0.5, dropout)))

    def plain(x: Any, a: Any, b: Any) -> Any:
        dropped = x * kept / (1 - RATE)
        return jnp.sum(d_y * (x @ weight.T + 0.5 * (dropped @ a.T) @ b.T))

    with jax.default_matmul_precision("highest"):
        found, expected = (jax.value_and_grad(f, (0, 1, 2))(x, a, b) for f in (fast, plain))
    assert distance(found, expected) <= bound("dropout_fp32")


@functools.cache
def gradients(micro_batches: int, remat: Remat, step: int = 0, rate: float = RATE) -> Any:
    config = CONFIG.replace(num_hidden_layers=1)
    model, frozen, adapters = adapted(config, dataclasses.replace(LORA, dropout=rate))
    model = model._replace(remat=remat, seed=3)
    rows = random_batch(config, 4, 16)
    batch = jax.tree.map(lambda array: array.reshape(micro_batches, -1, array.shape[-1]), rows)

    def run(frozen: Any, adapters: Any, batch: Any, step: Any) -> Any:
        objective = next_token_objective(0.1)
        chosen = model.dropout_keys(step, batch.input_ids.shape[:2])
        return loss_and_gradients(model, frozen, adapters, batch, objective, chosen).gradients

    return jax.tree.map(np.asarray, jax.jit(run)(frozen, adapters, batch, jnp.int32(step)))


def test_masks_do_not_depend_on_micro_batches_or_recomputation() -> None:
    once = gradients(1, "low-memory")
    assert distance(gradients(2, "low-memory"), once) <= bound("accumulation")
    assert distance(gradients(1, "fast"), once) <= bound("accumulation")
    for other in (gradients(1, "low-memory", step=1), gradients(1, "low-memory", rate=0.0)):
        assert distance(other, once) > 100 * bound("accumulation")


def lowered(rate: float) -> str:
    lora = dataclasses.replace(LORA, dropout=rate)
    model = Model(CONFIG, lora)
    _, frozen, adapters = adapted(CONFIG, lora)
    schedule = learning_rate("constant", 1e-3, 0, 10)
    optimizer = adamw(schedule, model, max_grad_norm=1.0, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-8)
    batch = jax.tree.map(lambda array: array[None], random_batch(CONFIG, 2, 16))
    step = make_train_step(model, optimizer, schedule, next_token_objective())
    return jax.jit(step).lower(frozen, initial_state(adapters, optimizer), batch).as_text()


def test_without_dropout_no_random_number_is_drawn() -> None:
    assert "threefry" not in lowered(0.0)
    assert "threefry" in lowered(RATE)


def test_it_belongs_to_a_runs_identity() -> None:
    assert LORA.to_dict()["dropout"] == RATE
    assert "dropout" not in LoraConfig().to_dict(), "runs from before the field could not be resumed"


@pytest.mark.parametrize(
    ("targets", "written"), [(("q_proj", "v_proj"), RATE), (("q_proj", "gate", "experts.down_proj"), 0.0)]
)
def test_peft_loads_what_is_written(targets: tuple[str, ...], written: float, tmp_path: pathlib.Path) -> None:
    """PEFT refuses dropout on parameters, so an adapter that has some is written without it."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    lora = LoraConfig(r=2, targets=targets, dropout=RATE)
    arrays = {name: np.ones(spec.shape, np.float32) for name, spec in lora_specs(CONFIG, lora).items()}
    write_peft(tmp_path / "adapter", CONFIG, lora, arrays)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_dropout"] == written
    assert read_peft(tmp_path / "adapter", CONFIG)[0] == dataclasses.replace(lora, dropout=written)
    base = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig.from_dict(CONFIG.to_hf()))
    peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    if not written:
        with pytest.raises(
            ConfigError, match=r"lora_dropout: expected 0 .* than gate, experts\.down_proj; found 0\.25"
        ):
            lora.check_dropout()
