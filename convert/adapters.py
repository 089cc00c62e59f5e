"""Reads, writes and merges LoRA adapters in PEFT's format.

`convert.peft_settings` reads adapter_config.json, `convert.peft_experts` knows the layouts of the experts' tensors, and
`convert.peft_served` writes what inference servers load.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from convert.peft_experts import (
    DOWN,
    EXPERTS,
    GATE_UP,
    AdapterLayout,
    Pair,
    check_layout,
    flattened,
    fuse,
    of_all_experts,
    pack,
    stack_experts,
    stacked_projection,
    unpack,
)
from convert.peft_served import served
from convert.peft_settings import MERGE, SETTINGS, PeftSettings
from convert.safetensors_io import read_header, write_file
from convert.saved_modules import (
    KEYS,
    is_saved,
    merge_saved,
    read_saved,
    saved_settings,
    saved_tensors,
    without_copies,
)
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.errors import UserError, shown
from jaxmoe.lora import LORA_TARGETS, ROUTER, LoraConfig, expand_targets, layers_of
from jaxmoe.parameters import parameter_specs
from jaxmoe.store.adapter import check_adapter, is_adapter, read_adapter
from jaxmoe.store.checkpoint import Block, Checkpoint, cast
from jaxmoe.store.expert_adapters import with_all_experts
from jaxmoe.store.files import output_folder

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model.model."
# The PEFT version whose layout of experts is written. Without it, some shapes would not tell (`peft_experts.unpack`).
_WRITTEN_VERSION = "0.19.0"

# Module in a decoder layer -> its target, for modules with one weight. The two expert weights share a module.
_TARGETS = {target.peft_module: name for name, target in LORA_TARGETS.items() if target.peft_module != EXPERTS}
# The adapter's own name may stand before the last word: lora_A.default.weight.
_KEY = re.compile(r"(.*?)layers\.(\d{1,9})\.(.+)\.lora_([AB])(?:\.([^.]+))?\.weight")
_PREFIXES = (PREFIX, "base_model.model.", "model.", "")
# Of torch.compile, of data parallelism, and of recomputation.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_UNTARGETED = "target_modules, target_parameters, exclude_modules, layers_to_transform: PEFT would ignore the others"
_OLD_EXPERT = re.compile(r"mlp\.experts\.(\d{1,9})\.(gate_proj|up_proj|down_proj)")
# What a key contains -> why it is not read, and the way out.
_OTHER_TENSORS = {
    "lora_embedding_": f"LoRA on embeddings is not supported; {MERGE}",
    "lora_magnitude_vector": f"DoRA rescales the whole weight; {MERGE}",
    "base_layer.weight": f"LoRA on embeddings or on the output head is not supported; {MERGE}",
    "lm_head.lora_": f"LoRA on the output head is not supported; {MERGE}",
    "unembed_tokens.lora_": (
        "LoRA on the output head is not supported; merge it with tinker_cookbook.weights.build_hf_model and convert "
        "the merged model, or train with train_unembed=False"
    ),
    ".bias": f"trained biases are not read; {MERGE}",
    "trainable_tokens": f"single trained token embeddings are not supported; {MERGE}",
    "norm.weight": f"trained norms are not read; {MERGE}",
}

Modules = dict[tuple[int, str], dict[str, np.ndarray]]


def read_peft(
    path: str | os.PathLike[str],
    config: Qwen3MoeConfig,
    layout: AdapterLayout | None = None,
    base: Checkpoint | None = None,
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Reads a PEFT adapter for the model `config` as the arrays of `lora_specs`; layers without an adapter get zeros.

    `layout` is that of the experts' tensors; by default the names, the shapes and PEFT's version tell. Embeddings that
    are stored beside the adapter are dropped if they equal those of the checkpoint `base`.

    With
    transformers 4, PEFT has one adapter per expert and projection. The adapters of gate and up become one, whose rank
    is the sum and whose B is block diagonal; its product is the same.

    Raises:
        UserError: another kind of adapter, a feature that changes the result and is not supported (DoRA, trained
            biases, ...), a tensor that is missing, unexpected or of the wrong shape, or experts whose
            layout nothing tells.
    """
    path = pathlib.Path(path)
    settings = PeftSettings.read(path)
    _check_biases(path, config, settings)
    tensors = without_copies(_tensors(path))
    saved = read_saved(path, config, settings.raw, tensors, base)
    modules = _modules(path, config, {key: tensor for key, tensor in tensors.items() if not is_saved(key)})
    pairs = _pairs(path / WEIGHTS, config, settings, modules, layout)
    lora = LoraConfig(
        r=settings.raw["r"],
        alpha=float(settings.raw["lora_alpha"]),
        use_rslora=settings.use_rslora,
        targets=expand_targets(list({target for target, _ in pairs})),
        base_model_name_or_path=settings.raw.get("base_model_name_or_path"),
        dropout=float(settings.raw.get("lora_dropout") or 0.0),
        modules_to_save=tuple(name for name in KEYS.values() if name in saved.arrays),
        ensure_weight_tying=saved.tied,
        full_router=ROUTER in saved.arrays,
    )
    stacks = {target: _in_slots(path / WEIGHTS, config, target, pairs) for target in lora.targets}
    lora = _with_patterns(lora, stacks)
    arrays: dict[str, np.ndarray] = {}
    for target, slots in stacks.items():
        arrays |= _stack(target, lora.rank(target), slots)
    arrays |= saved.arrays
    check_adapter(str(path), config, lora, arrays)
    return lora, arrays


def _check_biases(path: pathlib.Path, config: Qwen3MoeConfig, settings: PeftSettings) -> None:
    """Refuses trained biases. A model without biases has none, whatever the adapter's settings say."""
    bias = settings.raw.get("bias")
    if bias not in ("none", None) and (config.attention_bias or bias not in ("all", "lora_only")):
        raise UserError(
            f"{path / SETTINGS}: bias: expected 'none', found {shown(bias)}: trained biases are not read; {MERGE}"
        )


def _tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    if not (path / WEIGHTS).is_file():
        pickled = ""
        if (path / "adapter_model.bin").exists():
            pickled = (
                " (adapter_model.bin is a pickle and is not read; PEFT's PeftModel.from_pretrained(...) and"
                " save_pretrained(...) write it as safetensors)"
            )
        raise UserError(f"file not found: {path / WEIGHTS}{pickled}")
    return {name: tensor.read() for name, tensor in read_header(path / WEIGHTS).items()}


def _modules(path: pathlib.Path, config: Qwen3MoeConfig, tensors: Mapping[str, np.ndarray]) -> Modules:
    """(layer, module) -> its A and B. Every tensor must be one of them, and both must be there."""
    file = path / WEIGHTS
    modules: Modules = {}
    names: set[str] = set()
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(_WRAPPERS.sub("", key))
        if match is None or tensor.ndim not in (2, 3):
            raise UserError(f"{file}: {_about(key, tensor)}")
        if match[1] not in _PREFIXES:
            raise UserError(
                f"{file}: {key}: expected names that start with {PREFIX}layers, found {match[1]}layers: the adapter "
                f"was made for another model class; if its text model is this one, rename the tensors"
            )
        names.add(match[5] or "")
        halves = modules.setdefault((int(match[2]), match[3]), {})
        if match[4] in halves:
            raise UserError(f"{file}: {key}: expected one tensor of this module, found two")
        halves[match[4]] = tensor
    if not modules:
        raise UserError(f"{file}: expected LoRA tensors, found none")
    if len(names) > 1:
        shown = " and ".join(sorted(name or "none" for name in names))
        raise UserError(f"{file}: expected one adapter, found the adapters {shown}; save one of them by itself")
    for (layer, module), halves in modules.items():
        where = f"{file}: layers.{layer}.{module}"
        if set(halves) != {"A", "B"}:
            raise UserError(f"{where}: expected lora_A and lora_B, found only lora_{next(iter(halves))}")
        if layer >= config.num_hidden_layers:
            raise UserError(f"{where}: expected a layer below {config.num_hidden_layers}, found {layer}")
    return modules


def _about(key: str, tensor: np.ndarray) -> str:
    """Why a tensor is not read."""
    for part, reason in _OTHER_TENSORS.items():
        if part in key:
            return f"{key}: unexpected tensor: {reason}"
    return f"unexpected tensor {key} {list(tensor.shape)}"


def _pairs(
    file: pathlib.Path,
    config: Qwen3MoeConfig,
    settings: PeftSettings,
    modules: Modules,
    layout: AdapterLayout | None,
) -> dict[tuple[str, int], Pair]:
    """(target, layer) -> its adapter; void ones are left out unless all are."""
    pairs: dict[tuple[str, int], Pair] = {}
    check_layout(str(file), {module: halves["A"].ndim for (_, module), halves in modules.items()}, layout)
    of_experts = {key: halves for key, halves in modules.items() if _projection(key[1], halves) is not None}
    for (layer, module), halves in modules.items():
        if (layer, module) in of_experts:
            continue
        where = f"{file}: layers.{layer}.{module}"
        target, a, b = _located(where, config, settings, layer, module, halves, layout)
        if (target, layer) in pairs:
            raise UserError(f"{where}: expected one adapter per weight, found two for {target}")
        # A weight may be the target as a module or as a parameter.
        names = [module, f"{module}.weight"] if module in _TARGETS else [LORA_TARGETS[target].peft_parameter or module]
        names = [f"model.layers.{layer}.{name}" for name in names]
        if module in _TARGETS and not settings.loads(names):
            raise UserError(f"{where}: expected a module that {SETTINGS} targets ({_UNTARGETED}), found tensors of it")
        pairs[target, layer] = _pair(where, settings, settings.targeted(names), a, b)
    for layer, each in _projections(file, config, settings, of_experts).items():
        for target, pair in fuse(settings, each).items():
            if pairs.setdefault((target, layer), pair) is not pair:
                forms = "those of transformers 4 and of transformers 5"
                raise UserError(f"{file}: layers.{layer}: {target}: expected one form of adapter, found {forms}")
    return {key: pair for key, pair in pairs.items() if not pair.is_void} or pairs


def _projection(module: str, halves: Mapping[str, np.ndarray]) -> tuple[int | None, str] | None:
    """(expert, projection) of a module that adapts gate, up or down; None instead of the expert stands for all."""
    if old := _OLD_EXPERT.fullmatch(module):
        return int(old[1]), old[2]
    name = stacked_projection(module)
    stacked = name not in (None, "gate_up_proj") and halves["A"].ndim == halves["B"].ndim == 3
    return (None, name) if stacked and name is not None else None


def _projections(
    file: pathlib.Path, config: Qwen3MoeConfig, settings: PeftSettings, modules: Modules
) -> dict[int, dict[str, Pair]]:
    """Layer -> gate_proj, up_proj and down_proj -> the adapter of all experts."""
    found: dict[tuple[int, str], dict[int | None, Pair]] = {}
    for (layer, module), halves in modules.items():
        where = f"{file}: layers.{layer}.{module}"
        one = _projection(module, halves)
        assert one is not None
        expert, name = one
        pair = _pair(where, settings, [f"model.layers.{layer}.{module}"], halves["A"], halves["B"])
        experts = found.setdefault((layer, name), {})
        if expert in experts or (experts and None in (expert, *experts)):
            raise UserError(f"{where}: expected one adapter of {name}, found two")
        experts[expert] = pair if expert is not None else of_all_experts(where, config, name, pair)
    projections: dict[int, dict[str, Pair]] = {}
    for (layer, name), experts in found.items():
        single = {expert: pair for expert, pair in experts.items() if expert is not None}
        module = f"layers.{layer}.{EXPERTS}"
        whole = experts.get(None) or stack_experts(f"{file}: {module}", config, settings, module, name, single)
        projections.setdefault(layer, {})[name] = whole
    return projections


def _pair(where: str, settings: PeftSettings, names: Sequence[str], a: np.ndarray, b: np.ndarray) -> Pair:
    rank, alpha = settings.rank_and_alpha(names)
    if rank != a.shape[-2]:
        raise UserError(f"{where}: expected rank {rank}, as {SETTINGS} says, found {a.shape[-2]}")
    return Pair(a, b, alpha)


def _located(
    where: str,
    config: Qwen3MoeConfig,
    settings: PeftSettings,
    layer: int,
    module: str,
    halves: Mapping[str, np.ndarray],
    layout: AdapterLayout | None,
) -> tuple[str, np.ndarray, np.ndarray]:
    """The target of a module, and its A and B as `lora_specs` has them, without the layer axis."""
    a, b = halves["A"], halves["B"]
    if module in _TARGETS and a.ndim == b.ndim == 2:
        return _TARGETS[module], a, b
    if module == f"{EXPERTS}.gate_up_proj" and a.ndim == b.ndim == 3:
        whole = of_all_experts(where, config, "gate_up_proj", Pair(a, b, 0.0))
        return GATE_UP, whole.a, whole.b
    inner = (EXPERTS, f"{EXPERTS}.base_layer")
    packed = (*inner, f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj")
    by_expert = a.ndim == b.ndim == 3 and a.shape[0] == b.shape[-1] == config.num_experts
    if (by_expert and module in inner) or (a.ndim == b.ndim == 2 and module in packed):
        return unpack(where, config, layer, module, flattened(halves), layout, settings)
    raise UserError(
        f"{where}: expected {', '.join(_TARGETS)} or {EXPERTS}, found {module} with lora_A {list(a.shape)}; adapters "
        f"of other weights are not read: {MERGE}"
    )


def _in_slots(
    file: pathlib.Path, config: Qwen3MoeConfig, target: str, pairs: Mapping[tuple[str, int], Pair]
) -> list[Pair | None]:
    """The adapters of a target in the order of its stack; None for layers without one."""
    layers = layers_of(config, target)
    expected = parameter_specs(config)[LORA_TARGETS[target].path].shape[-2:]
    for (name, layer), pair in pairs.items():
        if name != target:
            continue
        where = f"{file}: layer {layer}: {target}"
        if layer not in layers:
            raise UserError(f"{where}: expected a layer with this weight, found one without it")
        if (found := (pair.b.shape[-2], pair.a.shape[-1])) != expected:
            raise UserError(
                f"{where}: expected an adapter of a weight of shape {list(expected)}, as the base's config.json says, "
                f"found one of {list(found)}; was it made for another model?"
            )
    return [pairs.get((target, layer)) for layer in layers]


def _with_patterns(lora: LoraConfig, stacks: Mapping[str, list[Pair | None]]) -> LoraConfig:
    """`lora` with the ranks and alphas of the adapters, per target, and per layer where they differ."""
    ranks, alphas, layer_ranks, layer_alphas = [], [], [], []
    for target, slots in stacks.items():
        each = tuple(pair.rank if pair else 0 for pair in slots)
        ranks += [(target, max(each))] if max(each) != lora.r else []
        layer_ranks += [(target, each)] if len(set(each)) > 1 else []
        found = {pair.alpha for pair in slots if pair}
        if len(found) > 1:
            layer_alphas.append((target, tuple(pair.alpha if pair else lora.alpha for pair in slots)))
        elif found != {lora.alpha}:
            alphas.append((target, *found))
    parts = tuple(pair.part if pair else "both" for pair in stacks.get(GATE_UP, []))
    return replace(
        lora,
        rank_pattern=tuple(ranks),
        alpha_pattern=tuple(alphas),
        layer_ranks=tuple(layer_ranks),
        layer_alphas=tuple(layer_alphas),
        gate_up_parts=parts if set(parts) - {"both"} else (),
    )


def _stack(target: str, rank: int, slots: list[Pair | None]) -> dict[str, np.ndarray]:
    """The arrays of a target; a layer's rank is padded with zeros up to the largest. Their dtype is the widest."""
    padded = [pair and pair.padded(rank) for pair in slots]
    out = {}
    for name, arrays in (("lora_A", [p and p.a for p in padded]), ("lora_B", [p and p.b for p in padded])):
        present = [array for array in arrays if array is not None]
        dtype = present[0].dtype
        for array in present:
            dtype = np.promote_types(dtype, array.dtype)
        stacked = np.zeros((len(slots), *present[0].shape), dtype)
        for slot, array in enumerate(arrays):
            if array is not None:
                stacked[slot] = array
        out[f"{LORA_TARGETS[target].path}.{name}"] = stacked
    return out


def write_peft(
    dst: str | os.PathLike[str],
    config: Qwen3MoeConfig,
    lora: LoraConfig,
    adapters: Mapping[str, Any],
    layout: AdapterLayout = "peft",
) -> None:
    """Writes `adapters`, the arrays of `lora_specs`, as a PEFT adapter into `dst`, which must be new or empty.

    `layout` is "peft" (what PEFT from 0.19 on writes), "per-expert" or "stacked" (`convert.peft_served`).

    Raises:
        UserError: other names or shapes, or `dst` is not empty.
    """
    arrays = {name: np.asarray(array) for name, array in adapters.items()}
    check_adapter("adapter", config, lora, arrays)
    lora, arrays = with_all_experts(config, lora, arrays)
    pairs = dict(_layers(config, lora, arrays))
    if layout == "peft":
        tensors, settings = dict(_peft_tensors(pairs)), _settings(config, lora)
    elif lora.saved_paths:
        names = ", ".join(lora.saved_paths)
        raise UserError(
            f"layout {layout}: expected an adapter of layers, found {names} trained in full, which servers do not "
            f"load: merge it with `jax2hf --adapter`, or write it with --layout peft"
        )
    else:
        assert layout in ("per-expert", "stacked"), layout
        tensors, settings = served(config, lora, pairs, layout)
    named = {f"{PREFIX}layers.{key}": array for key, array in tensors.items()} | saved_tensors(config, lora, arrays)
    with output_folder(dst) as folder:
        write_file(folder / WEIGHTS, named, {"format": "pt"})
        common = {"peft_type": "LORA", "peft_version": _WRITTEN_VERSION, "task_type": "CAUSAL_LM"}
        common |= {"base_model_name_or_path": lora.base_model_name_or_path, "inference_mode": True, "bias": "none"}
        common |= {"fan_in_fan_out": False, "init_lora_weights": True}
        # PEFT refuses dropout on parameters.
        parameters = any(LORA_TARGETS[target].peft_parameter for target in lora.targets)
        common |= {"lora_dropout": 0.0 if parameters else lora.dropout} | saved_settings(lora)
        text = json.dumps(common | settings, indent=2, sort_keys=True) + "\n"
        (folder / SETTINGS).write_text(text, encoding="utf-8")


def _layers(
    config: Qwen3MoeConfig, lora: LoraConfig, arrays: Mapping[str, np.ndarray]
) -> Iterator[tuple[tuple[str, int], Pair]]:
    """((target, layer), adapter) of every layer that has one, without the padding of its rank."""
    for target in lora.targets:
        path = LORA_TARGETS[target].path
        for slot, layer in enumerate(layers_of(config, target)):
            if rank := lora.layer_rank(target, slot):
                a, b = arrays[f"{path}.lora_A"][slot], arrays[f"{path}.lora_B"][slot]
                part = lora.layer_part(target, slot)
                yield (target, layer), Pair(a[..., :rank, :], b[..., :rank], lora.layer_alpha(target, slot), part)


def _peft_tensors(pairs: Mapping[tuple[str, int], Pair]) -> Iterator[tuple[str, np.ndarray]]:
    """The keys below `layers` and the tensors, as PEFT writes them."""
    for (target, layer), pair in pairs.items():
        module, a, b = LORA_TARGETS[target].peft_module, pair.a, pair.b
        if module == EXPERTS:
            # PEFT wraps the module once per adapted parameter, gate_up_proj first: it is the inner layer.
            module = f"{EXPERTS}.base_layer" if target == GATE_UP and (DOWN, layer) in pairs else EXPERTS
            a, b = pack(a, b)
        yield f"{layer}.{module}.lora_A.weight", a
        yield f"{layer}.{module}.lora_B.weight", b


def _settings(config: Qwen3MoeConfig, lora: LoraConfig) -> dict[str, Any]:
    """What adapter_config.json says of ranks, alphas and targets, in PEFT's layout."""
    modules, parameters = [], []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    by_layer = {target for target, _ in (*lora.layer_ranks, *lora.layer_alphas)}
    for target in lora.targets:
        parameter = LORA_TARGETS[target].peft_parameter
        slots = dict(enumerate(layers_of(config, target)))
        present = {slot: layer for slot, layer in slots.items() if lora.layer_rank(target, slot)}
        where = {
            slot: f"layers.{layer}.{parameter or LORA_TARGETS[target].peft_module}" for slot, layer in slots.items()
        }
        names = [parameter or target] if present == slots else [where[slot] for slot in present]
        (parameters if parameter else modules).extend(names)
        # A pattern of the whole target would hide those of its layers: PEFT takes the first that matches.
        patterns = {slot: where[slot] for slot in present} if target in by_layer else {0: parameter or target}
        for slot, name in patterns.items():
            if (rank := lora.layer_rank(target, slot)) != lora.r:
                ranks[re.escape(name)] = rank
            if (alpha := lora.layer_alpha(target, slot)) != lora.alpha:
                alphas[re.escape(name)] = _number(alpha)
    return {
        "r": lora.r,
        "lora_alpha": _number(lora.alpha),
        "use_rslora": lora.use_rslora,
        "target_modules": modules,
        "target_parameters": parameters,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


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
    Weights that the adapter holds in full replace the base's.
    """
    if block.layer is None:
        merge_saved(config, block, lora, adapters)
    if lora.full_router and block.layer in config.sparse_layers:
        own = adapters[ROUTER][config.sparse_layers.index(block.layer)]
        block.arrays[ROUTER] = cast(f"layer {block.layer}: {ROUTER}", own, block.arrays[ROUTER].dtype)
    for target in lora.targets:
        path, layers = LORA_TARGETS[target].path, layers_of(config, target)
        if block.layer not in layers or not lora.layer_rank(target, layers.index(block.layer)):
            continue
        slot = layers.index(block.layer)
        scale = np.float32(lora.scale(target, slot))
        base = block.arrays[path]
        a, b = adapters[f"{path}.lora_A"][slot], adapters[f"{path}.lora_B"][slot]
        adapted = lora.adapted_experts[slot] if lora.expert_places(target) else range(len(a))
        name = f"layer {block.layer}: {path}"
        if base.ndim == 2:
            block.arrays[path] = _merged(name, base, a, b, scale)
            continue
        merged = np.array(base)
        for place, expert in enumerate(adapted):
            merged[expert] = _merged(f"{name}[{expert}]", base[expert], a[place], b[place], scale)
        block.arrays[path] = merged
    return block


def _merged(name: str, base: np.ndarray, a: np.ndarray, b: np.ndarray, scale: np.float32) -> np.ndarray:
    delta = (b.astype(np.float32) @ a.astype(np.float32)) * scale
    return cast(name, base.astype(np.float32) + delta, base.dtype)
