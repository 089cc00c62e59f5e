"""LoRA on attention, experts, router and dense MLPs, made by PEFT and saved in its format.

PEFT is told of the fused expert stacks, the router and the dense MLPs as parameters: where `gate_proj`, `up_proj` and
`down_proj` are named as modules of this model type, it takes them for the experts of transformers 4.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft import get_peft_model as make_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_DENSE = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
_ROUTER = "mlp.gate.weight"
# what a user may name -> the parameters of a layer that it stands for
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "gate_up_proj": _EXPERTS[:1],
    "experts.gate_up_proj": _EXPERTS[:1],
    "experts.down_proj": _EXPERTS[1:],
    "experts": _EXPERTS,
    "gate": (_ROUTER,),
    "router": (_ROUTER,),
    "gate_proj": (_EXPERTS[0], _DENSE[0]),
    "up_proj": (_EXPERTS[0], _DENSE[1]),
    "down_proj": (_EXPERTS[1], _DENSE[2]),
    **{name: (name,) for name in (*_EXPERTS, *_DENSE, _ROUTER)},
}
DEFAULT_TARGETS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def get_peft_model(
    model: Any,
    r: int = 16,
    target_modules: Sequence[str] = DEFAULT_TARGETS,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    bias: str = "none",
    layers_to_transform: int | Sequence[int] | None = None,
    use_gradient_checkpointing: bool | str = True,
    random_state: int = 3407,
    use_rslora: bool = False,
    modules_to_save: Sequence[str] | None = None,
    **options: Any,
) -> PeftModel:
    """Freezes `model` and puts LoRA adapters of rank `r` on `target_modules`, ready to train.

    Args:
        model: what `from_pretrained` returned.
        r: rank of every adapter.
        target_modules: names of attention projections; `gate_proj`, `up_proj`, `down_proj` for the MLPs of all layers,
            where gate and up of the experts are one stack and come together; `gate` or `router`; `experts`; or
            `experts.gate_up_proj`, `experts.down_proj`.
        lora_alpha: the adapters' product is scaled by alpha / r, or by alpha / sqrt(r) with `use_rslora`.
        lora_dropout: on the input of A. PEFT cannot load an adapter on parameters with dropout, so where the experts or
            dense MLPs are among the targets, the saved configuration says 0.
        bias: as in PEFT: none, all, lora_only.
        layers_to_transform: the layers that get adapters; None is all.
        use_rslora: see `lora_alpha`.
        use_gradient_checkpointing: recompute each layer in the backward pass instead of keeping its activations;
            "unsloth" holds what the recomputation starts from in the host's memory too.
        random_state: seed of the adapters' first values; the global generator is left as it was.
        modules_to_save: modules to train and save whole, such as lm_head.
        options: further fields of PEFT's `LoraConfig`.

    Raises:
        ValueError: an unknown target, one that the model lacks, gate_proj without up_proj of the experts, a layer that
            does not exist, dropout on the router, or another value of `use_gradient_checkpointing`.
    """
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout: expected a probability below 1, found {lora_dropout!r}")
    layers = _layers(model, layers_to_transform)
    modules, parameters = _targets(model, target_modules, layers)
    if lora_dropout and any(name.endswith(_ROUTER) for name in parameters):
        raise ValueError(
            f"lora_dropout: expected 0 with the router, whose adapter is added to its weight, found {lora_dropout}"
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=0.0 if parameters else lora_dropout,
        bias=bias,  # pyright: ignore[reportArgumentType]
        use_rslora=use_rslora,
        target_modules=modules,
        target_parameters=parameters or None,
        layers_to_transform=None if layers_to_transform is None or not modules else layers,
        modules_to_save=list(modules_to_save) if modules_to_save else None,
        **options,
    )
    for module in model.modules():
        _state_logical_shapes(module)
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(random_state)
        adapted = make_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    if lora_dropout:
        for module in adapted.modules():
            if isinstance(module, LoraLayer):
                for name in module.lora_dropout:
                    module.lora_dropout[name] = nn.Dropout(lora_dropout)
    return for_training(adapted, use_gradient_checkpointing)


def for_training(model: Any, use_gradient_checkpointing: bool | str) -> Any:
    """Training mode without the cache; returns `model`."""
    set_gradient_checkpointing(model, use_gradient_checkpointing)
    model.config.use_cache = False
    return model.train()


def set_gradient_checkpointing(model: Any, mode: bool | str) -> None:
    """Switches the recomputation of layers in the backward pass, for a model with or without adapters.

    Raises:
        ValueError: anything but True, False and "unsloth", or the latter where transformers cannot offload.
    """
    if mode not in (True, False, "unsloth"):
        raise ValueError(f"use_gradient_checkpointing: expected True, False or 'unsloth', found {mode!r}")
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not mode:
        for module in base.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
        return
    # earlier versions of transformers have the other name only, and no offloading
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    options = {"offload": True} if mode == "unsloth" and base.device.type == "cuda" else {}
    if options and "offload" not in inspect.signature(enable).parameters:
        raise ValueError("use_gradient_checkpointing: 'unsloth' needs a transformers that offloads activations")
    enable({"use_reentrant": False}, **options)


def _state_logical_shapes(module: nn.Module) -> None:
    """Tells PEFT the shape that a packed 4-bit parameter stands for: it looks for `ds_shape` first, then at `shape`."""
    for name, shape in getattr(module, "packed_shapes", {}).items():
        getattr(module, name).ds_shape = shape


def _layers(model: Any, layers: int | Sequence[int] | None) -> list[int]:
    count = model.config.num_hidden_layers
    chosen = list(range(count)) if layers is None else [layers] if isinstance(layers, int) else list(layers)
    for layer in chosen:
        if not 0 <= layer < count:
            raise ValueError(f"layers_to_transform: expected layers from 0 to {count - 1}, found {layer}")
    return chosen


def _targets(model: Any, names: Sequence[str], layers: Sequence[int]) -> tuple[list[str], list[str]]:
    """Attention modules and the parameters to adapt, the latter with their layer where not every layer is meant."""
    if isinstance(names, str):
        raise ValueError(f"target_modules: expected a list of names, found {names!r}")
    known = (*ATTENTION, *_PARAMETERS)
    for name in names:
        if name not in known:
            raise ValueError(f"target_modules: expected names among {', '.join(known)}, found {name!r}")
    modules = [name for name in ATTENTION if name in names]
    wanted = dict.fromkeys(parameter for name in names for parameter in _PARAMETERS.get(name, ()))
    present = {
        parameter: [layer for layer in layers if _has(model.model.layers[layer], parameter)] for parameter in wanted
    }
    if ("gate_proj" in names) != ("up_proj" in names) and present.get(_EXPERTS[0]):
        raise ValueError("target_modules: the experts' gate_proj and up_proj are one stack; name both or neither")
    for name in names:
        if name in _PARAMETERS and not any(present[parameter] for parameter in _PARAMETERS[name]):
            raise ValueError(f"target_modules: {name}: the chosen layers of this model have none")
    parameters = []
    for parameter, found in present.items():
        whole = len(layers) == model.config.num_hidden_layers
        parameters += [parameter] if whole and found else [f"model.layers.{layer}.{parameter}" for layer in found]
    return modules, parameters


def _has(layer: nn.Module, parameter: str) -> bool:
    return any(name == parameter for name, _ in layer.named_parameters())
