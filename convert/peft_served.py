"""Adapters as inference servers load them: vLLM's and SGLang's layouts of the experts' tensors.

Both read one rank and one factor alpha / r from adapter_config.json and apply them to every tensor; neither reads
`rank_pattern`, `alpha_pattern` or, in SGLang, `use_rslora`. So all ranks are padded with zeros to the largest, and B
takes up what a factor differs. A layer that has an adapter on some of q, k, v, or on some of gate, up, down, gets zeros
for the others, because both servers pack these together.

Sources, read in November 2026:
- vLLM, vllm/lora/lora_weights.py, `PackedLoRALayerWeights.pack_moe`: each expert needs gate_proj, down_proj and
  up_proj, all of one rank; `LoRALayerWeights.from_config` takes rank and factor from `PEFTHelper` in
  vllm/lora/peft_helper.py.
- SGLang, python/sglang/srt/lora/mem_pool.py, `LoRAMemoryPool.load_lora_weight_to_buffer`: tensors named `experts.N.`
  are those of one expert, 3-D tensors those of all experts; the rank must be that of the config.
  python/sglang/srt/lora/lora.py, `LoRAAdapter.normalize_qkv_proj` and `normalize_gate_up_proj`: a q_proj needs a
  v_proj; the A of gate_up_proj serves both halves of its B.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from convert.peft_experts import DOWN, EXPERTS, GATE_UP, Pair, common_scale, scaled, split_halves
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.lora import LORA_TARGETS, LoraConfig
from jaxmoe.parameters import parameter_specs

ServedLayout = Literal["per-expert", "stacked"]
_PACKED_TOGETHER = (("q_proj", "k_proj", "v_proj"), (GATE_UP, DOWN), ("gate_proj", "up_proj"))


def served(
    config: Qwen3MoeConfig, lora: LoraConfig, pairs: Mapping[tuple[str, int], Pair], layout: ServedLayout
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The adapters (target, layer) -> (tensors by key below `layers`, what adapter_config.json says of them)."""
    matrices = dict(_matrices(pairs, lora, layout))
    scale, factors = common_scale([scale for _, _, scale in matrices.values()])
    rank = max(a.shape[-2] for a, _, _ in matrices.values())
    tensors: dict[str, np.ndarray] = {}
    for (name, (a, b, _)), factor in zip(matrices.items(), factors, strict=True):
        pair = Pair(a, scaled(b, factor), 0.0).padded(rank)
        tensors |= {f"{name}.lora_A.weight": pair.a, f"{name}.lora_B.weight": pair.b}
    for name, (a_shape, b_shape) in _gaps(config, pairs, layout, rank).items():
        if f"{name}.lora_A.weight" not in tensors:
            first = next(iter(tensors.values())).dtype
            tensors[f"{name}.lora_A.weight"] = np.zeros(a_shape, first)
            tensors[f"{name}.lora_B.weight"] = np.zeros(b_shape, first)
    alpha = scale * rank
    settings = {
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": False,
        "target_modules": sorted(
            {key.removesuffix(".lora_A.weight").split(".")[-1] for key in tensors if "lora_A" in key}
        ),
        "target_parameters": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    return tensors, settings


def _scale(lora: LoraConfig, pair: Pair) -> float:
    return pair.alpha / (pair.rank**0.5 if lora.use_rslora else pair.rank)


def _matrices(
    pairs: Mapping[tuple[str, int], Pair], lora: LoraConfig, layout: ServedLayout
) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray, float]]]:
    """(name below `layers`, (A, B, factor)) of everything that is trained."""
    for (target, layer), pair in pairs.items():
        scale = _scale(lora, pair)
        if target not in (GATE_UP, DOWN):
            yield f"{layer}.{LORA_TARGETS[target].peft_module}", (pair.a, pair.b, scale)
        elif layout == "stacked":
            yield f"{layer}.mlp.{target}", (pair.a, pair.b, scale)
        else:
            halves = split_halves(pair) if target == GATE_UP else {"down_proj": (pair.a, pair.b)}
            for name, (a, b) in halves.items():
                for expert in range(a.shape[0]):
                    yield f"{layer}.{EXPERTS}.{expert}.{name}", (a[expert], b[expert], scale)


def _gaps(
    config: Qwen3MoeConfig, pairs: Mapping[tuple[str, int], Pair], layout: ServedLayout, rank: int
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Name below `layers` -> the shapes of A and B, of all that a server packs together with a trained adapter."""
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    specs = parameter_specs(config)
    for target, layer in pairs:
        together = next((group for group in _PACKED_TOGETHER if target in group), ())
        for other in together:
            *lead, out, inner = specs[LORA_TARGETS[other].path].shape[1:]
            if not lead:
                shapes[f"{layer}.{LORA_TARGETS[other].peft_module}"] = (rank, inner), (out, rank)
            elif layout == "stacked":
                shapes[f"{layer}.mlp.{other}"] = (*lead, rank, inner), (*lead, out, rank)
            else:
                names = ("gate_proj", "up_proj") if other == GATE_UP else ("down_proj",)
                for expert in range(lead[0]):
                    for name in names:
                        key = f"{layer}.{EXPERTS}.{expert}.{name}"
                        shapes[key] = (rank, inner), (out // len(names), rank)
    return shapes
