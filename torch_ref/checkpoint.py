"""Reads HF checkpoints tensor by tensor into a model whose experts, attention and dense MLPs may be 4-bit.

A tensor is read, quantised on its device and released before the next one is read, so the 16-bit model never exists as
a whole. Both layouts of the experts are read: one key per expert and projection, or fused stacks. Tensors that are
already quantised keep their bytes.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from torch_ref.export import save_pretrained_4bit
from torch_ref.lora import state_logical_shapes
from torch_ref.quantize import (
    Experts4bit,
    Linear4bit,
    PackedStack,
    QuantState,
    State,
    decode,
    get_4bit_type,
    quantize,
    same_form,
)
from torch_ref.shards import Shards, local_folder
from torch_ref.strangers import naming

logger = logging.getLogger(__name__)

_STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_STATE = "quant_state.bitsandbytes__"
_AUTOMATIC = ("sequential", "auto", "balanced", "balanced_low_0")


class Reader(Shards):
    """The tensors of a folder, some of them in bitsandbytes' 4 bit."""

    def rows(self, key: str, expert: int, rows: slice) -> Tensor:
        """Some rows of the matrix of one expert, from a fused stack."""
        self._unread.discard(key)
        return self._files[key].get_slice(key)[expert, rows]

    def quantized(self, key: str) -> bool:
        """Whether `key` is stored in bitsandbytes' 4 bit."""
        return any(f"{key}.{_STATE}{kind}" in self for kind in ("nf4", "fp4"))

    def read_quantized(self, key: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, State]:
        """Codes [bytes, 1] in uint8 and statistics of `key`, which decode to `dtype`.

        Raises:
            ValueError: statistics that bitsandbytes cannot read, or that do not belong to as many codes.
        """
        names = [f"{key}.{name}" for name in (*_STATISTICS, f"{_STATE}nf4", f"{_STATE}fp4")]
        with naming(self.folder, f"statistics of {key}"):
            state = QuantState.from_dict({name: self.read(name) for name in names if name in self}, device)
            get_4bit_type(state.quant_type, device="cpu")
            elements = state.shape.numel()
            blocks = -(-elements // state.blocksize)
        # bitsandbytes may call the bytes another dtype (bnb_4bit_quant_storage)
        packed = self.read(key).flatten().view(torch.uint8)[:, None].to(device)
        where = f"{self.folder}: {key}"
        _check(where, tuple(packed.shape), (-(-elements // 2), 1))
        _check(f"{where}.absmax", tuple(state.absmax.shape), (blocks,))
        if state.nested:
            _check(f"{where}.nested_absmax", tuple(state.state2.absmax.shape), (-(-blocks // state.state2.blocksize),))
        state.dtype = dtype
        return packed, state

    def read_dense(self, key: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The tensor `key` in `dtype`, decoded if it is quantised."""
        if self.quantized(key):
            return decode(*self.read_quantized(key, device, dtype), dtype)
        return self.read(key).to(device, dtype)


def load_4bit(
    model_class: Any,
    model_name: str | os.PathLike[str],
    config: Any,
    dtype: torch.dtype,
    device_map: Any,
    token: str | None = None,
    attn_implementation: str | None = None,
) -> Any:
    """Loads a checkpoint with 4-bit attention, MLPs and experts; router, embeddings, norms and head in `dtype`.

    A checkpoint quantised by bitsandbytes keeps its form: its 16-bit tensors stay in 16 bit, with a warning if experts
    are among them.

    Raises:
        ValueError: another quantisation, missing or unexpected keys, or a device map that is not supported.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        check_stored_quantization(model_name, stored)
        del config.quantization_config
    folder = local_folder(model_name, token)
    reader = Reader(folder)
    if stored is None:
        reader.check_plain()
    model = build_4bit(
        model_class, config, reader, dtype, device_map, attn_implementation, quantize_weights=stored is None
    )
    reader.check_all_read()
    if (folder / "generation_config.json").is_file():
        with naming(folder, "a generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = str(model_name)
    model.name_or_path = str(model_name)
    # transformers' own method would write the packed stacks as if they were weights
    model.save_pretrained = functools.partial(save_pretrained_4bit, model)
    return model


def build_4bit(
    model_class: Any,
    config: Any,
    reader: Reader,
    dtype: torch.dtype,
    device_map: Any,
    attn_implementation: str | None = None,
    *,
    quantize_weights: bool,
) -> Any:
    """The model of `config` with the tensors of `reader`, in evaluation mode.

    Raises:
        ValueError: missing tensors, tensors of the wrong shape, or a device map that is not supported.
    """
    attention = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=dtype, **attention)
    devices = place(model, device_map)
    _fill(model, reader, dtype, lambda name: device_of(devices, name), quantize_weights=quantize_weights)
    model.tie_weights()
    if len(set(devices.values())) > 1:
        from accelerate import dispatch_model

        dispatch_model(model, devices)
    state_logical_shapes(model)  # for an adapter that PEFT loads
    model.is_loaded_in_4bit = True  # PEFT reads this
    return model.eval()


def check_stored_quantization(model_name: str | os.PathLike[str], stored: Any) -> None:
    """Raises a ValueError unless `stored`, the quantization_config of a model, describes bitsandbytes' 4 bit."""
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    is_4bit = settings.get("load_in_4bit") or settings.get("_load_in_4bit")
    if settings.get("quant_method", "bitsandbytes") != "bitsandbytes" or not is_4bit:
        found = settings.get("quant_method", "another quantisation")
        found = f"{found} in another form" if found in ("bitsandbytes", "fp8") else found
        raise ValueError(f"{model_name}: quantization_config: expected bitsandbytes in 4 bit, found {found}")


def _fill(
    model: Any,
    reader: Reader,
    dtype: torch.dtype,
    device_of_module: Callable[[str], torch.device],
    *,
    quantize_weights: bool,
) -> None:
    """Replaces every parameter of `model`, which is on the meta device, with the checkpoint's tensors."""
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    sixteen_bit_experts = False
    for name, module in list(model.named_modules()):
        device = device_of_module(name)
        if hasattr(module, "gate_up_proj") and hasattr(module, "down_proj"):
            experts = _experts(module, name, reader, dtype, device, quantize_weights)
            sixteen_bit_experts |= experts is module
            if experts is not module:
                model.set_submodule(name, experts)
            continue
        key = f"{name}.weight"
        if ".layers." in name and isinstance(module, nn.Linear) and (quantize_weights or reader.quantized(key)):
            bias = _parameter(reader.read_dense(f"{name}.bias", device, dtype)) if module.bias is not None else None
            if reader.quantized(key):
                packed, state = reader.read_quantized(key, device, dtype)
            else:
                packed, state = quantize(reader.read_dense(key, device, dtype), dtype)
            _check(f"{reader.folder}: {key}", tuple(state.shape), (module.out_features, module.in_features))
            model.set_submodule(name, Linear4bit.packed(packed, state, bias))
            continue
        if hasattr(module, "original_inv_freq"):
            # No checkpoint holds these buffers: they are computed again, on the real device.
            rotary: Any = type(module)
            model.set_submodule(name, rotary(config=model.config).to(device))
            continue
        for local, parameter in list(module.named_parameters(recurse=False)):
            key = f"{name}.{local}"
            if key in tied and key not in reader:
                continue
            value = reader.read_dense(key, device, dtype)
            _check(f"{reader.folder}: {key}", tuple(value.shape), tuple(parameter.shape))
            setattr(module, local, _parameter(value, parameter.requires_grad))
    if sixteen_bit_experts and not quantize_weights:
        logger.warning("%s: the experts are stored in 16 bit and stay in 16 bit", reader.folder)


def _parameter(value: Tensor, requires_grad: bool = False) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=requires_grad)


def _check(key: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise ValueError(f"{key}: expected the shape {list(expected)}, found {list(found)}")


def _experts(
    module: Any, name: str, reader: Reader, dtype: torch.dtype, device: torch.device, quantize_weights: bool
) -> nn.Module:
    """The experts of one layer: a 4-bit module, or `module` itself with its weights if they stay in 16 bit."""
    quantized = reader.quantized(f"{name}.0.gate_proj.weight")
    stacks = {}
    for stack, projections in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        shape = getattr(module, stack).shape
        if quantized:
            parts = _stored_parts(name, projections, reader, dtype, device, shape)
            stacks[stack] = PackedStack.from_parts(parts, shape)
        elif quantize_weights:
            dense = _dense_parts(name, stack, projections, reader, dtype, device, shape)
            parts = ((expert, part, *quantize(weight, dtype)) for expert, part, weight in dense)
            stacks[stack] = PackedStack.from_parts(parts, shape)
        else:
            whole = torch.empty(shape, dtype=dtype, device=device)
            rows = shape[1] // len(projections)
            for expert, part, weight in _dense_parts(name, stack, projections, reader, dtype, device, shape):
                whole[expert, part * rows : (part + 1) * rows] = weight
            setattr(module, stack, _parameter(whole, True))
    if not stacks:
        return module
    config = getattr(module, "config", None)
    return Experts4bit(stacks["gate_up_proj"], stacks["down_proj"], module.act_fn, dtype, config)


def _stored_parts(
    name: str,
    projections: tuple[str, ...],
    reader: Reader,
    dtype: torch.dtype,
    device: torch.device,
    shape: torch.Size,
) -> Iterator[tuple[int, int, Tensor, State]]:
    first: State = None
    for expert in range(shape[0]):
        for part, projection in enumerate(projections):
            key = f"{name}.{expert}.{projection}.weight"
            if not reader.quantized(key):
                raise ValueError(
                    f"{reader.folder}: {key}: expected 4 bit, as for the first expert, found 16 bit or no tensor"
                )
            packed, state = reader.read_quantized(key, device, dtype)
            _check(f"{reader.folder}: {key}", tuple(state.shape), (shape[1] // len(projections), shape[2]))
            first = first or state
            if not same_form(state, first):
                raise ValueError(
                    f"{reader.folder}: {key}: expected the quantisation of the first expert, found other settings"
                )
            yield expert, part, packed, state


def _dense_parts(
    name: str,
    stack: str,
    projections: tuple[str, ...],
    reader: Reader,
    dtype: torch.dtype,
    device: torch.device,
    shape: torch.Size,
) -> Iterator[tuple[int, int, Tensor]]:
    """Yields (expert, part, 16-bit weight) from either layout."""
    rows = shape[1] // len(projections)
    fused = f"{name}.{stack}"
    for expert in range(shape[0]):
        for part, projection in enumerate(projections):
            key = f"{name}.{expert}.{projection}.weight"
            if fused in reader:
                weight = reader.rows(fused, expert, slice(part * rows, (part + 1) * rows)).to(device, dtype)
            else:
                weight = reader.read_dense(key, device, dtype)
            _check(f"{reader.folder}: {key}", tuple(weight.shape), (rows, shape[2]))
            yield expert, part, weight


def place(model: Any, device_map: Any) -> dict[str, Any]:
    """The device of each module as `device_map` says; the name "" stands for all modules.

    Raises:
        ValueError: an unknown map, a device that does not exist, or a model that does not fit on the GPUs.
    """
    if device_map is None:
        device_map = "cpu"
    if isinstance(device_map, dict):
        devices = {name: _device(device) for name, device in device_map.items()}
    elif isinstance(device_map, str) and device_map in _AUTOMATIC:
        count = torch.cuda.device_count()
        devices = _spread(model, device_map) if count > 1 else {"": _device("cuda:0" if count else "cpu")}
    else:
        devices = {"": _device(device_map)}
    for name, _ in model.named_parameters():
        if not any(_covers(prefix, name) for prefix in devices):
            raise ValueError(f"device_map: expected a device for every module, found none for {name}")
    return devices


def device_of(devices: dict[str, torch.device], name: str) -> torch.device:
    """The device of the longest entry of `devices` that covers the module `name`; the first one if none does."""
    prefixes = [prefix for prefix in devices if _covers(prefix, name)]
    return devices[max(prefixes, key=len)] if prefixes else next(iter(devices.values()))


def _covers(prefix: str, name: str) -> bool:
    return prefix in ("", name) or name.startswith(prefix + ".")


def _device(device: Any) -> torch.device:
    try:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError):
        expected = ", ".join(_AUTOMATIC)
        raise ValueError(f"device_map: expected {expected}, a device or a dictionary, found {device!r}") from None
    if found.type not in ("cpu", "cuda") or (found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device_map: expected a CPU or one of {torch.cuda.device_count()} GPUs, found {device!r}")
    return found


def _spread(model: Any, device_map: str) -> dict[str, Any]:
    """Spreads layers over several GPUs with accelerate, which is told the size of the 4-bit weights."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import CustomDtype, get_balanced_memory

    packed = {
        f"{name}.{local}"
        for name, module in model.named_modules()
        for local, _ in module.named_parameters(recurse=False)
        if (".layers." in name and isinstance(module, nn.Linear) and local == "weight") or hasattr(module, "down_proj")
    }
    known: dict[str, Any] = {
        "no_split_module_classes": list(model._no_split_modules),
        "special_dtypes": dict.fromkeys(packed, CustomDtype.INT4),
        "dtype": model.dtype,
    }
    memory = None
    if device_map != "sequential":
        memory = get_balanced_memory(model, low_zero=device_map == "balanced_low_0", **known)
    found = infer_auto_device_map(model, max_memory=memory, **known)
    if any(device in ("cpu", "disk") for device in found.values()):
        raise ValueError(
            f"device_map: expected a model that fits on the GPUs; {device_map!r} would place parts of it elsewhere"
        )
    return {name: _device(device) for name, device in found.items()}
