"""Training runs on a tiny model: resume, accumulation, what is trained and frozen, signals, every kind of bad input."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.hf2jax import companion_files, read_hf
from convert.jax2hf import HFForm, write_hf
from convert.safetensors_io import open_folder
from jaxmoe import memory
from jaxmoe.cli import arguments as cli
from jaxmoe.config import LoraConfig, Qwen3MoeConfig, expand_targets
from jaxmoe.control import router_bias
from jaxmoe.data.packing import Batch, Sequences
from jaxmoe.data.sources import DEFAULT_WINDOW
from jaxmoe.errors import UserError
from jaxmoe.model import layer_loop
from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM
from jaxmoe.model.init import init_adapters, init_parameters
from jaxmoe.parameters import parameter_specs
from jaxmoe.runs.plots import of_runs
from jaxmoe.runs.record import read_run
from jaxmoe.stopping import Postponed
from jaxmoe.store.train_state import TrainCheckpoints
from jaxmoe.train import prepare
from jaxmoe.train.__main__ import main
from jaxmoe.train.compiled_steps import CompiledSteps
from jaxmoe.train.data import read_data
from jaxmoe.train.export import export_full
from jaxmoe.train.loop import train
from jaxmoe.train.loss import NextTokenCrossEntropy, Outputs, next_token_objective
from jaxmoe.train.metrics import MetricsLog, expert_load
from jaxmoe.train.optimizers import adamw, learning_rate
from jaxmoe.train.settings import TrainConfig
from jaxmoe.train.step import Model, initial_state, loss_and_gradients, make_train_step
from jaxmoe.train.watch import CHANGED, DIVERGENCE
from peers.make_checkpoint import TINY, make_checkpoint
from tests.conftest import ROOT
from tests.tolerances import bound

CONFIG = TINY.replace(num_hidden_layers=2, router_aux_loss_coef=0.01)
MIXED = CONFIG.replace(mlp_only_layers=(0,))
STEPS = 6
NO_LORA: dict[str, Any] = {"lora_targets": ("attention",), "lora_r": 16}  # the defaults


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(shared_tmp: pathlib.Path) -> Iterator[dict[str, str]]:
    """Runs of one shape compile once, and fast; the settings also go to subprocesses, through their environment."""
    options: dict[str, Any] = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(shared_tmp / "jax-cache"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield {name.upper(): str(value) for name, value in options.items()}
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with `model/`, `config.json`, `data.jsonl` and `held-out.jsonl`."""
    folder = tmp_path_factory.mktemp("base")
    make_checkpoint(folder / "model", CONFIG)
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    write_records(folder / "data.jsonl", range(36))
    write_records(folder / "held-out.jsonl", range(36, 40))
    return folder


def write_records(path: pathlib.Path, numbers: Iterable[int]) -> None:
    lines = (
        json.dumps({"prompt": f"{i} + {i % 7} = ", "completion": str(i + i % 7) * (1 + i % 3)}) + "\n" for i in numbers
    )
    path.write_text("".join(lines))


def options(base: pathlib.Path, output: pathlib.Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "model": base / "model",
        "data": base / "data.jsonl",
        "output": output,
        "lora_targets": ("attention", "router", "experts"),
        "lora_r": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "max_steps": STEPS,
        "batch_size": 2,
        "accumulation": 2,
        "seq_length": 48,
        "log_every": 1,
        "eval_data": base / "held-out.jsonl",
        "merge": True,
        "tensorboard": False,
    }
    return TrainConfig(**values | changes)


def scratch(base: pathlib.Path, output: pathlib.Path, **changes: Any) -> TrainConfig:
    values = {"model": None, "from_scratch": base / "config.json", "tokenizer": base / "model", "accumulation": 1}
    values |= {"router_bias_rate": 0.01, "router_aux_loss_coef": 0.01}
    return options(base, output, **values | NO_LORA | {"merge": False} | changes)


def metrics(output: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without the one number that differs between equal runs."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


def weights(output: pathlib.Path) -> bytes:
    path = output / "adapter_model.safetensors"
    return (path if path.exists() else output / "model" / "model.safetensors").read_bytes()


class Crash(Exception):
    pass


def crash_at(step: int) -> Callable[[dict[str, Any]], None]:
    def on_step(row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise Crash

    return on_step


# --- resume


@pytest.fixture(scope="module", params=[options, scratch], ids=["adapters", "from scratch"])
def whole(request: pytest.FixtureRequest, base: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The settings of a kind of run, and its output if it never stops."""
    output = tmp_path_factory.mktemp("whole") / "out"
    train(request.param(base, output))
    return request.param, output


@pytest.fixture(scope="module")
def crashed(whole: Any, base: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The same run, killed after step 4, with a checkpoint of step 3."""
    output = tmp_path_factory.mktemp("crashed") / "out"
    with pytest.raises(Crash):
        train(whole[0](base, output, save_every=3), crash_at(4))
    assert [row["step"] for row in metrics(output)] == [0, 1, 2, 3, 4]
    return output


def check_resume(
    whole: Any, crashed: pathlib.Path, base: pathlib.Path, output: pathlib.Path, steps: int = STEPS
) -> None:
    """A resumed run writes the same output as one that never stopped."""
    setup, expected = whole
    shutil.copytree(crashed, output)
    summary = train(setup(base, output, resume=True))
    assert summary["steps"] == steps
    assert metrics(output) == metrics(expected)
    assert weights(output) == weights(expected)


def test_resume_is_bit_for_bit(whole: Any, crashed: pathlib.Path, base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    check_resume(whole, crashed, base, tmp_path / "out")


def test_a_watched_run_learns_the_same(whole: Any, base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Measuring changes nothing, and a resumed run finds the same numbers: its base is the model as the run began."""
    setup, expected = whole
    watched = functools.partial(setup, watch_routing=base / "held-out.jsonl", watch_every=2, save_every=3)
    with pytest.raises(Crash):
        train(watched(base, tmp_path / "out"), crash_at(4))
    before = metrics(tmp_path / "out")
    train(watched(base, tmp_path / "out", resume=True))
    rows = metrics(tmp_path / "out")
    assert weights(tmp_path / "out") == weights(expected)
    assert rows[:5] == before

    measured = {row["step"]: row for row in rows if CHANGED in row}
    assert [*measured] == [0, 2, 4, STEPS]
    assert measured[0][CHANGED] == measured[0][DIVERGENCE] == [0, 0]
    assert min(measured[STEPS][CHANGED]) > 0 and min(measured[STEPS][DIVERGENCE]) > 0
    titles = [figure.title for figure in of_runs([read_run(tmp_path / "out")], ["run"])]
    assert len([title for title in titles if title.startswith("Probe: ")]) == 4
    assert "Probe: tokens with other experts" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("whole", [scratch], indirect=True, ids=["from scratch"])
def test_the_routers_bias_is_written_beside_the_model(
    whole: Any, crashed: pathlib.Path, base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """It is 0 before the first step, and a resumed run ends with the same."""
    shutil.copytree(crashed, tmp_path / "out")
    train(scratch(base, tmp_path / "out", resume=True))
    found, again = (router_bias.read(at / "model" / router_bias.FILE, CONFIG) for at in (whole[1], tmp_path / "out"))
    np.testing.assert_array_equal(found, again)
    assert 0 < np.abs(found).max() <= STEPS * np.float32(0.01)
    first, *_, last = metrics(whole[1])
    assert first["eval_loss_without_bias"] == first["eval_loss"]
    assert last["eval_loss_without_bias"] != last["eval_loss"]
    written = Qwen3MoeForCausalLM.from_pretrained(whole[1] / "model")
    assert set(written.params) == set(parameter_specs(CONFIG))
    with pytest.raises(UserError, match="router_bias_rate and replay: expected one of them"):
        scratch(base, tmp_path / "other", replay=tmp_path)


def forget_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TrainCheckpoints.restore_latest

    def restore(self: TrainCheckpoints, template: Any, which: str | None = None) -> Any:
        found = right(self, template, which)
        return found if found is None else (found[0], found[1]._replace(optimizer=template.optimizer), found[2])

    monkeypatch.setattr(TrainCheckpoints, "restore_latest", restore)


def start_data_over(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Sequences.batch

    def batch(self: Sequences, step: int, shape: tuple[int, ...], *rest: Any) -> Batch:
        if len(shape) == 2:  # training, not evaluation: whatever the step, what this object has not served yet
            step = vars(self).setdefault("served", 0)
            vars(self)["served"] += 1
        return right(self, step, shape, *rest)

    monkeypatch.setattr(Sequences, "batch", batch)


def keep_late_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    right = MetricsLog.__init__
    monkeypatch.setattr(MetricsLog, "__init__", lambda *args, **options: right(*args, **{**options, "keep_to": 99}))


@pytest.mark.parametrize("whole", [options], indirect=True, ids=["adapters"])
@pytest.mark.parametrize("fault", [forget_moments, start_data_over, keep_late_metrics])
def test_resume_that_forgets_is_noticed(
    fault: Any,
    whole: Any,
    crashed: pathlib.Path,
    base: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check_resume(whole, crashed, base, tmp_path / "out")


def test_modules_to_save_and_dropout(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """They are trained, resumed bit for bit, exported, and read again by a run that keeps both."""
    setup = functools.partial(
        options,
        lora_targets=("attention",),
        modules_to_save=("lm_head", "embed_tokens"),
        router="full",
        router_z_loss=0.01,
        routing_penalty=0.1,
        lora_dropout=0.1,
        accumulation=1,
        max_steps=4,
        merge=False,
    )
    train(setup(base, tmp_path / "whole"))
    with pytest.raises(Crash):
        train(setup(base, tmp_path / "crashed", save_every=2), crash_at(3))
    with pytest.raises(UserError, match=r"^lora: to resume .*, expected dropout 0\.1, found 0\.2"):
        train(setup(base, tmp_path / "crashed", resume=True, lora_dropout=0.2))
    check_resume((setup, tmp_path / "whole"), tmp_path / "crashed", base, tmp_path / "out", steps=4)

    rows = metrics(tmp_path / "whole")
    assert rows[-1]["routing_kl"] > 0 and rows[-1]["router_z_loss"] > 0
    last = rows[-1]["eval_loss"]
    kept = {"modules_to_save": (), "router": None, "lora_dropout": None, "adapter": tmp_path / "whole"}
    again = setup(base, tmp_path / "again", **NO_LORA, **kept)
    with pytest.raises(Crash):
        train(again, crash_at(1))
    assert abs(metrics(again.output)[0]["eval_loss"] - last) <= bound("reloaded_loss") * last
    lora = json.loads((again.output / "train_config.json").read_text())["identity"]["lora"]
    assert (lora["dropout"], lora["modules_to_save"]) == (0.1, ["embed_tokens", "lm_head"])
    assert lora["full_router"]


@pytest.mark.parametrize("whole", [scratch], indirect=True, ids=["from scratch"])
def test_seed_decides(whole: Any, base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    setup, expected = whole
    train(setup(base, tmp_path / "other", seed=1))
    for before, after in zip(metrics(expected), metrics(tmp_path / "other"), strict=True):
        assert before["eval_loss"] is None or before["eval_loss"] != after["eval_loss"]
    assert weights(tmp_path / "other") != weights(expected)


CHANGES = {
    "lora": {"lora_r": 3},
    "learning_rate": {"learning_rate": 1e-3},
    "max_steps": {"max_steps": 7},
    "seed": {"seed": 1},
    "batch_size": {"batch_size": 1},
    "router_aux_loss_coef": {"router_aux_loss_coef": 0.0},
    "data": {"eval_data": None, "eval_fraction": 0.2},
    "unroll_layers": {"unroll_layers": True},
}


@pytest.mark.parametrize("whole", [options], indirect=True, ids=["adapters"])
@pytest.mark.parametrize("name", [*CHANGES, "model"])
def test_resume_refuses_another_run(name: str, whole: Any, base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    setup, output = whole
    changes = CHANGES.get(name, {})
    if name == "model":
        changes = {"model": make_checkpoint(tmp_path / "model", CONFIG, seed=1)}
    before = weights(output), metrics(output)
    with pytest.raises(UserError, match=f"^{name}: to resume .*expected .*found") as caught:
        train(setup(base, output, resume=True, **changes))
    assert "\n" not in str(caught.value)
    assert before == (weights(output), metrics(output))


@pytest.mark.parametrize("whole", [options], indirect=True, ids=["adapters"])
def test_resume_of_a_finished_run_changes_nothing(whole: Any, base: pathlib.Path) -> None:
    setup, output = whole
    before = weights(output), metrics(output)
    assert train(setup(base, output, resume=True))["steps"] == STEPS
    assert before == (weights(output), metrics(output))


# --- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_says_how_to_go_on(
    number: signal.Signals, base: pathlib.Path, tmp_path: pathlib.Path, compilation_cache: dict[str, str]
) -> None:
    output = tmp_path / "out"
    flags = f"--model {base}/model --data {base}/data.jsonl --output {output} --max-steps 100000 --log-every 1"
    flags += " --batch-size 2 --seq-length 48 --lora-r 2 --no-tensorboard"
    command = [sys.executable, "-m", "jaxmoe.train", *flags.split()]
    environment = os.environ | compilation_cache
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            give_up = time.monotonic() + 120
            while not (output / "metrics.jsonl").exists() or len(metrics(output)) < 3:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < give_up
                time.sleep(0.05)
            process.send_signal(number)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + number
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    steps = metrics(output)[-1]["step"]
    assert f"{number.name}: saved after step {steps}" in lines[0]
    assert "--resume" in lines[0]
    assert [int(path.name) for path in (output / "checkpoints").iterdir()] == [steps]
    assert not (output / "adapter_model.safetensors").exists(), "an unfinished adapter is not passed off as finished"


def test_second_signal_is_the_systems() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with Postponed() as signals:
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        assert {signal.getsignal(number) for number in before} == {signal.SIG_DFL}
    assert {number: signal.getsignal(number) for number in before} == before


# --- the step


def random_batch(config: Qwen3MoeConfig, rows: int, length: int, seed: int = 0) -> Batch:
    """Sequences of two documents and padding, with a different number of learned tokens in each."""
    rng = np.random.default_rng(seed)
    place = np.arange(length)
    segment_ids = np.stack([1 + (place >= length // 2) - 2 * (place >= length - i) for i in range(rows)])
    segment_ids = np.maximum(segment_ids, 0).astype(np.int32)
    learned = rng.random((rows, length)) < rng.uniform(0.2, 1.0, (rows, 1))
    return Batch(
        input_ids=rng.integers(0, config.vocab_size, (rows, length), np.int32),
        labels=rng.integers(0, config.vocab_size, (rows, length), np.int32),
        weights=(learned & (segment_ids > 0)).astype(np.float32),
        segment_ids=segment_ids,
        position_ids=np.tile(np.where(place < length // 2, place, place - length // 2), (rows, 1)).astype(np.int32),
    )


def adapted(config: Qwen3MoeConfig, lora: LoraConfig) -> tuple[Model, dict[str, Any], dict[str, Any]]:
    """A model with random weights and adapters, B included."""
    frozen = init_parameters(config, jax.random.key(0))
    adapters = init_adapters(config, lora, jax.random.key(1))
    keys = jax.random.split(jax.random.key(2), len(adapters))
    noisy = {
        path: 0.1 * jax.random.normal(key, a.shape) if path.endswith("lora_B") else a
        for key, (path, a) in zip(keys, adapters.items(), strict=True)
    }
    return Model(config, lora, remat="fast"), frozen, noisy


@functools.cache
def in_one_batch() -> Any:
    """The trained arrays, the sequences, and loss, statistics and gradients of all sequences in one batch."""
    model, frozen, adapters = adapted(CONFIG, LoraConfig(r=2, targets=("q_proj", "gate")))
    rows = random_batch(CONFIG, 4, 24)
    return (model, frozen, adapters), rows, in_micro_batches(1, rows, model, frozen, adapters)


def in_micro_batches(count: int, rows: Batch, model: Model, frozen: Any, adapters: Any) -> Any:
    batch = jax.tree.map(lambda array: array.reshape(count, -1, array.shape[-1]), rows)
    objective = next_token_objective(0.1)
    return jax.jit(lambda f, a, b: loss_and_gradients(model, f, a, b, objective))(frozen, adapters, batch)


def check_accumulation() -> None:
    what, sequences, whole = in_one_batch()
    split = in_micro_batches(2, sequences, *what)
    np.testing.assert_array_equal(whole.stats.counts, split.stats.counts)
    errors = {"loss": abs(float(split.loss - whole.loss)) / abs(float(whole.loss))}
    for path, gradient in whole.gradients.items():
        errors[path] = float(jnp.linalg.norm(split.gradients[path] - gradient) / jnp.linalg.norm(gradient))
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= bound("accumulation"), (worst, errors[worst])


def test_accumulation_is_one_batch() -> None:
    check_accumulation()


def own_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each micro-batch balances its own load."""
    in_one_batch()
    right = Model.run

    def run(self: Model, *args: Any, train: bool, **options: Any) -> Any:
        outputs = right(self, *args, train=train, **options)
        if train:
            return outputs
        half = outputs.router._replace(counts=outputs.router.counts // 2, tokens=outputs.router.tokens // 2)
        return dataclasses.replace(outputs, router=half)

    monkeypatch.setattr(Model, "run", run)


def own_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each micro-batch's loss is divided by its own weight, not by all."""
    in_one_batch()
    right = NextTokenCrossEntropy.__call__

    def own(self: NextTokenCrossEntropy, outputs: Outputs, batch: Batch, totals: Any) -> Any:
        summed, metrics = right(self, outputs, batch, totals)
        return summed * 20 / jnp.sum(batch.weights), metrics

    monkeypatch.setattr(NextTokenCrossEntropy, "__call__", own)


@pytest.mark.parametrize("fault", [own_load, own_mean])
def test_accumulation_of_other_means_is_noticed(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check_accumulation()


def test_only_adapters_are_trained() -> None:
    lora = LoraConfig(r=2, targets=expand_targets(["q_proj", "router", "experts", "dense"]))
    model, frozen, adapters = adapted(MIXED, lora)
    before = jax.device_get(frozen)
    started = jax.device_get(adapters)
    rate = learning_rate("constant", 1e-2, 0, 10)
    optimizer = adamw(rate, model, max_grad_norm=1, weight_decay=0, beta1=0.9, beta2=0.99, epsilon=1e-8)
    state = initial_state(adapters, optimizer)
    paths = [jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(state) if leaf.ndim]
    assert len(paths) == 3 * len(adapters), "a master, a first and a second moment of each adapter"
    assert all("lora_" in path for path in paths)
    batch = jax.tree.map(lambda array: array[None], random_batch(MIXED, 4, 24))
    state, numbers = jax.jit(make_train_step(model, optimizer, rate, next_token_objective(0.01)), donate_argnums=1)(
        frozen, state, batch
    )
    for path, array in before.items():
        np.testing.assert_array_equal(array, frozen[path], err_msg=path)
    assert numbers.expert_counts.sum() == int((batch.segment_ids > 0).sum()) * MIXED.num_experts_per_tok
    received = np.asarray(numbers.expert_counts[0]) > 0
    for path, array in state.trainable.items():
        changed = np.asarray(array) != started[path]
        if path.startswith("sparse.") and "gate.lora" not in path:
            assert changed[0].any(axis=(-1, -2)).tolist() == received.tolist(), path
        else:
            assert changed.any(axis=(-1, -2)).all(), path


def test_weight_decay_spares_norms() -> None:
    model = Model(CONFIG.replace(attention_bias=True), None)
    params = {path: jnp.ones_like(a) for path, a in init_parameters(model.config, jax.random.key(0)).items()}
    rate = learning_rate("constant", 0.1, 0, 10)
    optimizer = adamw(rate, model, max_grad_norm=0, weight_decay=0.5, beta1=0.9, beta2=0.99, epsilon=1e-8)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates: Any = optimizer.update(zeros, optimizer.init(params), params)[0]
    decayed = {path for path, update in updates.items() if np.asarray(update).any()}
    assert {path for path in params if "norm" in path or "bias" in path} == set(params) - decayed
    assert decayed


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5]),
    ],
)
def test_learning_rate(schedule: Any, expected: list[float]) -> None:
    rate: Any = learning_rate(schedule, 2.0, 2, 6)
    np.testing.assert_allclose(
        [float(rate(step)) for step in range(6)], 2 * np.asarray(expected), rtol=bound("learning_rate_fp32")
    )
    at_once: Any = learning_rate(schedule, 2.0, 0, 6)
    assert float(at_once(0)) == 2.0


# --- output


def test_another_run_starts_where_one_ended(whole: Any, base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The written adapter, the merged model and the full model have the run's final held-out loss."""
    setup, output = whole
    name = "eval_loss_without_bias" if setup is scratch else "eval_loss"
    before, last = (metrics(output)[i][name] for i in (0, -1))
    assert last < 0.95 * before, "what the run learned has to show, or else nothing is compared"
    if setup is scratch:
        again = [options(base, tmp_path / "out", model=output / "model")]
    else:
        again = [
            options(base, tmp_path / "adapter", **NO_LORA, adapter=output),
            options(base, tmp_path / "merged", model=output / "merged"),
        ]
    for settings in again:
        with pytest.raises(Crash):
            train(settings, crash_at(1))
        first = metrics(settings.output)[0]["eval_loss"]
        assert abs(first - last) <= bound("reloaded_loss") * last


@pytest.mark.parametrize("whole", [scratch], indirect=True, ids=["from scratch"])
def test_transformers_loads_a_model_from_scratch(whole: Any, base: pathlib.Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = whole[1] / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    losses = []
    for line in (base / "held-out.jsonl").read_text().splitlines():
        raw = json.loads(line)
        prompt, answer = (tokenizer.encode(raw[key], add_special_tokens=False) for key in ("prompt", "completion"))
        ids = torch.tensor([prompt + answer + [tokenizer.eos_token_id]])
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].log_softmax(-1)
        losses += (-scores[range(ids.shape[1] - 1), ids[0, 1:]])[len(prompt) - 1 :].tolist()
    last = metrics(whole[1])[-1]["eval_loss_without_bias"]
    assert abs(np.mean(losses) - last) <= bound("reloaded_loss") * last


def test_full_training_keeps_the_dtype_and_the_files(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    source, written = make_checkpoint(tmp_path / "model", CONFIG, dtype="bfloat16"), tmp_path / "out" / "model"
    raw = json.loads((source / "config.json").read_text())
    raw |= {"unsloth_version": "2025.9.1", "qkv_bias": False, "eos_token_id": [258, 7], "torch_dtype": raw.pop("dtype")}
    (source / "config.json").write_text(json.dumps(raw))
    (source / "generation_config.json").write_text(json.dumps({"do_sample": True, "made_up": 1}))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    changes = {"full": True, "accumulation": 1, "merge": False}
    settings = options(base, tmp_path / "out", model=source, **NO_LORA, **changes)
    summary = train(settings)
    assert summary["eval_loss"] < summary["eval_loss_before"]
    assert json.loads((written / "config.json").read_text()) == raw
    params = Qwen3MoeForCausalLM.from_pretrained(written).params
    assert {str(array.dtype) for array in params.values()} == {"bfloat16"}
    copied = {file.name for file in source.iterdir()} - {"config.json", "model.safetensors"}
    assert copied == {file.name for file in written.iterdir()} - {"config.json", "model.safetensors", "README.md"}
    assert all((written / name).read_bytes() == (source / name).read_bytes() for name in copied)


@pytest.mark.parametrize("stored_head", [False, True])
def test_the_written_model_has_the_form_of_the_one_that_was_trained(
    stored_head: bool, base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Experts fused or one by one, and a tied head that is stored, stay so; a missing end of text is added."""
    config = CONFIG.replace(tie_word_embeddings=True)
    make_checkpoint(tmp_path / "model", config)
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    del raw["eos_token_id"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw))
    source = read_hf(tmp_path / "model")
    arrays = {path: np.zeros(spec.shape, np.float32) for path, spec in parameter_specs(config).items()}
    form = HFForm(layout="fused", stored_tied_head=stored_head)
    files = {**companion_files(source.path), "config.json": (source.path / "config.json").read_bytes()}
    write_hf(tmp_path / "fused", config, source.dtypes, source.blocks(), files, form)
    export_full(tmp_path / "out", tmp_path / "fused", config, arrays)
    written, expected = open_folder(tmp_path / "out"), open_folder(tmp_path / "fused")
    assert written.keys() == expected.keys()
    assert ("lm_head.weight" in written) == stored_head
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == raw | {"dtype": "float32", "eos_token_id": 258}


def test_loss_that_is_not_finite(base: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Sequences.batch

    def batch(self: Sequences, step: int, shape: tuple[int, ...], *rest: Any) -> Batch:
        found = right(self, step, shape, *rest)
        return found if step < 2 else found._replace(weights=np.full_like(found.weights, np.inf))

    monkeypatch.setattr(Sequences, "batch", batch)
    with pytest.raises(
        UserError, match=r"^loss: expected a finite number, found .* at step 3; the checkpoint of step 2"
    ):
        train(options(base, tmp_path / "out", save_every=1))
    assert sorted(int(path.name) for path in (tmp_path / "out" / "checkpoints").iterdir()) == [1, 2]


def test_steps_are_compiled_while_weights_are_read(
    base: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is compiled before any weight is read, and nothing is compiled later; a failed read leaves nothing."""
    compiled: list[CompiledSteps] = []
    start, read = CompiledSteps.__init__, prepare.load_stacks

    def started(self: CompiledSteps, *arguments: Any) -> None:
        start(self, *arguments)
        compiled.append(self)

    def read_late(*arguments: Any, **options: Any) -> Any:
        assert compiled[-1].train_step and compiled[-1].eval_step
        return read(*arguments, **options)

    def fail(*arguments: Any, **options: Any) -> Any:
        raise UserError("weights: expected some, found none")

    monkeypatch.setattr(CompiledSteps, "__init__", started)
    monkeypatch.setattr(prepare, "load_stacks", read_late)
    train(options(base, tmp_path / "out", max_steps=1))
    monkeypatch.setattr(prepare, "load_stacks", fail)
    with pytest.raises(UserError, match=r"^weights:"):
        train(options(base, tmp_path / "failed", max_steps=1))
    assert len(compiled) == 2
    assert not (tmp_path / "failed").exists()


@pytest.mark.parametrize("whole", [options], indirect=True, ids=["adapters"])
def test_offload_is_the_same_training(
    whole: Any, base: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs, moments and embedding in the host's memory; the learning rate is the same while it warms up."""
    monkeypatch.setattr(memory, "LARGE_MOMENTS", 0)
    output = tmp_path / "out"
    train(options(base, output, remat="offload", max_steps=2, merge=False))
    numbers = lambda folder: [row.get("loss", row["eval_loss"]) for row in metrics(folder)][:3]
    np.testing.assert_allclose(numbers(output), numbers(whole[1]), rtol=bound("accumulation"))


def test_a_step_that_does_not_fit(base: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what would fit, and nothing is left behind."""

    def full(*_: Any) -> Any:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2147483648 bytes.")

    monkeypatch.setattr(CompiledSteps, "_begin", full)
    with pytest.raises(UserError, match=r"^out of device memory \(2.00 GiB more\): the step needs .* use --remat"):
        train(options(base, tmp_path / "out", remat="fast"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("whole", [options], indirect=True, ids=["adapters"])
def test_packing_does_not_change_the_held_out_loss(whole: Any, base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    setup, output = whole
    with pytest.raises(Crash):
        train(setup(base, tmp_path / "out", pack=False), crash_at(1))
    packed, apart = (metrics(folder)[0]["eval_loss"] for folder in (output, tmp_path / "out"))
    assert abs(packed - apart) <= bound("reloaded_loss") * apart


@pytest.mark.parametrize("whole", [options], indirect=True, ids=["adapters"])
def test_unrolled_layers_learn_the_same(
    whole: Any,
    base: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    setup, output = whole
    unrolled, traced = layer_loop._unrolled, []
    monkeypatch.setattr(prepare, "fallbacks", lambda *_: ["experts without a kernel"])
    monkeypatch.setattr(layer_loop, "_unrolled", lambda *operands: traced.append(1) or unrolled(*operands))
    train(setup(base, tmp_path / "out", unroll_layers=True, merge=False))
    assert traced
    said = capsys.readouterr().out
    assert "--unroll-layers: compiling every layer takes" in said and "experts without a kernel" in said
    for expected, found in zip(metrics(output), metrics(tmp_path / "out"), strict=True):
        for name in ("loss", "grad_norm", "eval_loss"):
            if expected.get(name) is not None:
                assert abs(found[name] - expected[name]) / expected[name] <= bound("unrolled_run_fp32")


@pytest.mark.parametrize(
    ("steps", "on_gpu", "changes", "said"),
    [
        (3000, True, {}, "3,000 steps: --unroll-layers would make"),
        (2999, True, {}, None),
        (3000, False, {}, None),
        (3000, True, {"remat": "offload"}, None),
        (3000, True, {"full": True, "merge": False}, None),
        (10, False, {"unroll_layers": True}, "--unroll-layers: compiling every layer takes"),
    ],
    ids=str,
)
def test_long_runs_hear_of_unrolling(steps: int, on_gpu: bool, changes: dict[str, Any], said: str | None) -> None:
    settings = TrainConfig(model=pathlib.Path("m"), data=pathlib.Path("d"), output=pathlib.Path("o"), **changes)
    notices = prepare._about_unrolling(settings, steps, on_gpu)
    assert [notice[: len(said or "")] for notice in notices] == ([said] if said else [])


def test_a_streamed_mixture_goes_on_in_the_middle(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Bit for bit, from a checkpoint in the middle of a window; what decides the batches cannot change."""
    with gzip.open(tmp_path / "b.json.gz", "wt") as file:
        json.dump([{"text": f"text {i}" * (i % 5 + 1)} for i in range(9)], file)
    mixed: dict[str, Any] = {"data": (f"{base / 'data.jsonl'}:2", f"{tmp_path / 'b.json.gz'}:1")}
    streamed = mixed | {"streaming": True, "shuffle_buffer": 7, "save_every": 3, "merge": False}
    train(options(base, tmp_path / "whole", **streamed))
    with pytest.raises(Crash):
        train(options(base, tmp_path / "run", **streamed), crash_at(5))
    for change, message in (
        ({"shuffle_buffer": 8}, r"streaming: .*, expected 7, found 8 \(shuffle_buffer 7 before, 8 now\)"),
        (
            {"data": (f"{base / 'data.jsonl'}:3", mixed["data"][1])},
            "data: .*, expected weights 2.0, 1.0, found 3.0, 1.0",
        ),
        ({"streaming": False, "shuffle_buffer": DEFAULT_WINDOW}, "streaming: .*, expected 7, found none"),
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            train(options(base, tmp_path / "run", **streamed | change, resume=True))
    train(options(base, tmp_path / "run", **streamed, resume=True))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    unstreamed = read_data(options(base, tmp_path / "x", **mixed), CONFIG)
    assert unstreamed.digests["mixture"] == [[2.0, 36], [1.0, 9]]


def test_settings_of_the_chat_template(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """They reach the data of training and evaluation, so they belong to the run; what has no effect is said."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    paths = {"data": tmp_path / "chats.jsonl", "eval_data": tmp_path / "chats.jsonl"}

    def read(**changes: Any) -> Any:
        return read_data(options(base, tmp_path / "out", **paths, **changes), CONFIG)

    plain, changed = read(), read(system="Sys", thinking=False, template_arg=("made_up=[1,2]",))
    said = [f"the chat template does not read {name}, which has no effect" for name in ("made_up", "enable_thinking")]
    assert changed.notices == [*said, *plain.notices]
    assert all(plain.digests[name] != changed.digests[name] for name in ("data", "eval_data"))
    with pytest.raises(UserError, match="template-arg: expected KEY=VALUE, found 'a'"):
        read(template_arg=("a",))


def test_expert_load() -> None:
    load = expert_load(np.asarray([[4, 4, 4, 4], [16, 0, 0, 0], [0, 0, 0, 0], [3, 1, 0, 0]]))
    np.testing.assert_allclose(load["expert_load_cv"], [0, 3**0.5, 0, 1.5**0.5])
    half = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(4)
    np.testing.assert_allclose(load["expert_load_entropy"], [1, 0, 0, half], rtol=0, atol=bound("metrics_fp64"))


def test_metrics_log(tmp_path: pathlib.Path) -> None:
    log = MetricsLog(tmp_path, keep_to=-1)
    for number in range(4):
        log.write({"step": number, "loss": 1.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    MetricsLog(tmp_path, keep_to=2).close()
    assert [row["step"] for row in metrics(tmp_path)] == [0, 1, 2]


# --- bad input


def broken(base: pathlib.Path, folder: pathlib.Path, *, remove: str = "", truncate: str = "") -> pathlib.Path:
    shutil.copytree(base / "model", folder)
    if remove:
        (folder / remove).unlink()
    if truncate:
        content = (folder / truncate).read_bytes()
        (folder / truncate).write_bytes(content[: len(content) // 2])
    return folder


BAD_FLAGS = {
    "no such data": ("--data {tmp}/nowhere.jsonl", "file not found: .*nowhere.jsonl"),
    "bad record": ("--data {tmp}/bad.jsonl", r"bad\.jsonl:2: expected JSON, found"),
    "bad held-out record": ("--eval-data {tmp}/bad.jsonl", r"bad\.jsonl:2: expected JSON, found"),
    "no such model": ("--model {tmp}/nowhere", "nowhere: expected a model folder, found none"),
    "no weights": ("--model {tmp}/no-weights", "no-weights: .*safetensors"),
    "half the weights": ("--model {tmp}/half", "half.*model.safetensors"),
    "no tokenizer": ("--model {tmp}/no-tokenizer", "no-tokenizer: expected a tokenizer"),
    "no config": ("--model {tmp}/no-config", r"file not found: .*no-config/config\.json"),
    "no such adapter": ("--adapter {tmp}/nowhere", "nowhere: expected a PEFT adapter"),
    "adapter and rank": ("--adapter {tmp}/nowhere --lora-r 3", "lora_r: expected none, since the adapter decides it"),
    "unknown target": ("--lora-targets q_proj,mlp", "LoRA targets: expected .*'mlp'"),
    "missing layers": ("--lora-targets dense", "'gate_proj': the model has no dense MLP layer"),
    "too long": ("--seq-length 4096", "seq_length: expected at most the model's max_position_embeddings"),
    "too short": ("--seq-length 0", "seq_length: expected at least 1, found 0"),
    "no number": ("--batch-size two", "--batch-size: expected a whole number, found 'two'"),
    "unknown flag": ("--lora-rank 8", "unrecognized arguments: --lora-rank 8"),
    "beta": ("--adam-beta1 1", "adam_beta1: expected a number from 0 to below 1"),
    "steps and epochs": ("--max-steps 3 --epochs 1", "epochs and max_steps: expected one of them, found both"),
    "two ways to evaluate": ("--eval-data a --eval-fraction 0.1", "eval_data and eval_fraction: expected one of them"),
    "nothing to evaluate": ("--eval-every 3", "eval_every: expected eval_data or eval_fraction"),
    "watched never": ("--watch-every 3", "watch_every: expected watch_routing with it, found none"),
    "no such probe": ("--watch-routing {tmp}/nowhere.jsonl", "file not found: .*nowhere.jsonl"),
    "router twice": ("--router full --lora-targets q_proj,gate", "router full and lora_targets router: expected one"),
    "full and router": ("--full --router full", "router: expected none, since all parameters are trained"),
    "full and penalty": ("--full --routing-penalty 1", "routing_penalty: only valid with LoRA training"),
    "base without penalty": ("--routing-base {tmp}", "routing_base: only valid with routing_penalty above 0"),
    "base of a stream": (
        "--routing-penalty 1 --routing-base {tmp} --streaming --max-steps 2",
        "streaming and routing_base: expected one of them, found both",
    ),
    "no such base": ("--routing-penalty 1 --routing-base {tmp}/nowhere", "nowhere: expected a capture"),
    "negative z-loss": ("--router-z-loss -1", "router_z_loss: expected at least 0"),
    "bias of a finished model": ("--router-bias-rate 0.1", "router_bias_rate: only valid with from_scratch"),
    "all held out": ("--eval-fraction 1", "eval_fraction: expected a number between 0 and 1"),
    "two models": ("--from-scratch {tmp}/config.json", "model and from_scratch: expected one of them, found both"),
    "stray tokenizer": ("--tokenizer {tmp}", "tokenizer: only valid with from_scratch, which needs it; found it alone"),
    "full and merge": ("--full --merge", "adapter and merge: only valid with LoRA training"),
    "dropout": ("--lora-dropout 1", "lora_dropout: expected a number from 0 to below 1, found 1.0"),
    "dropout on experts": ("--lora-dropout 0.1 --lora-targets attention,experts", "lora_dropout: expected 0 .*experts"),
    "full and dropout": ("--full --lora-dropout 0.1", "lora_dropout: only valid with LoRA training"),
    "full and modules": ("--full --modules-to-save lm_head", "modules_to_save: expected none, since all parameters"),
    "another module": ("--modules-to-save norm", "modules_to_save: expected some of embed_tokens, lm_head .*'norm'"),
    "full and rank": ("--full --lora-r 3", "lora_r: expected none, since all parameters are trained"),
    "full and unrolled": ("--full --unroll-layers", "unroll_layers: only valid with LoRA training"),
    "unrolled and offload": ("--unroll-layers --remat offload", "unroll_layers: only valid .* not with remat offload"),
    "nothing within a row": ("--seq-length 2", "data: expected at least one record with a token to learn, found none"),
    "output in use": ("--output {tmp}/used", "used: expected a new or empty folder, or --resume"),
    "output of something else": ("--output {tmp}/used --resume", r"file not found: .*used/train_config\.json"),
    "output is a file": ("--output {tmp}/bad.jsonl", r"bad\.jsonl: expected a folder, found a file"),
}


@pytest.fixture(scope="module")
def bad(base: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{\n')
    (folder / "used").mkdir()
    (folder / "used" / "thesis.tex").touch()
    broken(base, folder / "no-weights", remove="model.safetensors")
    broken(base, folder / "half", truncate="model.safetensors")
    broken(base, folder / "no-tokenizer", remove="tokenizer.json")
    broken(base, folder / "no-config", remove="config.json")
    return folder


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_input(
    name: str, base: pathlib.Path, bad: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, message = BAD_FLAGS[name]
    given = f"--model {base}/model --data {base}/data.jsonl --output {tmp_path}/out --seq-length 48 ".split()
    listing = sorted(bad.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: main([*given, *flags.format(tmp=bad).split()]))
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert re.search(message, printed.err), printed.err
    assert not (tmp_path / "out").exists()
    assert sorted(bad.rglob("*")) == listing


def test_bad_architecture(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf() | {"num_heads": 3}))
    with pytest.raises(UserError, match="num_heads: expected 4 or null"):
        train(scratch(base, tmp_path / "out", from_scratch=tmp_path / "config.json"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.replace(attention_dropout=0.1).to_hf()))
    with pytest.raises(UserError, match=r"attention_dropout: expected 0 .* found 0\.1"):
        train(scratch(base, tmp_path / "out", from_scratch=tmp_path / "config.json"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.replace(vocab_size=200).to_hf()))
    with pytest.raises(
        UserError, match=r"data\.jsonl:1: expected token ids below the model's vocab_size 200, found 258"
    ):
        train(scratch(base, tmp_path / "out", from_scratch=tmp_path / "config.json"))
    assert not (tmp_path / "out").exists()
