"""Losses over pairs of answers against TRL: the same files, checkpoint and adapters, in float32."""

from __future__ import annotations

import functools
import json
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from jaxmoe import Qwen3MoeForCausalLM
from jaxmoe.config import LoraConfig, expand_targets
from jaxmoe.data.chat import load_tokenizer
from jaxmoe.data.packing import Batch, Sequences, cut
from jaxmoe.data.records import Record, read_records
from jaxmoe.ops.router import load_balancing_loss
from jaxmoe.train.loss import Loss, objective
from jaxmoe.train.preferences import DirectPreference, OddsRatioPreference
from jaxmoe.train.step import Model, loss_and_gradients
from peers.configs import random_adapters
from peers.reference import Reference, peft_config
from tests.conftest import ROOT
from tests.parity import COMPILER_OPTIONS, relative_error
from tests.tolerances import bound

trl = pytest.importorskip("trl", reason="compares with TRL, which the extra dev installs")
orpo = pytest.importorskip("trl.experimental.orpo")
datasets = pytest.importorskip("datasets")

CHECKPOINT = ROOT / "tests" / "checkpoints" / "qwen3-moe-stdlib"
LORA = LoraConfig(r=2, alpha=8.0, targets=expand_targets(["attention", "router", "experts"]))
LENGTH = 40
AUX = 0.3  # so that load balancing matters in the router's gradient
STRINGS = [
    {"prompt": "def size(path):", "chosen": " Return the size of a file.", "rejected": " Not a size."},
    {"prompt": "def join(parts):\n", "chosen": "Join the parts. " * 12, "rejected": "x"},  # cut at its end
    {"prompt": "class Node: ", "chosen": "a node of a tree", "rejected": "nothing"},
]


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "def add(a, b):"}]
EXPLICIT = [
    {"prompt": ASK, "chosen": say("Add two numbers."), "rejected": say("Subtract them, or do something else.")},
    {"prompt": ASK[1:], "chosen": say("Add."), "rejected": say("Add " * 60)},
    {"prompt": [*ASK, *say("Of what?"), ASK[1]], "chosen": say("Of a and b."), "rejected": say("No.")},
]
IMPLICIT = [
    {"chosen": ASK + say("The sum of a and b."), "rejected": ASK + say("No idea.")},
    {"chosen": [*ASK, *say("Yes."), ASK[1], *say("Add.")], "rejected": [*ASK, *say("No."), ASK[1], *say("Add.")]},
]
IMPLICIT_STRINGS = [{"chosen": "class Node: a node of a tree", "rejected": "class Node: nothing"}]
TOO_LONG = [{"prompt": "word " * 50, "chosen": "a", "rejected": "b"}, STRINGS[0]]


Found = tuple[float, dict[str, float], dict[str, np.ndarray]]  # objective, what is reported, gradients


@functools.cache
def model() -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM.from_pretrained(CHECKPOINT, dtype="float32")


@functools.cache
def adapters(seed: int) -> dict[str, np.ndarray]:
    return random_adapters(model().config, LORA, seed=seed)


def ours(records: list[Any], folder: pathlib.Path) -> list[Record]:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_records(file, load_tokenizer(CHECKPOINT), model().config.vocab_size, pairs=True)


def arguments_of(records: list[Any]) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": len(records),
        "max_length": LENGTH,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
    }


def data_of(records: list[Any]) -> dict[str, Any]:
    tokenizer = load_tokenizer(CHECKPOINT)
    tokenizer.pad_token = tokenizer.eos_token
    return {"train_dataset": datasets.Dataset.from_list(records), "processing_class": tokenizer}


def transformers_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(
        CHECKPOINT, dtype="float32", attn_implementation="eager", use_safetensors=True, trust_remote_code=False
    )


@functools.cache
def dpo_trainer() -> tuple[Any, Reference]:
    """TRL's trainer, whose reference is the model without adapters."""
    base = transformers_model()
    reference = Reference.of(base)
    arguments = trl.DPOConfig(**arguments_of(STRINGS), router_aux_loss_coef=AUX)
    trainer = trl.DPOTrainer(base, args=arguments, peft_config=peft_config(LORA), **data_of(STRINGS))
    return trainer, reference


@pytest.mark.parametrize("records", [STRINGS, IMPLICIT_STRINGS, EXPLICIT, IMPLICIT, TOO_LONG])
def test_records_are_read_as_trl_reads_them(records: list[Any], tmp_path: pathlib.Path) -> None:
    trainer, _ = dpo_trainer()
    data = data_of(records)
    theirs = trainer._prepare_dataset(data["train_dataset"], data["processing_class"], trainer.args, "train")
    collated = trainer.data_collator(list(theirs))
    documents, _ = cut(ours(records, tmp_path), LENGTH)
    batch = Sequences(documents, LENGTH, pack=False, shuffle=False, epochs=1).batch(0, (len(documents),))
    for line, side in enumerate(side for which in (0, 1) for side in [d.sides[which] for d in documents]):
        length = int(collated["attention_mask"][line].sum())
        assert side.inputs.tolist() == collated["input_ids"][line, :length].tolist()
        assert side.weights[:-1].tolist() == collated["completion_mask"][line, 1:length].tolist()
        assert not side.weights[-1]
    assert batch.input_ids.shape == (2 * len(documents), LENGTH)


@functools.cache
def batch(micro_batches: int) -> Batch:
    """The pairs of STRINGS, packed into one micro-batch, or each in a micro-batch of its own."""
    with tempfile.TemporaryDirectory() as folder:
        documents, _ = cut(ours(STRINGS, pathlib.Path(folder)), LENGTH)
    sequences = Sequences(documents, LENGTH, pack=micro_batches == 1, shuffle=False, epochs=1)
    return jax.tree.map(jnp.asarray, sequences.batch(0, (micro_batches, 3 // micro_batches)))


@functools.cache
def compiled(kind: type[Loss]) -> Any:
    """jaxmoe's step; the loss's numbers are arrays, so that one compilation is enough for all of them."""
    config = model().config
    spec = Model(config, LORA, reference=kind is DirectPreference)

    def run(frozen: Any, trainable: Any, given: Batch, options: dict[str, Any]) -> Any:
        loss = kind()
        for name, value in options.items():
            object.__setattr__(loss, name, value)
        found = loss_and_gradients(spec, frozen, trainable, given, objective(loss, AUX))
        aux = load_balancing_loss(found.stats.counts, found.stats.prob_sums, found.stats.tokens)
        return found.loss + AUX * aux, found.metrics, found.gradients

    return jax.jit(run, compiler_options=COMPILER_OPTIONS)


def step(kind: type[Loss], micro_batches: int, **options: float) -> Found:
    """(objective, what is reported, gradients) of jaxmoe's step."""
    trained = {path: jnp.asarray(array) for path, array in adapters(1).items()}
    numbers = {name: jnp.asarray(value) for name, value in options.items()}
    found = compiled(kind)(model().params, trained, batch(micro_batches), numbers)
    total, metrics, gradients = jax.device_get(found)
    return float(total), {name: float(value) for name, value in metrics.items()}, gradients


def check(found: Found, expected: Found) -> None:
    """The parity that every test of a loss asserts, negative controls included."""
    total, metrics, gradients = found
    expected_total, expected_metrics, expected_gradients = expected
    assert total == pytest.approx(expected_total, rel=bound("preference_loss"))
    for name, value in metrics.items():
        # ORPO subtracts two mean log-probabilities near -11, where float32 has steps of 9.5e-7. The logarithm of the
        # difference's sigmoid, log_odds_ratio, inherits that rounding: its slope is at most 1.
        terms = abs(expected_metrics["logps/chosen"]) if name in ("log_odds_chosen", "log_odds_ratio") else 1.0
        rounding = bound("preference_rewards") * float(terms)
        near = pytest.approx(expected_metrics[name], rel=bound("preference_loss"), abs=rounding)
        assert value == near, name
    assert gradients.keys() == expected_gradients.keys()
    errors = {
        (path, layer): relative_error(gradients[path][layer], expected_gradients[path][layer])
        for path in gradients
        for layer in range(len(gradients[path]))
    }
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= bound("preference_gradients"), f"{worst}: {errors[worst]:.1e}"


@functools.cache
def of_trl_dpo(smoothing: float) -> Found:
    trainer, reference = dpo_trainer()
    trainer.loss_types, trainer.label_smoothing = ["robust" if smoothing else "sigmoid"], smoothing
    trainer._metrics["train"].clear()
    reference.set_adapters(adapters(1))
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    loss.backward()
    return float(loss), {name: values[-1] for name, values in trainer._metrics["train"].items()}, reference.gradients()


@functools.cache
def of_trl_orpo() -> Found:
    base: Any = transformers_model()
    base.config.output_router_logits, base.config.router_aux_loss_coef = True, AUX
    base.router_aux_loss_coef = AUX
    reference = Reference.of(base)
    arguments = orpo.ORPOConfig(**arguments_of(STRINGS))
    trainer: Any = orpo.ORPOTrainer(base, args=arguments, peft_config=peft_config(LORA), **data_of(STRINGS))
    reference.set_adapters(adapters(1))
    loss, metrics = trainer.get_batch_loss_metrics(
        trainer.model, trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    )
    loss.backward()
    return float(loss), metrics, reference.gradients()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_trls(smoothing: float) -> None:
    check(step(DirectPreference, 1, beta=0.1, label_smoothing=smoothing), of_trl_dpo(smoothing))


def test_orpo_is_trls() -> None:
    check(step(OddsRatioPreference, 3, beta=0.1), of_trl_orpo())


def test_a_loss_of_another_strength_is_noticed() -> None:
    for found, expected in (
        (step(DirectPreference, 1, beta=0.1001, label_smoothing=0.0), of_trl_dpo(0.0)),
        (step(DirectPreference, 1, beta=0.1, label_smoothing=0.2), of_trl_dpo(0.0)),
        (step(OddsRatioPreference, 3, beta=0.1001), of_trl_orpo()),
    ):
        with pytest.raises(AssertionError):
            check(found, expected)
