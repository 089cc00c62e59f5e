"""Writes a random Qwen3-MoE checkpoint in HF form, with a byte-level tokenizer: `python -m peers.make_checkpoint DIR`.

The key names are written out here, not imported from `convert.names`, so that a wrong name there is found. Tensors are
drawn and written a few MiB at a time: only the disk limits the size of the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import struct
import zlib
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from jaxmoe.config import Qwen3MoeConfig

_DTYPES = {
    "float32": ("F32", np.dtype(np.float32)),
    "float16": ("F16", np.dtype(np.float16)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
_CHUNK = 1 << 21  # elements drawn at a time

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 256, 257, 258
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def hf_shapes(config: Qwen3MoeConfig, layout: str = "per_expert") -> dict[str, tuple[int, ...]]:
    """HF key -> shape, in the order in which transformers saves.

    `layout` is "per_expert", as checkpoints on disk, or "fused", as transformers 5 holds experts in memory.
    """
    if layout not in ("per_expert", "fused"):
        raise ValueError(f"layout: expected per_expert or fused, found {layout!r}")
    c = config
    D, H = c.hidden_size, c.head_dim
    Q, KV = c.num_attention_heads * H, c.num_key_value_heads * H
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, D)}
    for layer in range(c.num_hidden_layers):
        at = f"model.layers.{layer}."
        for name, out, inner in (("q", Q, D), ("k", KV, D), ("v", KV, D), ("o", D, Q)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (out, inner)
            if c.attention_bias:
                shapes[f"{at}self_attn.{name}_proj.bias"] = (out,)
        shapes[f"{at}self_attn.q_norm.weight"] = shapes[f"{at}self_attn.k_norm.weight"] = (H,)
        shapes[f"{at}input_layernorm.weight"] = shapes[f"{at}post_attention_layernorm.weight"] = (D,)
        sparse = layer not in c.mlp_only_layers and c.num_experts > 0 and (layer + 1) % c.decoder_sparse_step == 0
        if not sparse:
            for name in ("gate", "up"):
                shapes[f"{at}mlp.{name}_proj.weight"] = (c.intermediate_size, D)
            shapes[f"{at}mlp.down_proj.weight"] = (D, c.intermediate_size)
            continue
        E, F = c.num_experts, c.moe_intermediate_size
        shapes[f"{at}mlp.gate.weight"] = (E, D)
        if layout == "fused":
            shapes[f"{at}mlp.experts.gate_up_proj"] = (E, 2 * F, D)
            shapes[f"{at}mlp.experts.down_proj"] = (E, D, F)
            continue
        for expert in range(E):
            for name in ("gate", "up"):
                shapes[f"{at}mlp.experts.{expert}.{name}_proj.weight"] = (F, D)
            shapes[f"{at}mlp.experts.{expert}.down_proj.weight"] = (D, F)
    shapes["model.norm.weight"] = (D,)
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, D)
    return shapes


def _parts(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """The per-expert tensors that make up a fused tensor, so that both layouts hold the same values."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return [(name, shape)]
    prefix, _, kind = name.rpartition(".")
    kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    rows = shape[1] // len(kinds)
    return [(f"{prefix}.{e}.{k}.weight", (rows, shape[2])) for e in range(shape[0]) for k in kinds]


def _draw(name: str, shape: tuple[int, ...], seed: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Flat chunks: norms near one, embeddings of unit variance, matrices with variance 1 / fan-in, small biases."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    mean, scale = 0.0, 1 / math.sqrt(shape[-1])
    if "norm" in name:
        mean, scale = 1.0, 0.1
    elif "embed_tokens" in name:
        scale = 1.0
    elif name.endswith("bias"):
        scale = 0.1
    total = math.prod(shape)
    for start in range(0, total, _CHUNK):
        values = rng.standard_normal(min(_CHUNK, total - start), dtype=np.float32)
        yield (values * np.float32(scale) + np.float32(mean)).astype(dtype)


def _write_shard(path: pathlib.Path, shapes: dict[str, tuple[int, ...]], seed: int, dtype: str) -> None:
    code, element = _DTYPES[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * element.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in shapes.items():
            for part, part_shape in _parts(name, shape):
                for chunk in _draw(part, part_shape, seed, element):
                    file.write(chunk.view(np.uint8).data)


def write_tokenizer(path: pathlib.Path) -> None:
    """A byte-level tokenizer (256 bytes, then `SPECIAL_TOKENS`) with a ChatML template, as AutoTokenizer reads it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # the printable stand-ins of GPT-2 for the 256 bytes, in byte order
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    stand_in = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={stand_in[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def make_checkpoint(
    path: str | pathlib.Path,
    config: Qwen3MoeConfig,
    seed: int = 0,
    dtype: str = "float32",
    shards: int = 1,
    layout: str = "per_expert",
) -> pathlib.Path:
    """Writes config, weights, tokenizer and generation config into `path`; the same seed gives the same bytes.

    The tokenizer always has 259 tokens; a model with a smaller vocabulary cannot embed all of them.
    """
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    raw = config.replace(dtype=dtype).to_hf() | {"eos_token_id": 258}
    (path / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 256]}, indent=2) + "\n")
    write_tokenizer(path)

    shapes = hf_shapes(config, layout)
    if shards == 1:
        _write_shard(path / "model.safetensors", shapes, seed, dtype)
        return path
    total = sum(map(math.prod, shapes.values()))
    groups: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    done = 0
    for name, shape in shapes.items():
        groups[done * shards // total][name] = shape
        done += math.prod(shape)
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        _write_shard(path / file, group, seed, dtype)
        weight_map |= dict.fromkeys(group, file)
    index = {"metadata": {"total_size": total * _DTYPES[dtype][1].itemsize}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return path


def main() -> None:
    """Writes the checkpoint that the command line asks for."""
    parser = argparse.ArgumentParser(description="Writes a random Qwen3-MoE checkpoint in HF form.")
    parser.add_argument("path", type=pathlib.Path, help="folder to write")
    parser.add_argument("--config", type=pathlib.Path, help="config.json of the model (default: a tiny model)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="float32")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--layout", choices=("per_expert", "fused"), default="per_expert")
    args = parser.parse_args()
    config = Qwen3MoeConfig.from_hf(json.loads(args.config.read_text())) if args.config else TINY
    make_checkpoint(args.path, config, args.seed, args.dtype, args.shards, args.layout)


TINY = Qwen3MoeConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=1024,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    norm_topk_prob=True,
)

if __name__ == "__main__":
    main()
