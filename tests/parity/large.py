"""Writes a checkpoint of Qwen3-30B-A3B's shape with random weights, fast, to a memory-backed disk.

    python -m tests.parity.large DIR [--layers 48] [--preset qwen3-30b-a3b] [--device cuda] [--seed 0]

There is one shard per layer, so that a model of fewer layers is the same files with another index (`first_layers`). The
scales keep the model from being degenerate: logits have a standard deviation of at least 2, router logits of about 2,
and each residual branch adds about as much as the stream holds. The experts are written fused, as transformers holds
them in memory.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from concurrent.futures import ThreadPoolExecutor

import torch
from safetensors.torch import save_file

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.presets import PRESETS
from peers.make_checkpoint import hf_shapes, write_tokenizer

_GAINS = {"lm_head": 2.5, "mlp.gate": 2.0, "down_proj": 2.0}
_WRITERS = 8  # layers being written at a time; 1.3 GB each in the full shape
_OUTER = "model-outer.safetensors"


def draw(name: str, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Norms near one, embeddings of unit variance, matrices with variance gain^2 / fan-in."""
    x = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
    if "norm" in name:
        return 1 + 0.1 * x
    if "embed_tokens" in name:
        return x
    gain = next((gain for part, gain in _GAINS.items() if part in name), 1.0)
    return x * (gain / math.sqrt(shape[-1]))


def write_large(
    folder: pathlib.Path, config: Qwen3MoeConfig, device: str, seed: int = 0, dtype: str = "bfloat16"
) -> pathlib.Path:
    """Writes the checkpoint; the same seed and device give the same bytes, whatever the number of layers."""
    folder.mkdir(parents=True)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in hf_shapes(config, "fused").items():
        shards.setdefault(_shard(name), {})[name] = shape

    def write(item: tuple[int, str]) -> None:
        number, file = item
        generator = torch.Generator(device).manual_seed((seed << 16) + number)
        tensors = {n: draw(n, s, generator, getattr(torch, dtype)).cpu() for n, s in shards[file].items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})

    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(write, enumerate(shards)))
    _write_rest(folder, config.replace(dtype=dtype), {name: file for file, names in shards.items() for name in names})
    return folder


def first_layers(source: pathlib.Path, folder: pathlib.Path, layers: int) -> pathlib.Path:
    """The first `layers` layers of a checkpoint of `write_large`, as hard links to its shards.

    Symbolic links would not do: a folder must not point outside itself.
    """
    config = Qwen3MoeConfig.from_pretrained(source).replace(num_hidden_layers=layers)
    folder.mkdir(parents=True)
    weight_map = {name: _shard(name) for name in hf_shapes(config, "fused")}
    for file in set(weight_map.values()):
        (folder / file).hardlink_to(source / file)
    _write_rest(folder, config, weight_map)
    return folder


def _shard(name: str) -> str:
    return f"model-layer-{int(name.split('.')[2]):03d}.safetensors" if ".layers." in name else _OUTER


def _write_rest(folder: pathlib.Path, config: Qwen3MoeConfig, weight_map: dict[str, str]) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config.to_hf(), indent=1) + "\n", encoding="utf-8")
    write_tokenizer(folder)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Writes a random checkpoint of a large shape.")
    parser.add_argument("path", type=pathlib.Path)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = PRESETS[args.preset]
    write_large(
        args.path, config.replace(num_hidden_layers=args.layers or config.num_hidden_layers), args.device, args.seed
    )


if __name__ == "__main__":
    main()
