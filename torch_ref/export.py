"""Writes a model as an HF folder: with its adapters merged into 16-bit weights, or with its 4-bit weights unchanged.

Experts are written with one key per expert and projection, the layout that transformers 4 and 5 both read; in 4 bit
each has its own nested statistics. Only one layer's tensors exist in 16 bit at a time. The folder appears whole or not
at all, and one process at a time writes it.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from captures.shared import os_error, output_folder
from torch_ref.adapters import LINEAR, inner, split_experts

MAX_SHARD_SIZE = 5 * 10**9  # bytes; transformers' default


def save_pretrained_merged(
    model: Any,
    save_directory: str | os.PathLike[str],
    tokenizer: Any = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Writes `model` with its active adapters merged, in `dtype` (None: the model's), into a new or empty folder.

    W + scale B A is computed in float32, from the decoded weight if it is 4-bit, and rounded once.

    A head that the adapters separate from a tied embedding is written, and tie_word_embeddings is then false.

    Raises:
        ValueError: a folder that is not empty, adapters that are not plain LoRA on linear maps and experts, or a dtype
            other than float32, float16 and bfloat16.
    """
    base = _base(model)
    kinds = {str(config.peft_type.value) for config in getattr(model, "peft_config", {}).values()}
    if others := sorted(kinds - {"LORA"}):
        raise ValueError(f"model: expected plain LoRA, found {others[0]}, which cannot be merged")
    chosen: Any = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or base.dtype
    if chosen not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype: expected bfloat16, float16 or float32, found {dtype!r}")
    changes: dict[str, Any] = {"dtype": _name(chosen)}
    if base.config.tie_word_embeddings and not _is_tied(base):
        changes["tie_word_embeddings"] = False
    _write(base, save_directory, tokenizer, _merged(base, chosen), changes, max_shard_size)


def save_pretrained_4bit(
    model: Any, save_directory: str | os.PathLike[str], tokenizer: Any = None, max_shard_size: int = MAX_SHARD_SIZE
) -> None:
    """Writes a 4-bit `model` without adapters into a new or empty folder, each quantised tensor with its statistics.

    Raises:
        ValueError: a folder that is not empty, a model that is not 4-bit, or one with adapters.
    """
    if isinstance(model, PeftModel) or any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ValueError("model: expected one without adapters, found adapters; save those with save_pretrained")
    if not getattr(model, "is_loaded_in_4bit", False):
        raise ValueError("model: expected one that was loaded in 4 bit, found 16-bit weights")
    routers = [name for name, _ in model.named_modules() if name.endswith(".mlp.gate")]
    settings = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": _name(model.dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head", *routers],
    }
    changes = {"dtype": _name(model.dtype), "quantization_config": settings}
    _write(model, save_directory, tokenizer, _packed(model), changes, max_shard_size)


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _merged(base: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yields every key of the 16-bit layout with its tensor."""
    yield from _own("model.embed_tokens", base.model.embed_tokens, dtype)
    for index, layer in enumerate(base.model.layers):
        at = f"model.layers.{index}"
        for name, module in layer.self_attn.named_children():
            yield from _own(f"{at}.self_attn.{name}", module, dtype)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield from _own(f"{at}.{name}", getattr(layer, name), dtype)
        for name, module in layer.mlp.named_children():
            if name == "experts":
                yield from _merged_experts(f"{at}.mlp.experts", module, dtype)
            elif name != "act_fn":
                yield from _own(f"{at}.mlp.{name}", module, dtype)
    yield from _own("model.norm", base.model.norm, dtype)
    if not _is_tied(base):
        yield from _own("lm_head", base.lm_head, dtype)


def _is_tied(base: Any) -> bool:
    """Whether the head is the embedding: it may be trained apart from it, although the config ties them."""
    head, embedding = _trained(base.lm_head), _trained(base.model.embed_tokens)
    adapted = isinstance(head, LoraLayer) or isinstance(embedding, LoraLayer)
    return base.config.tie_word_embeddings and not adapted and torch.equal(head.weight, embedding.weight)


def _trained(module: Any) -> Any:
    """The copy of a module that is trained in full, or the module itself."""
    return inner(module) if isinstance(module, ModulesToSaveWrapper) else module


def _own(name: str, module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yields weight and bias of one module, with PEFT's adapters merged."""
    module = _trained(module)
    if isinstance(module, BaseTunerLayer) and not isinstance(module, (*LINEAR, ParamWrapper)):
        raise ValueError(f"{name}: expected plain LoRA on a linear map, found {type(module).__qualname__}")
    holder: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
    weight = holder.dequantized(torch.float32) if hasattr(holder, "dequantized") else holder.weight.detach()
    if isinstance(module, LoraLayer):
        weight = weight.float() + _delta(name, module)
    yield f"{name}.weight", weight.to(dtype)
    if getattr(holder, "bias", None) is not None:
        yield f"{name}.bias", holder.bias.detach().to(dtype)


def _delta(name: str, module: LoraLayer) -> Tensor | float:
    """The sum over the active adapters of scale B A, in float32."""
    if any(module.use_dora.values()) or any(module.lora_bias.values()) or module.lora_variant:
        raise ValueError(f"{name}: expected plain LoRA, found a variant that cannot be merged")
    delta: Tensor | float = 0.0
    for adapter in module.active_adapters:
        if adapter in module.lora_A and not (module.merged or module.disable_adapters):
            a, b = (getattr(module, half)[adapter].weight.detach().float() for half in ("lora_A", "lora_B"))
            delta = delta + module.scaling[adapter] * (b @ a)
    return delta


def _merged_experts(name: str, module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    experts, adapters = split_experts(module)
    source: Any = experts
    for stack, projections in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        for expert in range(source.num_experts):
            if hasattr(source, "stack"):
                weight = source.stack(stack).select(slice(expert, expert + 1)).dequantized(torch.float32)[0]
            else:
                weight = getattr(source, stack)[expert].detach()
            for adapter in adapters.get(stack, ()):
                a, b = (half[expert].detach().float() for half in (adapter.lora_A, adapter.lora_B))
                weight = weight.float() + adapter.scale * (b @ a)
            for projection, part in zip(projections, weight.chunk(len(projections)), strict=True):
                yield f"{name}.{expert}.{projection}.weight", part.to(dtype)


def _packed(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every key of the 4-bit layout with its tensor."""
    for name, module in model.named_modules():
        if hasattr(module, "stack"):
            yield from _packed_experts(name, module)
        elif hasattr(module, "gate_up_proj") and hasattr(module, "num_experts"):
            yield from _merged_experts(name, module, model.dtype)
        elif hasattr(module, "dequantized"):
            yield from _with_state(f"{name}.weight", module.weight.data, module.weight.quant_state)
            if module.bias is not None:
                yield f"{name}.bias", module.bias.detach()
        elif not (name == "lm_head" and model.config.tie_word_embeddings):
            for local, parameter in module.named_parameters(recurse=False):
                yield f"{name}.{local}", parameter.detach()


def _packed_experts(name: str, module: Any) -> Iterator[tuple[str, Tensor]]:
    for stack, projections in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        for expert in range(module.num_experts):
            states = module.stack(stack).states(expert, module.dtype)
            for projection, (codes, state) in zip(projections, states, strict=True):
                yield from _with_state(f"{name}.{expert}.{projection}.weight", codes, state)


def _with_state(key: str, codes: Tensor, state: Any) -> Iterator[tuple[str, Tensor]]:
    yield key, codes
    for suffix, value in state.as_dict(packed=True).items():
        yield f"{key}.{suffix}", value


def _write(
    model: Any,
    save_directory: str | os.PathLike[str],
    tokenizer: Any,
    tensors: Iterator[tuple[str, Tensor]],
    changes: dict[str, Any],
    max_shard_size: int,
) -> None:
    with output_folder(save_directory) as folder, torch.no_grad():
        settings = model.config.to_diff_dict() | {"architectures": [type(model).__name__]} | changes
        (folder / "config.json").write_text(json.dumps(settings, indent=2, default=str) + "\n", encoding="utf-8")
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        _write_shards(folder, tensors, max_shard_size)


def _write_shards(folder: pathlib.Path, tensors: Iterator[tuple[str, Tensor]], max_shard_size: int) -> None:
    shards: list[list[str]] = []
    total = used = 0
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        shard = folder / f"shard-{len(shards)}"
        try:
            save_file(pending, shard, metadata={"format": "pt"})
        except SafetensorError as error:  # its text has the cause, such as a full disk
            raise os_error(shard, str(error)) from error
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.itemsize
        if pending and used + size > max_shard_size:
            flush()
            used = 0
        # copied, because slices of a stack share memory, which the format does not allow
        pending[name] = tensor.to("cpu", copy=True).contiguous()
        used += size
        total += size
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
