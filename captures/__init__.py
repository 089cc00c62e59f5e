"""Captured routing on disk, in one format that `jaxmoe` and `torch_ref` write and all comparisons read.

Imports NumPy and safetensors but neither framework, so that both sides can import it.
"""

from captures.format import (
    ROLES,
    Capture,
    CaptureWriter,
    Chunk,
    LabelledText,
    Model,
    Text,
    expert_dtype,
    tokenizer_digest,
)

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
