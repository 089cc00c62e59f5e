"""Reads HF checkpoints in FP8 (e4m3 codes, a scale for each block of 128 x 128) and decodes them to plain weights.

A weight is code * scale of its block, formed in float32 and rounded once; blocks at the lower and right edges may be
smaller. Source: the checkpoints that Qwen publishes; `Fp8Dequantize` of transformers 5, which cannot read such edges.
This module needs neither bitsandbytes nor a GPU.
"""

from __future__ import annotations

import os
import pathlib
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig

from torch_ref.experts import DenseStack
from torch_ref.shards import Shards, local_folder
from torch_ref.strangers import naming

BLOCK = 128
_LARGEST = 448.0  # of e4m3
_SCALES = "_scale_inv"


def is_fp8(stored: Any) -> bool:
    """Whether `stored`, a quantization_config, describes FP8 in blocks of 128 x 128."""
    settings = stored if isinstance(stored, dict) else stored.to_dict() if stored is not None else {}
    size = settings.get("weight_block_size", [BLOCK, BLOCK])  # transformers' default
    return settings.get("quant_method") == "fp8" and size in ([BLOCK, BLOCK], (BLOCK, BLOCK))


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights [..., out, in] of codes and of scales [..., ceil(out / 128), ceil(in / 128)]."""
    rows, columns = codes.shape[-2:]
    spread = scales.float().repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :columns]
    return (codes.float() * spread).to(dtype)


def load_fp8(
    model_class: Any,
    model_name: str | os.PathLike[str],
    config: Any,
    dtype: torch.dtype,
    device_map: Any,
    token: str | None = None,
    **options: Any,
) -> Any:
    """The model of a folder or hub id in FP8, with all weights decoded to `dtype`.

    Raises:
        ValueError: missing or unexpected tensors, or scales of another shape.
    """
    folder = local_folder(model_name, token)
    del config.quantization_config
    model, found = model_class.from_pretrained(
        None,
        config=config,
        state_dict=read_decoded(folder, dtype),
        dtype=dtype,
        device_map=device_map,
        use_safetensors=True,  # a pickle can run code
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )
    for what, keys in (("expected", found["missing_keys"]), ("unexpected tensor", found["unexpected_keys"])):
        if keys:
            raise ValueError(f"{folder}: {what} {min(keys)} (of {len(keys)})")
    if (folder / "generation_config.json").is_file():
        with naming(folder, "a generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = model.name_or_path = str(model_name)
    return model


def read_decoded(folder: pathlib.Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Key -> tensor of a folder, weights in FP8 decoded; the scales are left out."""
    shards = Shards(folder)
    weights = {key: _read(shards, key, dtype) for key in shards if not key.endswith(_SCALES)}
    shards.check_all_read()
    return weights


def _read(shards: Shards, key: str, dtype: torch.dtype) -> Tensor:
    tensor = shards.read(key)
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor.to(dtype)
    scales = shards.read(f"{key}{_SCALES}")
    grid = tuple(-(-side // BLOCK) for side in tensor.shape[-2:])
    if scales.shape != (*tensor.shape[:-2], *grid):
        raise ValueError(
            f"{shards.folder}: {key}{_SCALES}: expected the shape {list(grid)}, found {list(scales.shape)}"
        )
    return decode(tensor, scales, dtype)


def multiply_in_fp8(model: nn.Module) -> None:
    """From now on the model's experts multiply rows in FP8, as kernels for weights in FP8 do; emulated on any device.

    Forwards, each row and 128 channels are quantised with a scale of their own; the gradient is that of rows that are
    not. Experts with adapters are quantised, too; in `jaxmoe` they are not.
    """
    for module in model.modules():
        if hasattr(module, "gate_up_proj") and hasattr(module, "act_fn"):
            experts: Any = module
            experts.stack = partial(_with_rows_in_fp8, module)


def _with_rows_in_fp8(experts: nn.Module, name: str) -> RowsInFP8:
    return RowsInFP8(getattr(experts, name))


def rounded_rows(x: Tensor) -> Tensor:
    """Rows [..., inner] as e4m3 holds them with a scale for every 128 channels, decoded in float32; x's dtype."""
    inner = x.shape[-1]
    parts = F.pad(x.float(), (0, -inner % BLOCK)).unflatten(-1, (-1, BLOCK))
    largest = parts.abs().amax(-1, keepdim=True)
    scales = torch.where(largest > 0, largest * (1 / _LARGEST), 1)
    codes = (parts / scales).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return (codes.float() * scales).flatten(-2)[..., :inner].to(x.dtype)


class _Rounded(torch.autograd.Function):
    """`rounded_rows`, whose gradient is passed on as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return rounded_rows(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class RowsInFP8(DenseStack):
    """A frozen stack of experts, whose forward products take rows in FP8."""

    def linear(self, x: Tensor, expert: int) -> Tensor:
        """X W[expert]^T."""
        return super().linear(_Rounded.apply(x), expert)

    def grouped_linear(self, rows: Tensor, ends: Tensor, experts: Tensor) -> Tensor:
        """Each row times its expert's W^T."""
        return super().grouped_linear(_Rounded.apply(rows), ends, experts)
