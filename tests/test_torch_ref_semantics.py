"""What transformers, PEFT and accelerate promise of a model holds for torch_ref's patched classes too."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, dispatch_model
from packaging.version import Version
from peft import AdaLoraConfig, LoraConfig, XLoraConfig, get_peft_model
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.utils.generic import find_labels

import torch_ref.adapters
import torch_ref.experts
from tests.test_torch_ref import distance, patched, stock
from tests.tolerances import bound
from torch_ref import FastQwen3MoeModel
from torch_ref.loss import LogitsNotComputed

IDS = torch.arange(3, 19).view(2, 8)
recent_transformers = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="transformers 5.17 has no such form of the argument"
)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MODULES = ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.self_attn.q_norm", "model.layers.0.mlp")


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """Stock transformers before and after each test."""
    yield
    FastQwen3MoeModel.unpatch()


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, **options).logits


def same(make: Callable[[], torch.Tensor]) -> None:
    """`make` gives the same on stock and on patched classes."""
    expected = make()
    FastQwen3MoeModel.pre_patch()
    assert distance(make(), expected) <= bound("torch_ref_fp32")


# --- losses


def test_the_trainer_finds_the_labels_and_nothing_else() -> None:
    with patched(stock("plain")):
        assert find_labels(modeling_qwen3_moe.Qwen3MoeForCausalLM) == ["labels"]


def test_a_loss_function_of_ones_own() -> None:
    model = stock("plain").train()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum() + vocab_size
    with patched(model):
        for choose in (lambda: model, lambda: FastQwen3MoeModel.for_training(model)):
            out = choose()(IDS, labels=IDS)
            assert float(out.loss.detach()) == pytest.approx(float(out.logits.sum().detach()) + 97)


@pytest.mark.parametrize("use", [torch.sum, lambda x: x[0], lambda x: x.shape, len, lambda x: 2 * x])
def test_logits_that_were_not_computed_say_so(use: Callable[[Any], Any]) -> None:
    model = FastQwen3MoeModel.for_training(stock("plain"))
    with patched(model):
        out = model(IDS, labels=IDS)
        with pytest.raises(LogitsNotComputed, match=r"chose the chunked loss; pass return_logits=True"):
            use(out.logits)
        assert not hasattr(out.logits, "to") and "chunked loss" in repr(out)
        assert len(model(IDS, labels=IDS, return_dict=False)) == 2
        FastQwen3MoeModel.for_training(model, chunked_loss=False)
        assert model(IDS, labels=IDS).logits.shape == (2, 8, 97)


def test_the_chunked_loss_of_a_frozen_head_refuses_a_second_derivative() -> None:
    model = stock("plain").train().requires_grad_(False)
    embedded = model.model.embed_tokens(IDS).requires_grad_()
    with patched(model):
        loss = model(inputs_embeds=embedded, labels=IDS, return_logits=False).loss
        assert torch.autograd.grad(loss, embedded, retain_graph=True)[0].any()
        with pytest.raises(RuntimeError, match="create_graph: torch_ref has no second derivative"):
            torch.autograd.grad(loss, embedded, create_graph=True)


@pytest.mark.parametrize(
    "keep",
    [
        0,
        3,
        torch.tensor([1, 4]),
        pytest.param(torch.tensor([[0, 1], [5, 7]]), marks=recent_transformers),
        pytest.param(torch.arange(16).view(2, 8) % 3 == 0, marks=recent_transformers),
    ],
)
def test_logits_to_keep(keep: Any) -> None:
    model = stock("plain")
    same(lambda: logits(model, logits_to_keep=keep))


@recent_transformers
def test_hidden_states_of_chosen_layers() -> None:
    model = stock("sparse_step_2")
    with patched(model), torch.no_grad():
        every = model(IDS, output_hidden_states=True).hidden_states
        chosen = model(IDS, output_hidden_states=[1, -1]).hidden_states
    assert [x is not None for x in chosen] == [False, True, False, False, True]
    assert torch.equal(chosen[1], every[1]) and torch.equal(chosen[-1], every[-1])


# --- modules and hooks


def test_hooks_see_the_calls_of_transformers() -> None:
    """Every submodule is called in the same order, with the same keywords, and returns the same kind of object."""

    def seen() -> list[tuple[Any, ...]]:
        model, calls = stock("mlp_only_layers"), []
        for name, module in model.named_modules():
            note = lambda _, args, given, out, name=name: calls.append((name, len(args), [*given], type(out).__name__))
            module.register_forward_hook(note, with_kwargs=True)
        with torch.no_grad():
            model(IDS, labels=IDS, num_items_in_batch=5, output_router_logits=True)
        return calls

    expected = seen()
    FastQwen3MoeModel.pre_patch()
    assert seen() == expected


def test_parts_of_other_classes() -> None:
    def rebuilt() -> torch.Tensor:
        model = stock("mlp_only_layers")
        model.model.layers[0].input_layernorm = torch.nn.LayerNorm(48)
        model.model.layers[0].mlp.act_fn = torch.nn.ReLU()
        model.model.layers[1].self_attn.q_norm = torch.nn.Identity()
        model.model.layers[1].mlp.experts.act_fn = torch.nn.GELU()
        model.model.layers[1].mlp.gate.top_k = 4
        return logits(model)

    same(rebuilt)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("return_logits", [True, False])
def test_transforms_of_torch_func(frozen: bool, return_logits: bool) -> None:
    model = stock("plain").train().requires_grad_(not frozen)
    embedded = model.model.embed_tokens(IDS).detach().requires_grad_()
    (expected,) = torch.autograd.grad(model(inputs_embeds=embedded, labels=IDS).loss, embedded)
    with patched(model, "grouped"):
        loss = lambda x: model(inputs_embeds=x, labels=IDS, use_cache=False, return_logits=return_logits).loss
        found = torch.func.grad(loss)(embedded.detach())
        assert distance(found.detach(), expected) <= bound("torch_ref_fp32")


@pytest.mark.parametrize(
    "name", [*MODULES, "model.layers.0", "model.layers.0.mlp.experts", "model.layers.1.self_attn.k_proj"]
)
def test_a_hook_and_an_own_forward_change_the_output(name: str) -> None:
    def steered() -> torch.Tensor:
        model = stock("plain")
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, __, out: out + 1.0)
        forward = module.forward
        module.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 1.5
        return logits(model)

    same(steered)


def test_offloaded_weights_are_loaded(tmp_path: pathlib.Path) -> None:
    FastQwen3MoeModel.pre_patch()
    model = stock("plain")
    expected = logits(model)
    cpu_offload(model.model.layers[0].mlp.experts, execution_device=torch.device("cpu"))
    assert torch.equal(logits(model), expected)
    places: dict[str, Any] = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = stock("plain")
    places |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(len(model.model.layers))}
    dispatch_model(model, places, main_device=torch.device("cpu"), offload_dir=str(tmp_path), force_hooks=True)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(("name", "runs"), [("eager", "loop"), ("grouped_mm", "grouped"), ("batched_mm", "")])
def test_transformers_own_choice_of_implementation(name: str, runs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, used = stock("plain"), []
    model.set_experts_implementation(name)

    def noted(key: str, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *arguments: used.append(key) or function(*arguments)

    own = {key: noted(key, function) for key, function in torch_ref.experts.IMPLEMENTATIONS.items()}
    monkeypatch.setattr(torch_ref.experts, "IMPLEMENTATIONS", own)
    theirs = noted("", batched_mm_experts_forward)
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "batched_mm", theirs)
    same(lambda: logits(model))
    assert used[-1] == runs


def test_an_implementation_of_ones_own_runs_under_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    half = lambda experts, *arguments: 0.5 * batched_mm_experts_forward(experts, *arguments)
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "half", half)

    def halved() -> torch.Tensor:
        model = adapted(LoraConfig(init_lora_weights=False, target_modules=[], target_parameters=EXPERTS))
        model.get_base_model().set_experts_implementation("half")
        return logits(model)

    same(halved)


def test_checkpointing_hooks_a_layer_once_and_its_parts_twice() -> None:
    model, calls = stock("plain").train(), []
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name in ("model.layers.0", "model.layers.0.input_layernorm"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    with patched(model):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert sorted(calls) == ["model.layers.0", *["model.layers.0.input_layernorm"] * 2]


# --- adapters


def adapted(config: Any = None, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(stock("plain"), config or lora()).eval()


def lora() -> LoraConfig:
    return LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def test_batches_that_mix_adapters() -> None:
    FastQwen3MoeModel.pre_patch()
    model = adapted()
    model.add_adapter("other", lora())
    model.eval()
    mixed = logits(model, adapter_names=["other", "__base__"])
    with model.disable_adapter():
        assert distance(mixed[1], logits(model)[1]) <= bound("torch_ref_fp32")
    model.set_adapter("other")
    assert distance(mixed[0], logits(model)[0]) <= bound("torch_ref_fp32")


def test_adalora() -> None:
    same(lambda: logits(adapted(AdaLoraConfig(total_step=10, target_modules=["q_proj"], init_lora_weights=False))))


def test_xlora(tmp_path: pathlib.Path) -> None:
    for seed in (0, 1):
        adapted(seed=seed).save_pretrained(str(tmp_path / str(seed)))
    adapters = {str(seed): str(tmp_path / str(seed)) for seed in (0, 1)}

    def mixed() -> torch.Tensor:
        config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=48, xlora_depth=1, adapters=dict(adapters))
        model = stock("plain")
        model.config.use_cache = False
        torch.manual_seed(2)
        return logits(get_peft_model(model, config).eval())

    same(mixed)
    assert distance(mixed(), logits(adapted(seed=0))) > bound("torch_ref_fp32")


@pytest.mark.parametrize("part", ["", ".lora_A.default", ".lora_B.default", ".lora_dropout.default", ".base_layer"])
@pytest.mark.parametrize("target", ["self_attn.q_proj", "mlp.experts"])
def test_hooks_on_adapters(part: str, target: str) -> None:
    """A hook on A, B or dropout of an expert stack does not fire in PEFT either, which reads the weights."""
    parameters = {"target_modules": [], "target_parameters": EXPERTS}

    def steered() -> torch.Tensor:
        config = LoraConfig(init_lora_weights=False, **parameters) if "experts" in target else lora()
        model = adapted(config)
        module = model.get_submodule(f"base_model.model.model.layers.0.{target}{part}")
        module.register_forward_hook(lambda _, __, out: out + 1.0)
        return logits(model)

    same(steered)


def test_plain_adapters_take_the_fast_form() -> None:
    model = adapted()
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert torch_ref.adapters.is_plain(layer)
    handle = layer.register_forward_hook(lambda *_: None)
    assert not torch_ref.adapters.is_plain(layer)
    handle.remove()
    layer.set_scale("default", 3.0)
    assert torch_ref.adapters.is_plain(layer)
