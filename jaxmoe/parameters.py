"""Every parameter of the model and of its adapters: path, shape, logical axes and initialiser, declared together.

Standard library only, so that `convert` can check a checkpoint without loading a model. Shapes are in the letters of
the dimension key (`jaxmoe.config`). Weights are laid out as transformers holds them in memory: [out, in], and experts
as one array [E, out, in]. Layers of one kind are stacked along a leading axis: `attention` [L, ...] holds every decoder
layer, `sparse` [Ls, ...] and `dense` [Ld, ...] hold the MLPs of their kind. Nothing is transposed on the way from a
checkpoint to the device, so the blocks of NF4 and FP8 stay whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.lora import LORA_TARGETS, LoraConfig
from jaxmoe.weight_form import WeightForm

# NF4: weights in a block, and absmax values in a block of the second quantisation; the defaults of bitsandbytes
NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256
# FP8: a scale belongs to a block of this many rows and columns; blocks at the lower and right edges may be smaller.
FP8_BLOCK = 128
FP8_DTYPE = "float8_e4m3fn"
# The 256 values of the second quantisation: one table for the whole model, a parameter of the top level.
NESTED_QUANT_MAP = "nested_quant_map"
# What training adds to the router's probabilities where it chooses experts; no part of a stored model.
CHOICE_BIAS = "sparse.choice_bias"
# How many matrices a parameter holds, one below the other. HF stores, and NF4 and FP8 quantise, each separately.
_MATRICES = {"sparse.gate_up_proj": 2}


@dataclass(frozen=True)
class ParameterSpec:
    """Shape and logical axis names (same length), and how a fresh array is filled: normal, zeros, ones or uniform; base
    copies the weight of the same path from the base model.

    `dtype` is None for arrays that have the model's dtype.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: str = "normal"
    dtype: str | None = None


@dataclass(frozen=True)
class Quantization:
    """Which parameters are held in a quantised form, and in which: NF4 or FP8.

    NF4 (Dettmers et al. 2023): the arrays "x.codes" (two 4-bit codes in a byte) and "x.absmax" (largest magnitude in
    each block) replace the weight "x". Double quantisation (`nested`) quantises absmax too and adds "x.nested_absmax"
    and "x.nested_offset".

    FP8: "x.codes" (e4m3, in the shape of the weight) and "x.scales" (one for each block of 128 x 128, of the dtype
    `scales`) replace it. Source: the checkpoints that Qwen publishes.

    The gate, up and down matrices of an expert are quantised separately.

    A mixed stack has layers that are not quantised. `unquantized` has its path and these layers, as indices in the
    stack, in rising order. Its quantised arrays hold the other layers only, "x.weight" holds these, and "x.places" says
    for each layer of the stack where it is: i in the quantised arrays, or -1 - i in "x.weight".
    """

    paths: tuple[str, ...]
    nested: bool = True
    unquantized: tuple[tuple[str, tuple[int, ...]], ...] = ()
    form: WeightForm = "nf4"
    scales: str = "float32"

    @classmethod
    def in_fp8(
        cls, paths: Iterable[str], scales: str = "float32", unquantized: tuple[tuple[str, tuple[int, ...]], ...] = ()
    ) -> Quantization:
        """These parameters in FP8."""
        return cls(tuple(sorted(paths)), False, unquantized, "fp8", scales)

    @classmethod
    def default(cls, config: Qwen3MoeConfig, form: str) -> Quantization:
        """All parameters that the form is used for, as `--quantize` makes it."""
        paths = quantizable(config)
        return cls.in_fp8(paths) if form == "fp8" else cls(paths)

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Quantization | None:
        """The quantisation of a model with these arrays; None for plain weights. Reads the places' values."""
        paths = quantized_paths(params)
        mixed = {path: params[f"{path}.places"].tolist() for path in paths if f"{path}.places" in params}
        slots = ((path, tuple(i for i, place in enumerate(places) if place < 0)) for path, places in mixed.items())
        if not paths:
            return None
        if (scales := params.get(f"{paths[0]}.scales")) is not None:
            return cls.in_fp8(paths, str(scales.dtype), tuple(slots))
        return cls(paths, NESTED_QUANT_MAP in params, tuple(slots))

    def places(self, path: str, layers: int) -> list[int]:
        """The values of "x.places", for the mixed stack `path` of that many layers."""
        left = dict(self.unquantized)[path]
        before = [sum(slot < i for slot in left) for i in range(layers)]
        return [-1 - before[i] if i in left else i - before[i] for i in range(layers)]


def quantized_paths(names: Iterable[str]) -> tuple[str, ...]:
    """The parameters that are quantised, wholly or in part, in a model whose arrays have these names."""
    return tuple(sorted(name.removesuffix(".codes") for name in names if name.endswith(".codes")))


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
            "sparse.gate": ParameterSpec((sparse, E, D), ("layers", "router", "embed")),
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


def quantizable(config: Qwen3MoeConfig, router: bool = False) -> tuple[str, ...]:
    """The parameters that NF4 and FP8 are used for: attention projections, experts, dense MLPs; with `router` also the
    router, which transformers 4 quantises to NF4."""
    specs = parameter_specs(config).items()
    matrices = (path for path, spec in specs if spec.axes[0] == "layers" and spec.init == "normal")
    return tuple(path for path in matrices if router or path != "sparse.gate")


def matrix_shape(config: Qwen3MoeConfig, path: str) -> tuple[int, ...]:
    """How one layer of a parameter divides into matrices that are quantised separately: (matrices, elements), for
    instance (1, N*H*D) for q_proj; (E, matrices, elements) for experts."""
    *lead, out, inner = parameter_specs(config)[path].shape[1:]
    matrices = _MATRICES.get(path, 1)
    return (*lead, matrices, out // matrices * inner)


def stored_specs(config: Qwen3MoeConfig, quantization: Quantization | None) -> dict[str, ParameterSpec]:
    """The specs of all stored arrays: `parameter_specs`, with several arrays in place of each quantised weight."""
    specs = parameter_specs(config)
    if quantization is None:
        return specs
    unquantized = dict(quantization.unquantized)
    for path in quantization.paths:
        weight = specs.pop(path)
        layers, *shape = weight.shape
        if left := len(unquantized.get(path, ())):
            specs[f"{path}.weight"] = ParameterSpec((left, *shape), weight.axes)
            specs[f"{path}.places"] = ParameterSpec((layers,), weight.axes[:1], dtype="int32")
        quantized = replace(weight, shape=(layers - left, *shape))
        matrices = _MATRICES.get(path, 1)
        if quantization.form == "fp8":
            arrays = _fp8_specs(quantized, matrices, quantization.scales)
        else:
            arrays = _nf4_specs(quantized, matrices, quantization.nested)
        specs |= {f"{path}.{name}": spec for name, spec in arrays.items()}
    if quantization.nested:
        specs[NESTED_QUANT_MAP] = ParameterSpec((256,), ("codes",), dtype="float32")
    return specs


def _nf4_specs(weight: ParameterSpec, matrices: int, nested: bool) -> dict[str, ParameterSpec]:
    """NF4's arrays in place of a weight."""
    *lead, out, inner = weight.shape
    lead, axes = (*lead, matrices), (*weight.axes[:-2], "matrices")
    elements = out // matrices * inner
    blocks = -(-elements // NF4_BLOCK)
    arrays = {
        "codes": ParameterSpec((*lead, -(-elements // 2)), (*axes, "codes"), dtype="uint8"),
        "absmax": ParameterSpec((*lead, blocks), (*axes, "blocks"), dtype="uint8" if nested else "float32"),
    }
    if nested:
        outer = -(-blocks // NF4_NESTED_BLOCK)
        arrays["nested_absmax"] = ParameterSpec((*lead, outer), (*axes, "blocks"), dtype="float32")
        arrays["nested_offset"] = ParameterSpec(lead, axes, dtype="float32")
    return arrays


def _fp8_specs(weight: ParameterSpec, matrices: int, scales: str) -> dict[str, ParameterSpec]:
    """FP8's arrays in place of a weight: codes in its shape, and scales by matrix."""
    *lead, out, inner = weight.shape
    grid = -(-out // matrices // FP8_BLOCK), -(-inner // FP8_BLOCK)
    axes = (*weight.axes[:-2], "matrices", "blocks", "block_columns")
    return {
        "codes": ParameterSpec(weight.shape, weight.axes, dtype=FP8_DTYPE),
        "scales": ParameterSpec((*lead, matrices, *grid), axes, dtype=scales),
    }


def choice_bias_spec(config: Qwen3MoeConfig) -> ParameterSpec:
    """The spec of `CHOICE_BIAS`."""
    return ParameterSpec((len(config.sparse_layers), config.num_experts), ("layers", "router"), "zeros")


def lora_specs(config: Qwen3MoeConfig, lora: LoraConfig) -> dict[str, ParameterSpec]:
    """Dotted path -> spec of every adapter array: `attention.q_proj.lora_A` -> [L, r, D], `.lora_B` -> [L, N*H, r];
    experts have one A and B each: `sparse.gate_up_proj.lora_A` -> [Ls, E, r, D], or fewer than E where only some have
    an adapter (`LoraConfig.adapted_experts`). A weight that the adapter holds in full has the path and shape of the
    base's: `lm_head` -> [V, D], `sparse.gate` -> [Ls, E, D]."""
    lora.check_against(config)
    base = parameter_specs(config)
    specs: dict[str, ParameterSpec] = {}
    for target in lora.targets:
        path, rank = LORA_TARGETS[target].path, lora.rank(target)
        (*lead, out, inner), (*lead_axes, out_axis, in_axis) = base[path].shape, base[path].axes
        if (places := lora.expert_places(target)) is not None:
            lead[1], lead_axes[1] = places, "adapted_experts"
        # As PEFT initialises them: A uniform (Kaiming, a = sqrt 5), B zero, so that the adapted model equals the base.
        specs[f"{path}.lora_A"] = ParameterSpec((*lead, rank, inner), (*lead_axes, "lora_rank", in_axis), "uniform")
        specs[f"{path}.lora_B"] = ParameterSpec((*lead, out, rank), (*lead_axes, out_axis, "lora_rank"), "zeros")
    for name in lora.modules_to_save:
        specs[name] = replace(base["embed_tokens"], init="base")  # the head has the embedding's shape
    for path in sorted(lora.trained_in_layers):
        specs[path] = replace(base[path], init="base")
    return specs


def layer_paths(
    config: Qwen3MoeConfig, layer: int, quantization: Quantization | None = None
) -> Iterator[tuple[str, int]]:
    """(path, index in that array) of every stored array of decoder layer `layer`."""
    sparse = layer in config.sparse_layers
    kind = "sparse" if sparse else "dense"
    slot = (config.sparse_layers if sparse else config.dense_layers).index(layer)
    unquantized = dict(quantization.unquantized) if quantization else {}
    for path in stored_specs(config, quantization):
        stack = path.split(".")[0]
        if stack not in ("attention", kind):
            continue
        index = layer if stack == "attention" else slot
        weight, _, part = path.rpartition(".")
        if weight not in unquantized:
            yield path, index
            continue
        left = unquantized[weight]
        before = sum(other < index for other in left)
        if part == "weight" and index in left:
            yield path, before
        elif part not in ("weight", "places") and index not in left:
            yield path, index - before


def top_level_paths(config: Qwen3MoeConfig, quantization: Quantization | None = None) -> tuple[str, ...]:
    """Paths of the arrays outside the layers: embed_tokens, norm, lm_head unless tied, nested_quant_map of NF4."""
    return tuple(path for path in stored_specs(config, quantization) if "." not in path)
