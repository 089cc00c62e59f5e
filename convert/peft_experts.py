"""The forms in which adapters of experts are stored, and the one form in which this package holds them.

Here the adapter of an expert weight is A [E, r, in] and B [E, out, r]; gate and up share one, whose out is 2F. On disk
there are four forms:

- peft: A [E*r, in], expert slowest, and B [out, r*E], expert fastest (`ParamWrapper.get_delta_weight` in PEFT's
  tuners/lora/layer.py). If both parameters have adapters, PEFT's keys name the inner one `base_layer`, so the shapes
  tell which parameter a pair belongs to. Megatron-Bridge writes the same as A [E, r, in] and B [out, r, E] for vLLM.
- peft-0.18: the same with in and out exchanged. PEFT before 0.19 took a parameter [E, out, in] for [E, in, out], so its
  A_e and B_e are the transposes of B and A here.
- unsloth: lora_B as [out, E*r], as Unsloth wrote it before September 2026; in and out as in either of the former.
- stacked and per-expert: the arrays themselves, or a matrix for each expert and projection, as with transformers 4.
  Stacked gate and up may be apart. Tinker and Megatron-Bridge share the outer matrices: gate's and up's A and down's B
  are [1, ...] and serve all experts (SGLang's `--experts-shared-outer-loras`). Tinker calls gate, down and up w1, w2
  and w3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from convert.names import block_shapes
from convert.peft_settings import PeftSettings
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.errors import UserError
from jaxmoe.lora import GateUpPart

AdapterLayout = Literal["peft", "peft-0.18", "per-expert", "stacked", "unsloth"]
LAYOUTS: tuple[AdapterLayout, ...] = get_args(AdapterLayout)

EXPERTS = "mlp.experts"
GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
_NEW_LAYOUT = (0, 19, 0)  # PEFT's first version with the layout "peft"
_STACKED = re.compile(rf"{re.escape(EXPERTS)}\.(gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3)")
_TINKER = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass(frozen=True)
class Pair:
    """A, B and alpha of one target in one layer; the shapes are those of `lora_specs` without the layer axis.

    `part` says which half of experts.gate_up_proj has an adapter.
    """

    a: np.ndarray
    b: np.ndarray
    alpha: float
    part: GateUpPart = "both"

    @property
    def rank(self) -> int:
        """The adapter's rank r."""
        return self.a.shape[-2]

    @property
    def is_void(self) -> bool:
        """Whether A and B are zero throughout: without effect and without gradient, as if there were no adapter.

        The layouts for inference servers fill up with such adapters.
        """
        return not self.a.any() and not self.b.any()

    def padded(self, rank: int) -> Pair:
        """The same product with the given, larger rank: zero rows of A and zero columns of B."""
        extra = rank - self.rank
        before = [(0, 0)] * (self.a.ndim - 2)
        a = np.pad(self.a, [*before, (0, extra), (0, 0)])
        return replace(self, a=a, b=np.pad(self.b, [*before, (0, 0), (0, extra)]))


def scaled(b: np.ndarray, factor: float) -> np.ndarray:
    """`factor * b`: float32, or b's own dtype where that is as exact."""
    if factor == 1:
        return b
    product = b.astype(np.float32) * np.float32(factor)
    same = product.astype(b.dtype)
    return same if np.array_equal(same.astype(np.float32), product) else product


def common_scale(scales: Sequence[float]) -> tuple[float, list[float]]:
    """One of the factors alpha / r, and for each what its B has to be multiplied by to have that factor instead."""
    scale = next((each for each in scales if each), 1.0)
    return scale, [each / scale for each in scales]


def pack(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A [E, r, in] and B [E, out, r] -> the matrices of the form "peft"."""
    return a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)


def unpack(
    where: str,
    config: Qwen3MoeConfig,
    layer: int,
    module: str,
    halves: Mapping[str, np.ndarray],
    layout: AdapterLayout | None,
    settings: PeftSettings,
) -> tuple[str, np.ndarray, np.ndarray]:
    """The packed matrices of an expert weight -> (target, A [E, r, in], B [E, out, r]).

    Raises:
        UserError: shapes that fit no weight, or that fit both layouts of PEFT while nothing tells which it is.
    """
    a, b = halves["A"], halves["B"]
    shapes = {f"experts.{path.removeprefix('sparse.')}": shape for path, shape in block_shapes(config, layer).items()}
    shapes = {target: shape for target, shape in shapes.items() if len(shape) == 3}
    fits = [
        (target, exchanged)
        for target, (experts, out, inner) in shapes.items()
        for exchanged in (False, True)
        if (a.shape[1], b.shape[0]) == ((out, inner) if exchanged else (inner, out))
        and a.shape[0] == b.shape[1]
        and a.shape[0] % experts == 0
    ]
    if named := _named_target(module):
        fits = [fit for fit in fits if fit[0] == named]
    if layout == "peft-0.18":
        fits = [fit for fit in fits if fit[1]]
    if not fits:
        found = f"{list(a.shape)} and {list(b.shape)}"
        raise UserError(f"{where}: expected {_expected_shapes(shapes, layout)}, found {found}")
    if len(fits) > 1:
        fits = [fit for fit in fits if fit[1] == _is_exchanged(where, layout, settings)]
    target, exchanged = fits[0]
    experts = shapes[target][0]
    rank = a.shape[0] // experts
    a = a.reshape(experts, rank, -1)
    if layout == "unsloth":
        b = b.reshape(-1, experts, rank).transpose(1, 0, 2)
    else:
        b = b.reshape(-1, rank, experts).transpose(2, 0, 1)
    return (target, b.transpose(0, 2, 1), a.transpose(0, 2, 1)) if exchanged else (target, a, b)


def flattened(halves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A [E, r, in] and B [out, r, E] -> the matrices of the form "peft"; matrices stay."""
    a, b = halves["A"], halves["B"]
    return {"A": a.reshape(-1, a.shape[-1]), "B": b.reshape(b.shape[0], -1)}


def stacked_projection(module: str) -> str | None:
    """The projection that a module's 3-D tensors are of, such as gate_proj; None for a module without such tensors."""
    match = _STACKED.fullmatch(module)
    return _TINKER.get(match[1], match[1]) if match else None


def of_all_experts(where: str, config: Qwen3MoeConfig, name: str, pair: Pair) -> Pair:
    """A checked adapter of the projection `name`, A [E, r, in] and B [E, out, r]; one that is [1, ...] is repeated.

    Raises:
        UserError: other shapes.
    """
    repeated = lambda array: np.broadcast_to(array, (config.num_experts, *array.shape[1:]))
    whole = replace(
        pair,
        a=repeated(pair.a) if len(pair.a) == 1 else pair.a,
        b=repeated(pair.b) if len(pair.b) == 1 else pair.b,
    )
    check_shapes(where, config, name, whole, (config.num_experts,))
    return whole


def _named_target(module: str) -> str | None:
    """The target of a module whose name tells it; PEFT's own names do not."""
    name = module.removeprefix(f"{EXPERTS}.")
    return f"experts.{name}" if name in ("gate_up_proj", "down_proj") else None


def _expected_shapes(shapes: Mapping[str, tuple[int, ...]], layout: AdapterLayout | None) -> str:
    if not shapes:
        return "no experts in this layer"
    exchanged = layout == "peft-0.18"
    each = ((e, o, i) if exchanged else (e, i, o) for e, o, i in shapes.values())
    return " or ".join(f"[{e}*r, {first}] and [{second}, r*{e}]" for e, first, second in each)


def _is_exchanged(where: str, layout: AdapterLayout | None, settings: PeftSettings) -> bool:
    """Whether in and out are exchanged, as PEFT's version tells; asked only where the shapes fit both ways."""
    version = settings.raw.get("peft_version")
    match = re.match(r"(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?(.*)", version) if isinstance(version, str) else None
    if match:
        release = (int(match[1]), int(match[2]), int(match[3] or 0))
        # The layout changed while versions from 0.18.1 to 0.19.0 were in development.
        in_development = "dev" in match[4] and (0, 18, 1) <= release <= _NEW_LAYOUT
        if not in_development:
            return release < _NEW_LAYOUT
    if layout == "peft":
        return False
    raise UserError(
        f"{where}: the shapes fit the layouts of PEFT before and since 0.19, and {settings.path.name} has no "
        f"peft_version that tells (found {version!r}): add the version that wrote it, for instance "
        f'"peft_version": "0.18.1", or use python -m convert peft2jax with --layout peft-0.18 or --layout peft'
    )


def check_shapes(where: str, config: Qwen3MoeConfig, name: str, pair: Pair, lead: tuple[int, ...] = ()) -> None:
    """Raises UserError unless A is [*lead, r, in] and B [*lead, out, r] of the projection `name` of an expert."""
    F, D = config.moe_intermediate_size, config.hidden_size
    out, inner = {"gate_up_proj": (2 * F, D), "down_proj": (D, F)}.get(name, (F, D))
    if pair.a.shape != (*lead, pair.rank, inner) or pair.b.shape != (*lead, out, pair.rank):
        expected = f"{[*lead, pair.rank, inner]} and {[*lead, out, pair.rank]}"
        raise UserError(f"{where}: expected {expected}, found {list(pair.a.shape)} and {list(pair.b.shape)}")


def stack_experts(
    where: str, config: Qwen3MoeConfig, settings: PeftSettings, module: str, name: str, found: Mapping[int, Pair]
) -> Pair:
    """The adapters of the projection `name` in the module `module`, expert by expert -> one of all experts.

    Experts that `target_modules` leaves out get zeros. Smaller ranks are padded with zeros. Where the factors alpha / r
    differ, B takes up the difference.

    Raises:
        UserError: an expert that `target_modules` names has no adapter, or a wrong shape.
    """
    E = config.num_experts
    if unknown := [expert for expert in found if expert >= E]:
        raise UserError(f"{where}: expected experts below {E}, found {min(unknown)}")
    missing = [expert for expert in range(E) if expert not in found]
    if missing and settings.targets_any([f"model.{module}.{expert}.{name}" for expert in missing]):
        raise UserError(
            f"{where}: expected an adapter for {missing[0]}.{name} ({len(missing)} missing in all), as target_modules "
            "says, found none"
        )
    for expert, pair in found.items():
        check_shapes(f"{where}: {expert}.{name}", config, name, pair)
    some = next(iter(found.values()))
    void = replace(some, a=np.zeros_like(some.a), b=np.zeros_like(some.b))
    pairs = [found.get(expert, void) for expert in range(E)]
    if len({(pair.rank, pair.alpha) for pair in pairs}) == 1:
        return Pair(np.stack([pair.a for pair in pairs]), np.stack([pair.b for pair in pairs]), pairs[0].alpha)
    rank = max(pair.rank for pair in pairs)
    scale, factors = common_scale([settings.scale(pair.rank, pair.alpha) for pair in pairs])
    each = [pair.padded(rank) for pair in pairs]
    b = [scaled(pair.b, factor) for pair, factor in zip(each, factors, strict=True)]
    return Pair(np.stack([pair.a for pair in each]), np.stack(b), settings.alpha_for(scale, rank))


def join_halves(settings: PeftSettings, gate: Pair | None, up: Pair | None) -> Pair:
    """The adapters of gate [E, F, D] and up -> one of experts.gate_up_proj [E, 2F, D] with the same product.

    Its rank is the sum of both, and its B is block diagonal. Where only one of the two has an adapter, B is zero in the
    other half.
    """
    if gate is None or up is None:
        part, one = ("up", up) if gate is None else ("gate", gate)
        assert one is not None
        empty = np.zeros_like(one.b)
        return Pair(one.a, np.concatenate([one.b, empty] if part == "gate" else [empty, one.b], 1), one.alpha, part)
    rank = gate.rank + up.rank
    if (gate.rank, gate.alpha) == (up.rank, up.alpha):
        alpha, factors = gate.alpha * (math.sqrt(2) if settings.use_rslora else 2), (1.0, 1.0)
    else:
        scale, factors = common_scale([settings.scale(pair.rank, pair.alpha) for pair in (gate, up)])
        alpha = settings.alpha_for(scale, rank)
    gate_b, up_b = (scaled(pair.b, factor) for pair, factor in zip((gate, up), factors, strict=True))
    E, F = gate.b.shape[:2]
    b = np.zeros((E, 2 * F, rank), np.promote_types(gate_b.dtype, up_b.dtype))
    b[:, :F, : gate.rank] = gate_b
    b[:, F:, gate.rank :] = up_b
    return Pair(np.concatenate([gate.a, up.a], 1), b, alpha)


def split_halves(pair: Pair) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The inverse of `join_halves`: an adapter of experts.gate_up_proj -> A and B of gate_proj and of up_proj.

    Both have the whole A. If B is block diagonal, as `join_halves` makes it, each has its half of A.
    """
    a, b = pair.a, pair.b
    F, half = b.shape[1] // 2, a.shape[1] // 2
    if pair.part != "both":
        return {f"{pair.part}_proj": (a, b[:, :F] if pair.part == "gate" else b[:, F:])}
    gate, up = b[:, :F], b[:, F:]
    diagonal = not gate[..., half:].any() and not up[..., :half].any() and gate.any() and up.any()
    if diagonal and 2 * half == a.shape[1]:
        return {"gate_proj": (a[:, :half], gate[..., :half]), "up_proj": (a[:, half:], up[..., half:])}
    return {"gate_proj": (a, gate), "up_proj": (a, up)}


def fuse(settings: PeftSettings, each: Mapping[str, Pair]) -> dict[str, Pair]:
    """The adapters of gate_proj, up_proj and down_proj of all experts in a layer -> target: its adapter."""
    each = {name: pair for name, pair in each.items() if not pair.is_void} or each
    targets: dict[str, Pair] = {}
    if "gate_proj" in each or "up_proj" in each:
        targets[GATE_UP] = join_halves(settings, each.get("gate_proj"), each.get("up_proj"))
    if "down_proj" in each:
        targets[DOWN] = each["down_proj"]
    return targets


def check_layout(where: str, modules: Mapping[str, int], layout: AdapterLayout | None) -> None:
    """Raises UserError when the experts' modules, module -> dimensions, have another layout than was asked for."""
    found = {
        "per-expert" if re.match(rf"{EXPERTS}\.\d+\.", module) else "stacked" if ndim == 3 else "peft"
        for module, ndim in modules.items()
        if module.startswith(EXPERTS)
    }
    if layout in ("per-expert", "stacked") and found - {layout}:
        raise UserError(f"{where}: expected experts in the layout {layout}, found {min(found - {layout})}")
