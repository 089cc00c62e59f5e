"""Qwen3-MoE in JAX: LoRA training, generation, conversion. `import jaxmoe` loads neither jax nor flax."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxmoe.lazy import exports

if TYPE_CHECKING:
    from jaxmoe.config import Qwen3MoeConfig
    from jaxmoe.lora import LoraConfig
    from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM

__version__ = "0.1.0"
__all__ = ["LoraConfig", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", "__version__"]

__getattr__, __dir__ = exports(
    __name__,
    {
        "LoraConfig": "jaxmoe.lora",
        "Qwen3MoeConfig": "jaxmoe.config",
        "Qwen3MoeForCausalLM": "jaxmoe.model.causal_lm",
    },
)
