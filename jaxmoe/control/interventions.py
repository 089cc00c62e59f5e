"""Interventions on the router (experts removed, forced or biased, by layer), and the flags that specify them.

An intervention names layers by their index in the model.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.control import router_bias
from jaxmoe.errors import UserError, shown
from jaxmoe.ops.router import RoutingControl


@dataclass(frozen=True)
class Intervention:
    """Which experts of which layers are removed, forced into the k of every token, or biased.

    A removed expert keeps its router probability but is never chosen: removing one that no token uses changes nothing.

    Attributes:
        ablate: layer -> experts to remove.
        force: layer -> experts that every token uses.
        bias: layer -> {expert: what is added to its router logit}.
        choice_bias: what is added to the probabilities [Ls, E] where experts are chosen, and nowhere else.
    """

    ablate: Mapping[int, Sequence[int]] = field(default_factory=dict)
    force: Mapping[int, Sequence[int]] = field(default_factory=dict)
    bias: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    choice_bias: Float32[np.ndarray, "Ls E"] | None = None

    def control(self, config: Qwen3MoeConfig) -> RoutingControl | None:
        """The arrays [Ls, E] for the forward pass; None if nothing changes.

        Raises:
            UserError: a layer without experts, an expert that does not exist or is both removed and forced, or too many
                experts.
        """
        E, k = config.num_experts, config.num_experts_per_tok
        slots = {layer: slot for slot, layer in enumerate(config.sparse_layers)}
        self._check_indices(slots, E)
        bias = np.zeros((len(slots), E), np.float32)
        selection = np.zeros((len(slots), E), np.int32)
        for layer, values in self.bias.items():
            for expert, value in values.items():
                bias[slots[layer], expert] += value
        for layer, experts in self.ablate.items():
            selection[slots[layer], list(experts)] = -1
            if E - len(set(experts)) < k:
                raise UserError(f"ablate: expected at least {k} experts to be left in layer {layer}, found fewer")
        for layer, experts in self.force.items():
            if both := sorted(set(experts) & set(self.ablate.get(layer, ()))):
                raise UserError(
                    f"force: expected experts that are not removed, found {both[0]} in layer {layer}, which is removed"
                )
            selection[slots[layer], list(experts)] = 1
            if len(set(experts)) > k:
                raise UserError(f"force: expected at most {k} experts in layer {layer}, found {len(set(experts))}")
        given = lambda array: jnp.asarray(array) if array is not None and array.any() else None
        control = RoutingControl(None, given(bias), given(selection), given(self.choice_bias))
        return control if any(part is not None for part in control) else None

    def _check_indices(self, slots: Mapping[int, int], E: int) -> None:
        for name, layers in (("ablate", self.ablate), ("force", self.force), ("bias", self.bias)):
            for layer, experts in layers.items():
                if layer not in slots:
                    raise UserError(f"{name}: expected a layer with experts, found layer {layer}")
                if wrong := [expert for expert in experts if not 0 <= expert < E]:
                    raise UserError(f"{name}: expected an expert below {E}, found {wrong[0]} in layer {layer}")

    def describe(self) -> dict[str, Any]:
        """The JSON values for a manifest; empty parts are left out."""
        experts = {
            name: {str(layer): list(chosen) for layer, chosen in part.items()}
            for name, part in (("ablate", self.ablate), ("force", self.force))
        }
        bias = {str(layer): {str(e): value for e, value in values.items()} for layer, values in self.bias.items()}
        of_file = {}
        if self.choice_bias is not None:
            of_file = {"sha256": hashlib.sha256(self.choice_bias.tobytes()).hexdigest()}
        parts = experts | {"bias": bias, "router_bias": of_file}
        return {name: part for name, part in parts.items() if part}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags `--ablate`, `--force`, `--bias` and `--router-bias`; `intervention` reads their values."""
    for flag, metavar, text in (
        ("--ablate", "LAYER:E,...", "remove experts; LAYER is a number, a range such as 3-5, or all"),
        ("--force", "LAYER:E,...", "make every token use these experts"),
        ("--bias", "LAYER:E=X,...", "add X to the router logit of expert E"),
    ):
        parser.add_argument(flag, action="append", default=[], metavar=metavar, help=text)
    text = "route as a training with --router-bias-rate did: its router_bias.json"
    parser.add_argument("--router-bias", type=pathlib.Path, metavar="FILE", help=text)


def intervention(arguments: argparse.Namespace, config: Qwen3MoeConfig) -> Intervention:
    """The intervention that the flags describe; each flag may be repeated.

    Raises:
        UserError: a value in another form than the flag expects.
    """
    ablate: dict[int, tuple[int, ...]] = {}
    force: dict[int, tuple[int, ...]] = {}
    for flag, texts, into in (("ablate", arguments.ablate, ablate), ("force", arguments.force, force)):
        for text in texts:
            layers, rest = _layers(flag, text, config)
            if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", rest):
                raise UserError(f"{flag}: expected LAYER:EXPERT,..., found {shown(text)}")
            for layer in layers:
                into[layer] = (*into.get(layer, ()), *map(int, rest.split(",")))
    bias: dict[int, dict[int, float]] = {}
    for text in arguments.bias:
        layers, rest = _layers("bias", text, config)
        try:
            values = {int(e): float(x) for e, x in (item.split("=") for item in rest.split(","))}
        except ValueError:
            raise UserError(f"bias: expected LAYER:EXPERT=NUMBER,..., found {shown(text)}") from None
        if not all(map(math.isfinite, values.values())):
            raise UserError(f"bias: expected finite numbers (--ablate removes an expert), found {shown(text)}")
        for layer in layers:
            bias.setdefault(layer, {}).update(values)
    from_file = arguments.router_bias
    return Intervention(ablate, force, bias, None if from_file is None else router_bias.read(from_file, config))


def _layers(flag: str, text: str, config: Qwen3MoeConfig) -> tuple[Sequence[int], str]:
    where, colon, rest = text.partition(":")
    if colon and where == "all":
        return tuple(config.sparse_layers), rest
    if colon and (match := re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", where)):
        first, last = int(match[1]), int(match[2] or match[1])
        if 0 <= last - first < config.num_hidden_layers:
            return range(first, last + 1), rest
    raise UserError(f"{flag}: expected LAYER:EXPERT,... with a layer, a range of layers, or all; found {shown(text)}")
