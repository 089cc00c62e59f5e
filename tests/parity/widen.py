"""A trained checkpoint with wider matrices that computes the same: `python -m tests.parity.widen SOURCE TARGET`.

The kernels that decode NF4 and FP8 in the experts' products need matrices whose sides are multiples of 128; the trained
models of the suites are narrower. Here their hidden state is turned into a wider space by a random matrix with
orthonormal columns, norms' weights move into the matrices behind them, and neurons of experts are repeated, their
outputs shared. No weight becomes zero. The new weights are rounded once, so the models agree up to rounding.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from safetensors.torch import load_file, save_file

SIDE = 128
_COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def widened(weights: Mapping[str, torch.Tensor], config: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """The weights and the config of the wider model.

    Args:
        weights: those of a model whose layers are all sparse, with one key per expert and tied embeddings.
        config: its config.json.
    """
    D, F = config["hidden_size"], config["moe_intermediate_size"]
    wide_D, wide_F = (-(-size // SIDE) * SIDE for size in (D, F))
    gaussian = np.random.default_rng(0).standard_normal((wide_D, D))
    turn = torch.from_numpy(np.linalg.qr(gaussian)[0])  # [wide D, D]; the norm of a hidden state stays
    neurons = torch.arange(wide_F) % F
    share = 1 / torch.bincount(neurons)[neurons].double()

    def norm(name: str) -> torch.Tensor:
        return weights[name].double()

    def turned() -> Iterator[tuple[str, torch.Tensor]]:
        embedding = weights["model.embed_tokens.weight"].double()
        yield "model.embed_tokens.weight", embedding @ turn.T
        yield "lm_head.weight", (embedding * norm("model.norm.weight")) @ turn.T
        # A norm divides by the root of the mean over more values.
        less = torch.full((wide_D,), (D / wide_D) ** 0.5, dtype=torch.float64)
        yield "model.norm.weight", less
        for name, weight in weights.items():
            layer, _, part = name.partition("self_attn.") if "self_attn." in name else name.partition("mlp.")
            matrix = weight.double()
            before = "input_layernorm" if "self_attn." in name else "post_attention_layernorm"
            if name.endswith("layernorm.weight"):
                yield name, less
            elif not part:
                continue
            elif part in ("q_norm.weight", "k_norm.weight"):
                yield name, matrix
            elif part == "o_proj.weight":
                yield name, turn @ matrix
            elif part.endswith("down_proj.weight"):
                yield name, (turn @ matrix)[:, neurons] * share
            else:
                matrix = (matrix * norm(f"{layer}{before}.weight")) @ turn.T
                yield name, matrix[neurons] if part.startswith("experts.") else matrix

    wide = {name: matrix.to(weights[next(iter(weights))].dtype).contiguous() for name, matrix in turned()}
    changed = {"hidden_size": wide_D, "moe_intermediate_size": wide_F, "tie_word_embeddings": False}
    return wide, config | changed | {"rms_norm_eps": config["rms_norm_eps"] * D / wide_D}


def write_widened(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Writes the wider model of the checkpoint `source` into the new folder `target`."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    wide, wide_config = widened(load_file(source / "model.safetensors"), config)
    target.mkdir(parents=True)
    save_file(wide, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(wide_config, indent=1) + "\n", encoding="utf-8")
    for name in _COPIED:
        shutil.copy(source / name, target / name)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A trained checkpoint with wider matrices that computes the same.")
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("target", type=pathlib.Path)
    arguments = parser.parse_args()
    write_widened(arguments.source, arguments.target)
