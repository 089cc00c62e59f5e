"""Changing the routing: replay in evaluation, training and generation; removed and forced experts."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from captures import Capture, Chunk, LabelledText, Text, tokenizer_digest
from jaxmoe import Qwen3MoeForCausalLM
from jaxmoe.config import LoraConfig
from jaxmoe.control.base_logits import BaseLogits
from jaxmoe.control.interventions import Intervention, add_arguments, intervention
from jaxmoe.control.replay import Replay
from jaxmoe.data.packing import Batch, Sequences, cut
from jaxmoe.data.records import read_records
from jaxmoe.errors import UserError
from jaxmoe.generate.capture import capture_generation
from jaxmoe.generate.engine import Generator
from jaxmoe.model.init import init_adapters
from jaxmoe.ops.router import RoutingControl
from jaxmoe.routing.capture import capture
from jaxmoe.routing.effects import effects, write_effects
from jaxmoe.routing.text import read_text
from jaxmoe.train.loss import next_token_objective
from jaxmoe.train.router_losses import RoutingPenalty
from jaxmoe.train.step import Model, loss_and_gradients
from peers.configs import config_of, random_parameters, random_tokens
from tests.parity import COMPILER_OPTIONS
from tests.tolerances import bound

LENGTH = 24
pytestmark = pytest.mark.usefixtures("quick_compilation")


class Letters:
    """A tokenizer of 97 letters, with the methods that this project's data code uses."""

    eos_token, eos_token_id = "!", 1
    chat_template = None

    def get_vocab(self) -> dict[str, int]:
        return {chr(32 + i): i for i in range(97)}

    def __call__(self, texts: list[str], **options: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) - 32 for letter in text] for text in texts]}


@pytest.fixture(scope="module")
def model() -> Qwen3MoeForCausalLM:
    config = config_of("top_8_of_32")
    return Qwen3MoeForCausalLM(config, {path: jnp.asarray(a) for path, a in random_parameters(config).items()})


def stream_of(contexts: list[np.ndarray]) -> LabelledText:
    parts = []
    for number, ids in enumerate(contexts):
        n, zero = len(ids), np.zeros(len(ids), np.int32)
        following = np.append(ids[1:], -1).astype(np.int32)
        parts.append(Text(ids, zero + number, np.arange(n, dtype=np.int32), zero, zero, following))
    text = Text(*map(np.concatenate, zip(*parts, strict=True)))
    return LabelledText(text, ("d",), ("text",), LENGTH, tokenizer_digest(Letters()))


@pytest.fixture(scope="module")
def labels(model) -> LabelledText:
    ids = random_tokens(model.config, 4, LENGTH)
    return stream_of([ids[0], ids[1, :10], ids[2, :13], ids[3]])


@pytest.fixture(scope="module")
def captured(quick_compilation, model, labels, tmp_path_factory) -> Capture:
    return capture(model, labels, tmp_path_factory.mktemp("c") / "free", batch_size=2)


def whole(found: Capture) -> Chunk:
    return found.read(0, found.tokens)


def losses(chunk: Chunk) -> np.ndarray:
    assert chunk.loss is not None
    return chunk.loss


def test_replaying_a_runs_own_routing_reproduces_it_exactly(model, labels, captured, tmp_path):
    again = capture(model, labels, tmp_path / "again", batch_size=2, replay=captured)
    a, b = whole(captured), whole(again)
    assert again.control == {"replay": str(captured.folder)} and again.keep_logits == 32
    assert np.array_equal(a.experts, b.experts) and np.array_equal(a.weights, b.weights)
    assert np.array_equal(a.top_logits, b.top_logits[..., :16])
    assert np.array_equal(losses(a), losses(b), equal_nan=True)
    assert a.predicted is not None and b.predicted is not None and np.array_equal(a.predicted, b.predicted)


def test_replay_imposes_another_models_experts(model, labels, captured, tmp_path):
    config = model.config
    other = Qwen3MoeForCausalLM(config, {p: jnp.asarray(a) for p, a in random_parameters(config, 1).items()})
    theirs = whole(capture(other, labels, tmp_path / "theirs", batch_size=2))
    imposed = whole(capture(other, labels, tmp_path / "imposed", batch_size=2, replay=captured))
    assert not np.array_equal(theirs.experts, whole(captured).experts)
    assert np.array_equal(imposed.experts, whole(captured).experts)
    # the weights are the model's own probabilities of the experts that were imposed
    p = np.take_along_axis(imposed.dense_probabilities(), imposed.experts.astype(int), -1)
    expected = p / p.sum(-1, keepdims=True) if config.norm_topk_prob else p
    assert np.allclose(imposed.weights, expected, rtol=bound("imposed_weights_fp32"), atol=0)
    assert np.nanmax(np.abs(losses(imposed) - losses(theirs))) > 1e-3


def test_replay_refuses_another_text(model, captured, tmp_path):
    ids = random_tokens(model.config, 1, LENGTH, seed=9)
    with pytest.raises(UserError, match="expected a capture of the same text with the same tokenizer, found another"):
        capture(model, stream_of([ids[0]]), tmp_path / "x", replay=captured)


def unused_expert(captured: Capture) -> tuple[int, int]:
    """(layer, expert) that no token uses; the text is short enough that there is one."""
    for slot, experts in enumerate(whole(captured).experts):
        for expert in range(captured.model.num_experts):
            if not (experts == expert).any():
                return captured.model.layers[slot], expert
    raise AssertionError("expected an expert that is not used")


def test_ablating_an_unused_expert_changes_nothing_and_a_used_one_does(model, labels, tmp_path):
    short = stream_of([labels.text.token[:3]])
    free = capture(model, short, tmp_path / "free", batch_size=2)
    layer, unused = unused_expert(free)
    used = int(whole(free).experts[model.config.sparse_layers.index(layer)][0, 0])
    found = {}
    for name, expert in (("unused", unused), ("used", used)):
        control = Intervention({layer: (expert,)}, {}, {}).control(model.config)
        found[name] = whole(capture(model, short, tmp_path / name, batch_size=2, control=control))
        assert not (found[name].experts[model.config.sparse_layers.index(layer)] == expert).any()
    base = whole(free)
    assert np.array_equal(found["unused"].experts, base.experts)
    assert np.array_equal(losses(found["unused"]), losses(base), equal_nan=True)
    assert np.nanmax(np.abs(losses(found["used"]) - losses(base))) > 1e-4
    rows = effects(model, short, experts=[(layer, unused), (layer, used)], batch_size=2)
    assert (rows[0].load, rows[0].change, rows[0].kl, rows[0].same_prediction) == (0, 0, 0, 1)
    assert rows[1].load > 0 and rows[1].kl > 1e-5
    expected = np.nanmean(losses(found["used"]).astype(np.float64) - losses(base))
    assert rows[1].change == pytest.approx(expected, abs=bound("effect_fp32"))
    write_effects(rows, tmp_path / "effects.csv")
    with (tmp_path / "effects.csv").open() as file:
        assert [float(row["change"]) for row in csv.DictReader(file)] == [row.change for row in rows]
    broken = {path: jnp.full_like(array, jnp.nan) for path, array in model.params.items()}
    with pytest.raises(UserError, match="model: expected finite losses, found NaN or infinity"):
        effects(Qwen3MoeForCausalLM(model.config, broken), short, experts=[(layer, used)], batch_size=2)


def test_a_forced_expert_is_among_the_k_with_its_own_weight(model, labels, captured, tmp_path):
    layer = model.config.sparse_layers[1]
    control = Intervention({}, {layer: (5, 7)}, {}).control(model.config)
    found = whole(capture(model, labels, tmp_path / "forced", batch_size=2, control=control))
    slot = model.config.sparse_layers.index(layer)
    assert ((found.experts[slot] == 5).any(-1) & (found.experts[slot] == 7).any(-1)).all()
    assert not (found.experts[0] == 5).any(-1).all()  # only where it was asked for
    # the layers before it are untouched; the others of the k are the most probable ones
    assert np.array_equal(found.experts[:slot], whole(captured).experts[:slot])
    rest = np.asarray([[e for e in row if e not in (5, 7)] for row in found.experts[slot]])
    order = [[e for e in row if e not in (5, 7)][: rest.shape[1]] for row in found.top_experts[slot]]
    assert np.array_equal(rest, order)
    p = np.take_along_axis(found.dense_probabilities()[slot], found.experts[slot].astype(int), -1)
    expected = p / p.sum(-1, keepdims=True) if model.config.norm_topk_prob else p
    assert np.allclose(found.weights[slot], expected, rtol=bound("imposed_weights_fp32"), atol=0)


def test_a_bias_shifts_the_logits_by_what_it_says(model, labels, captured, tmp_path):
    layer = model.config.sparse_layers[0]
    control = Intervention({}, {}, {layer: {3: 2.5}}).control(model.config)
    found = whole(capture(model, labels, tmp_path / "biased", batch_size=2, control=control))
    full = whole(capture(model, labels, tmp_path / "full", batch_size=2, keep_logits=32))
    dense = []
    for chunk in (full, found):
        logits = np.empty_like(chunk.top_logits[0])
        np.put_along_axis(logits, chunk.top_experts[0].astype(int), chunk.top_logits[0], -1)
        dense.append(logits)
    shift = np.zeros(32)
    shift[3] = 2.5
    assert np.allclose(dense[1] - dense[0], shift, rtol=0, atol=bound("biased_logits_fp32"))


@pytest.mark.parametrize(
    ("intervention", "message"),
    [
        (Intervention({99: (0,)}, {}, {}), "ablate: expected a layer with experts, found layer 99"),
        (Intervention({0: (32,)}, {}, {}), "ablate: expected an expert below 32, found 32 in layer 0"),
        (Intervention({0: tuple(range(25))}, {}, {}), "ablate: expected at least 8 experts to be left in layer 0"),
        (Intervention({}, {0: tuple(range(9))}, {}), "force: expected at most 8 experts in layer 0, found 9"),
        (Intervention({0: (4,)}, {0: (4,)}, {}), "expected experts that are not removed, found 4 in layer 0"),
    ],
)
def test_impossible_interventions_are_refused(model, intervention, message):
    with pytest.raises(UserError, match=message):
        intervention.control(model.config)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--ablate", "0-1:2,3", "--bias", "all:4=-1.5"], ({0: (2, 3), 1: (2, 3)}, -1.5)),
        (["--ablate", "0-999999999:1"], "ablate: expected .* a range of layers"),
        (["--ablate", "9" * 5000 + ":1"], "ablate: expected .* a range of layers"),
        (["--force", "0:" + "9" * 5000], "force: expected LAYER:EXPERT,..., found '0:999"),
        (["--bias", f"0:{'9' * 5000}=1"], "bias: expected LAYER:EXPERT=NUMBER,..., found '0:999"),
        (["--bias", "0:1=nan"], "bias: expected finite numbers"),
    ],
)
def test_what_the_flags_mean(flags, expected):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    config = config_of("plain")
    if isinstance(expected, tuple):
        found = intervention(parser.parse_args(flags), config)
        assert found.ablate == expected[0]
        assert found.bias == {layer: {4: expected[1]} for layer in config.sparse_layers}
        return
    with pytest.raises(UserError, match=expected) as caught:
        intervention(parser.parse_args(flags), config)
    assert len(str(caught.value)) < 500, "a line, however long the flag"


# ---- training


@pytest.fixture(scope="module")
def training(quick_compilation, model, tmp_path_factory):
    """(segments of four records, a capture of the same records)."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    records = ["The quick brown fox jumps over it.", "Hello.", "A lazy dog sleeps in the sun all day long.", "abc"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in records))
    tokenizer = Letters()
    segments, _ = cut(read_records(path, tokenizer, model.config.vocab_size), LENGTH)
    labels = read_text([path], tokenizer, model.config.vocab_size, LENGTH)
    return segments, capture(model, labels, path.parent / "capture", batch_size=2, keep_logits=32)


def test_training_replays_the_captured_experts_and_its_own_routing_changes_no_bit(model, training):
    segments, found = training
    config = model.config
    replay = Replay(found, config, Letters())
    replay.check(segments)
    batch = Sequences(segments, LENGTH, seed=3, epochs=1).batch(0, (1, 4))  # packed and shuffled
    replayed = replay.on(batch)
    assert replayed.experts is not None and replayed.experts.shape == (1, 4, LENGTH, len(config.sparse_layers), 8)
    used = batch.segment_ids > 0
    assert (replayed.experts[used] >= 0).all() and (replayed.experts[~used] == -1).all()
    lora = LoraConfig(r=4, targets=("q_proj", "gate", "experts.gate_up_proj", "experts.down_proj"))
    adapters = init_adapters(config, lora, jax.random.key(0))
    step = jax.jit(
        lambda batch: loss_and_gradients(
            Model(config, lora), model.params, adapters, batch, next_token_objective(0.01)
        ),
        compiler_options=COMPILER_OPTIONS,
    )
    free, own = step(batch), step(replayed)
    for a, b in zip(jax.tree.leaves(free), jax.tree.leaves(own), strict=True):
        assert np.array_equal(a, b)
    # Other experts give another loss, and the gradients go to the experts that were replayed.
    moved = step(replayed._replace(experts=np.where(replayed.experts < 0, -1, replayed.experts % 8).astype(np.int16)))
    assert abs(float(moved[0] - free[0])) > 1e-4


def test_training_data_that_was_not_captured_is_refused_before_training(model, training):
    segments, found = training
    replay = Replay(found, model.config, Letters())
    other = segments[0]._replace(inputs=segments[0].inputs[::-1].copy())
    with pytest.raises(UserError, match=r"replay: expected all training data in .*, missing documents: 1"):
        replay.check([*segments, other])
    with pytest.raises(UserError, match="replay: expected 2 MoE layers with 2 of 8 experts, found"):
        Replay(found, config_of("mlp_only_layers"), Letters())


def test_captured_logits_take_the_place_of_a_second_forward_pass(model, training):
    segments, found = training
    config, base = model.config, BaseLogits(found, model.config, Letters())
    base.check(segments)
    batch = base.on(Sequences(segments, LENGTH, seed=3, epochs=1).batch(0, (4,)))
    assert batch.base_logits is not None and not batch.base_logits[batch.segment_ids == 0].any()
    lora = LoraConfig(r=4, targets=("q_proj",))
    adapters = {path: jnp.full_like(a, 0.1) for path, a in init_adapters(config, lora, jax.random.key(0)).items()}
    asks, penalty = Model(config, lora, router_logits=True, base_router=True), RoutingPenalty()
    reads = asks._replace(base_router=False)

    def penalties(batch: Batch) -> list[jax.Array]:
        alone = batch._replace(base_logits=None)
        runs = ((asks, alone), (reads, batch))
        outputs = [each.run(model.params, adapters, of, train=False) for each, of in runs]
        return [penalty(each, batch, {})[0] for each in outputs]

    compiled = jax.jit(penalties, compiler_options=COMPILER_OPTIONS)
    asked, read = map(float, compiled(batch))
    assert read == pytest.approx(asked, rel=bound("captured_base"))
    exchanged = batch._replace(base_logits=batch.base_logits[:, :, ::-1])  # of other layers
    assert abs(float(compiled(exchanged)[1]) / asked - 1) > 100 * bound("captured_base")


def test_other_captures_are_no_base(model, training, captured):
    segments, found = training
    other = segments[0]._replace(inputs=segments[0].inputs[::-1].copy())
    with pytest.raises(UserError, match=r"routing_base: expected all training data in .*, missing documents: 1"):
        BaseLogits(found, model.config, Letters()).check([*segments, other])
    with pytest.raises(UserError, match=r"routing_base: expected the router logits of all 32 .* found 16 in"):
        BaseLogits(captured, model.config, Letters())
    imposed = dataclasses.replace(found, control={"ablate": {"0": [1]}})
    with pytest.raises(UserError, match="routing_base: expected a model's own routing, found ablate imposed in"):
        BaseLogits(imposed, model.config, Letters())
    assert BaseLogits(found, model.config, Letters()).digest != Replay(found, model.config, Letters()).digest


# ---- generation


def test_generation_is_captured_and_replayed_exactly(model, tmp_path):
    generator = Generator(model)
    prompts = [random_tokens(model.config, 1, 7)[0].tolist(), random_tokens(model.config, 1, 4, seed=2)[0].tolist()]
    digest = tokenizer_digest(Letters())
    plain = generator.generate(prompts, 6)
    out = capture_generation(generator, prompts, 6, tmp_path / "g", tokenizer=digest)
    assert out == plain
    found = Capture.open(tmp_path / "g")
    stream = found.read_text()
    ids, mask = (np.zeros((2, 12), np.int32) for _ in range(2))
    for row, part in enumerate(stream.contexts()):
        assert stream.token[part].tolist() == [*prompts[row], *out[row]][:-1]
        assert int(stream.next[part.stop - 1]) == out[row][-1]
        ids[row, : part.stop - part.start], mask[row, : part.stop - part.start] = stream.token[part], 1
    # the same tokens in one pass give the same logits up to rounding
    logits = np.stack(model(ids, attention_mask=mask, output_router_logits=True).router_logits)
    top = np.sort(logits[:, mask.astype(bool)], -1)[..., ::-1]
    assert np.allclose(whole(found).top_logits, top, rtol=0, atol=bound("generated_logits_fp32"))
    assert found.probability_sums().sum(-1) == pytest.approx(
        [found.tokens] * found.probability_sums().shape[0], rel=bound("capture_sums_fp32")
    )
    again = capture_generation(generator, prompts, 6, tmp_path / "h", tokenizer=digest, replay=found)
    assert again == out
    a, b = whole(found), whole(Capture.open(tmp_path / "h"))
    for name in ("experts", "top_experts", "top_logits", "log_sum_exp", "entropy"):
        assert np.array_equal(getattr(a, name), getattr(b, name))


def test_generation_follows_imposed_experts(model, tmp_path):
    """Another choice of experts at one position changes what is generated from there on, not the routing before."""
    generator = Generator(model)
    prompt = random_tokens(model.config, 1, 5, seed=4)[0].tolist()
    digest = tokenizer_digest(Letters())
    capture_generation(generator, [prompt, prompt], 5, tmp_path / "free", tokenizer=digest)
    free = whole(Capture.open(tmp_path / "free"))
    prompts = [prompt, prompt]
    experts = np.full((len(model.config.sparse_layers), 2, 7, 8), -1, np.int32)
    experts[:, :, 6] = (free.experts[:, None, 6] + 1) % 32
    control = RoutingControl(experts=jnp.asarray(experts))
    capture_generation(generator, prompts, 5, tmp_path / "moved", tokenizer=digest, control=control)
    moved = whole(Capture.open(tmp_path / "moved"))
    assert np.array_equal(moved.experts[:, :6], free.experts[:, :6])
    assert np.array_equal(moved.experts[:, 6], experts[:, 0, 6])
    assert not np.array_equal(moved.top_logits[1:, 6], free.top_logits[1:, 6])
