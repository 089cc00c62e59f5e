"""Whether a model's config.json says that its weights are in NF4 or in FP8; uses the standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

WeightForm = Literal["nf4", "fp8"]


def weight_form(settings: Any) -> WeightForm | None:
    """The form that a config.json's quantization_config stands for; None for plain weights and for other forms."""
    if is_nf4(settings):
        return "nf4"
    return "fp8" if is_fp8(settings) else None


def quant_method(settings: Mapping[str, Any]) -> Any:
    """The quant_method of a quantization_config. As for transformers, one without it that loads in 4 or 8 bits is
    bitsandbytes'."""
    bits = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    return settings.get("quant_method") or ("bitsandbytes" if bits else None)


def is_nf4(settings: Any) -> bool:
    """Whether a config.json's quantization_config is NF4 as bitsandbytes writes it."""
    wanted = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    if not isinstance(settings, Mapping) or any(settings.get(key) != value for key, value in wanted.items()):
        return False
    if quant_method(settings) != "bitsandbytes":
        return False
    return settings.get("bnb_4bit_quant_storage", "uint8") == "uint8"


def is_fp8(settings: Any) -> bool:
    """Whether a quantization_config is FP8 e4m3 with one scale for each 128 x 128 block, as Qwen publishes it."""
    if not isinstance(settings, Mapping):
        return False
    found = (settings.get("quant_method"), settings.get("fmt", "e4m3"), settings.get("activation_scheme", "dynamic"))
    forms = (settings.get("scale_fmt") or "float", settings.get("expert_dtype") or "fp8")
    blocks = settings.get("weight_block_size", [128, 128])
    return found == ("fp8", "e4m3", "dynamic") and forms == ("float", "fp8") and blocks == [128, 128]
