"""Every parameter of the model and of its adapters: path, shape, logical axes and initialiser, declared together.

Standard library only, so that `convert` can check a checkpoint without loading a model. Weights lie as transformers
holds them in memory, [out, in], and experts as one [E, out, in] array; layers of a kind are stacked along a leading
axis (`attention` holds every decoder layer, `sparse` and `dense` the MLPs of their kind). Nothing is transposed on the
way from a checkpoint to the device, and NF4 blocks, which run along the flat [out, in] order, stay whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jaxmoe.config import LORA_TARGETS, LoraConfig, Qwen3MoeConfig

STACKS = ("attention", "sparse", "dense")


@dataclass(frozen=True)
class ParameterSpec:
    """Shape and logical axis names (same length), and how a fresh array is drawn: normal, zeros, ones or uniform."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: str = "normal"


def parameter_specs(config: Qwen3MoeConfig) -> dict[str, ParameterSpec]:
    """Dotted path -> spec, for instance `attention.q_proj` -> [L, N*H, D]; `lm_head` is absent when tied."""
    c = config
    L, D, V = c.num_hidden_layers, c.hidden_size, c.vocab_size
    Q, KV, H = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, c.head_dim
    specs = {
        "embed_tokens": ParameterSpec((V, D), ("vocab", "embed")),
        "norm": ParameterSpec((D,), ("embed",), "ones"),
        "attention.input_layernorm": ParameterSpec((L, D), ("layers", "embed"), "ones"),
        "attention.q_proj": ParameterSpec((L, Q, D), ("layers", "heads", "embed")),
        "attention.k_proj": ParameterSpec((L, KV, D), ("layers", "kv_heads", "embed")),
        "attention.v_proj": ParameterSpec((L, KV, D), ("layers", "kv_heads", "embed")),
        "attention.o_proj": ParameterSpec((L, D, Q), ("layers", "embed", "heads")),
        "attention.q_norm": ParameterSpec((L, H), ("layers", "head_dim"), "ones"),
        "attention.k_norm": ParameterSpec((L, H), ("layers", "head_dim"), "ones"),
        "attention.post_attention_layernorm": ParameterSpec((L, D), ("layers", "embed"), "ones"),
    }
    if c.attention_bias:
        specs |= {
            "attention.q_proj_bias": ParameterSpec((L, Q), ("layers", "heads"), "zeros"),
            "attention.k_proj_bias": ParameterSpec((L, KV), ("layers", "kv_heads"), "zeros"),
            "attention.v_proj_bias": ParameterSpec((L, KV), ("layers", "kv_heads"), "zeros"),
            "attention.o_proj_bias": ParameterSpec((L, D), ("layers", "embed"), "zeros"),
        }
    if sparse := len(c.sparse_layers):
        E, F = c.num_experts, c.moe_intermediate_size
        specs |= {
            "sparse.gate": ParameterSpec((sparse, E, D), ("layers", "experts", "embed")),
            "sparse.gate_up_proj": ParameterSpec((sparse, E, 2 * F, D), ("layers", "experts", "expert_mlp", "embed")),
            "sparse.down_proj": ParameterSpec((sparse, E, D, F), ("layers", "experts", "embed", "expert_mlp")),
        }
    if dense := len(c.dense_layers):
        width = c.intermediate_size
        specs |= {
            "dense.gate_proj": ParameterSpec((dense, width, D), ("layers", "mlp", "embed")),
            "dense.up_proj": ParameterSpec((dense, width, D), ("layers", "mlp", "embed")),
            "dense.down_proj": ParameterSpec((dense, D, width), ("layers", "embed", "mlp")),
        }
    if not c.tie_word_embeddings:
        specs["lm_head"] = ParameterSpec((V, D), ("vocab", "embed"))
    return specs


def lora_specs(config: Qwen3MoeConfig, lora: LoraConfig) -> dict[str, ParameterSpec]:
    """Dotted path -> spec of every adapter array: `attention.q_proj.lora_A` -> [L, r, D], `.lora_B` -> [L, N*H, r];
    experts have one A and B each: `sparse.gate_up_proj.lora_A` -> [Ls, E, r, D]."""
    lora.check_against(config)
    base = parameter_specs(config)
    specs: dict[str, ParameterSpec] = {}
    for target in lora.targets:
        path, rank = ".".join(LORA_TARGETS[target]), lora.rank(target)
        (*lead, out, inner), (*lead_axes, out_axis, in_axis) = base[path].shape, base[path].axes
        # PEFT's start: A uniform (Kaiming, a = sqrt 5), B zero, so that the adapted model equals the base.
        specs[f"{path}.lora_A"] = ParameterSpec((*lead, rank, inner), (*lead_axes, "lora_rank", in_axis), "uniform")
        specs[f"{path}.lora_B"] = ParameterSpec((*lead, out, rank), (*lead_axes, out_axis, "lora_rank"), "zeros")
    return specs


def layer_paths(config: Qwen3MoeConfig, layer: int) -> Iterator[tuple[str, int]]:
    """(stacked path, slot in the stack) of every parameter of decoder layer `layer`."""
    sparse = layer in config.sparse_layers
    kind = "sparse" if sparse else "dense"
    slot = (config.sparse_layers if sparse else config.dense_layers).index(layer)
    for path in parameter_specs(config):
        stack = path.split(".")[0]
        if stack == "attention":
            yield path, layer
        elif stack == kind:
            yield path, slot


def top_level_paths(config: Qwen3MoeConfig) -> tuple[str, ...]:
    """Paths that belong to no layer: embed_tokens, norm and, unless tied, lm_head."""
    return tuple(path for path in parameter_specs(config) if "." not in path)
