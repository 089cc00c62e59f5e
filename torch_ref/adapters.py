"""How the replaced forwards apply PEFT's adapters: read from PEFT's modules, computed in the activations' dtype.

PEFT casts activations to the adapter's float32, and adds an expert's delta to a copy of the whole stack. Here
x A^T B^T is computed in the activations' dtype, with A and B split into high and low parts, and added to the product.
The float32 weights and the files remain PEFT's.
"""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional as F

from torch_ref.experts import ExpertAdapter
from torch_ref.low_rank import fold, split_high_low, unfold


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, with LoRA computed in x's dtype: W x + b + scale B A dropout(x).

    PEFT's own forward runs wherever this is not plain LoRA on a linear map: DoRA, a trained bias, a merged or disabled
    adapter.
    """
    if not isinstance(module, LoraLayer) or not _factored(module):
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


def _factored(module: LoraLayer) -> bool:
    special = any(module.use_dora.values()) or any(module.lora_bias.values()) or module.lora_variant
    return isinstance(module.base_layer, nn.Linear) and not (module.disable_adapters or module.merged or special)


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
        if isinstance(module, ModulesToSaveWrapper):
            copied = not module.disable_adapters and bool(module.active_adapters)
            module = module.modules_to_save[module.active_adapters[0]] if copied else module.original_module
            continue
        if not (module.disable_adapters or module.merged):
            found = [_expert_adapter(module, name) for name in module.active_adapters if name in module.lora_A]
            adapters[module.parameter_name] = found
        module = module.base_layer
    return module, adapters


def _expert_adapter(module: ParamWrapper, name: str) -> ExpertAdapter:
    experts = module.num_experts
    return ExpertAdapter(
        lora_A=_weight(module.lora_A[name]).unflatten(0, (experts, -1)),
        lora_B=_weight(module.lora_B[name]).unflatten(1, (-1, experts)).permute(2, 0, 1),
        scale=module.scaling[name],
        dropout=module.lora_dropout[name],
    )
