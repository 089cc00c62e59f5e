"""torch_ref's adapters against PEFT: loss, gradients, files, merges, and what each option means."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoHaConfig, PeftModel, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from peft import LoraConfig as PeftLoraConfig
from transformers import AutoModelForCausalLM

import torch_ref.adapters
import torch_ref.experts
from jaxmoe.config import LoraConfig, expand_targets
from peers.configs import CONFIGS, config_of, random_adapters, random_parameters
from peers.make_checkpoint import TINY, make_checkpoint
from peers.reference import Reference, _pack
from tests.parity import make_batch
from tests.test_torch_ref import distance, inputs_of, patched, stock
from tests.tolerances import bound
from torch_ref import FastQwen3MoeModel as Fast

LAYOUT = [[48], [-3, 30, 15]]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
Result = tuple[float, dict[str, np.ndarray]]


def lora_of(name: str) -> LoraConfig:
    """Adapters on everything that the model has."""
    config = config_of(name)
    groups = [*(["router", "experts"] if config.sparse_layers else []), *(["dense"] if config.dense_layers else [])]
    return LoraConfig(r=3, alpha=5.0, targets=expand_targets(["attention", *groups]))


def targets_of(name: str) -> list[str]:
    """The same under torch_ref's names."""
    config = config_of(name)
    router = ["gate"] if config.sparse_layers else []
    return [*ATTENTION, "gate_proj", "up_proj", "down_proj", *router]


def adapted(name: str, **options: Any) -> tuple[Reference, Any]:
    """A model with torch_ref's adapters, filled with random numbers."""
    reference = Reference(CONFIGS[name], random_parameters(config_of(name)))
    settings = {"r": 3, "lora_alpha": 5, "target_modules": targets_of(name)} | options
    model = Fast.get_peft_model(reference.model, **settings)
    arrays = random_adapters(config_of(name), lora_of(name))
    with torch.no_grad():
        for path, slot, parameter, experts in reference._adapter_parameters():
            parameter.copy_(_pack(torch.from_numpy(arrays[path][slot]), path, experts))
    return reference, model


def gradients(reference: Reference, name: str) -> Result:
    batch = make_batch(config_of(name), LAYOUT)
    return reference.loss_and_gradients(
        batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids, aux_coef=0.5
    )


def expected_gradients(name: str) -> Result:
    adapters = random_adapters(config_of(name), lora_of(name))
    model = Reference(CONFIGS[name], random_parameters(config_of(name)), lora=lora_of(name), adapters=adapters)
    return gradients(model, name)


def check(found: Result, expected: Result) -> None:
    """The parity that every test of gradients asserts, negative controls included."""
    assert found[0] == pytest.approx(expected[0], rel=bound("parity_loss"))
    assert found[1].keys() == expected[1].keys()
    for path, stack in expected[1].items():
        for layer, gradient in enumerate(stack):
            error = np.linalg.norm(found[1][path][layer] - gradient) / np.linalg.norm(gradient)
            assert error <= bound("torch_ref_gradients"), f"{path}[{layer}]: {error:.1e}"


NAMES = ("plain", "top_8_of_32", "sparse_step_2", "attention_bias", "every_expert", "all_dense")


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_those_of_peft(name: str) -> None:
    expected = expected_gradients(name)
    for implementation in torch_ref.experts.IMPLEMENTATIONS:
        reference, _ = adapted(name)
        with patched(reference.model, implementation):
            check(gradients(reference, name), expected)


def test_odd_sizes_equal_peft() -> None:
    reference, _ = adapted("odd_sizes")
    with patched(reference.model, "loop"):
        check(gradients(reference, "odd_sizes"), expected_gradients("odd_sizes"))


def forget_the_scale(patch: pytest.MonkeyPatch) -> None:
    real = torch_ref.adapters._expert_adapter

    def wrong(module: Any, name: str) -> Any:
        adapter = real(module, name)
        return torch_ref.experts.ExpertAdapter(adapter.lora_A, adapter.lora_B, 1 / 3, adapter.dropout)

    patch.setattr(torch_ref.adapters, "_expert_adapter", wrong)


def reverse_the_experts(patch: pytest.MonkeyPatch) -> None:
    real = torch_ref.adapters._expert_adapter

    def wrong(module: Any, name: str) -> Any:
        adapter = real(module, name)
        return torch_ref.experts.ExpertAdapter(adapter.lora_A, adapter.lora_B.flip(0), adapter.scale, adapter.dropout)

    patch.setattr(torch_ref.adapters, "_expert_adapter", wrong)


def detach_the_experts(patch: pytest.MonkeyPatch) -> None:
    real = torch_ref.experts._aligned
    patch.setattr(torch_ref.experts, "_aligned", lambda *a: tuple(x.detach() + 0 * x for x in real(*a)))


def forget_attention(patch: pytest.MonkeyPatch) -> None:
    def wrong(module: Any, x: torch.Tensor) -> torch.Tensor:
        base = module.get_base_layer() if hasattr(module, "lora_A") else module
        return base(x) + (0 * sum(p.sum() for p in module.parameters()) if base is not module else 0)

    patch.setattr("torch_ref.patch.linear", wrong)


@pytest.mark.parametrize("fault", [forget_the_scale, reverse_the_experts, detach_the_experts, forget_attention])
def test_a_planted_fault_is_found(fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = expected_gradients("plain")
    reference, _ = adapted("plain")
    with patched(reference.model, "grouped"):
        check(gradients(reference, "plain"), expected)
        fault(monkeypatch)
        with pytest.raises(AssertionError):
            check(gradients(reference, "plain"), expected)


@pytest.fixture
def training() -> Iterator[tuple[dict[str, Any], Any]]:
    reference, model = adapted("sparse_step_2")
    with patched(reference.model):
        inputs = inputs_of("sparse_step_2", packed=False)
        yield inputs | {"labels": inputs["input_ids"]}, model


def test_a_second_forward_gives_the_same(training: tuple[dict[str, Any], Any]) -> None:
    inputs, model = training
    losses = []
    for _ in range(3):
        loss = model(**inputs, output_router_logits=True).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1] == losses[2]


def test_training_changes_every_adapter_and_nothing_else() -> None:
    name = "sparse_step_2"
    model = Fast.get_peft_model(stock(name), r=2, target_modules=targets_of(name))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    inputs = inputs_of(name, packed=False)
    with patched(model):
        for _ in range(2):
            out = model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
            assert len(out.router_logits) == 1 and out.aux_loss > 0
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) == ("lora_" not in n), n


def test_adapters_are_read_by_peft(tmp_path: pathlib.Path) -> None:
    _, model = adapted("sparse_step_2")
    inputs = inputs_of("sparse_step_2", packed=False)
    with patched(model), torch.no_grad():
        expected = model.eval()(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(stock("sparse_step_2"), str(tmp_path))
    with torch.no_grad():
        assert distance(loaded(**inputs).logits, expected) <= bound("torch_ref_fp32")
        assert distance(stock("sparse_step_2")(**inputs).logits, expected) > 0.1
    keys = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"} <= set(keys["target_parameters"])


@pytest.mark.parametrize("shard", [10**9, 20_000])
def test_merged_models_are_read_by_transformers(tmp_path: pathlib.Path, shard: int) -> None:
    _, model = adapted("sparse_step_2", modules_to_save=["lm_head"])
    inputs = inputs_of("sparse_step_2", packed=False)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
        with patched(model):
            expected = model.eval()(**inputs).logits
        Fast.save_pretrained_merged(model, tmp_path / "merged", max_shard_size=shard)
        merged = AutoModelForCausalLM.from_pretrained(
            tmp_path / "merged", attn_implementation="eager", use_safetensors=True, trust_remote_code=False
        )
        assert distance(merged(**inputs).logits, expected) <= bound("torch_ref_fp32")
    assert (tmp_path / "merged" / "model.safetensors.index.json").exists() == (shard == 20_000)
    with pytest.raises(ValueError, match="expected a new or empty folder, found one with files in it"):
        Fast.save_pretrained_merged(model, tmp_path / "merged")


TIED = TINY.replace(tie_word_embeddings=True)


def loaded(folder: pathlib.Path) -> Any:
    options: dict[str, Any] = {"dtype": "float32", "device_map": "cpu", "load_in_4bit": False, "fix_tokenizer": False}
    return Fast.from_pretrained(str(folder), **options)[0]


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "lm_head"]},
        {"trainable_token_indices": [1, 2]},
    ],
    ids=["head", "embedding", "both", "LoRA on the head", "tokens"],
)
def test_a_head_that_is_trained_apart_from_its_embedding_is_merged(
    options: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    fields: dict[str, Any] = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    settings = PeftLoraConfig(**(fields | options))
    model: Any = get_peft_model(loaded(make_checkpoint(tmp_path / "base", TIED)), settings)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += torch.linspace(0, 1, parameter.numel()).view(parameter.shape) / 10
        expected = model(input_ids=ids).logits
        Fast.save_pretrained_merged(model, tmp_path / "merged")
        assert distance(loaded(tmp_path / "merged")(input_ids=ids).logits, expected) <= bound("torch_ref_fp32")
    raw = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert raw["tie_word_embeddings"] == ("ensure_weight_tying" in options or "trainable_token_indices" in options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PeftLoraConfig(target_modules=["embed_tokens"]), "model.embed_tokens: expected plain LoRA .* found Embedding"),
        (LoHaConfig(target_modules=["q_proj"]), "model: expected plain LoRA, found LOHA"),
        (PromptTuningConfig(num_virtual_tokens=2), "model: expected plain LoRA, found PROMPT_TUNING"),
    ],
)
def test_adapters_that_cannot_be_merged_are_named(settings: Any, message: str, tmp_path: pathlib.Path) -> None:
    settings.task_type = "CAUSAL_LM"
    model = get_peft_model(loaded(make_checkpoint(tmp_path / "base", TINY)), settings)
    with pytest.raises(ValueError, match=message):
        Fast.save_pretrained_merged(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_merge_rounds_once(tmp_path: pathlib.Path) -> None:
    _, model = adapted("plain")
    base: Any = model.get_base_model()
    weight = base.model.layers[0].self_attn.q_proj.base_layer.weight
    layer = base.model.layers[0].self_attn.q_proj
    exact = weight + 5 / 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    for wrong in (torch.int8, "int8"):
        with pytest.raises(ValueError, match=r"dtype: expected bfloat16, float16 or float32, found .*int8"):
            Fast.save_pretrained_merged(model, tmp_path / "merged", dtype=wrong)
    Fast.save_pretrained_merged(model, tmp_path / "merged", dtype="bfloat16")
    merged = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.bfloat16, use_safetensors=True, trust_remote_code=False
    )
    found = merged.model.layers[0].self_attn.q_proj.weight
    assert (found == exact.bfloat16()).float().mean() > 0.999


def trainable(model: PeftModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_layers_to_transform() -> None:
    model = Fast.get_peft_model(
        stock("sparse_step_2"), r=2, target_modules=targets_of("sparse_step_2"), layers_to_transform=[1, 2]
    )
    layers = {name.split("layers.")[1].split(".")[0] for name in trainable(model)}
    kinds = {name.split("layers.")[1].split(".")[2] for name in trainable(model)}
    assert layers == {"1", "2"} and kinds >= {"experts", "gate", "up_proj", "q_proj"}
    with pytest.raises(ValueError, match="layers_to_transform: expected layers from 0 to 3, found 4"):
        Fast.get_peft_model(stock("sparse_step_2"), layers_to_transform=4)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 12 / 4), (True, 12 / 2)])
def test_the_scale(rslora: bool, scale: float) -> None:
    model: Any = Fast.get_peft_model(stock("plain"), r=4, lora_alpha=12, use_rslora=rslora)
    _, adapters = torch_ref.adapters.split_experts(model.get_base_model().model.layers[0].mlp.experts)
    assert {a.scale for found in adapters.values() for a in found} == {scale} and len(adapters) == 2


def test_the_seed_decides_and_leaves_the_generator_alone() -> None:
    def first(seed: int) -> torch.Tensor:
        model = stock("plain")
        state = torch.get_rng_state()
        adapted = Fast.get_peft_model(model, r=2, random_state=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return next(p for n, p in adapted.named_parameters() if "lora_A" in n)

    a, b, c = first(1), first(1), first(2)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_dropout_acts_in_training_only() -> None:
    _, model = adapted("plain", lora_dropout=0.5, target_modules=[*ATTENTION, "experts"])
    plain, _ = adapted("plain", target_modules=[*ATTENTION, "experts"])
    inputs = inputs_of("plain", packed=False)
    with patched(model), torch.no_grad():
        assert distance(model.train()(**inputs).logits, model(**inputs).logits) > 1e-3
        expected = plain.model.eval()(**inputs).logits
        assert distance(model.eval()(**inputs).logits, expected) <= bound("torch_ref_fp32")
    for implementation in torch_ref.experts.IMPLEMENTATIONS:  # the whole input is dropped, so only the base remains
        dropped, adapters = adapted("plain", lora_dropout=1 - 1e-9, target_modules=["experts"])
        with patched(dropped.model, implementation), torch.no_grad():
            found = adapters.train()(**inputs).logits
            assert distance(found, stock("plain")(**inputs).logits) <= bound("torch_ref_fp32")


def test_biases() -> None:
    model = Fast.get_peft_model(stock("attention_bias"), r=2, target_modules=["q_proj"], bias="lora_only")
    assert any(name.endswith("q_proj.base_layer.bias") for name in trainable(model))
    assert not any(name.endswith("k_proj.bias") for name in trainable(model))


def test_disabled_and_merged_adapters(training: tuple[dict[str, Any], Any]) -> None:
    inputs, model = training
    model.eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        with model.disable_adapter():
            assert distance(model(**inputs).logits, stock("sparse_step_2")(**inputs).logits) <= bound("torch_ref_fp32")
        model.merge_adapter()
        assert distance(model(**inputs).logits, expected) <= bound("torch_ref_fp32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["wq"]}, "target_modules: expected names among .*, found 'wq'"),
        ({"target_modules": "all-linear"}, "target_modules: expected a list of names, found 'all-linear'"),
        ({"target_modules": ["gate_proj"]}, "target_modules: the experts' gate_proj and up_proj are one stack"),
        ({"target_modules": ["mlp.up_proj.weight"]}, "mlp.up_proj.weight: the chosen layers of this model have none"),
        ({"target_modules": ["gate"], "lora_dropout": 0.1}, "lora_dropout: expected 0 with the router"),
        ({"lora_dropout": 1.5}, "lora_dropout: expected a probability below 1, found 1.5"),
        ({"layers_to_transform": []}, "layers_to_transform: expected at least one layer"),
        ({"modules_to_save": "lm_head"}, "modules_to_save: expected a list of names, found 'lm_head'"),
        ({"modules_to_save": ["lm_heads"]}, "modules_to_save: expected modules of the model, found 'lm_heads'"),
        ({"use_gradient_checkpointing": "always"}, "use_gradient_checkpointing: expected True, False or 'unsloth'"),
    ],
)
def test_what_cannot_be_honoured_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fast.get_peft_model(stock("plain"), **options)


@pytest.mark.parametrize("mode", [True, False, "unsloth"])
def test_gradient_checkpointing(mode: bool | str) -> None:
    model = Fast.get_peft_model(stock("plain"), r=2, use_gradient_checkpointing=mode)
    base: Any = model.get_base_model()
    assert all(layer.gradient_checkpointing == bool(mode) for layer in base.model.layers)
    assert model.training and not model.config.use_cache
    Fast.for_inference(model)
    assert not any(layer.gradient_checkpointing for layer in base.model.layers) and not model.training
    assert Fast.for_training(model).training and base.model.layers[0].gradient_checkpointing


# --- adapters in 16 bits


def applied_matrix(path: str, a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """The matrix that a bfloat16 path applies to rows: least squares over so many that their rounding averages out."""
    x = torch.randn(4096, a.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    if path == "linear map":
        layers = torch.nn.Sequential(torch.nn.Linear(a.shape[1], b.shape[0], bias=False, dtype=torch.bfloat16))
        peft = PeftLoraConfig(r=a.shape[0], lora_alpha=a.shape[0], target_modules=["0"])
        module: Any = inject_adapter_in_model(peft, layers)[0]  # pyright: ignore[reportIndexIssue]
        with torch.no_grad():
            module.base_layer.weight.zero_()
            module.lora_A["default"].weight = torch.nn.Parameter(a)
            module.lora_B["default"].weight = torch.nn.Parameter(b)
        y = torch_ref.adapters.linear(module, x)
    else:
        adapter = torch_ref.experts.ExpertAdapter(
            torch.stack([a + 1, a]), torch.stack([b + 1, b]), 1.0, torch.nn.Identity()
        )
        zeros = torch_ref.experts.DenseStack(torch.zeros(2, b.shape[0], a.shape[1], dtype=torch.bfloat16))
        projection = torch_ref.experts.Projection(zeros, [adapter])
        ends = torch.tensor([0, len(x)], dtype=torch.int32)
        every = torch.ones(len(x), dtype=torch.int64)
        y = projection.linear(x, 1) if path == "loop" else projection.grouped_linear(x, ends, every)
    return np.linalg.lstsq(x.double().numpy(), y.detach().double().numpy(), rcond=None)[0].T


@pytest.mark.parametrize("rank", [3, 16])
@pytest.mark.parametrize("path", ["linear map", "loop", "grouped"])
def test_adapters_are_not_rounded_to_16_bits(path: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(rank, 64, generator=generator), torch.randn(128, rank, generator=generator)
    exact = (b.double() @ a.double()).numpy()

    def error() -> float:
        return float(np.linalg.norm(applied_matrix(path, a, b) - exact) / np.linalg.norm(exact))

    assert error() <= bound("applied_adapter")
    for module in (torch_ref.adapters, torch_ref.experts):
        monkeypatch.setattr(module, "split_high_low", lambda weight, dtype, rank_dim: weight.to(dtype))
    assert error() > 3 * bound("applied_adapter")
