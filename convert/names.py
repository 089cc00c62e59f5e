"""The one table between HF keys and JAX paths, used in both directions.

A row says which HF tensor is which part of which parameter: `parameter[part] = tensor` on the way in,
`tensor = parameter[part]` on the way out. Nothing is transposed. Parameters here are those of one decoder layer or of
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
# the tensors that lie one below the other in an expert's parameter
_EXPERT = {"sparse.gate_up_proj": ("gate_proj", "up_proj"), "sparse.down_proj": ("down_proj",)}


@dataclass(frozen=True)
class Row:
    """HF key and shape on disk; the parameter it belongs to and the part of it that it is (a NumPy index)."""

    key: str
    shape: tuple[int, ...]
    path: str
    part: tuple[int | slice, ...]
    matrix: tuple[int, ...] = (0,)  # index among the matrices that NF4 quantises one by one: (expert, matrix) or (0,)


def block_shapes(
    config: Qwen3MoeConfig, layer: int | None, quantization: Quantization | None = None
) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the stored arrays of one decoder layer, or of the top level (None)."""
    specs = stored_specs(config, quantization)
    if layer is None:
        return {path: specs[path].shape for path in top_level_paths(config, quantization)}
    return {path: specs[path].shape[1:] for path, _ in layer_paths(config, layer, quantization)}


def rows(config: Qwen3MoeConfig, layer: int | None, layout: Layout) -> Iterator[Row]:
    """Every HF tensor of one decoder layer, or of the top level (None)."""
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
    """The blocks in the order in which they are streamed: the top level, then every layer."""
    return [None, *range(config.num_hidden_layers)]


def find_layout(keys: Iterable[str]) -> Layout:
    """Which layout a checkpoint has; one that mixes both then shows missing and unexpected keys."""
    return (
        "fused" if any(key.endswith((".experts.gate_up_proj", ".experts.down_proj")) for key in keys) else "per_expert"
    )
