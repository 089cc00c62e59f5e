"""Captured routing on disk, in one format that `jaxmoe` and `torch_ref` write and all comparisons read.

Imports NumPy and safetensors but neither framework, so that both sides can import it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxmoe.lazy import exports

if TYPE_CHECKING:
    from captures.format import ROLES, Chunk, LabelledText, Model, Text, expert_dtype, tokenizer_digest
    from captures.reader import Capture
    from captures.writer import CaptureWriter

__all__ = [
    "ROLES",
    "Capture",
    "CaptureWriter",
    "Chunk",
    "LabelledText",
    "Model",
    "Text",
    "expert_dtype",
    "tokenizer_digest",
]

# Imported on first use, so that a command can watch for signals before NumPy is loaded.
__getattr__, __dir__ = exports(
    __name__,
    {
        "ROLES": "captures.format",
        "Capture": "captures.reader",
        "CaptureWriter": "captures.writer",
        "Chunk": "captures.format",
        "LabelledText": "captures.format",
        "Model": "captures.format",
        "Text": "captures.format",
        "expert_dtype": "captures.format",
        "tokenizer_digest": "captures.format",
    },
)
