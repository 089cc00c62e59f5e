"""Whether a model's config.json says that its weights are in NF4; uses the standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_nf4(settings: Any) -> bool:
    """Whether a config.json's quantization_config is NF4 as bitsandbytes writes it."""
    wanted = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    if not isinstance(settings, Mapping) or any(settings.get(key) != value for key, value in wanted.items()):
        return False
    return settings.get("bnb_4bit_quant_storage", "uint8") == "uint8"
