"""LoRA on attention, experts, router and dense MLPs, made by PEFT and saved in its format.

The expert stacks, the router and the dense MLPs are named to PEFT as parameters. Named as modules of this model type,
PEFT would take `gate_proj`, `up_proj` and `down_proj` for the experts of transformers 4.
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

from torch_ref.loss import CHUNKED

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_DENSE = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
_ROUTER = "mlp.gate.weight"
# a name that users may give -> the parameters of a layer that it stands for
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
    """Freezes `model` and adds LoRA adapters of rank `r` to `target_modules`, ready to train with the chunked loss.

    Args:
        model: what `from_pretrained` returned.
        r: rank of every adapter.
        target_modules: names of attention projections; `gate_proj`, `up_proj`, `down_proj` for the MLPs of all layers
            (the experts' gate and up are one stack, so both or neither); `gate` or `router`; `experts`; or
            `experts.gate_up_proj`, `experts.down_proj`.
        lora_alpha: the adapters' product is scaled by alpha / r, or by alpha / sqrt(r) with `use_rslora`.
        lora_dropout: dropout on the input of A. PEFT cannot load adapters of parameters with dropout, so the saved
            configuration says 0 if the experts or dense MLPs are among the targets.
        bias: none, all or lora_only, as in PEFT.
        layers_to_transform: the layers that get adapters; None means all.
        use_gradient_checkpointing: recompute each layer in the backward pass instead of saving its activations;
            "unsloth" also moves the inputs of the layers to the host's memory.
        random_state: seed of the adapters' initial values; the global generator is not changed.
        use_rslora: see `lora_alpha`.
        modules_to_save: modules to train and save whole, such as lm_head.
        options: further fields of PEFT's `LoraConfig`.

    Raises:
        ValueError: an unknown target, one that the model lacks, gate_proj of the experts without up_proj, a layer that
            does not exist, no layer at all, a module to save that the model lacks, dropout on the router, weights that
            are split over processes (`tp_plan`), or an unknown value of `use_gradient_checkpointing`.
    """
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout: expected a probability below 1, found {lora_dropout!r}")
    if getattr(model, "_tp_size", None) not in (None, 1):
        raise ValueError(
            f"model: expected whole weights, found them split over {model._tp_size} processes (tp_plan), "
            "to which PEFT cannot add these adapters; load the model without tp_plan"
        )
    _check_saved(model, modules_to_save or ())
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
    state_logical_shapes(model)
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


def for_training(model: Any, use_gradient_checkpointing: bool | str, chunked_loss: bool = True) -> Any:
    """Puts `model` in training mode, without the cache, and returns it.

    With `chunked_loss` a step with labels never holds the logits of all tokens, and returns none.
    """
    set_gradient_checkpointing(model, use_gradient_checkpointing)
    choose_chunked_loss(model, chunked_loss)
    model.config.use_cache = False
    return model.train()


def choose_chunked_loss(model: Any, chosen: bool) -> None:
    """Decides whether training computes the loss from chunks of logits; `CausalLM_fast_forward` reads it."""
    setattr(base_of(model), CHUNKED, chosen)


def base_of(model: Any) -> Any:
    """The model of transformers, without PEFT's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def set_gradient_checkpointing(model: Any, mode: bool | str) -> None:
    """Turns the recomputation of layers in the backward pass on or off, for a model with or without adapters.

    Raises:
        ValueError: a value other than True, False and "unsloth", or "unsloth" if transformers cannot offload.
    """
    if mode not in (True, False, "unsloth"):
        raise ValueError(f"use_gradient_checkpointing: expected True, False or 'unsloth', found {mode!r}")
    base = base_of(model)
    if not mode:
        for module in base.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
        return
    # earlier versions of transformers have only the second name, and no offloading
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    options = {"offload": True} if mode == "unsloth" and base.device.type == "cuda" else {}
    if options and "offload" not in inspect.signature(enable).parameters:
        raise ValueError("use_gradient_checkpointing: 'unsloth' needs a transformers that offloads activations")
    enable({"use_reentrant": False}, **options)


def state_logical_shapes(model: nn.Module) -> None:
    """Tells PEFT the unpacked shapes of 4-bit parameters: PEFT reads `ds_shape` first, then `shape`."""
    for module in model.modules():
        for name, shape in getattr(module, "packed_shapes", {}).items():
            getattr(module, name).ds_shape = shape


def _layers(model: Any, layers: int | Sequence[int] | None) -> list[int]:
    count = model.config.num_hidden_layers
    chosen = list(range(count)) if layers is None else [layers] if isinstance(layers, int) else list(layers)
    if not chosen:  # PEFT would take all
        raise ValueError("layers_to_transform: expected at least one layer, or None for all, found none")
    for layer in chosen:
        if not 0 <= layer < count:
            raise ValueError(f"layers_to_transform: expected layers from 0 to {count - 1}, found {layer}")
    return chosen


def _check_saved(model: nn.Module, names: Sequence[str]) -> None:
    """Checks `modules_to_save`, whose unknown names PEFT passes over."""
    if isinstance(names, str):
        raise ValueError(f"modules_to_save: expected a list of names, found {names!r}")
    for name in names:
        if not any(f".{path}".endswith(f".{name}") for path, _ in model.named_modules()):
            raise ValueError(f"modules_to_save: expected modules of the model, found {name!r}")


def _targets(model: Any, names: Sequence[str], layers: Sequence[int]) -> tuple[list[str], list[str]]:
    """Attention modules and parameters to adapt; a parameter's name includes its layer if not all layers are chosen."""
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
