"""What a capture's manifest says about its origin: the model, the packages, and what was imposed on the routing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from captures import Capture, Model
from jaxmoe import environment
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.ops.router import RoutingControl


def model_of(config: Qwen3MoeConfig) -> Model:
    """The part of the configuration that a capture stores."""
    return Model(
        tuple(config.sparse_layers),
        config.num_experts,
        config.num_experts_per_tok,
        config.norm_topk_prob,
        config.vocab_size,
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a capture's numbers depend on, and the device's name."""
    found = environment.versions(("python", "jaxmoe", "jax", "jaxlib", "flax", "transformers", "numpy"))
    installed = {name: version for name, version in found.items() if version is not None}
    return {"device": jax.devices()[0].device_kind} | installed


def imposed_routing(
    control: RoutingControl | None, replay: Capture | None, description: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """The manifest's `control`: `description` and the replayed folder; None if the routing is the model's own."""
    if control is None and replay is None:
        return None
    imposed = dict(description or {}) | ({"replay": str(replay.folder)} if replay is not None else {})
    return imposed or {"control": "given as arrays"}
