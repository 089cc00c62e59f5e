"""Preference pairs: how they are read and packed, DPO and ORPO against float64, runs that learn from them."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save

from examples import preference_pairs
from jaxmoe.config import LoraConfig
from jaxmoe.data.chat import load_tokenizer
from jaxmoe.data.packing import Batch, Sequences, cut
from jaxmoe.data.records import Record, digest, read_records
from jaxmoe.errors import UserError
from jaxmoe.model.interface import RouterStats
from jaxmoe.train.identity import REFERENCE_FILE
from jaxmoe.train.log_probs import token_log_probs
from jaxmoe.train.loop import train
from jaxmoe.train.loss import Outputs, Term
from jaxmoe.train.preferences import DirectPreference, OddsRatioPreference
from jaxmoe.train.reference import read_reference
from jaxmoe.train.settings import TrainConfig
from jaxmoe.train.step import LossAndGradients, loss_and_gradients, make_eval_step
from peers.make_checkpoint import make_checkpoint
from tests import oracle
from tests.parity import COMPILER_OPTIONS, relative_error
from tests.test_train import CONFIG, Crash, adapted, compilation_cache, crash_at, metrics, weights
from tests.tolerances import bound

__all__ = ["compilation_cache"]  # a fixture: runs of one shape compile once
LORA = LoraConfig(r=2, targets=("q_proj", "gate", "experts.down_proj"))
EPSILON = 1e-6


# --- reading


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with `model/`, `pairs.jsonl` and `held-out.jsonl`."""
    base = tmp_path_factory.mktemp("pairs")
    make_checkpoint(base / "model", CONFIG)
    write_pairs(base / "pairs.jsonl", range(20))
    write_pairs(base / "held-out.jsonl", range(20, 23))
    return base


def write_pairs(path: pathlib.Path, numbers: Any) -> None:
    records = ({"prompt": f"{i} + 1 = ", "chosen": str(i + 1), "rejected": "?" * (1 + i % 5)} for i in numbers)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read(folder: pathlib.Path, tmp_path: pathlib.Path, *records: Any) -> list[Record]:
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_records(file, load_tokenizer(folder / "model"), CONFIG.vocab_size, pairs=True)


USER, YES, NO = ({"role": role, "content": text} for role, text in (("user", "Ask"), *[("assistant", t) for t in "YN"]))
PAIR = {"chosen": [USER, YES], "rejected": [USER, NO]}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"prompt": "Ask", **PAIR},  # the prompt is also in the answers, as in published data sets
        {"prompt": "Ask", "chosen": [YES], "rejected": [NO]},
        {"prompt": [USER], "chosen": "Y", "rejected": "N"},
        {
            "conversations": [{"from": "human", "value": "Ask"}],
            "chosen": {"from": "gpt", "value": "Y"},
            "rejected": {"from": "gpt", "value": "N"},
        },
        {**PAIR, "score_chosen": 9.0, "prompt_id": "x", "prompt": None},
    ],
    ids=["explicit", "twice", "a string", "answers as strings", "ShareGPT", "other columns"],
)
def test_forms_of_one_pair(record: Any, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert digest(read(folder, tmp_path, record)) == digest(read(folder, tmp_path, PAIR))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"prompt": "a", "completion": "b"},
            r'expected the keys "chosen" and "rejected" .*found "prompt", "completion"',
        ),
        (
            {"question": "q", "chosen": "b", "rejected": "c"},
            r'expected the prompt of the pair under "prompt", found "question"',
        ),
        (
            {"instruction": "q", "chosen": {"from": "gpt", "value": "b"}, "rejected": {"from": "gpt", "value": "c"}},
            r'expected the prompt of the pair under "prompt", found "instruction"',
        ),
        ({"prompt": "a", "chosen": "b"}, r'expected the keys "chosen" and "rejected" .*found "prompt", "chosen"'),
        ([], "expected a JSON object, found a list"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "prompt: expected a string or a list of messages"),
        (
            {"chosen": [YES], "rejected": [NO]},
            "chosen and rejected: expected a prompt of their own, or the same messages",
        ),
        ({"prompt": "a", "chosen": [], "rejected": [NO]}, "chosen: .*found an empty list"),
        ({"prompt": [USER], "chosen": [YES], "rejected": [USER]}, "rejected: expected a message from the assistant"),
        ({"prompt": [USER], "chosen": ["b"], "rejected": [NO]}, "chosen: message 2: expected an object"),
    ],
)
def test_other_records_are_refused_in_one_line(
    record: Any, message: str, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(UserError, match=rf"records.jsonl:2: {message}") as caught:
        read(folder, tmp_path, PAIR, record)
    assert "\n" not in str(caught.value)


def test_pairs_are_made_from_chats(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    chats, made = tmp_path / "chats.jsonl", tmp_path / "pairs.jsonl"
    answers = ["Y", "N", "N"]
    said = ({"messages": [USER, {"role": "assistant", "content": answer}]} for answer in answers)
    chats.write_text("".join(json.dumps(chat) + "\n" for chat in said))
    preference_pairs.main([str(chats), str(made)])
    expected = read(folder, tmp_path, PAIR, {"chosen": [USER, NO], "rejected": [USER, YES]})
    found = read_records(made, load_tokenizer(folder / "model"), CONFIG.vocab_size, pairs=True)
    assert digest(found) == digest(expected)  # the second chat has the third one's answer
    with pytest.raises(UserError, match="file not found"):
        preference_pairs.main(["nowhere.jsonl", str(made)])


def test_both_sides_count(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pair = {"prompt": "abc", "chosen": "defg", "rejected": "d"}
    (record,) = read(folder, tmp_path, pair)
    assert record.rejected is not None
    assert (len(record.tokens), len(record.rejected.tokens)) == (8, 5)  # bytes, and the end of the text
    assert record.weights.tolist() == [0] * 3 + [1] * 5
    assert digest([record]) != digest(read(folder, tmp_path, pair | {"rejected": "x"}))
    (document,), lost = cut([record], 6)
    assert (lost.truncated, lost.dropped) == (1, 0)
    assert [side.inputs.tolist() for side in document.sides] == [
        record.tokens[:6].tolist(),
        record.rejected.tokens.tolist(),
    ]
    assert document.weights.tolist() == [0, 0, 1, 1, 1, 0]  # nothing follows the last token
    with pytest.raises(UserError, match="raise --seq-length"):
        cut([record], 3)  # the prompt alone


def test_pairs_stay_together(folder: pathlib.Path) -> None:
    documents, _ = cut(
        read_records(folder / "pairs.jsonl", load_tokenizer(folder / "model"), CONFIG.vocab_size, pairs=True), 64
    )
    prompts = {tuple(d.inputs.tolist()): tuple(d.rejected.inputs.tolist()) for d in documents if d.rejected}
    for pack in (True, False):
        sequences = Sequences(documents, 64, seed=3, pack=pack, epochs=1)
        seen = []
        for step in range(sequences.steps(1, 4)):
            batch = sequences.batch(step, (2, 2))
            assert batch.input_ids.shape == (2, 4, 64)
            lines = [*zip(batch.input_ids.reshape(-1, 64), batch.segment_ids.reshape(-1, 64), strict=True)]
            for chosen, rejected in zip(lines[0::2], lines[1::2], strict=True):
                for number in range(1, int(chosen[1].max()) + 1):
                    sides = [tuple(ids[segments == number].tolist()) for ids, segments in (chosen, rejected)]
                    assert prompts[sides[0]] == sides[1]
                    seen.append(sides[0])
        assert sorted(seen) == sorted(prompts)
        assert sequences.packed == pack


# --- the losses


def log1p_exp(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, x)


class Float64:
    """What the two losses are, from the oracle's logits, one pair after the other."""

    def __init__(self, given: Batch, frozen: Any, adapters: Any) -> None:
        self.batch = jax.tree.map(lambda a: np.asarray(a).reshape(-1, a.shape[-1]), given)
        run = functools.partial(
            oracle.forward, CONFIG, frozen, self.batch.input_ids, self.batch.position_ids, self.batch.segment_ids
        )
        self.policy = run(adapters=adapters, lora=LORA).logits
        self.reference = run().logits

    def sides(self) -> Any:
        """[[chosen, rejected] of the model, the same of the reference] for each pair: log p of the labels, learned."""
        batch = self.batch
        for line in range(0, len(batch.input_ids), 2):
            for number in range(1, batch.segment_ids[line].max() + 1):
                yield [
                    [self._side(logits, line + side, number) for side in (0, 1)]
                    for logits in (self.policy, self.reference)
                ]

    def _side(self, logits: np.ndarray, line: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        here = np.flatnonzero(self.batch.segment_ids[line] == number)[:-1]  # nothing follows the last token
        of_labels = np.log(oracle.softmax(logits[line, here]))[np.arange(len(here)), self.batch.labels[line, here]]
        return of_labels, self.batch.weights[line, here]

    def dpo(self, beta: float, smoothing: float) -> tuple[float, dict[str, float]]:
        losses, rewards = [], []
        for sides in self.sides():
            (chosen, rejected), (by_chosen, by_rejected) = [[p @ w for p, w in side] for side in sides]
            rewards.append((beta * (chosen - by_chosen), beta * (rejected - by_rejected)))
            margin = rewards[-1][0] - rewards[-1][1]
            losses.append(((1 - smoothing) * log1p_exp(-margin) - smoothing * log1p_exp(margin)) / (1 - 2 * smoothing))
        return float(np.mean(losses)), self._rewards(rewards)

    def orpo(self, beta: float) -> tuple[float, dict[str, float]]:
        nll, ratios, rewards = [], [], []
        for (chosen, rejected), _ in self.sides():
            nll += (-chosen[0]).tolist()
            mean = [p @ w / w.sum() for p, w in (chosen, rejected)]
            odds = [p - np.log(1 - np.exp(p)) for p in mean]
            ratios.append(odds[0] - odds[1])
            rewards.append((beta * mean[0], beta * mean[1]))
        agreement = -log1p_exp(-np.asarray(ratios))
        further = {"nll_loss": np.mean(nll), "log_odds_ratio": agreement.mean(), "log_odds_chosen": np.mean(ratios)}
        return float(np.mean(nll) - beta * agreement.mean()), further | self._rewards(rewards)

    def _rewards(self, rewards: list[Any]) -> dict[str, float]:
        chosen, rejected = np.transpose(rewards)
        return {
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "rewards/accuracies": (chosen > rejected).mean(),
        }


@functools.cache
def setting() -> tuple[Any, Any, Any, Batch]:
    """A model, its weights and adapters, and pairs of random tokens: 2 x 2 lines, of which two are packed."""
    model, frozen, adapters = adapted(CONFIG, LORA)
    rng = np.random.default_rng(5)

    def record(length: int) -> Record:
        tokens = rng.integers(0, CONFIG.vocab_size, length).astype(np.int32)
        return Record(tokens, (np.arange(length) > 2).astype(np.float32), False)

    records = [dataclasses.replace(record(9), rejected=record(length)) for length in (6, 12, 5)]
    documents, _ = cut(records, 20)
    batch = Sequences(documents, 20, shuffle=False, epochs=1).batch(0, (2, 1))
    assert batch.segment_ids.max() == 2
    return model._replace(reference=True), frozen, adapters, jax.tree.map(jnp.asarray, batch)


@functools.cache
def dpo() -> LossAndGradients:
    """DPO's loss, what it reports, and its gradients, from two micro-batches."""
    model, frozen, adapters, batch = setting()
    step = lambda f, a, b: loss_and_gradients(model, f, a, b, (Term(DirectPreference(0.3, 0.1)),))
    return jax.jit(step, compiler_options=COMPILER_OPTIONS)(frozen, adapters, batch)


@functools.cache
def orpo() -> tuple[float, dict[str, float]]:
    """ORPO's loss and what it reports, from one batch, as in evaluation."""
    model, frozen, adapters, batch = setting()
    evaluate = jax.jit(make_eval_step(model, OddsRatioPreference(0.3)), compiler_options=COMPILER_OPTIONS)
    sums, pairs = evaluate(frozen, adapters, jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), batch))
    assert float(pairs) == 3
    return float(sums.loss / pairs), {name: float(value / pairs) for name, value in sums.further.items()}


@functools.cache
def exact() -> Float64:
    _, frozen, adapters, batch = setting()
    return Float64(batch, frozen, adapters)


def check(found: tuple[Any, dict[str, Any]], expected: tuple[float, dict[str, float]]) -> None:
    assert float(found[0]) == pytest.approx(expected[0], rel=bound("preference_loss"))
    for name, number in expected[1].items():
        assert abs(float(found[1][name]) - number) <= bound("preference_rewards"), name


def test_losses_are_those_of_float64() -> None:
    check((dpo().loss, dpo().metrics), exact().dpo(0.3, 0.1))
    check(orpo(), exact().orpo(0.3))


def test_other_numbers_are_noticed() -> None:
    for found, expected in (
        ((dpo().loss, dpo().metrics), exact().dpo(0.3001, 0.1)),
        ((dpo().loss, dpo().metrics), exact().dpo(0.3, 0.0)),
        (orpo(), exact().orpo(0.3001)),
    ):
        with pytest.raises(AssertionError):
            check(found, expected)


def test_the_gradient_is_the_slope_in_float64() -> None:
    _, frozen, adapters, batch = setting()
    rng = np.random.default_rng(0)
    direction = {path: rng.standard_normal(a.shape) for path, a in adapters.items()}
    moved = lambda step: {path: np.asarray(a, np.float64) + step * direction[path] for path, a in adapters.items()}
    up, down = (Float64(batch, frozen, moved(step)).dpo(0.3, 0.1)[0] for step in (EPSILON, -EPSILON))
    slope = sum(float(np.sum(np.asarray(dpo().gradients[path], np.float64) * d)) for path, d in direction.items())
    assert slope == pytest.approx((up - down) / (2 * EPSILON), rel=bound("preference_slope"))


def test_a_token_is_the_same_in_every_chunk_and_under_every_head() -> None:
    rng = np.random.default_rng(1)
    hidden, head = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((7, 5), (11, 5)))
    labels, factors = jnp.asarray(rng.integers(0, 11, 7)), jnp.asarray(rng.standard_normal(7), jnp.float32)

    def plain(hidden: Any, head: Any) -> Any:
        log_probs = jax.nn.log_softmax(jnp.einsum("md,vd->mv", hidden, head, precision="highest"))
        return jnp.sum(factors * jnp.take_along_axis(log_probs, labels[:, None], 1)[:, 0])

    expected = jax.value_and_grad(plain, (0, 1))(hidden, head)
    trained = jax.jit(jax.value_and_grad(lambda h, w: jnp.sum(factors * token_log_probs(h, w, labels, 3)), (0, 1)))
    frozen = jax.jit(jax.value_and_grad(lambda h: jnp.sum(factors * token_log_probs(h, head, labels, 3, True))))
    for found, part in ((trained(hidden, head), expected), (frozen(hidden), (expected[0], expected[1][0]))):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(part), strict=True):
            assert relative_error(a, b) <= bound("preference_loss")


def test_the_sums_over_documents_need_little_memory() -> None:
    tokens = jax.ShapeDtypeStruct((2, 2048), jnp.int32), jax.ShapeDtypeStruct((2, 2048), jnp.float32)
    hidden, head = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 2048, 8), (16, 8)))

    def loss(hidden: Any, head: Any, ids: Any, floats: Any) -> Any:
        router = RouterStats(jnp.zeros((0, 1), jnp.int32), jnp.zeros((0, 1)), jnp.zeros((), jnp.int32))
        outputs = Outputs(hidden, head, router, 256, True, floats)
        return DirectPreference()(outputs, Batch(ids, ids, floats, ids, ids), {})[0]

    used: Any = jax.jit(jax.value_and_grad(loss)).lower(hidden, head, *tokens).compile().memory_analysis()
    assert used.temp_size_in_bytes < 2048**2


def test_dpo_without_a_reference_is_refused() -> None:
    model, frozen, adapters, batch = setting()
    objective = (Term(DirectPreference()),)
    with pytest.raises(ValueError, match="reference: expected the log-probabilities of a reference model"):
        jax.eval_shape(
            lambda f, a, b: loss_and_gradients(model._replace(reference=False), f, a, b, objective),
            *(frozen, adapters, batch),
        )


# --- runs


def options(folder: pathlib.Path, output: pathlib.Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "model": folder / "model",
        "data": folder / "pairs.jsonl",
        "output": output,
        "loss": "dpo",
        "beta": 0.5,
        "lora_targets": ("q_proj",),
        "lora_r": 2,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "batch_size": 2,
        "seq_length": 24,
        "log_every": 1,
        "eval_data": folder / "held-out.jsonl",
        "tensorboard": False,
        "quantize": "nf4",
        "optimizer": "muon",  # whose state is the least regular one
        "weight_decay": 0.1,
        "remat": "fast",
    }
    return TrainConfig(**values | changes)


@pytest.fixture(scope="module")
def whole(folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run whose reference is stored."""
    output = tmp_path_factory.mktemp("whole") / "out"
    train(options(folder, output, precompute_reference=True))
    return output


def test_a_stored_reference_resumes_bit_for_bit(
    whole: pathlib.Path, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    output, stored = tmp_path / "out", (whole / REFERENCE_FILE).read_bytes()
    setup = functools.partial(options, folder, output, precompute_reference=True)
    with pytest.raises(Crash):
        train(setup(save_every=1), crash_at(2))
    assert (output / REFERENCE_FILE).read_bytes() == stored
    with pytest.raises(UserError, match=r"^loss: to resume .*, expected beta 0\.5, found 0\.4"):
        train(setup(resume=True, beta=0.4))
    with pytest.raises(UserError, match=r"^optimizer: to resume .*expected 'muon', found 'lion'"):
        train(setup(resume=True, optimizer="lion"))
    (output / REFERENCE_FILE).unlink()  # it is computed again, from the weights that the run began with
    train(setup(resume=True))
    assert (output / REFERENCE_FILE).read_bytes() == stored
    assert metrics(output) == metrics(whole)
    assert weights(output) == weights(whole)
    before, after = (metrics(whole)[row]["eval_rewards/margins"] for row in (0, -1))
    assert abs(before) <= bound("stored_reference") < after


def test_a_damaged_reference_is_refused(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path, wanted = tmp_path / REFERENCE_FILE, {"data": np.zeros((20, 2), np.float32)}
    stored = (whole / REFERENCE_FILE).read_bytes()
    nothing = np.full((20, 2), np.nan, np.float32)
    for content in (stored[:-1], stored, save({"data": nothing}), save({"data": nothing.astype(np.float16)})):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"expected finite float32 data \[20, 2\], found .*delete it"):
            read_reference(path, wanted)


def test_the_reference_that_each_step_asks(whole: pathlib.Path, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """It is the same model: the numbers are those of a run that stores what it says."""
    run = options(folder, tmp_path / "out", eval_data=None)
    with pytest.raises(Crash):
        train(run, crash_at(2))
    rows = metrics(run.output)
    assert abs(rows[0]["rewards/chosen"]) <= bound("stored_reference") < abs(rows[1]["rewards/chosen"])
    for row, other in zip(rows, metrics(whole)[1:], strict=False):
        for name in ("loss", "rewards/chosen", "rewards/margins"):
            assert abs(row[name] - other[name]) <= bound("stored_reference"), name


def test_the_reference_is_the_model_as_the_run_starts(
    whole: pathlib.Path, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """With an adapter to start from it is stored without being asked for."""
    defaults = {"lora_targets": ("attention",), "lora_r": 16}
    run = options(folder, tmp_path / "out", adapter=whole, **defaults)
    with pytest.raises(Crash):
        train(run, crash_at(1))
    before, first = metrics(run.output)
    assert (run.output / REFERENCE_FILE).exists()
    assert abs(before["eval_rewards/chosen"]) + abs(first["rewards/margins"]) <= bound("stored_reference")
    assert options(folder, tmp_path / "full", full=True, quantize=None, **defaults).stores_reference
    assert not options(folder, tmp_path / "new").stores_reference


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "orpo", "label_smoothing": 0.1}, "label_smoothing: only valid with --loss dpo, found --loss orpo"),
        ({"loss": "next-token"}, "beta: only valid with --loss dpo or orpo, found --loss next-token"),
        ({"label_smoothing": 0.5}, "label_smoothing: expected a number from 0 to below 0.5, found 0.5"),
        ({"loss": "orpo", "precompute_reference": True}, "precompute_reference: only valid with --loss dpo"),
        ({"replay": pathlib.Path("x")}, "replay: only valid with --loss next-token, found --loss dpo"),
        ({"beta": -1.0}, "beta: expected at least 0, found -1.0"),
    ],
)
def test_settings_that_exclude_each_other(
    changes: dict[str, Any], message: str, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        options(folder, tmp_path / "out", **changes)
