"""Loads an export with transformers and PEFT and compares its logits with jaxmoe's; JAX is not loaded."""

from __future__ import annotations

import logging
import pathlib
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from jaxmoe.cli.arguments import ArgumentParser, run

# Both compute in float32; only the order of their sums differs. Logits are about 10.
TOLERANCE = 1e-3


def load(folder: pathlib.Path) -> Any:
    """The model in an HF folder, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    return model.eval()


def load_adapter(model: Any, folder: pathlib.Path) -> Any:
    """The model with a PEFT adapter on it."""
    # PEFT loads bitsandbytes, which warns about a missing 4-bit kernel; nothing here is in 4 bits.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder)


def largest_difference(model: Any, expected: Any) -> float:
    """The largest |logit - logit| over the tokens to compare and the whole vocabulary."""
    inputs = {
        "input_ids": torch.from_numpy(expected["input_ids"]).long(),
        "attention_mask": torch.from_numpy(expected["mask"]).long(),
    }
    with torch.no_grad():
        logits = model(**inputs).logits.numpy()
    compared = expected["compared"]
    return float(np.abs(logits[compared] - expected["logits"][compared]).max())


def main(argv: Sequence[str] | None = None) -> int:
    """0 if adapter and merged model give the logits in the NPZ file, else 1."""
    parser = ArgumentParser(
        description="Compare the logits of an exported adapter and of a merged model with jaxmoe's."
    )
    parser.add_argument(
        "--logits", type=pathlib.Path, required=True, metavar="FILE", help="NPZ file of examples.capture"
    )
    parser.add_argument(
        "--base", type=pathlib.Path, required=True, metavar="DIR", help="HF folder of the original model"
    )
    parser.add_argument("--adapter", type=pathlib.Path, required=True, metavar="DIR", help="PEFT folder of the adapter")
    parser.add_argument(
        "--merged", type=pathlib.Path, required=True, metavar="DIR", help="HF folder of the merged model"
    )
    arguments = parser.parse_args(argv)

    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    with np.load(arguments.logits) as file:
        expected = dict(file)
    adapted = load_adapter(load(arguments.base), arguments.adapter)
    found = {
        "transformers + PEFT adapter": largest_difference(adapted, expected),
        "transformers, merged model": largest_difference(load(arguments.merged), expected),
    }
    with adapted.disable_adapter():
        without = largest_difference(adapted, expected)
    assert "jax" not in sys.modules

    scale, tokens = np.abs(expected["logits"]).max(), expected["compared"].sum()
    print(f"largest difference from jaxmoe's logits over {tokens} tokens (the largest logit is {scale:.1f}):")
    for name, difference in found.items():
        print(f"  {name:<28} {difference:.1e}")
    print(f"  {'without the adapter':<28} {without:.1e}  (the effect of the adapter)")
    return int(not max(found.values()) < min(TOLERANCE, without))


if __name__ == "__main__":
    run(main)
