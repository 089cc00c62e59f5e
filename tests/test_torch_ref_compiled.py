"""torch.compile and torch.export trace torch_ref's whole forward pass; loss and gradients equal those without them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.test_torch_ref import distance, stock
from tests.tolerances import bound

IDS = torch.arange(3, 19).view(2, 8)
ADAPTED: dict[str, Any] = {
    "target_modules": ["q_proj", "o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
needs_float32_operator = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="transformers 5.17 has no backward pass of its float32 product that can be compiled",
)
Result = tuple[torch.Tensor, dict[str, torch.Tensor]]


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """torch_ref, patched in, without the checks of array annotations, which torch.compile cannot trace."""
    finders = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("jaxtyping")]
    monkeypatch.setattr(sys, "meta_path", finders)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_ref"]:
        monkeypatch.delitem(sys.modules, name)
    torch_ref = importlib.import_module("torch_ref")
    torch_ref.FastQwen3MoeModel.pre_patch()
    yield torch_ref
    torch_ref.FastQwen3MoeModel.unpatch()
    torch.compiler.reset()


def one_layer(kind: str, torch_ref: Any, name: str = "plain") -> Any:
    """A model in training: everything frozen but the embeddings, or with adapters, or also with the chunked loss."""
    model = stock(name).train()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.set_experts_implementation("grouped_mm")
    if kind == "frozen":
        model.requires_grad_(False).model.embed_tokens.requires_grad_(True)
        return model
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, **ADAPTED)).train()
    if kind == "chunked":
        torch_ref.FastQwen3MoeModel.for_training(adapted, use_gradient_checkpointing=False)
    return adapted.base_model.model


def compiled(model: torch.nn.Module, _: dict[str, Any]) -> Callable[..., Any]:
    """The default backend would also call a C++ compiler, which takes half a minute."""
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def exported(model: torch.nn.Module, inputs: dict[str, Any]) -> Callable[..., Any]:
    return torch.export.export(model, (), inputs, strict=False).module()


def step(model: torch.nn.Module, call: Callable[..., Any], inputs: dict[str, Any]) -> Result:
    """The loss and the gradients of what is trained."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    loss = call(**inputs).loss
    return loss.detach(), dict(zip(trained, torch.autograd.grad(loss, [*trained.values()]), strict=True))


@pytest.mark.parametrize("kind", ["frozen", "adapters", "chunked"])
@pytest.mark.parametrize("way", [pytest.param(compiled, marks=needs_float32_operator), exported])
def test_a_traced_step_equals_an_eager_one(way: Callable[..., Any], kind: str, unchecked: Any) -> None:
    model = one_layer(kind, unchecked)
    inputs = {"input_ids": IDS, "labels": IDS, "use_cache": False}
    expected_loss, expected = step(model, model, inputs)
    loss, gradients = step(model, way(model, inputs), inputs)
    assert float(loss) == pytest.approx(float(expected_loss), rel=bound("torch_ref_loss"))
    assert len(expected) == (1 if kind == "frozen" else 8)
    for name, gradient in gradients.items():
        assert gradient.any() and distance(gradient, expected[name]) <= bound("torch_ref_fp32"), name


@pytest.mark.parametrize("asked", ["grouped_mm", "batched_mm"])  # transformers decodes with the second
def test_a_traced_pass_without_gradients_equals_an_eager_one(asked: str, unchecked: Any) -> None:
    model = one_layer("adapters", unchecked).eval()
    inputs = {"input_ids": IDS, "use_cache": False}
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_experts_implementation(asked)
        assert distance(compiled(model, inputs)(**inputs).logits, expected) <= bound("torch_ref_fp32")


@pytest.mark.parametrize("way", [compiled, exported])
def test_loop_says_that_it_cannot_be_traced(way: Callable[..., Any], unchecked: Any) -> None:
    model, inputs = one_layer("frozen", unchecked), {"input_ids": IDS, "use_cache": False}
    model.set_experts_implementation("eager")
    with pytest.raises(Exception, match=r"'loop' cannot be compiled as part of a full graph.* use 'grouped'"):
        way(model, inputs)(**inputs)


def test_an_exported_program_takes_other_sizes(unchecked: Any) -> None:
    model = one_layer("frozen", unchecked)
    auto = torch.export.Dim.AUTO
    shapes = {"input_ids": {0: auto, 1: auto}, "use_cache": None}
    inputs = {"input_ids": IDS, "use_cache": False}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False).module()
    other = {"input_ids": torch.arange(33).view(3, 11), "use_cache": False}
    with torch.no_grad():
        assert distance(program(**other).logits, model(**other).logits) <= bound("torch_ref_fp32")


def test_no_kernel_reads_a_tensor_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a tensor can name a GPU that the machine lacks."""
    from torch_ref import kernels

    monkeypatch.setattr(kernels, "SWITCHED_ON", True)
    monkeypatch.setattr(kernels, "programs", object())
    with FakeTensorMode():
        x = torch.empty(4, 8, device="cuda")
    for asked in (kernels.unsupported, kernels.unsupported_activations):
        assert "which tensors have neither in torch.export nor in FakeTensorMode" in str(asked(x))
        assert "the kernels need CUDA, found cpu" in str(asked(torch.ones(4, 8)))


# --- the same on a GPU, with the compiler's default backend and torch_ref's kernels


def losses(model: Any, call: Callable[..., Any], inputs: dict[str, Any]) -> torch.Tensor:
    """The losses of three steps of AdamW on what is trained."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    found = []
    for _ in range(3):
        loss = call(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach().float())
    return torch.stack(found)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=needs_float32_operator), torch.bfloat16])
@pytest.mark.parametrize("kind", ["frozen", "adapters", "chunked"])
def test_compiled_training_on_a_gpu(kind: str, dtype: torch.dtype, unchecked: Any) -> None:
    inputs = {"input_ids": IDS.cuda(), "labels": IDS.cuda(), "use_cache": False}
    eager, model = (one_layer(kind, unchecked, "top_8_of_32").to("cuda", dtype) for _ in range(2))
    call = torch.compile(model, fullgraph=True)
    single = dtype == torch.float32
    expected_loss, expected = step(eager, eager, inputs)
    loss, gradients = step(model, call, inputs)
    assert distance(loss, expected_loss) <= bound("torch_ref_fp32" if single else "torch_ref_gpu_bf16")
    worst = max(distance(gradient, expected[name]) for name, gradient in gradients.items())
    assert worst <= bound("torch_ref_gradients" if single else "torch_ref_gpu_bf16")
    several = distance(losses(model, call, inputs), losses(eager, eager, inputs))
    assert several <= bound("torch_ref_gradients" if single else "torch_ref_gpu_bf16")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["frozen", "adapters"])
def test_compiled_generation_on_a_gpu(kind: str, unchecked: Any) -> None:
    model = one_layer(kind, unchecked, "top_8_of_32").eval().cuda()
    generate = lambda **options: model.generate(IDS.cuda(), max_new_tokens=12, do_sample=False, **options)
    expected = generate()
    # transformers compiles the steps of decoding when the cache is static
    assert torch.equal(generate(cache_implementation="static"), expected)
    model.forward = torch.compile(model.forward, fullgraph=True)
    assert torch.equal(generate(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["frozen", "adapters"])
def test_an_exported_program_on_a_gpu(kind: str, unchecked: Any) -> None:
    model = one_layer(kind, unchecked, "top_8_of_32").to("cuda", torch.bfloat16).eval()
    inputs = {"input_ids": IDS.cuda(), "use_cache": False}
    with torch.no_grad():
        found, expected = exported(model, inputs)(**inputs).logits, model(**inputs).logits
    assert distance(found.float(), expected.float()) <= bound("torch_ref_gpu_bf16")
