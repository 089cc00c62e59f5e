"""Captured routing on disk: one format, written by `jaxmoe` and by `torch_ref`, read by everything that compares them.

NumPy and safetensors only; neither framework's code is imported, so that both may import this.
"""

from captures.format import (
    Capture,
    CaptureWriter,
    Chunk,
    LabelledText,
    Model,
    Text,
    expert_dtype,
    tokenizer_digest,
)

__all__ = ["Capture", "CaptureWriter", "Chunk", "LabelledText", "Model", "Text", "expert_dtype", "tokenizer_digest"]
