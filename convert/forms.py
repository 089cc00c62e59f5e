"""In which form an HF folder stores its weights: plain, NF4, or FP8. Any other form is refused with what to download.

A form is found from config.json, and where that is silent, from the names of tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from convert.safetensors_io import Tensor
from jaxmoe.errors import UserError, shown
from jaxmoe.weight_form import WeightForm, quant_method, weight_form

_INSTEAD = (
    "download the model in 16 bits (such as Qwen/Qwen3-30B-A3B), in FP8 with 128 x 128 blocks (...-FP8), "
    "or in NF4 by bitsandbytes (...-bnb-4bit)"
)
# quantization_config's quant_method -> what people call the form
_METHODS = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes in another form than NF4",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "fbgemm_fp8": "FP8 by FBGEMM, one scale per channel,",
    "fp8": "FP8 in another form than e4m3 with 128 x 128 blocks",
    "fp_quant": "FP-Quant",
    "gguf": "GGUF",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "modelopt": "ModelOpt (NVFP4 or FP8)",
    "mxfp4": "MXFP4",
    "quanto": "Quanto",
    "quark": "Quark",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
# how the names of its tensors end -> the form, for folders whose config.json is silent
_SUFFIXES = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "compressed-tensors or ModelOpt",
    ".weight_scale_2": "ModelOpt (NVFP4)",
    ".scales": "MLX",
    ".SCB": "bitsandbytes in 8 bits",
    "_blocks": "MXFP4",
    ".W_q": "HQQ",
    ".weight_scale_inv": "FP8 without quantization_config",
}
_STATE = ".quant_state.bitsandbytes__"


def find_form(where: str, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> WeightForm | None:
    """The form of the weights of a folder with this config.json and these tensors; None for plain weights.

    Raises:
        UserError: a form that cannot be read.
    """
    settings = raw.get("quantization_config")
    if raw.get("quantization") is not None and not (isinstance(settings, Mapping) and "quant_method" in settings):
        raise _refusal(f"{where}: quantization", "MLX")
    if settings is None:
        _check_names(where, tensors)
        return None
    form = weight_form(settings)
    if form == "nf4":
        _check_state(where, tensors)
    if form is not None:
        return form
    method = quant_method(settings) if isinstance(settings, Mapping) else None
    name = _METHODS.get(str(method), f"quant_method {shown(method)}")
    raise _refusal(f"{where}: quantization_config", name, _details(settings))


def _check_names(where: str, names: Iterable[str]) -> None:
    for name in names:
        if _STATE in name:
            raise UserError(f"{where}: {name}: expected quantization_config in config.json with it, found none")
        for suffix, form in _SUFFIXES.items():
            if name.endswith(suffix):
                raise _refusal(f"{where}: {name}", form)


def _check_state(where: str, names: Iterable[str]) -> None:
    for name in names:
        _, mark, kind = name.partition(_STATE)
        if mark and kind != "nf4":
            raise _refusal(f"{where}: {name}", f"{kind} by bitsandbytes")


def _details(settings: Any) -> str:
    """The fields that tell forms of one method apart, for a message."""
    if not isinstance(settings, Mapping):
        return f" {settings!r}"[:100]
    names = (
        "bits",
        "format",
        "fmt",
        "weight_block_size",
        "activation_scheme",
        "scale_fmt",
        "expert_dtype",
        "load_in_8bit",
        "bnb_4bit_quant_type",
        "bnb_4bit_quant_storage",
        "quant_algo",
    )
    found = [f"{name} {settings[name]}" for name in names if settings.get(name) not in (None, False)]
    return f" ({', '.join(found)})"[:160] if found else ""


def _refusal(where: str, form: str, details: str = "") -> UserError:
    return UserError(f"{where}: expected plain weights, FP8 or NF4, found {form}{details} (not supported); {_INSTEAD}")
