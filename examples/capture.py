"""Runs a model on held-out records; writes its logits to an NPZ file and draws the load of its experts."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxmoe import Qwen3MoeForCausalLM
from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.data.chat import load_tokenizer
from jaxmoe.data.records import Record, read_records
from jaxmoe.errors import UserError

# If the k-th and the next expert of a token are this close in probability, rounding decides: another framework may
# choose the other one, and both are right. The comparison of a record ends before its first such token.
MARGIN = 1e-5


def pad(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """(token ids [B, T], attention mask [B, T]) of the records, padded on the right."""
    longest = max(len(record.tokens) for record in records)
    input_ids = np.zeros((len(records), longest), np.int32)
    mask = np.zeros_like(input_ids)
    for sequence, record in enumerate(records):
        input_ids[sequence, : len(record.tokens)] = record.tokens
        mask[sequence, : len(record.tokens)] = 1
    return input_ids, mask


def chosen_experts(router_logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(which experts each token uses, bool [Ls, B, T, E]; its margin [Ls, B, T], in probability)."""
    probabilities = np.exp(router_logits - router_logits.max(axis=-1, keepdims=True))
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    ordered = np.sort(probabilities, axis=-1)
    margin = ordered[..., -k] - ordered[..., -k - 1] if k < ordered.shape[-1] else np.ones(ordered.shape[:-1])
    return probabilities >= ordered[..., -k, None], margin


def comparable(valid: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """Which tokens [B, T] and all tokens before them are routed with a clear margin; `margin` is [Ls, B, T]."""
    return np.logical_and.accumulate(valid & (margin.min(axis=0) > MARGIN), axis=1)


def draw_expert_load(counts: np.ndarray, picture: pathlib.Path) -> None:
    """Saves a heat map of the rows per layer and expert, `counts` [Ls, E], relative to an even share."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers, experts = counts.shape
    load = counts / counts.mean(axis=1, keepdims=True)
    figure, axes = plt.subplots(figsize=(1.5 + 0.28 * experts, 1.4 + 0.35 * layers), layout="constrained")
    image = axes.imshow(np.sort(load, axis=1)[:, ::-1], aspect="auto", cmap="viridis", vmin=0)
    axes.set_title(f"Expert load on held-out records ({counts.sum() // layers:,} rows per layer)")
    axes.set_xlabel("experts, busiest first")
    axes.set_ylabel("MoE layer")
    axes.set_yticks(range(layers))
    figure.colorbar(image, label="rows / even share")
    figure.savefig(picture, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the model on the first records of a file and writes both files."""
    parser = ArgumentParser(description="Write a model's logits and draw its expert load on held-out records.")
    parser.add_argument(
        "--model", type=pathlib.Path, required=True, metavar="DIR", help="HF folder or converted folder"
    )
    parser.add_argument("--adapter", type=pathlib.Path, metavar="DIR", help="PEFT folder or converted adapter")
    parser.add_argument("--data", type=pathlib.Path, required=True, metavar="FILE", help="JSONL records")
    parser.add_argument("--records", type=int, default=64, metavar="N", help="how many records (default: 64)")
    parser.add_argument("--logits", type=pathlib.Path, required=True, metavar="FILE", help="NPZ file to write")
    parser.add_argument("--picture", type=pathlib.Path, required=True, metavar="FILE", help="PNG file to write")
    arguments = parser.parse_args(argv)

    model = Qwen3MoeForCausalLM.from_pretrained(arguments.model, dtype="float32", adapter=arguments.adapter)
    records = read_records(arguments.data, load_tokenizer(arguments.model), model.config.vocab_size)
    input_ids, mask = pad(records[: arguments.records])
    out = model(jnp.asarray(input_ids), attention_mask=jnp.asarray(mask), output_router_logits=True)
    if not out.router_logits:
        raise UserError(f"{arguments.model}: expected a model with mixture-of-experts layers, found none")
    chosen, margin = chosen_experts(np.stack(out.router_logits), model.config.num_experts_per_tok)
    valid = mask.astype(bool)
    draw_expert_load((chosen & valid[..., None]).sum(axis=(1, 2)), arguments.picture)
    print(f"{arguments.picture}: expert load of {len(mask)} records")

    compared = comparable(valid, margin)
    if not compared.any():
        raise UserError(f"{arguments.data}: expected a token routed with a margin above {MARGIN}, found none")
    np.savez(arguments.logits, input_ids=input_ids, mask=mask, compared=compared, logits=np.asarray(out.logits))
    print(
        f"{arguments.logits}: logits of {len(mask)} records; {compared.sum()} of {valid.sum()} tokens can be compared, "
        f"those before the first token of their record whose margin is below {MARGIN}"
    )


if __name__ == "__main__":
    run(main)
