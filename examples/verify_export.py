"""Loads an export with transformers and PEFT, as anyone else would, and compares logits. No JAX in this process."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from jaxmoe.cli import ArgumentParser, run

# Both compute in float32 and differ by the order of their sums, in logits of about 10.
TOLERANCE = 1e-3


def load(folder: pathlib.Path) -> Any:
    """The model in an HF folder, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def largest_difference(model: Any, expected: Any) -> float:
    """The largest |logit - logit| over all tokens that are not padding and the whole vocabulary."""
    inputs = {
        "input_ids": torch.from_numpy(expected["input_ids"]).long(),
        "attention_mask": torch.from_numpy(expected["mask"]).long(),
    }
    with torch.no_grad():
        logits = model(**inputs).logits.numpy()
    valid = expected["mask"].astype(bool)
    return float(np.abs(logits[valid] - expected["logits"][valid]).max())


def main(argv: Sequence[str] | None = None) -> int:
    """0 where adapter and merged model give the logits in the NPZ file, 1 where not."""
    parser = ArgumentParser(
        description="Compares an exported adapter and a merged model with the logits they should give."
    )
    parser.add_argument("--logits", type=pathlib.Path, required=True, metavar="FILE", help="NPZ of examples.capture")
    parser.add_argument("--base", type=pathlib.Path, required=True, metavar="DIR", help="the original HF checkpoint")
    parser.add_argument("--adapter", type=pathlib.Path, required=True, metavar="DIR", help="PEFT adapter")
    parser.add_argument("--merged", type=pathlib.Path, required=True, metavar="DIR", help="merged HF checkpoint")
    arguments = parser.parse_args(argv)

    with np.load(arguments.logits) as file:
        expected = dict(file)
    adapted = PeftModel.from_pretrained(load(arguments.base), arguments.adapter)
    found = {
        "transformers + PEFT adapter": largest_difference(adapted, expected),
        "transformers, merged model": largest_difference(load(arguments.merged), expected),
    }
    with adapted.disable_adapter():
        without = largest_difference(adapted, expected)
    assert "jax" not in sys.modules

    scale, tokens = np.abs(expected["logits"]).max(), expected["mask"].sum()
    print(f"largest difference from jaxmoe's logits over {tokens} tokens (the largest logit is {scale:.1f}):")
    for name, difference in found.items():
        print(f"  {name:<28} {difference:.1e}")
    print(f"  {'without the adapter':<28} {without:.1e}  (what it changes)")
    return int(not max(found.values()) < min(TOLERANCE, without))


if __name__ == "__main__":
    run(main)
