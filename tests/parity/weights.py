"""A checkpoint in HF form as torch tensors, read by key; NF4 and FP8 decoded by their formulas.

It shares no code with `convert` or `torch_ref`. The float64 oracle reads through it. So does stock transformers if the
weights are quantised, because it cannot load 4-bit experts, nor FP8 blocks of several sizes.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_STATE = "quant_state.bitsandbytes__nf4"


def in_fp8(x: Tensor) -> Tensor:
    """Rows as e4m3 holds them, with a scale for each row and 128 channels, decoded in float32; in x's dtype."""
    parts = []
    for part in x.float().split(128, dim=-1):
        largest = part.abs().amax(-1, keepdim=True)
        scale = torch.where(largest > 0, largest * (1 / 448), 1)
        parts.append((part / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)
    return torch.cat(parts, -1).to(x.dtype)


class Weights:
    """The tensors of a folder; each is read when it is requested, in `dtype` on `device`."""

    def __init__(self, folder: str | pathlib.Path, dtype: torch.dtype, device: str) -> None:
        folder = pathlib.Path(folder)
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            names = ["model.safetensors"]
        self._files: dict[str, Any] = {}
        for name in names:
            file = safe_open(folder / name, framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)
        self.dtype, self.device = dtype, device

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __getitem__(self, key: str) -> Tensor:
        """The tensor `key`, decoded if it is quantised, rounded to `dtype` once."""
        tensor = self.stored(key)
        if f"{key}.{_STATE}" in self:
            tensor = self._decoded(key, tensor)
        if f"{key}_scale_inv" in self:
            tensor = self._decoded_fp8(tensor, self.stored(f"{key}_scale_inv"))
        return tensor.to(self.dtype)

    def stored(self, key: str) -> Tensor:
        """The tensor `key` as it is stored."""
        return self._files[key].get_tensor(key).to(self.device)

    def experts(self, layer: int, num_experts: int) -> tuple[Tensor, Tensor]:
        """gate_up [E, 2F, D] and down [E, D, F] of one sparse layer, from either layout."""
        at = f"model.layers.{layer}.mlp.experts"
        if f"{at}.gate_up_proj" in self:
            return self[f"{at}.gate_up_proj"], self[f"{at}.down_proj"]
        both, down = [], []
        for expert in range(num_experts):
            gate, up = (self[f"{at}.{expert}.{name}_proj.weight"] for name in ("gate", "up"))
            both.append(torch.cat([gate, up]))
            down.append(self[f"{at}.{expert}.down_proj.weight"])
        return torch.stack(both), torch.stack(down)

    @staticmethod
    def _decoded_fp8(codes: Tensor, scales: Tensor) -> Tensor:
        """Code times the scale of its block of 128 x 128, in float32; the last blocks may be smaller."""
        rows, columns = (torch.arange(size, device=codes.device) // 128 for size in codes.shape)
        return codes.float() * scales.float()[rows[:, None], columns[None]]

    def _decoded(self, key: str, packed: Tensor) -> Tensor:
        """Code times block maximum in float32; the maximum is itself code times outer maximum, plus an offset."""
        state = json.loads(bytes(self.stored(f"{key}.{_STATE}").cpu().tolist()))
        absmax = self.stored(f"{key}.absmax")
        if f"{key}.nested_absmax" in self:
            outer = self.stored(f"{key}.nested_absmax").repeat_interleave(state["nested_blocksize"])[: absmax.numel()]
            absmax = self.stored(f"{key}.nested_quant_map")[absmax.int()] * outer + state["nested_offset"]
        flat = packed.flatten()
        codes = torch.stack([flat >> 4, flat & 15], dim=-1).flatten().int()
        values = self.stored(f"{key}.quant_map")[codes]
        blocks = absmax.repeat_interleave(state["blocksize"])[: values.numel()]
        rows, columns = state["shape"]
        return (values * blocks)[: rows * columns].view(rows, columns)
