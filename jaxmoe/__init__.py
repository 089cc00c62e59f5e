"""Qwen3-MoE in JAX: LoRA training, generation, conversion. `import jaxmoe` loads neither jax nor flax."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmoe.config import LoraConfig, Qwen3MoeConfig
    from jaxmoe.model import Qwen3MoeForCausalLM

__version__ = "0.1.0"
__all__ = ["LoraConfig", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", "__version__"]

_HOMES = {
    "LoraConfig": "jaxmoe.config",
    "Qwen3MoeConfig": "jaxmoe.config",
    "Qwen3MoeForCausalLM": "jaxmoe.model",
}


def __getattr__(name: str) -> Any:
    """Imports a public name from its module on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxmoe' has no attribute {name!r}")
    try:
        module = importlib.import_module(_HOMES[name])
    except AttributeError as error:
        # `from jaxmoe import NAME` would take it for a missing name and hide it: two packages that do not fit, say.
        raise ImportError(f"{_HOMES[name]}: {error}") from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
