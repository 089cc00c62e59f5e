"""LoRA: the settings of a model's adapters, and the tables of the weights that an adapter can change.

Standard library only. An adapter adds low-rank factors to the weights of `LORA_TARGETS`, and may hold a weight of
`SAVED_MODULES` in full, which then replaces the base's (PEFT's `modules_to_save`). All code that translates between the
names here, the stacks and PEFT's names reads these tables. The letters in the shapes are those of the dimension key in
`jaxmoe.config`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from jaxmoe.errors import ConfigError, check_integer, check_number

GateUpPart = Literal["gate", "up", "both"]
# Fields of `LoraConfig` that a stored config may lack; they then have their default.
OPTIONAL_FIELDS = (
    "layer_ranks",
    "layer_alphas",
    "gate_up_parts",
    "adapted_experts",
    "dropout",
    "modules_to_save",
    "ensure_weight_tying",
    "full_router",
)


class LayerKinds(Protocol):
    """What adapters depend on in a model's config: the indices of the layers with experts and of those with a dense
    MLP, the number of experts, and whether the head is the embedding."""

    @property
    def sparse_layers(self) -> tuple[int, ...]: ...
    @property
    def dense_layers(self) -> tuple[int, ...]: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...


@dataclass(frozen=True)
class LoraTarget:
    """One weight of a decoder layer that an adapter can be added to.

    `stack` and `parameter` locate the weight in `jaxmoe.parameters`; `shape` is the shape of one layer of it.
    `peft_module` is the module named in the keys of a PEFT adapter; the two expert weights share the module
    `mlp.experts`. `peft_parameter` is the name to list in PEFT's `target_parameters`; None where PEFT's
    `target_modules` can name the module.
    """

    group: str
    stack: str
    parameter: str
    shape: str
    peft_module: str
    peft_parameter: str | None = None

    @property
    def path(self) -> str:
        """The weight's path in `parameter_specs`, for instance `attention.q_proj`."""
        return f"{self.stack}.{self.parameter}"

    @property
    def allows_dropout(self) -> bool:
        """Whether PEFT can drop inputs of the adapter: on modules, not on parameters."""
        return self.peft_parameter is None


def _attention(name: str, shape: str) -> LoraTarget:
    return LoraTarget("attention", "attention", name, shape, f"self_attn.{name}")


def _expert(name: str, shape: str) -> LoraTarget:
    return LoraTarget("experts", "sparse", name, shape, "mlp.experts", f"mlp.experts.{name}")


def _dense(name: str, shape: str) -> LoraTarget:
    return LoraTarget("dense", "dense", name, shape, f"mlp.{name}", f"mlp.{name}.weight")


# Target name -> the weight. Attention and dense MLPs have the names of transformers' modules; `gate` is the router. The
# router is not an nn.Linear in transformers 5, so PEFT has to be told of it as a parameter. Dense MLPs are nn.Linear,
# but PEFT mistakes their module names for those of the experts in transformers 4 and would wrap the experts instead.
LORA_TARGETS: dict[str, LoraTarget] = {
    "q_proj": _attention("q_proj", "N*H D"),
    "k_proj": _attention("k_proj", "K*H D"),
    "v_proj": _attention("v_proj", "K*H D"),
    "o_proj": _attention("o_proj", "D N*H"),
    "gate": LoraTarget("router", "sparse", "gate", "E D", "mlp.gate", "mlp.gate.weight"),
    "experts.gate_up_proj": _expert("gate_up_proj", "E 2*F D"),
    "experts.down_proj": _expert("down_proj", "E D F"),
    "gate_proj": _dense("gate_proj", "I D"),
    "up_proj": _dense("up_proj", "I D"),
    "down_proj": _dense("down_proj", "D I"),
}


def adapts_experts(target: str) -> bool:
    """Whether a target is a weight of experts, which has an adapter for each."""
    return LORA_TARGETS[target].group == "experts"


# A group's name -> the targets that it stands for.
LORA_GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(name for name, target in LORA_TARGETS.items() if target.group == group)
    for group in dict.fromkeys(target.group for target in LORA_TARGETS.values())
}

# A weight that an adapter can hold in full -> its module in transformers. The name is also the weight's path in
# `jaxmoe.parameters` and in the dictionary of an adapter's arrays.
SAVED_MODULES: dict[str, str] = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
ROUTER = LORA_TARGETS["gate"].path  # a stack of layers, which an adapter can also hold in full (`full_router`)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): y = x W^T + scale * (x A^T) B^T, one A and B per target and expert.

    `targets` are keys of `LORA_TARGETS`. `rank_pattern` and `alpha_pattern` override `r` and `alpha` per target (an
    imported adapter may hold several ranks).

    `layer_ranks` and `layer_alphas` override them per layer: one entry for each layer of the target's stack. The rank
    of a target's arrays is then its largest one. In a layer of a smaller rank the further rows of A and columns of B
    are zero, and in a layer without an adapter, of rank 0, all are. Both sides are zero, so their gradients are, and
    training leaves them zero. `gate_up_parts` says, for each sparse layer, which half of experts.gate_up_proj has an
    adapter: gate, up, or both. B is zero for the other half and is not trained there.

    `adapted_experts` has, for each sparse layer, the experts that have an adapter, in rising order; empty: all have
    one. The arrays of expert weights then have one place for each, as many as the longest entry has: a layer with fewer
    leaves its last places unused, which are zero.

    In training, `dropout` is the probability that an element of an adapter's
    x is dropped; the others are divided by 1 - `dropout`.

    `modules_to_save`, keys of `SAVED_MODULES`, are trained and stored in full. In a model with a tied head,
    `ensure_weight_tying` says that the head follows the embedding; without it, the adapter separates the two. With
    `full_router` the same holds for the router of every layer, instead of an adapter on it.
    """

    r: int = 16
    alpha: float = 32.0
    use_rslora: bool = False
    targets: tuple[str, ...] = LORA_GROUPS["attention"]
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    base_model_name_or_path: str | None = None
    layer_ranks: tuple[tuple[str, tuple[int, ...]], ...] = ()
    layer_alphas: tuple[tuple[str, tuple[float, ...]], ...] = ()
    gate_up_parts: tuple[GateUpPart, ...] = ()
    adapted_experts: tuple[tuple[int, ...], ...] = ()
    dropout: float = 0.0
    modules_to_save: tuple[str, ...] = ()
    ensure_weight_tying: bool = False
    full_router: bool = False

    def __post_init__(self) -> None:
        if not self.targets:
            raise ConfigError("LoRA targets: expected at least one, found none")
        unknown = [t for t in self.targets if t not in LORA_TARGETS]
        if unknown:
            raise ConfigError(f"LoRA targets: expected some of {', '.join(LORA_TARGETS)}; found {unknown[0]!r}")
        if len(set(self.targets)) != len(self.targets):
            raise ConfigError(f"LoRA targets: expected each once, found {', '.join(self.targets)}")
        for name, rank in (("r", self.r), *self.rank_pattern):
            check_integer(f"LoRA rank {name}", rank, at_least=1)
        for name, alpha in (("alpha", self.alpha), *self.alpha_pattern):
            check_number(f"LoRA alpha {name}", alpha)
        for pattern in (self.rank_pattern, self.alpha_pattern, self.layer_ranks, self.layer_alphas):
            for name, _ in pattern:
                if name not in self.targets:
                    raise ConfigError(f"LoRA pattern: {name!r} is not among the targets {', '.join(self.targets)}")
        self._check_layers()
        self._check_experts()
        check_number("LoRA dropout", self.dropout)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"LoRA dropout: expected a probability below 1, found {self.dropout}")
        if self.modules_to_save != saved_modules(self.modules_to_save):
            raise ConfigError(
                f"modules_to_save: expected some of {', '.join(SAVED_MODULES)}, found {', '.join(self.modules_to_save)}"
            )
        if self.ensure_weight_tying and self.modules_to_save != ("embed_tokens",):
            raise ConfigError("ensure_weight_tying: only valid with modules_to_save embed_tokens")
        if self.full_router and "gate" in self.targets:
            raise ConfigError("full_router: expected no target gate, since the router is trained in full, found one")

    def _check_layers(self) -> None:
        for name, ranks in self.layer_ranks:
            for rank in ranks:
                check_integer(f"LoRA rank of a layer of {name}", rank, at_least=0)
            if max(ranks, default=0) != self.rank(name):
                raise ConfigError(f"layer_ranks: {name}: expected at most {self.rank(name)}, found {max(ranks)}")
        for name, alphas in self.layer_alphas:
            for alpha in alphas:
                check_number(f"LoRA alpha of a layer of {name}", alpha)
        if unknown := set(self.gate_up_parts) - {"gate", "up", "both"}:
            raise ConfigError(f"gate_up_parts: expected gate, up or both, found {min(unknown)!r}")
        if self.gate_up_parts and "experts.gate_up_proj" not in self.targets:
            raise ConfigError("gate_up_parts: only valid with the target experts.gate_up_proj")

    def _check_experts(self) -> None:
        for experts in self.adapted_experts:
            for expert in experts:
                check_integer("adapted_experts", expert, at_least=0)
            if list(experts) != sorted(set(experts)):
                raise ConfigError(f"adapted_experts: expected each expert once, in rising order, found {list(experts)}")
        if not self.adapted_experts:
            return
        if not any(map(adapts_experts, self.targets)):
            raise ConfigError(f"adapted_experts: only valid with the targets {', '.join(LORA_GROUPS['experts'])}")
        if not any(self.adapted_experts):
            raise ConfigError("adapted_experts: expected at least one expert, found none")

    def expert_places(self, target: str) -> int | None:
        """How many experts of a layer have a place in the target's arrays; None: all, or the target is of no expert."""
        return max(map(len, self.adapted_experts)) if self.adapted_experts and adapts_experts(target) else None

    def rank(self, target: str) -> int:
        """Rank r of one target's arrays, the largest of its layers."""
        return dict(self.rank_pattern).get(target, self.r)

    def layer_rank(self, target: str, slot: int) -> int:
        """Rank r in one layer, the `slot`-th of the target's stack; 0 without an adapter."""
        ranks = dict(self.layer_ranks).get(target)
        return self.rank(target) if ranks is None else ranks[slot]

    def layer_alpha(self, target: str, slot: int) -> float:
        """Alpha in one layer, the `slot`-th of the target's stack."""
        alphas = dict(self.layer_alphas).get(target)
        return dict(self.alpha_pattern).get(target, self.alpha) if alphas is None else alphas[slot]

    def layer_part(self, target: str, slot: int) -> GateUpPart:
        """Which half of experts.gate_up_proj has an adapter in a sparse layer; "both" for other targets."""
        return self.gate_up_parts[slot] if self.gate_up_parts and target == "experts.gate_up_proj" else "both"

    def scale(self, target: str, slot: int = 0) -> float:
        """Factor on the low-rank product in one layer, the `slot`-th of the target's stack.

        It is alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023); 0 in a layer without an adapter.
        """
        rank, alpha = self.layer_rank(target, slot), self.layer_alpha(target, slot)
        if rank == 0:
            return 0.0
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def scales(self, target: str) -> float | tuple[float, ...]:
        """The factor of all layers of the target's stack, or one for each layer where they differ."""
        ranks, alphas = dict(self.layer_ranks).get(target, ()), dict(self.layer_alphas).get(target, ())
        each = tuple(self.scale(target, slot) for slot in range(max(len(ranks), len(alphas), 1)))
        return each[0] if len(set(each)) == 1 else each

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, without those of `OPTIONAL_FIELDS` that say nothing: some files have no such fields."""
        return {name: value for name, value in asdict(self).items() if value or name not in OPTIONAL_FIELDS}

    @property
    def saved_paths(self) -> tuple[str, ...]:
        """The paths of the weights that the adapter holds in full."""
        return (*self.modules_to_save, *self.trained_in_layers)

    @property
    def trained_in_layers(self) -> frozenset[str]:
        """The paths of those that lie in the layers' stacks."""
        return frozenset({ROUTER} if self.full_router else ())

    @property
    def trains_head(self) -> bool:
        """Whether the output projection is trained in full, as lm_head or as the embedding that it is tied to."""
        return "lm_head" in self.modules_to_save or self.ensure_weight_tying

    def unties_head(self, config: LayerKinds) -> bool:
        """Whether the adapter separates the model's tied head from its embedding."""
        return config.tie_word_embeddings and bool(self.modules_to_save) and not self.ensure_weight_tying

    def check_dropout(self) -> None:
        """Raises ConfigError when the adapter cannot be trained with its dropout."""
        without = [name for name in self.targets if not LORA_TARGETS[name].allows_dropout]
        if self.dropout and without:
            raise ConfigError(
                f"lora_dropout: expected 0 (PEFT drops inputs of attention's adapters only) or other targets than "
                f"{', '.join(without)}; found {self.dropout}"
            )

    def check_against(self, config: LayerKinds) -> None:
        """Raises ConfigError when the adapter is for another kind of model, or for another number of layers."""
        if self.ensure_weight_tying and not config.tie_word_embeddings:
            raise ConfigError("ensure_weight_tying: the model's head is not tied to its embedding")
        if self.full_router and not config.sparse_layers:
            raise ConfigError("full_router: the model has no mixture-of-experts layer")
        for name in self.targets:
            stack = LORA_TARGETS[name].stack
            if stack == "sparse" and not config.sparse_layers:
                raise ConfigError(f"LoRA target {name!r}: the model has no mixture-of-experts layer")
            if stack == "dense" and not config.dense_layers:
                raise ConfigError(f"LoRA target {name!r}: the model has no dense MLP layer")
        for field, entries in (("layer_ranks", self.layer_ranks), ("layer_alphas", self.layer_alphas)):
            for name, values in entries:
                if len(values) != (layers := len(layers_of(config, name))):
                    raise ConfigError(f"{field}: {name}: expected {layers} layers, found {len(values)}")
        if self.adapted_experts and len(self.adapted_experts) != len(config.sparse_layers):
            raise ConfigError(
                f"adapted_experts: expected {len(config.sparse_layers)} layers, found {len(self.adapted_experts)}"
            )
        if (most := max((expert for experts in self.adapted_experts for expert in experts), default=-1)) >= (
            E := config.num_experts
        ):
            raise ConfigError(f"adapted_experts: expected experts below {E}, found {most}")
        if self.gate_up_parts and len(self.gate_up_parts) != len(config.sparse_layers):
            raise ConfigError(
                f"gate_up_parts: expected {len(config.sparse_layers)} layers, found {len(self.gate_up_parts)}"
            )


def layers_of(config: LayerKinds, target: str) -> tuple[int, ...]:
    """The indices of the layers that have the weight `target`, in the order of its stack."""
    stack = LORA_TARGETS[target].stack
    if stack == "attention":
        return tuple(sorted((*config.sparse_layers, *config.dense_layers)))
    return config.sparse_layers if stack == "sparse" else config.dense_layers


def expand_targets(names: Sequence[str]) -> tuple[str, ...]:
    """Group names (attention, router, experts, dense) and single targets -> single targets, in the table's order.

    Raises:
        ConfigError: a name that is neither.
    """
    chosen: set[str] = set()
    for name in names:
        if name not in LORA_GROUPS and name not in LORA_TARGETS:
            raise ConfigError(
                f"LoRA targets: expected groups {', '.join(LORA_GROUPS)} or {', '.join(LORA_TARGETS)}; found {name!r}"
            )
        chosen.update(LORA_GROUPS.get(name, (name,)))
    return tuple(target for target in LORA_TARGETS if target in chosen)


def saved_modules(names: Sequence[str]) -> tuple[str, ...]:
    """Names as in PEFT's `modules_to_save` (embed_tokens, model.embed_tokens, lm_head) -> keys of `SAVED_MODULES`.

    Raises:
        ConfigError: the name of another module.
    """
    chosen: set[str] = set()
    for name in names:
        found = [key for key, module in SAVED_MODULES.items() if name in (key, module)]
        if not found:
            raise ConfigError(
                f"modules_to_save: expected some of {', '.join(SAVED_MODULES)} (other modules can be trained with "
                f"--full, or merged with PEFT's merge_and_unload), found {name!r}"
            )
        chosen.update(found)
    return tuple(name for name in SAVED_MODULES if name in chosen)


def modules_to_save(names: Sequence[str], config: LayerKinds) -> dict[str, Any]:
    """The fields of `LoraConfig` that train the modules `names` in full; a tied head stays tied.

    Either name of a tied head then stands for the one weight, as with PEFT's `ensure_weight_tying`.
    """
    saved = saved_modules(names)
    if saved and config.tie_word_embeddings:
        return {"modules_to_save": ("embed_tokens",), "ensure_weight_tying": True}
    return {"modules_to_save": saved}
