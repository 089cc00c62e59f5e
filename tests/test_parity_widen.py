"""A widened checkpoint computes the same: norm, router, experts and head of one layer, in float64."""

from __future__ import annotations

from unittest import mock

import torch
from torch.nn.functional import silu

from tests.parity import relative_error, widen
from tests.tolerances import bound

CONFIG = {"hidden_size": 6, "moe_intermediate_size": 3, "rms_norm_eps": 0.1, "tie_word_embeddings": True}
LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (5, 6),
    "model.norm.weight": (6,),
    f"{LAYER}input_layernorm.weight": (6,),
    f"{LAYER}post_attention_layernorm.weight": (6,),
    f"{LAYER}self_attn.v_proj.weight": (6, 6),
    f"{LAYER}self_attn.o_proj.weight": (6, 6),
    f"{LAYER}mlp.gate.weight": (2, 6),
    f"{LAYER}mlp.experts.1.gate_proj.weight": (3, 6),
    f"{LAYER}mlp.experts.1.up_proj.weight": (3, 6),
    f"{LAYER}mlp.experts.1.down_proj.weight": (6, 3),
}


def computed(weights: dict[str, torch.Tensor], config: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's logits, and the logits after attention to the token itself and one expert."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean = x.square().mean(-1, keepdim=True)
        return x * (mean + config["rms_norm_eps"]).rsqrt() * weights[f"{name}.weight"]

    def matrix(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ weights[f"{LAYER}{name}.weight"].T

    x = weights["model.embed_tokens.weight"]
    x = x + matrix("self_attn.o_proj", matrix("self_attn.v_proj", norm(x, f"{LAYER}input_layernorm")))
    y = norm(x, f"{LAYER}post_attention_layernorm")
    gate, up = (matrix(f"mlp.experts.1.{part}_proj", y) for part in ("gate", "up"))
    out = norm(x + matrix("mlp.experts.1.down_proj", silu(gate) * up), "model.norm")
    return matrix("mlp.gate", y), out @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def test_a_widened_layer_computes_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    with mock.patch.object(widen, "SIDE", 8):
        wide, config = widen.widened(weights, CONFIG)
    assert wide[f"{LAYER}mlp.experts.1.down_proj.weight"].shape == (8, 8)
    for found, expected in zip(computed(wide, config), computed(weights, CONFIG), strict=True):
        assert relative_error(found.numpy(), expected.numpy()) < bound("widened")
    assert all((weight != 0).all() for weight in wide.values())
