"""Adapters of some experts only: what they compute, train, cost, and how they are chosen, written and read."""

from __future__ import annotations

import json
import pathlib
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from captures import Capture, CaptureWriter, LabelledText, Model, Text
from convert.adapters import read_peft, write_peft
from jaxmoe.control.expert_choice import chosen_experts, gate_scores
from jaxmoe.errors import ConfigError, UserError
from jaxmoe.lora import LoraConfig
from jaxmoe.memory import Workload, adapter_count, training_forecast
from jaxmoe.model.decoder import forward
from jaxmoe.model.init import init_adapters
from jaxmoe.model.interface import Options, Tokens
from jaxmoe.model.layer import by_expert
from jaxmoe.ops.experts import ExpertWeights, sorted_experts
from jaxmoe.ops.implementations import forced
from jaxmoe.ops.kernels.grouped_matmul import xla
from jaxmoe.ops.low_rank import Adapter
from jaxmoe.ops.router import expert_counts, route
from jaxmoe.ops.schedule import Schedule
from jaxmoe.store.adapter import read_adapter, write_adapter
from jaxmoe.store.expert_adapters import with_all_experts, without_void_experts
from jaxmoe.train import prepare
from jaxmoe.train.settings import TrainConfig
from peers.configs import random_parameters, random_tokens
from peers.make_checkpoint import TINY, make_checkpoint
from tests import oracle
from tests.parity import COMPILER_OPTIONS, relative_error
from tests.test_adapters import largest_merge_error, peft_model, random_adapters, same
from tests.tolerances import bound

# Four layers, of which 0, 2 and 3 have 5 experts.
MIXED = TINY.replace(num_hidden_layers=4, mlp_only_layers=(1,), num_experts=5)
SOME = ((0, 3), (2,), (1, 4))
LORA = LoraConfig(r=3, alpha=6.0, targets=("q_proj", "experts.gate_up_proj", "experts.down_proj"), adapted_experts=SOME)


@pytest.fixture(scope="module")
def adapters() -> dict[str, np.ndarray]:
    """Random adapters; the place that layer 2 does not use is zero."""
    arrays = random_adapters(MIXED, LORA)
    for name, array in arrays.items():
        if name.startswith("sparse"):
            assert array.shape[:2] == (3, 2)
            array[1, 1] = 0
    return arrays


def test_they_compute_and_train_as_they_should():
    """Hidden states against the float64 oracle with adapters of all experts, gradients against its differences."""
    config = TINY.replace(num_hidden_layers=2, num_experts=5)
    lora = replace(LORA, targets=LORA.targets[1:], adapted_experts=((0, 3), (2,)))
    arrays = random_adapters(config, lora)
    for array in arrays.values():
        array[1, 1] = 0
    params, ids = random_parameters(config), random_tokens(config, 1, 24)
    tokens = Tokens(jnp.asarray(ids), jnp.arange(24)[None], jnp.ones(ids.shape, jnp.int32))

    def loss(arrays: Any) -> tuple[Any, Any]:
        options = Options(lora=lora, trainable="adapters", packed=False, remat="fast")
        weights = {path: jnp.asarray(array) for path, array in params.items()}
        hidden = forward(weights, arrays, tokens, config=config, options=options).hidden
        return jnp.sum(jnp.sin(hidden)), hidden

    def expected(step: float, direction: dict[str, np.ndarray]) -> np.ndarray:
        moved = arrays | {name: arrays[name] + step * change for name, change in direction.items()}
        whole, everywhere = with_all_experts(config, lora, moved)
        return oracle.forward(config, params, ids, adapters=everywhere, lora=whole).hidden[-1]

    run = jax.jit(jax.grad(loss, has_aux=True), compiler_options=COMPILER_OPTIONS)
    gradients, hidden = run({name: jnp.asarray(array) for name, array in arrays.items()})
    assert relative_error(np.asarray(hidden), expected(0, {})) <= bound("parity_fp32")
    for name, gradient in gradients.items():
        found = np.asarray(gradient)
        assert found[0].any(axis=(1, 2)).all() and found[1, 0].any() and not found[1, 1].any(), name
        along = {name: found.astype(np.float64)}
        sums = [np.sin(expected(step, along)).sum() for step in (1e-6, -1e-6)]
        assert (sums[0] - sums[1]) / 2e-6 == pytest.approx(np.square(found).sum(), rel=bound("some_experts_slope"))


def test_each_device_takes_the_adapters_of_its_own_experts():
    a = np.arange(1.0, 4)[:, None]
    experts = jnp.asarray([1, 4, 6])  # the third place is unused: there are 6 experts
    whole = np.asarray(by_expert(jnp.asarray(a), experts, 6, 0))
    assert whole.ravel().tolist() == [0, 1, 0, 0, 2, 0]
    gradient = jax.grad(lambda a: jnp.sum(by_expert(a, experts, 6, 0)[:, 0] * jnp.arange(10.0, 16)))(jnp.asarray(a))
    assert np.asarray(gradient).ravel().tolist() == [11, 14, 0]
    halves = [by_expert(jnp.asarray(a), experts, 3, first) for first in (0, 3)]
    assert np.array_equal(np.concatenate(halves), whole)


class BySpans(xla.Xla):
    """Products that read spans, as kernels do: what they do not cover is not a number. `tiles` has the number of tiles
    that each one covered."""

    def __init__(self):
        self.tiles: list[int] = []

    def tile_rows(self, routed_rows: int, num_experts: int) -> int:
        return 16

    def span_rows(self, routed_rows: int, num_experts: int) -> tuple[int, ...]:
        return (32,)

    def matmul(self, x: jax.Array, weight: Any, schedule: Schedule, offset: Any, **how: Any) -> jax.Array:
        first, height, _, used = schedule.spans[32]
        self.tiles.append(int(height[:used].sum()))
        tile = jnp.arange(x.shape[0])[:, None] // 16
        own = (tile >= first) & (tile < first + height) & (jnp.arange(len(first)) < used)
        return jnp.where(jnp.any(own, axis=1)[:, None], super().matmul(x, weight, schedule, offset, **how), jnp.nan)

    def outer(self, left: jax.Array, right: jax.Array, schedule: Schedule) -> jax.Array:
        counts = jnp.repeat(schedule.tile_count[schedule.tile_expert] > 0, 16)[:, None]
        left, right = (jnp.where(counts, rows, 0) for rows in (left, right))
        return super().outer(left, right, schedule)


def test_low_rank_products_run_over_the_rows_of_the_chosen_experts_alone(monkeypatch):
    M, D, F, E, k, rank = 50, 16, 12, 6, 2, 3
    keys = iter(jax.random.split(jax.random.key(0), 9))
    draw = lambda *shape: jax.random.normal(next(keys), shape)
    x, gate, stacks = draw(M, D), draw(E, D), (draw(E, 2 * F, D), draw(E, D, F))
    chosen = jnp.asarray([False, True, False, False, True, False])
    factors = [draw(E, rank, D), draw(E, 2 * F, rank), draw(E, rank, F), draw(E, D, rank)]
    factors = [jnp.where(chosen[:, None, None], each, 0) for each in factors]
    routing = route(x, gate, num_experts_per_tok=k, norm_topk_prob=True)

    def results(chosen: Any) -> Any:
        def run(x, weights, factors):
            adapters = (Adapter(factors[n], factors[n + 1], 2.0, experts=chosen) for n in (0, 2))
            experts = ExpertWeights(*stacks, 0, trainable=False)
            return sorted_experts(x, routing._replace(weights=weights), experts, *adapters)

        value, pull = jax.vjp(run, x, routing.weights, factors)
        return jax.tree.map(np.asarray, (value, run(x, routing.weights, factors), pull(jnp.cos(value))))

    products = BySpans()
    monkeypatch.setattr(xla, "XLA", products)
    with forced(grouped_matmul="tiled"):
        everywhere, found, wrong = results(None), results(chosen), results(~chosen)
    assert all(np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (everywhere, found)), strict=True))
    d_gate_up_a = found[2][2][0]
    assert d_gate_up_a[np.asarray(chosen)].any(axis=(1, 2)).all() and not d_gate_up_a[~np.asarray(chosen)].any()
    assert not np.array_equal(wrong[0], everywhere[0])
    counts = expert_counts(routing.experts, jnp.ones(M, bool), E)
    tiles = -(-counts // 16)
    assert set(products.tiles) == {int(tiles.sum()), int(tiles[chosen].sum()), int(tiles[~chosen].sum())}


@pytest.mark.parametrize("layout", ["peft", "per-expert", "stacked"])
def test_every_layout_gives_each_expert_its_adapter(layout, adapters, tmp_path):
    whole, expected = with_all_experts(MIXED, LORA, adapters)
    assert [int(array.any(axis=(2, 3)).sum()) for name, array in expected.items() if "sparse" in name] == [5] * 4
    write_adapter(tmp_path / "jax", MIXED, LORA, adapters)
    assert read_adapter(tmp_path / "jax")[1] == LORA and same(read_adapter(tmp_path / "jax")[2], adapters)
    write_peft(tmp_path / layout, MIXED, LORA, adapters, layout)
    lora, found = read_peft(tmp_path / layout, MIXED)
    if layout == "peft":
        assert lora == whole and same(found, expected)
        assert without_void_experts(lora, found)[0] == LORA and same(without_void_experts(lora, found)[1], adapters)
        base = make_checkpoint(tmp_path / "base", MIXED)
        model = peft_model(base, tmp_path / layout)
        assert largest_merge_error(base, model, LORA, adapters) <= bound("merge_fp32")
        return

    def product(arrays: dict[str, np.ndarray], path: str, scale: float) -> np.ndarray:
        return scale * np.einsum("leor,leri->leoi", *(arrays[f"{path}.lora_{x}"] for x in "BA"))

    for path in ("sparse.gate_up_proj", "sparse.down_proj"):
        assert np.array_equal(product(found, path, lora.scale("experts.down_proj")), product(expected, path, 2.0))


def test_fresh_adapters_leave_unused_places_zero():
    fresh = init_adapters(MIXED, replace(LORA, targets=LORA.targets[2:]), jax.random.key(0))
    a = np.asarray(fresh["sparse.down_proj.lora_A"])
    assert a[0].all() and a[1, 0].all() and not a[1, 1].any() and a[2].all()


def test_memory_falls_with_the_experts():
    counts = [adapter_count(MIXED, replace(LORA, targets=LORA.targets[1:], adapted_experts=e)) for e in ((), SOME)]
    assert counts[1] * 5 == counts[0] * 2
    whole = replace(LORA, adapted_experts=())
    work = Workload(MIXED, whole, 1, 64, "float32")
    forecasts = [training_forecast(replace(work, lora=lora)) for lora in (whole, LORA)]
    parts = [{part.name: part.bytes for part in forecast.parts} for forecast in forecasts]
    for name in ("adapters", "gradients", "optimizer state"):
        factor = 2 if name == "optimizer state" else 1
        saved = 4 * factor * (adapter_count(MIXED, whole) - adapter_count(MIXED, LORA))
        assert parts[0][name] - parts[1][name] == saved > 0


def capture_of(folder: pathlib.Path) -> Capture:
    """Random routing of 30 tokens in two shards."""
    rng = np.random.default_rng(3)
    model = Model((0, 2, 3), 5, 2, True, 300)
    zero = np.zeros(30, np.int32)
    text = Text(zero, zero, np.arange(30, dtype=np.int32), zero, zero, zero)
    with CaptureWriter(
        folder, model, labels=LabelledText(text, ("d",), ("text",), 30, "t"), source={}, keep_logits=5
    ) as writer:
        for part in (slice(0, 20), slice(20, 30)):
            n = part.stop - part.start
            logits = -np.sort(-rng.standard_normal((3, n, 5)).astype(np.float32), axis=-1)
            order = np.argsort(rng.random((3, n, 5)), axis=-1).astype(np.uint8)
            arrays = {"experts": order[..., :2], "top_experts": order, "top_logits": logits}
            arrays |= {"log_sum_exp": np.log(np.exp(logits).sum(-1)), "entropy": np.zeros((3, n), np.float32)}
            writer.put(Text(*(a[part] for a in text)), arrays | {"probability_sums": np.zeros((3, 5), np.float32)})
    return Capture.open(folder)


def test_the_experts_that_a_capture_uses_most(tmp_path):
    found = capture_of(tmp_path / "c")
    chunk = found.read(0, 30)
    expected = np.zeros((3, 5))
    for layer in range(3):
        for token in range(30):
            for expert, weight in zip(chunk.experts[layer, token], chunk.weights[layer, token], strict=True):
                expected[layer, expert] += weight / 30
    assert np.allclose(gate_scores(found), expected, rtol=bound("saliency_fp32"), atol=0) and np.allclose(
        expected.sum(1), 1
    )
    chosen = chosen_experts("top:2", found.folder, MIXED)
    for layer, experts in enumerate(chosen):
        others = sorted({*range(5)} - {*experts})
        assert len(experts) == 2 and expected[layer, list(experts)].min() >= expected[layer, others].max()
    settings: dict[str, Any] = {
        "model": pathlib.Path("m"),
        "data": pathlib.Path("d"),
        "output": pathlib.Path("o"),
        "lora_r": 3,
    }
    flags = TrainConfig(
        **settings, lora_targets=("experts",), lora_experts="top:2", lora_capture=found.folder, lora_alpha=6.0
    )
    lora = prepare._new_lora(flags, MIXED)
    assert lora is not None and lora.adapted_experts == chosen
    with pytest.raises(UserError, match="lora_experts: expected lora_targets with experts, found attention"):
        prepare._new_lora(replace(flags, lora_targets=("attention",)), MIXED)
    with pytest.raises(UserError, match="lora_experts: expected 2 MoE layers with 2 of 5 experts, found 3"):
        chosen_experts("top:2", found.folder, MIXED.replace(num_hidden_layers=3))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"0": [3, 0], "2": [2], "3": [4, 1]}, SOME),
        ({"experts": {"0": [3, 0], "2": [2], "3": [4, 1]}, "shared_experts": False}, SOME),
        ({"3": [1]}, ((), (), (1,))),
        ({}, "expected an object of layers"),
        ({"1": [0]}, "expected MoE layers of the model, found '1'"),
        ({"9" * 5000: [0]}, "expected MoE layers of the model, found '999"),
        ({"0": [5]}, "layer 0: expected experts from 0 to 4"),
        ({"0": ["a"]}, "layer 0: expected experts from 0 to 4"),
        ({"0": []}, "expected at least one expert, found none"),
    ],
)
def test_a_file_of_experts(content, expected, tmp_path):
    path = tmp_path / "experts.json"
    path.write_text(json.dumps(content))
    if isinstance(expected, tuple):
        assert chosen_experts(str(path), None, MIXED) == expected
        return
    with pytest.raises(UserError, match=expected):
        chosen_experts(str(path), None, MIXED)


@pytest.mark.parametrize("choice", ["top:0", "top:6", "top:", "top:a", "top:" + "9" * 5000])
def test_a_choice_that_means_nothing_is_refused(choice):
    with pytest.raises(UserError, match="lora_experts: expected top:1 to top:5, or a file"):
        chosen_experts(choice, pathlib.Path("c"), MIXED)


def test_settings_that_contradict_are_refused(tmp_path):
    base: dict[str, Any] = {"model": tmp_path, "data": tmp_path, "output": tmp_path / "o"}
    contradictions: list[dict[str, Any]] = [
        {"lora_experts": "top:2"},
        {"lora_capture": tmp_path},
        {"lora_experts": "f", "lora_capture": tmp_path},
    ]
    for flags in contradictions:
        with pytest.raises(UserError, match="lora_capture: only valid with lora_experts top:N"):
            TrainConfig(**base, **flags)
    with pytest.raises(UserError, match="lora_experts: expected none, since the adapter decides it"):
        TrainConfig(**base, lora_experts="f", adapter=tmp_path)
    for experts, message in (
        (((3, 0), (2,), (1,)), "in rising order"),
        (((), (), ()), "at least one expert"),
        (((-1,), (), ()), "adapted_experts"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(LORA, adapted_experts=experts)
    with pytest.raises(ConfigError, match="only valid with the targets experts"):
        replace(LORA, targets=("q_proj",))
    for experts in (((0,), (5,), (1,)), ((0,), (1,))):
        with pytest.raises(ConfigError, match="adapted_experts: expected"):
            replace(LORA, adapted_experts=experts).check_against(MIXED)
