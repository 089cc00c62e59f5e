"""Generation whose routing is captured, for a notebook."""

from __future__ import annotations

from jaxmoe.generate.capture import capture_generation

__all__ = ["capture_generation"]
