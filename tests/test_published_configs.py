"""Every published config of the family, and some of the community: read, planned and forecast without a device's work.

`tests/published_configs` holds fields and values as they were published. A file says where its config comes from, and
`reconstructed` is true if it was put together from documented fields because no copy could be had.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from jaxmoe import memory
from jaxmoe.config import LoraConfig, Qwen3MoeConfig, expand_targets, read_config
from jaxmoe.doctor import report as doctor
from jaxmoe.lora import LORA_GROUPS, LORA_TARGETS
from jaxmoe.parameters import lora_specs
from jaxmoe.presets import PRESETS
from peers.make_checkpoint import hf_shapes
from peers.reference import hf_config
from tests.conftest import ROOT
from tests.test_config import SHARED_FIELDS

FILES = {path.stem: path for path in sorted((ROOT / "tests" / "published_configs").glob("*.json"))}
RECORDS: dict[str, dict[str, Any]] = {name: json.loads(path.read_text()) for name, path in FILES.items()}
# As the model cards say, rounded: total and active parameters
PARAMETERS = {
    "30b-a3b": ("30.5", None),
    "235b-a22b": ("235", "22"),
    "coder-480b-a35b-instruct": ("480", "35"),
    "pruned-16b": ("16", None),
    "pruned-reap-25b": ("25", None),
    "upscaled-42b": ("42", None),
}
LORA = LoraConfig(r=8, targets=expand_targets(["attention", "router", "experts"]))
HBM = 141 * 10**9  # bytes of an H200


def test_the_files_say_where_they_come_from() -> None:
    assert len(FILES) == 25
    for record in RECORDS.values():
        assert set(record) == {"model", "source", "retrieved", "reconstructed", "config"}
        assert isinstance(record["reconstructed"], bool) and record["source"] and record["retrieved"]


@pytest.mark.parametrize("name", FILES)
def test_a_published_config_is_read_planned_and_forecast(name: str, tmp_path: Any) -> None:
    raw = RECORDS[name]["config"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config, kept = read_config(tmp_path / "config.json")
    assert kept == raw and config.dtype == "bfloat16" and config.num_experts_per_tok == 8 and config.norm_topk_prob
    theirs = hf_config(raw)
    assert {field: getattr(config, field) for field in SHARED_FIELDS} == {
        field: getattr(theirs, field) for field in SHARED_FIELDS
    }
    assert config.rope_parameters.rope_theta == dict(theirs.rope_parameters or {})["rope_theta"]
    assert memory.parameter_count(config) == sum(map(math.prod, hf_shapes(config).values()))
    assert set(lora_specs(config, LORA)) == {f"{target}.lora_{side}" for target in _paths() for side in "AB"}
    forecast = doctor.forecast(doctor.DoctorConfig(model=str(tmp_path), lora_r=8))
    assert forecast["parameters"] == memory.parameter_count(config)
    assert forecast["parameters"] // 2 < forecast["generation"].total < forecast["training"].total
    assert (name == "unsloth-bnb-4bit") == (forecast["quantize"] == "nf4")
    work = memory.Workload(config, LORA, 1, 2048, "bfloat16", quantize="nf4")
    # QLoRA needs less than the weights in 16 bits
    assert memory.training_forecast(work).total < 2 * forecast["parameters"]
    assert forecast["parameters"] > 50e9 or memory.choose_remat(memory.training_forecasts(work), HBM) == "fast"


def _paths() -> list[str]:
    return [LORA_TARGETS[name].path for group in ("attention", "router", "experts") for name in LORA_GROUPS[group]]


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_counts_are_those_of_the_model_card(name: str) -> None:
    config = Qwen3MoeConfig.from_hf(RECORDS[name]["config"])
    counts = (memory.parameter_count(config), memory.active_parameter_count(config))
    for count, text in zip(counts, PARAMETERS[name], strict=True):
        if text is not None:
            assert f"{count / 1e9:.{len(text.partition('.')[2])}f}" == text


def test_the_presets_are_the_published_configs() -> None:
    published = {
        "qwen3-30b-a3b": "30b-a3b",
        "qwen3-coder-30b-a3b": "coder-30b-a3b-instruct",
        "qwen3-235b-a22b": "235b-a22b",
    }
    assert set(published) == set(PRESETS)
    for preset, name in published.items():
        read = Qwen3MoeConfig.from_hf(RECORDS[name]["config"])
        assert PRESETS[preset].replace(router_aux_loss_coef=read.router_aux_loss_coef) == read
