"""Qwen3-MoE in PyTorch, the reference side: transformers' model with replaced forwards, 4-bit experts and LoRA.

It computes what transformers computes; names and signatures are those of Unsloth's `qwen3_moe.py`.
"""

from __future__ import annotations

import transformers

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(
        f"torch_ref needs transformers 5, whose experts are one stack per layer, found {transformers.__version__}"
    )

from torch_ref.model import FastQwen3Model, FastQwen3MoeModel

__all__ = ["FastQwen3Model", "FastQwen3MoeModel"]
