"""Qwen3-MoE in PyTorch, the reference side: transformers' model with replaced forwards, 4-bit experts and LoRA.

It computes what transformers computes; names and signatures are those of Unsloth's `qwen3_moe.py`. `import torch_ref`
loads neither torch nor transformers; the first use of a class does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_ref.model import FastQwen3Model, FastQwen3MoeModel

__all__ = ["FastQwen3Model", "FastQwen3MoeModel"]


def __getattr__(name: str) -> Any:
    """Imports the classes on first use (PEP 562), so that a command can watch for signals before."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torch_ref import model

    return getattr(model, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
