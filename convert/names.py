"""The table of HF keys and JAX paths, used in both directions.

An entry says which HF tensor is which part of which parameter: `parameter[part] = tensor` when reading,
`tensor = parameter[part]` when writing. Nothing is transposed. Parameters here are those of one decoder layer, or of
the top level, without the leading layer axis of `jaxmoe.parameters`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.parameters import Quantization, layer_paths, stored_specs, top_level_paths
from jaxmoe.store.checkpoint import Layout

_TOP = {"embed_tokens": "model.embed_tokens.weight", "norm": "model.norm.weight", "lm_head": "lm_head.weight"}
_LAYER = {
    "attention.input_layernorm": "input_layernorm.weight",
    "attention.post_attention_layernorm": "post_attention_layernorm.weight",
    "attention.q_norm": "self_attn.q_norm.weight",
    "attention.k_norm": "self_attn.k_norm.weight",
    **{f"attention.{name}": f"self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{f"attention.{name}_bias": f"self_attn.{name}.bias" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    "sparse.gate": "mlp.gate.weight",
    **{f"dense.{name}": f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")},
}
# The HF tensors that an expert's parameter holds, one below the other.
_EXPERT = {"sparse.gate_up_proj": ("gate_proj", "up_proj"), "sparse.down_proj": ("down_proj",)}


@dataclass(frozen=True)
class Row:
    """One HF tensor: its key and shape on disk, and which part (a NumPy index) of which parameter it is.

    `matrix` is its index among the matrices that NF4 and FP8 quantise separately: (expert, matrix), or (0,).
    """

    key: str
    shape: tuple[int, ...]
    path: str
    part: tuple[int | slice, ...]
    matrix: tuple[int, ...] = (0,)


def block_shapes(
    config: Qwen3MoeConfig, layer: int | None, quantization: Quantization | None = None
) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every stored array of one decoder layer, or of the top level (None)."""
    specs = stored_specs(config, quantization)
    if layer is None:
        return {path: specs[path].shape for path in top_level_paths(config, quantization)}
    return {path: specs[path].shape[1:] for path, _ in layer_paths(config, layer, quantization)}


def rows(config: Qwen3MoeConfig, layer: int | None, layout: Layout) -> Iterator[Row]:
    """The entries of one decoder layer, or of the top level (None)."""
    for path, shape in block_shapes(config, layer).items():
        if layer is None:
            yield Row(_TOP[path], shape, path, ())
        elif path not in _EXPERT:
            yield Row(f"model.layers.{layer}.{_LAYER[path]}", shape, path, ())
        elif layout == "fused":
            yield Row(f"model.layers.{layer}.mlp.experts.{path.split('.')[1]}", shape, path, ())
        else:
            names = _EXPERT[path]
            experts, height, width = shape[0], shape[1] // len(names), shape[2]
            for expert in range(experts):
                for i, name in enumerate(names):
                    key = f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
                    part = expert, slice(i * height, (i + 1) * height)
                    yield Row(key, (height, width), path, part, (expert, i))


def blocks_of(config: Qwen3MoeConfig) -> list[int | None]:
    """The blocks in the order in which they are read and written: the top level (None), then every layer."""
    return [None, *range(config.num_hidden_layers)]


def find_layout(keys: Iterable[str]) -> Layout:
    """The layout of a checkpoint with these keys. If it mixes both layouts, the check of its keys fails."""
    return (
        "fused" if any(key.endswith((".experts.gate_up_proj", ".experts.down_proj")) for key in keys) else "per_expert"
    )
