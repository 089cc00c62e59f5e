"""torch_ref's backward passes under frozen weights: values, gradients, what is saved, the number of products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_ref.experts
import torch_ref.loss
from tests.test_torch_ref import distance, patched, stock
from tests.test_torch_ref_lora import ATTENTION, adapted, gradients
from tests.test_torch_ref_lora import check as check_adapters
from tests.tolerances import bound
from torch_ref.experts import DenseStack, Projection, Stack, grouped_experts, loop_experts
from torch_ref.loss import cross_entropy
from torch_ref.quantize import PackedStack, quantize

E, D, WIDTH, K, TOKENS = 6, 64, 32, 3, 40


def packed(weight: torch.Tensor, parts: int) -> PackedStack:
    """`weight` in NF4."""
    split = weight.unflatten(1, (parts, -1))
    codes = ((e, p, *quantize(split[e, p], torch.float32)) for e in range(E) for p in range(parts))
    return PackedStack.from_parts(codes, weight.shape)


def stacks_of(kind: str) -> tuple[Stack, Stack]:
    """gate_up and down; one expert gets no token in `draw`."""
    gate_up, down = torch.randn(E, 2 * WIDTH, D) / 8, torch.randn(E, D, WIDTH) / 6
    if kind == "4 bit":
        return packed(gate_up, 2), packed(down, 1)
    return DenseStack(gate_up), DenseStack(down)


def draw(tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    selected = torch.stack([torch.randperm(E - 1)[:K] for _ in range(tokens)])
    return torch.randn(tokens, D).requires_grad_(), selected, torch.rand(tokens, K).requires_grad_()


def results(run: Callable[..., Any], stacks: tuple[Stack, Stack], x: Any, selected: Any, weights: Any) -> list[Any]:
    """The output and the gradients of x and of the routing weights."""
    out = run(x, selected, weights, *map(Projection, stacks), F.silu)
    return [out, *torch.autograd.grad(out, (x, weights), torch.linspace(-1, 1, out.numel()).view_as(out))]


def worst(found: list[Any], expected: list[Any]) -> float:
    return max(distance(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["16 bit", "4 bit"])
@pytest.mark.parametrize("tokens", [TOKENS, 1])
def test_frozen_experts_equal_the_loop(kind: str, tokens: int) -> None:
    stacks, inputs = stacks_of(kind), draw(tokens)
    assert worst(results(grouped_experts, stacks, *inputs), results(loop_experts, stacks, *inputs)) <= bound(
        "torch_ref_fp32"
    )


def forget_the_weight(saved: list[torch.Tensor]) -> list[torch.Tensor]:
    saved[1] = torch.ones_like(saved[1])
    return saved


def swap_halves(saved: list[torch.Tensor]) -> list[torch.Tensor]:
    saved[0] = saved[0].roll(WIDTH, -1)
    return saved


@pytest.mark.parametrize("fault", [forget_the_weight, swap_halves])
def test_a_wrong_backward_pass_is_found(fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stacks, inputs = stacks_of("16 bit"), draw()
    expected = results(loop_experts, stacks, *inputs)
    backward = torch_ref.experts._FrozenExperts.backward

    class Context:
        def __init__(self, ctx: Any) -> None:
            self.saved_tensors = fault(list(ctx.saved_tensors))
            self.stacks, self.activation = ctx.stacks, ctx.activation

    monkeypatch.setattr(
        torch_ref.experts._FrozenExperts, "backward", staticmethod(lambda ctx, *g: backward(Context(ctx), *g))
    )
    assert worst(results(grouped_experts, stacks, *inputs), expected) > bound("torch_ref_fp32")


def test_gate_and_up_are_all_that_frozen_experts_keep() -> None:
    saved: list[torch.Tensor] = []
    x, selected, weights = draw()
    gate_up, down = map(Projection, stacks_of("16 bit"))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        grouped_experts(x, selected, weights, gate_up, down, F.silu)
    floats = sum(tensor.numel() for tensor in saved if tensor.is_floating_point())
    assert floats == TOKENS * K * 2 * WIDTH + TOKENS * K


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("implementation", torch_ref.experts.IMPLEMENTATIONS)
def test_attention_adapters_over_frozen_experts_equal_peft(implementation: str, checkpointing: bool) -> None:
    name = "top_8_of_32"
    reference, _ = adapted(name, target_modules=ATTENTION, use_gradient_checkpointing=False)
    expected = gradients(reference, name)
    reference, _ = adapted(name, target_modules=ATTENTION, use_gradient_checkpointing=checkpointing)
    with patched(reference.model, implementation):
        check_adapters(gradients(reference, name), expected)


@pytest.mark.parametrize("num_items", [None, 7])
def test_the_loss_under_a_frozen_head(num_items: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the plain loss; the head's product is computed once per chunk."""
    monkeypatch.setattr(torch_ref.loss, "CHUNK", 16)
    head = nn.Linear(D, 97, bias=False).requires_grad_(False)
    calls: list[int] = []
    head.register_forward_hook(lambda *_: calls.append(1))
    hidden, labels = torch.randn(TOKENS, D).requires_grad_(), torch.randint(97, (TOKENS,))
    labels[10:20] = -100
    loss = cross_entropy(hidden, head, labels, num_items)
    (found,) = torch.autograd.grad(3 * loss, hidden)
    assert len(calls) == 3
    plain = F.cross_entropy(head(hidden), labels, reduction="sum") / (num_items or (labels != -100).sum())
    (expected,) = torch.autograd.grad(3 * plain, hidden)
    assert float(loss) == pytest.approx(float(plain), rel=bound("parity_loss"))
    assert distance(found, expected) <= bound("torch_ref_fp32")
    with torch.no_grad():
        assert float(cross_entropy(hidden, head, labels, num_items)) == pytest.approx(
            float(plain), rel=bound("torch_ref_loss")
        )


def test_a_trained_head_gets_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_ref.loss, "CHUNK", 16)
    head = nn.Linear(D, 97, bias=False)
    hidden, labels = torch.randn(TOKENS, D).requires_grad_(), torch.randint(97, (TOKENS,))
    found = torch.autograd.grad(cross_entropy(hidden, head, labels), (hidden, head.weight))
    expected = torch.autograd.grad(F.cross_entropy(head(hidden), labels), (hidden, head.weight))
    assert worst(list(found), list(expected)) <= bound("torch_ref_fp32")


def test_recomputed_layers_give_the_same_gradients_bit_for_bit() -> None:
    model = stock("plain").requires_grad_(False).train()
    results = []
    ids = torch.arange(60).view(2, 30)
    for recompute in (False, True):
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with patched(model, "grouped"):
            loss = model(inputs_embeds=embeds, labels=ids).loss
            results.append(torch.autograd.grad(loss, embeds)[0])
    assert torch.equal(*results)
