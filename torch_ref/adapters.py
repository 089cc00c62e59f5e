"""How the replaced forwards apply PEFT's adapters: read from PEFT's modules, computed in the activations' dtype.

PEFT casts activations to the adapter's float32, and adds an expert's delta to a copy of the whole stack. Here
x A^T B^T is computed in the activations' dtype, with A and B split into high and low parts, and added to the product.
The float32 weights and the files remain PEFT's.

This holds for plain LoRA only: PEFT's own classes, on which nobody has put a hook or another forward. Everything else
(DoRA, X-LoRA, AdaLoRA, batches with `adapter_names`, offloaded weights, ...) is called as a module.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora as peft_lora
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook as _any_global_hook

from torch_ref.experts import ExpertAdapter
from torch_ref.low_rank import fold, split_high_low, unfold


def called_alone(module: Any) -> bool:
    """Whether a call of `module` runs its class's forward and nothing else: no hook, no forward of its own."""
    return not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
        or _any_global_hook()
    )


# PEFT's LoRA on a linear map, and on one of bitsandbytes in 4 bit
LINEAR: tuple[type, ...] = (peft_lora.Linear,)
if hasattr(peft_lora, "Linear4bit"):  # PEFT defines it if bitsandbytes is installed
    LINEAR += (peft_lora.Linear4bit,)


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`; LoRA that `is_plain` is computed in x's dtype: W x + b + scale B A dropout(x)."""
    if not isinstance(module, LoraLayer) or not _is_plain_linear(module):
        return module(x)
    y = module.base_layer(x)
    for name in module.active_adapters:
        if name in module.lora_A:
            a, b = _weight(module.lora_A[name]), _weight(module.lora_B[name])
            low = fold(F.linear(module.lora_dropout[name](x), split_high_low(a, x.dtype, 0)), a.shape[0])
            b = split_high_low(b, x.dtype, 1)
            y = add_product(y, unfold(low, b.shape[1]), b, module.scaling[name])
    return y


def add_product(y: Tensor, low: Tensor, b: Tensor, scale: float) -> Tensor:
    """Y + scale low B^T, as one matrix product that rounds once."""
    return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), b.t(), alpha=scale).view(y.shape)


def _is_plain_linear(module: Any) -> bool:
    """Whether `module` is plain LoRA on a linear map, or on the weight of one."""
    if isinstance(module, ParamWrapper):
        known = module.parameter_name == "weight"
    else:
        known = type(module) in LINEAR and not module.fan_in_fan_out
    return known and isinstance(module.base_layer, nn.Linear) and is_plain(module)


def is_plain(module: Any) -> bool:
    """Whether `module`, one of PEFT's own classes, would compute W x + scale B A dropout(x) and nothing else."""
    if type(module) not in (*LINEAR, ParamWrapper) or module.disable_adapters or module.merged:
        return False
    if any(module.use_dora.values()) or any(module.lora_bias.values()) or module.lora_variant:
        return False
    active = [name for name in module.active_adapters if name in module.lora_A]
    halves = [half[name] for half in (module.lora_A, module.lora_B) for name in active]
    # PEFT calls no dropout where it adds to a parameter
    dropouts = [module.lora_dropout[name] for name in active if isinstance(module, ParamWrapper)]
    return all(type(half) is nn.Linear for half in halves) and all(map(called_alone, [module, *halves, *dropouts]))


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def split_experts(module: nn.Module) -> tuple[nn.Module, dict[str, list[ExpertAdapter]]]:
    """The module that holds the expert stacks, and the active adapters of each of its parameters.

    PEFT adds one wrapper for each adapted parameter. A stack adapter is packed as A [E*r, in], expert slowest,
    and B [out, r*E], expert fastest (`ParamWrapper.get_delta_factors`).
    """
    adapters: dict[str, list[ExpertAdapter]] = {}
    while isinstance(module, ParamWrapper | ModulesToSaveWrapper):
        if isinstance(module, ParamWrapper) and not (module.disable_adapters or module.merged):
            found = [_expert_adapter(module, name) for name in module.active_adapters if name in module.lora_A]
            adapters[module.parameter_name] = found
        module = inner(module)
    return module, adapters


def wrapped_plainly(module: nn.Module) -> bool:
    """Whether expert stacks lie under PEFT's wrappers, and `split_experts` says all that a call would compute."""
    if not isinstance(module, ParamWrapper | ModulesToSaveWrapper):
        return False
    while isinstance(module, ParamWrapper | ModulesToSaveWrapper):
        if not (is_plain(module) if isinstance(module, ParamWrapper) else called_alone(module)):
            return False
        module = inner(module)
    return called_alone(module)


def inner(module: ParamWrapper | ModulesToSaveWrapper) -> nn.Module:
    """What one of PEFT's wrappers holds: the module below, or the copy of it that the active adapter trains."""
    if isinstance(module, ParamWrapper):
        return module.base_layer
    copied = not module.disable_adapters and bool(module.active_adapters)
    return module.modules_to_save[module.active_adapters[0]] if copied else module.original_module


def _expert_adapter(module: ParamWrapper, name: str) -> ExpertAdapter:
    experts = module.num_experts
    return ExpertAdapter(
        lora_A=_weight(module.lora_A[name]).unflatten(0, (experts, -1)),
        lora_B=_weight(module.lora_B[name]).unflatten(1, (-1, experts)).permute(2, 0, 1),
        scale=module.scaling[name],
        dropout=module.lora_dropout[name],
    )
