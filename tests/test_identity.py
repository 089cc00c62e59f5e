"""Which settings identify a run: every field says whether it does, and runs of earlier versions still continue."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from dataclasses import dataclass, field
from typing import Any

import pytest

from jaxmoe.cli.arguments import flag_kinds
from jaxmoe.cli.config_file import read_settings
from jaxmoe.train import identity
from jaxmoe.train.loop import train
from jaxmoe.train.settings import APART, VALUE, TrainConfig
from peers.make_checkpoint import make_checkpoint
from tests.test_train import CONFIG, Crash, crash_at, options, write_records

# What version 0.1.0 wrote for `options`.
MODEL_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "attention_bias": False,
    "sliding_window": None,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "num_experts": 8,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.01,
    "mlp_only_layers": [],
    "dtype": "float32",
    "use_sliding_window": False,
}
# The digest of all weights; version 0.1.0 had one of a few rows.
WEIGHTS = "weights:02ff67a726df9ad02439eb3b5e6d5120009688d2be8e3e7581ab1a24ee8554c3"
# Digests over the digests of the records; RECORDED has those of earlier versions.
DATA = "records:771afeb4863c9aebac31689cf54ed1c49f5220520fd9fc6b819513b90b89e604"
EVAL_DATA = "records:6a10cd734957877d34b9f966cfe033ac39c59a44e16839de8980a12ef92773c3"
RECORDED: dict[str, Any] = {
    "model": [MODEL_CONFIG, "fb18d20a13eb03f3bfdf2676267ac5e32912debd448220924257dc87a3c8c909"],
    "data": "3bf8384f924e9d302662390151e08da680c7651133e998e35044d7b8f0f8ff64",
    "eval_data": "55aefe8f21f5a86fff01fffa9e0a1c69a3109b30a5164c3a3fca073d8d7a948b",
    "lora": {
        "r": 2,
        "alpha": 32.0,
        "use_rslora": False,
        "targets": [
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate",
            "experts.gate_up_proj",
            "experts.down_proj",
        ],
        "rank_pattern": [],
        "alpha_pattern": [],
        "base_model_name_or_path": None,
    },
    "dtype": "float32",
    "remat": "fast",
    "unroll_layers": None,
    "router_aux_loss_coef": 0.01,
    "warmup_steps": 2,
    "max_steps": 6,
    "replay": None,
    "loss": None,
    "optimizer": None,
    "router_training": None,
    "routing_base": None,
    "mixture": None,
    "streaming": None,
    "seq_length": 48,
    "batch_size": 2,
    "accumulation": 2,
    "pack": True,
    "learning_rate": 0.01,
    "schedule": "cosine",
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-08,
    "seed": 0,
    "quantize": None,
}


def unclassified(settings: type) -> list[str]:
    """Fields that do not say whether they belong to the identity."""

    def classified(kind: Any) -> bool:
        return kind in (VALUE, APART) or (isinstance(kind, tuple) and bool(kind) and all(map(str.isidentifier, kind)))

    return [each.name for each in dataclasses.fields(settings) if not classified(each.metadata.get("identity"))]


@dataclass(frozen=True, kw_only=True)
class Forgetful(TrainConfig):
    """Settings with a field that does not say whether it belongs to the identity."""

    dropout: float = field(default=0.0, metadata={"help": "share of activations to drop"})


def test_every_setting_says_how_it_enters_the_identity() -> None:
    assert unclassified(TrainConfig) == []
    assert unclassified(Forgetful) == ["dropout"]


def test_every_entry_is_decided_by_a_setting() -> None:
    worked_out = identity.entries_to_work_out()
    assert worked_out | set(identity.entries_by_value()) == set(RECORDED)
    assert not worked_out & set(identity.entries_by_value())


def test_an_entry_that_nobody_works_out_is_noticed() -> None:
    settings = TrainConfig(model=pathlib.Path("m"), data=pathlib.Path("d"), output=pathlib.Path("o"))
    worked_out = dict.fromkeys(identity.entries_to_work_out() - {"model"})
    assert identity.identity_of(settings, worked_out).keys() == RECORDED.keys() - {"model"}
    del worked_out["warmup_steps"]
    with pytest.raises(AssertionError, match="warmup_steps"):
        identity.identity_of(settings, worked_out)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a run in `out` that was killed after its first step."""
    base = tmp_path_factory.mktemp("stopped")
    make_checkpoint(base / "model", CONFIG)
    write_records(base / "data.jsonl", range(36))
    write_records(base / "held-out.jsonl", range(36, 40))
    with pytest.raises(Crash):
        train(options(base, base / "out", remat="fast"), crash_at(1))
    return base


def test_the_identity_is_written_as_it_always_was(stopped: pathlib.Path) -> None:
    written = json.loads((stopped / "out" / "train_config.json").read_text())
    digests = {"model": [MODEL_CONFIG, WEIGHTS], "data": DATA, "eval_data": EVAL_DATA}
    assert written["identity"] == json.loads(json.dumps(RECORDED | digests))
    assert set(written) == {"settings", "identity", "versions", "device"}
    settings = read_settings(stopped / "out" / "run.toml", flag_kinds(TrainConfig))
    assert TrainConfig(**settings) == options(stopped, stopped / "out", remat="fast")


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        (None, None, None),
        ("lora", None, "lora: to resume .*, expected none, found {'r': 2"),
        ("warmup_steps", 3, "warmup_steps: to resume .*, expected 3, found 2"),
        ("model", [{}, ""], "model: to resume .*, expected the same content as before, found different content"),
        ("dropout", 0.1, "dropout: to resume .*, expected 0.1, found none"),
    ],
    ids=str,
)
def test_a_run_of_an_earlier_version_continues(
    entry: str | None, value: Any, message: str | None, stopped: pathlib.Path
) -> None:
    path = stopped / "out" / "train_config.json"
    recorded = RECORDED if entry is None else RECORDED | {entry: value}
    later = ("unroll_layers", "loss", "optimizer")  # an earlier version did not write these
    path.write_text(json.dumps({"identity": {k: v for k, v in recorded.items() if k not in later}}))
    settings = options(stopped, stopped / "out", resume=True)
    if message is None:
        with pytest.raises(Crash):
            train(settings, crash_at(1))
    else:
        with pytest.raises(identity.UserError, match=message):
            train(settings, crash_at(1))
