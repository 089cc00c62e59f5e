"""transformers' tensor parallelism (`tp_plan="auto"`) works with torch_ref's forwards: two processes equal one."""

from __future__ import annotations

import datetime
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed
from transformers import Qwen3MoeForCausalLM

from jaxmoe.config import Qwen3MoeConfig
from peers.configs import CONFIGS, random_parameters
from peers.reference import Reference
from tests.test_torch_ref import distance
from tests.tolerances import bound
from torch_ref import FastQwen3MoeModel

IDS = torch.arange(3, 19).view(2, 8)
Result = tuple[torch.Tensor, dict[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """Stock transformers before and after each test."""
    yield
    FastQwen3MoeModel.unpatch()


def logits_and_gradients(model: Any) -> Result:
    """Of the whole parameters, gathered from all processes."""
    out = model(IDS, labels=IDS, use_cache=False)
    out.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}
    return out.logits.detach(), whole


def one_of_two(rank: int, folder: pathlib.Path) -> Result:
    """What process `rank` of two computes with the patched forwards and half of the weights."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        FastQwen3MoeModel.pre_patch()
        model: Any = Qwen3MoeForCausalLM.from_pretrained(
            folder, dtype=torch.float32, tp_plan="auto", use_safetensors=True, trust_remote_code=False
        )
        weight = model.model.layers[0].mlp.experts.gate_up_proj
        assert weight.to_local().shape[1] == model.config.moe_intermediate_size, "half of gate and up"
        with pytest.raises(ValueError, match="tp_plan"):
            FastQwen3MoeModel.get_peft_model(model)
        return logits_and_gradients(model)
    finally:
        distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason="transformers gives each process a GPU of its own")
def test_two_processes_equal_one(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "0")  # restored afterwards
    # earlier versions of transformers need a vocabulary that two divides
    shape = CONFIGS["top_8_of_32"] | {"vocab_size": 96}
    model = Reference(shape, random_parameters(Qwen3MoeConfig.from_hf(shape))).model.requires_grad_(True)
    model.save_pretrained(tmp_path)
    expected_logits, expected = logits_and_gradients(model)
    other = torch.multiprocessing.get_context("spawn").Process(target=one_of_two, args=(1, tmp_path))
    other.start()
    try:
        logits, gradients = one_of_two(0, tmp_path)
        other.join(60)
    finally:
        other.kill()
    assert other.exitcode == 0
    assert distance(logits, expected_logits) <= bound("torch_ref_fp32")
    assert expected and gradients.keys() == expected.keys()
    assert max(distance(gradients[name], expected[name]) for name in expected) <= bound("torch_ref_gradients")
