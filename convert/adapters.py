"""Reads, writes and merges LoRA adapters in PEFT's format.

In this package the adapter of an expert weight is A [E, r, in] and B [E, out, r]. PEFT packs A as [E*r, in], expert
slowest, and B as [out, r*E], expert fastest (`ParamWrapper.get_delta_weight` in PEFT's lora/layer.py). If two
parameters of a module have adapters, PEFT's keys name the inner one `base_layer`, so the shapes tell which parameter a
pair of tensors belongs to.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from convert.names import block_shapes
from convert.safetensors_io import read_header, write_file
from convert.saved_modules import KEYS, merge_saved, read_saved, saved_settings, saved_tensors
from jaxmoe.config import Qwen3MoeConfig, read_json
from jaxmoe.errors import UserError, is_finite, shown
from jaxmoe.limited import first_match
from jaxmoe.lora import LORA_TARGETS, LoraConfig, expand_targets
from jaxmoe.store.adapter import check_adapter, is_adapter, read_adapter
from jaxmoe.store.checkpoint import Block, Checkpoint, cast
from jaxmoe.store.files import output_folder

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
# How lora_B of the experts is packed: as PEFT does, or [out, E*r] as Unsloth did before September 2026.
Packing = Literal["peft", "unsloth"]

# Module in a decoder layer -> its target, for modules with one weight. The two expert weights share a module.
_EXPERTS = "mlp.experts"
_TARGETS = {target.peft_module: name for name, target in LORA_TARGETS.items() if target.peft_module != _EXPERTS}
_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(.+)\.lora_([AB])\.weight")
_OLD_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)")

# Fields of adapter_config.json that do not change what a trained adapter computes.
_HARMLESS = frozenset(
    """auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules inference_mode
    layers_pattern layers_to_transform loftq_config lora_ga_config megatron_core peft_type peft_version
    qalora_group_size revision runtime_config target_modules target_parameters task_type""".split()
)
_USED = frozenset(
    "r lora_alpha use_rslora lora_dropout rank_pattern alpha_pattern init_lora_weights bias modules_to_save".split()
)
# Initialisations that leave the base weights unchanged; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change them.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _Pair:
    """A, B and alpha of one target in one layer; the shapes are those of `lora_specs` without the layer axis."""

    a: np.ndarray
    b: np.ndarray
    alpha: float


def read_peft(
    path: str | os.PathLike[str],
    config: Qwen3MoeConfig,
    packing: Packing = "peft",
    base: Checkpoint | None = None,
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Reads a PEFT adapter for the model `config` as the arrays of `lora_specs`; layers without an adapter get zeros.

    Embeddings that are stored beside the adapter are dropped if they equal those of the checkpoint `base`.

    With transformers 4, PEFT has one adapter per expert and projection. The adapters of gate and up become one of rank
    2r with twice the alpha, whose B is block diagonal; its product is the same.

    Raises:
        UserError: another kind of adapter, a feature that changes the result and is not supported (DoRA, trained
            biases, ...), a tensor that is missing, unexpected or of the wrong shape, or ranks, scales
            or dtypes that differ between the layers of a target.
    """
    path = pathlib.Path(path)
    if not (path / SETTINGS).is_file():
        raise UserError(f"{path}: expected a PEFT adapter, found no {SETTINGS}")
    if not (path / WEIGHTS).is_file():
        pickled = " (adapter_model.bin is a pickle and is not read)" if (path / "adapter_model.bin").exists() else ""
        raise UserError(f"file not found: {path / WEIGHTS}{pickled}")
    raw = read_json(path / SETTINGS)
    _check_settings(path, raw)
    tensors = {name: tensor.read() for name, tensor in read_header(path / WEIGHTS).items()}
    saved = read_saved(path, config, raw, tensors, base)
    factors = {key: tensor for key, tensor in tensors.items() if key not in KEYS}
    pairs = _pairs(path, config, raw, factors, packing)
    targets = expand_targets(list({target for target, _ in pairs}))
    lora = LoraConfig(
        r=raw["r"],
        alpha=float(raw["lora_alpha"]),
        use_rslora=bool(raw.get("use_rslora")),
        targets=targets,
        base_model_name_or_path=raw.get("base_model_name_or_path"),
        dropout=float(raw.get("lora_dropout") or 0.0),
        modules_to_save=tuple(name for name in KEYS.values() if name in saved.arrays),
        ensure_weight_tying=saved.tied,
    )
    ranks, alphas, arrays = [], [], {}
    for target in targets:
        layers = {layer: pair for (name, layer), pair in pairs.items() if name == target}
        rank, alpha = _common(path, target, layers)
        ranks += [(target, rank)] if rank != lora.r else []
        alphas += [(target, alpha)] if alpha != lora.alpha else []
        arrays |= _stack(config, target, layers)
    lora = replace(lora, rank_pattern=tuple(ranks), alpha_pattern=tuple(alphas))
    arrays |= saved.arrays
    check_adapter(str(path), config, lora, arrays)
    return lora, arrays


def _check_settings(path: pathlib.Path, raw: dict[str, Any]) -> None:
    where = path / SETTINGS
    for name, expected in (("peft_type", ("LORA",)), ("task_type", ("CAUSAL_LM", None)), ("bias", ("none", None))):
        if raw.get(name) not in expected:
            raise UserError(f"{where}: {name}: expected {expected[0]!r}, found {raw.get(name)!r}")
    if not isinstance(base := raw.get("base_model_name_or_path"), str | None):
        raise UserError(f"{where}: base_model_name_or_path: expected a text, found {shown(base)}")
    if (start := raw.get("init_lora_weights", True)) not in _PLAIN_STARTS:
        raise UserError(f"{where}: init_lora_weights: {start!r} changes the base weights, which is not supported")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = raw.get(name) or {}
        if not isinstance(pattern, dict) or not all(map(is_finite, pattern.values())):
            raise UserError(f"{where}: {name}: expected a JSON object of numbers, found {shown(raw[name])}")
    for name in ("r", "lora_alpha", "lora_dropout"):
        if not is_finite(raw.get(name, 0.0 if name == "lora_dropout" else None)):
            raise UserError(f"{where}: {name}: expected a number, found {shown(raw.get(name))}")
    for name, value in raw.items():
        if value and name not in _HARMLESS | _USED:
            raise UserError(f"{where}: {name}: expected this option to be off, found {value!r} (not supported)"[:300])


def _pairs(
    path: pathlib.Path, config: Qwen3MoeConfig, raw: dict[str, Any], tensors: dict[str, np.ndarray], packing: Packing
) -> dict[tuple[str, int], _Pair]:
    """(target, layer) -> its A, B and alpha. Every tensor must belong to one."""
    modules: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.ndim != 2:
            raise UserError(f"{path / WEIGHTS}: unexpected tensor {key} {list(tensor.shape)}")
        modules.setdefault((int(match[1]), match[2]), {})[match[3]] = tensor
    if not modules:
        raise UserError(f"{path / WEIGHTS}: expected LoRA tensors, found none")
    pairs: dict[tuple[str, int], _Pair] = {}
    experts: dict[int, dict[tuple[int, str], _Pair]] = {}
    for (layer, module), halves in modules.items():
        where = f"{path / WEIGHTS}: layers.{layer}.{module}"
        if set(halves) != {"A", "B"}:
            raise UserError(f"{where}: expected lora_A and lora_B, found only lora_{next(iter(halves))}")
        if layer >= config.num_hidden_layers:
            raise UserError(f"{where}: expected a layer below {config.num_hidden_layers}, found {layer}")
        a, b = halves["A"], halves["B"]
        if old := _OLD_EXPERT.fullmatch(module):
            alpha = _alpha(where, raw, [f"model.layers.{layer}.{module}"], a.shape[0])
            experts.setdefault(layer, {})[int(old[1]), old[2]] = _Pair(a, b, alpha)
            continue
        if module in (_EXPERTS, f"{_EXPERTS}.base_layer"):
            target, a, b = _unpack(where, config, layer, a, b, packing)
        elif module in _TARGETS:
            target = _TARGETS[module]
        else:
            raise UserError(f"{where}: expected {', '.join(_TARGETS)} or {_EXPERTS}, found {module}")
        if (target, layer) in pairs:
            raise UserError(f"{where}: expected one adapter per weight, found two for {target}")
        # Routers and dense MLPs may be targets as modules or as parameters, so a pattern may name either.
        names = [module] if module in _TARGETS else []
        names += [parameter] if (parameter := LORA_TARGETS[target].peft_parameter) else []
        names = [f"model.layers.{layer}.{name}" for name in names]
        pairs[target, layer] = _Pair(a, b, _alpha(where, raw, names, a.shape[-2]))
    for layer, of_experts in experts.items():
        for target, pair in _fuse(f"{path / WEIGHTS}: layers.{layer}.mlp.experts", config, raw, of_experts):
            if pairs.setdefault((target, layer), pair) is not pair:
                found = "those of transformers 4 and of transformers 5"
                raise UserError(
                    f"{path / WEIGHTS}: layers.{layer}: {target}: expected one form of adapter, found {found}"
                )
    return pairs


def _alpha(where: str, raw: dict[str, Any], names: Sequence[str], rank: int) -> float:
    """The alpha of one weight, which patterns may call by any of `names`; raises UserError for another rank."""

    def pick(pattern: str, default: float) -> float:
        # As in PEFT's `get_pattern_key`, the first pattern that matches the end of a name counts.
        given = raw.get(pattern) or {}
        try:
            index = first_match(tuple(given), names)
        except UserError as error:
            raise UserError(f"{SETTINGS}: {pattern}: {error}") from None
        return default if index is None else list(given.values())[index]

    if (expected := pick("rank_pattern", raw["r"])) != rank:
        raise UserError(f"{where}: expected rank {expected}, as {SETTINGS} says, found {rank}")
    return float(pick("alpha_pattern", raw["lora_alpha"]))


def _unpack(
    where: str, config: Qwen3MoeConfig, layer: int, a: np.ndarray, b: np.ndarray, packing: Packing
) -> tuple[str, np.ndarray, np.ndarray]:
    """The packed tensors of an expert weight -> (target, A [E, r, in], B [E, out, r])."""
    shapes = {name: shape for name, shape in block_shapes(config, layer).items() if len(shape) == 3}
    for path, (experts, out, inner) in shapes.items():
        if a.shape[1] != inner or b.shape[0] != out or a.shape[0] != b.shape[1] or a.shape[0] % experts:
            continue
        target = f"experts.{path.removeprefix('sparse.')}"
        rank = a.shape[0] // experts
        if packing == "unsloth":
            unpacked = b.reshape(out, experts, rank).transpose(1, 0, 2)
        else:
            unpacked = b.reshape(out, rank, experts).transpose(2, 0, 1)
        return target, a.reshape(experts, rank, inner), unpacked
    expected = (
        " or ".join(f"[{e}*r, {i}] and [{o}, r*{e}]" for e, o, i in shapes.values()) or "no experts in this layer"
    )
    raise UserError(f"{where}: expected {expected}, found {list(a.shape)} and {list(b.shape)}")


def _fuse(
    where: str, config: Qwen3MoeConfig, raw: dict[str, Any], found: dict[tuple[int, str], _Pair]
) -> Iterator[tuple[str, _Pair]]:
    """Adapters of each expert and projection (transformers 4) -> (target, adapter of all experts)."""
    for target, names in (("experts.gate_up_proj", ("gate_proj", "up_proj")), ("experts.down_proj", ("down_proj",))):
        wanted = [(expert, name) for expert in range(config.num_experts) for name in names]
        present = [key for key in wanted if key in found]
        if not present:
            continue
        if present != wanted:
            missing = next(key for key in wanted if key not in found)
            raise UserError(
                f"{where}: expected an adapter for {'.'.join(map(str, missing))}, as for the others, found none"
            )
        F, D = config.moe_intermediate_size, config.hidden_size
        out, inner = (D, F) if names == ("down_proj",) else (F, D)
        first = found[wanted[0]]
        rank = first.a.shape[0]
        for key in wanted:
            pair = found[key]
            shapes = (pair.a.shape, pair.b.shape)
            kinds = (pair.alpha, pair.a.dtype.name, pair.b.dtype.name)
            same = (first.alpha, first.a.dtype.name, first.b.dtype.name)
            if shapes != ((rank, inner), (out, rank)) or kinds != same:
                expected = f"A [{rank}, {inner}], B [{out}, {rank}], alpha and dtypes {same} as in the others"
                raise UserError(f"{where}: {'.'.join(map(str, key))}: expected {expected}; found {shapes}, {kinds}")
        n = len(names)
        a = np.concatenate([found[key].a for key in wanted]).reshape(config.num_experts, n * rank, inner)
        b = np.zeros((config.num_experts, n * out, n * rank), first.b.dtype)
        for expert, name in wanted:
            i = names.index(name)
            b[expert, i * out : (i + 1) * out, i * rank : (i + 1) * rank] = found[expert, name].b
        # The factor on the product, alpha / rank, or alpha / sqrt(rank) for rsLoRA, must not change with the rank.
        yield target, _Pair(a, b, first.alpha * (math.sqrt(n) if raw.get("use_rslora") else n))
    unknown = {expert for expert, _ in found if expert >= config.num_experts}
    if unknown:
        raise UserError(f"{where}: expected experts below {config.num_experts}, found {min(unknown)}")


def _common(path: pathlib.Path, target: str, layers: dict[int, _Pair]) -> tuple[int, float]:
    """Rank and alpha of a target. All its layers must have the same, because they are stacked."""
    first_layer, first = next(iter(layers.items()))
    rank = first.a.shape[-2]
    for pair in layers.values():
        for what, want, found in (
            ("rank", rank, pair.a.shape[-2]),
            ("alpha", first.alpha, pair.alpha),
            ("dtype of lora_A", first.a.dtype, pair.a.dtype),
            ("dtype of lora_B", first.b.dtype, pair.b.dtype),
        ):
            if want != found:
                raise UserError(f"{path}: {target}: expected {what} {want}, as in layer {first_layer}, found {found}")
    return rank, first.alpha


def _layers_of(config: Qwen3MoeConfig, target: str) -> tuple[int, ...]:
    stack = LORA_TARGETS[target].stack
    every = {"attention": tuple(range(config.num_hidden_layers)), "sparse": config.sparse_layers}
    return every.get(stack, config.dense_layers)


def _stack(config: Qwen3MoeConfig, target: str, layers: dict[int, _Pair]) -> dict[str, np.ndarray]:
    slots = {layer: slot for slot, layer in enumerate(_layers_of(config, target))}
    path = LORA_TARGETS[target].path
    out = {}
    for name, part in (("lora_A", "a"), ("lora_B", "b")):
        first = getattr(next(iter(layers.values())), part)
        stacked = np.zeros((len(slots), *first.shape), first.dtype)
        for layer, pair in layers.items():
            array = getattr(pair, part)
            if layer not in slots:
                raise UserError(f"layer {layer}: {target}: expected a layer with this weight, found one without it")
            if array.shape != first.shape:
                raise UserError(f"layer {layer}: {target}.{name}: expected {first.shape}, found {array.shape}")
            stacked[slots[layer]] = array
        out[f"{path}.{name}"] = stacked
    return out


def write_peft(
    dst: str | os.PathLike[str], config: Qwen3MoeConfig, lora: LoraConfig, adapters: Mapping[str, Any]
) -> None:
    """Writes `adapters`, the arrays of `lora_specs`, as a PEFT adapter into `dst`, which must be new or empty.

    Raises:
        UserError: other names or shapes, or `dst` is not empty.
    """
    arrays = {name: np.asarray(array) for name, array in adapters.items()}
    check_adapter("adapter", config, lora, arrays)
    tensors: dict[str, np.ndarray] = {}
    both = {"experts.gate_up_proj", "experts.down_proj"} <= set(lora.targets)
    for target in lora.targets:
        path = LORA_TARGETS[target].path
        for slot, layer in enumerate(_layers_of(config, target)):
            a, b = arrays[f"{path}.lora_A"][slot], arrays[f"{path}.lora_B"][slot]
            module = LORA_TARGETS[target].peft_module
            if module == _EXPERTS:
                # PEFT wraps the module once per adapted parameter, gate_up_proj first: it is the inner layer.
                module = f"{_EXPERTS}.base_layer" if both and target == "experts.gate_up_proj" else _EXPERTS
                a, b = a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)
            key = f"base_model.model.model.layers.{layer}.{module}"
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    tensors |= saved_tensors(lora, arrays)
    with output_folder(dst) as folder:
        write_file(folder / WEIGHTS, tensors, {"format": "pt"})
        settings = json.dumps(_settings(lora), indent=2, sort_keys=True) + "\n"
        (folder / SETTINGS).write_text(settings, encoding="utf-8")


def _settings(lora: LoraConfig) -> dict[str, Any]:
    def name(target: str) -> str:
        return re.escape(LORA_TARGETS[target].peft_parameter or target)

    def number(value: float) -> int | float:
        return int(value) if value == int(value) else value

    parameters = [row for target in lora.targets if (row := LORA_TARGETS[target].peft_parameter)]

    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lora.base_model_name_or_path,
        "r": lora.r,
        "lora_alpha": number(lora.alpha),
        "use_rslora": lora.use_rslora,
        "lora_dropout": 0.0 if parameters else lora.dropout,  # PEFT refuses dropout on parameters
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": [target for target in lora.targets if not LORA_TARGETS[target].peft_parameter],
        "target_parameters": parameters,
        "rank_pattern": {name(target): rank for target, rank in lora.rank_pattern},
        "alpha_pattern": {name(target): number(alpha) for target, alpha in lora.alpha_pattern},
        **saved_settings(lora),
    }


def load_adapter(
    path: str | os.PathLike[str], config: Qwen3MoeConfig, base: Checkpoint | None = None
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Reads the adapter in the folder `path`, PEFT or converted, for the model `config`: (its config, its arrays).

    `base` is the model's checkpoint, as in `read_peft`.

    Raises:
        UserError: what `read_peft` or `read_adapter` raises.
    """
    if is_adapter(path):
        _, lora, arrays = read_adapter(path, config)
        return lora, arrays
    return read_peft(path, config, base=base)


def merge(config: Qwen3MoeConfig, block: Block, lora: LoraConfig, adapters: Mapping[str, np.ndarray]) -> Block:
    """Replaces the weights in `block` by those with the layer's adapters merged, and returns `block`.

    W + scale * B A: product and sum in float32, one cast to the weight's dtype at the end; one expert at a time.
    Weights that the adapter holds in full replace those of the top level.
    """
    if block.layer is None:
        merge_saved(config, block, lora, adapters)
    for target in lora.targets:
        path, layers = LORA_TARGETS[target].path, _layers_of(config, target)
        if block.layer not in layers:
            continue
        slot, scale = layers.index(block.layer), np.float32(lora.scale(target))
        base = block.arrays[path]
        a, b = adapters[f"{path}.lora_A"][slot], adapters[f"{path}.lora_B"][slot]
        name = f"layer {block.layer}: {path}"
        if base.ndim == 2:
            block.arrays[path] = _merged(name, base, a, b, scale)
            continue
        merged = np.empty_like(base)
        for expert in range(base.shape[0]):
            merged[expert] = _merged(f"{name}[{expert}]", base[expert], a[expert], b[expert], scale)
        block.arrays[path] = merged
    return block


def _merged(name: str, base: np.ndarray, a: np.ndarray, b: np.ndarray, scale: np.float32) -> np.ndarray:
    delta = (b.astype(np.float32) @ a.astype(np.float32)) * scale
    return cast(name, base.astype(np.float32) + delta, base.dtype)
