"""The GPU against the CPU, in one process: the demo checkpoint's logits, gradients and text; experts at full width."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe import Qwen3MoeForCausalLM
from jaxmoe.config import LoraConfig, expand_targets
from jaxmoe.data.chat import load_tokenizer
from jaxmoe.data.packing import Batch
from jaxmoe.generate.engine import Generator
from jaxmoe.lora import LORA_GROUPS
from jaxmoe.model.init import init_adapters
from jaxmoe.ops.experts import ExpertWeights, sorted_experts
from jaxmoe.ops.router import route
from jaxmoe.train.loss import next_token_objective
from jaxmoe.train.step import Model, loss_and_gradients
from tests import oracle
from tests.conftest import ROOT
from tests.parity import relative_error
from tests.tolerances import bound

pytestmark = pytest.mark.gpu
CHECKPOINT = ROOT / "tests" / "checkpoints" / "qwen3-moe-stdlib"


def on(platform, function):
    """What `function` returns on the first device of `platform`, as NumPy arrays."""
    with jax.default_device(jax.devices(platform)[0]):
        return jax.device_get(function())


def tokens(length):
    """[2, length] token ids of Python source, the kind of text that the checkpoint was trained on."""
    text = (CHECKPOINT.parent / "source.txt").read_text(encoding="utf-8")
    ids = load_tokenizer(CHECKPOINT)(text)["input_ids"]
    assert len(ids) >= 2 * length
    return np.asarray(ids[: 2 * length], np.int32).reshape(2, length)


def test_logits_and_routing_equal_the_cpu():
    def run():
        model = Qwen3MoeForCausalLM.from_pretrained(CHECKPOINT, dtype="float32")
        out = model(tokens(600), output_router_logits=True)
        return out.logits, out.router_logits

    (gpu, gpu_router), (cpu, cpu_router) = on("gpu", run), on("cpu", run)
    same = np.ones(cpu.shape[:2], bool)  # of this token's experts in every layer
    for found, expected in zip(gpu_router, cpu_router, strict=True):
        (chosen, _), (expected_chosen, top) = (_most_probable(logits, 9) for logits in (found, expected))
        clear = top[..., -2] - top[..., -1] > bound("routing_margin")
        equal = (np.sort(chosen[..., :-1]) == np.sort(expected_chosen[..., :-1])).all(-1)
        assert equal[clear].all()
        same &= equal
    # A token reads those before it. This text has one exact tie, at token 524 of the first sequence.
    comparable = np.logical_and.accumulate(same, axis=1)
    assert comparable.mean() > 0.9
    assert relative_error(gpu[comparable], cpu[comparable]) <= bound("gpu_fp32")


def _most_probable(logits, k):
    """The k most probable experts [..., k] and their probabilities; ties go to the lowest index."""
    probabilities = np.asarray(jax.nn.softmax(logits))
    experts = oracle.top_k(probabilities, k)
    return experts, np.take_along_axis(probabilities, experts, axis=-1)


def test_adapter_gradients_equal_the_cpu():
    lora = LoraConfig(r=4, alpha=4, targets=expand_targets(["attention", "router", "experts"]))
    ids = tokens(129)
    ones = np.ones_like(ids[:, :-1])
    positions = np.broadcast_to(np.arange(128, dtype=np.int32), ones.shape)
    batch = Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones, positions)
    batch = jax.tree.map(lambda a: a[None], batch)

    def run():
        loaded = Qwen3MoeForCausalLM.from_pretrained(CHECKPOINT, dtype="float32")
        adapters = init_adapters(loaded.config, lora, jax.random.key(0))
        keys = jax.random.split(jax.random.key(1), len(adapters))
        adapters = {
            name: a + 0.02 * jax.random.normal(key, a.shape)
            for key, (name, a) in zip(keys, adapters.items(), strict=True)
        }
        objective = next_token_objective(0.01)
        step = jax.jit(partial(loss_and_gradients, Model(loaded.config, lora), objective=objective))
        found = step(loaded.params, adapters, batch)
        return found.loss, found.gradients

    (gpu_loss, gpu), (cpu_loss, cpu) = on("gpu", run), on("cpu", run)
    assert cpu_loss < 5  # the model still predicts (noise would give 12), so rounding errors do not decide its routing
    assert gpu_loss == pytest.approx(cpu_loss, rel=bound("gpu_fp32"))
    assert set(gpu) == {f"{path}.lora_{x}" for path in _paths() for x in "AB"}
    assert max(relative_error(gpu[name], cpu[name]) for name in cpu) <= bound("gpu_gradients_fp32")


def _paths():
    attention = [f"attention.{name}" for name in LORA_GROUPS["attention"]]
    return [*attention, "sparse.gate", "sparse.gate_up_proj", "sparse.down_proj"]


def test_greedy_text_equals_the_cpu():
    prompts = [tokens(length)[1].tolist() for length in (5, 40)]

    def run():
        return Generator(Qwen3MoeForCausalLM.from_pretrained(CHECKPOINT, dtype="float32")).generate(prompts, 24)

    assert on("gpu", run) == on("cpu", run)


@pytest.mark.parametrize("swapped", [False, True], ids=["right", "gate and up swapped"])
def test_bf16_experts_at_full_width(swapped):
    """One layer of Qwen3-30B-A3B's experts, value and gradient of x, against float32 over each token's experts."""
    M, D, F, E, k = 512, 2048, 768, 128, 8
    keys = jax.random.split(jax.random.key(0), 4)
    x, gate_up, down, gate = (
        (jax.random.normal(key, shape) * scale).astype(jnp.bfloat16)
        for key, shape, scale in zip(
            keys, [(M, D), (E, 2 * F, D), (E, D, F), (E, D)], [1, D**-0.5, F**-0.5, D**-0.5], strict=True
        )
    )
    routing = route(x, gate, num_experts_per_tok=k, norm_topk_prob=True)

    def by_token(x, gate_up, down):
        """The same mixture with each token's own eight experts gathered, in float32, 16 tokens at a time."""

        def mixture(piece):
            row, experts, weights = piece
            both = jnp.einsum("d,kfd->kf", row.astype(jnp.float32), gate_up[experts].astype(jnp.float32))
            first, second = jnp.split(both, 2, axis=-1)
            return jnp.einsum("kf,kdf,k->d", jax.nn.silu(first) * second, down[experts].astype(jnp.float32), weights)

        with jax.default_matmul_precision("highest"):
            return jax.lax.map(jax.checkpoint(mixture), (x, routing.experts, routing.weights), batch_size=16)

    def sorted_by_expert(x, gate_up, down):
        return sorted_experts(x, routing, ExpertWeights(gate_up, down, 0, False))

    @partial(jax.jit, static_argnums=0)
    def value_and_gradient(function, gate_up, down):
        value, pull = jax.vjp(lambda x: function(x, gate_up, down), x)
        return value, pull(cotangent.astype(value.dtype))[0]

    cotangent = jax.random.normal(jax.random.key(9), (M, D))
    halves = jnp.split(gate_up, 2, axis=1)
    fused = jnp.concatenate(halves[::-1], axis=1) if swapped else gate_up
    found, expected = value_and_gradient(sorted_by_expert, fused, down), value_and_gradient(by_token, gate_up, down)
    errors = jax.tree.map(relative_error, found, expected)
    assert (max(errors) <= bound("gpu_experts_bf16")) is not swapped
