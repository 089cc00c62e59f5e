"""Brings a checkpoint into a quantised form, NF4 or FP8, or out of it, while it is read."""

from __future__ import annotations

from typing import get_args

from jaxmoe.errors import UserError
from jaxmoe.fp8 import recode as fp8
from jaxmoe.nf4 import recode as nf4
from jaxmoe.store.checkpoint import Checkpoint
from jaxmoe.weight_form import WeightForm

_ROOMS = {"nf4": nf4, "fp8": fp8}


def quantized(source: Checkpoint, form: str) -> Checkpoint:
    """The checkpoint with projections, dense MLPs and experts in `form`, "nf4" or "fp8", encoded while it is read.

    Router, embeddings, norms and head stay as they are, and so does what is in that form already.

    Raises:
        UserError: another form, or weights that are in another form than the one asked for.
    """
    if form not in get_args(WeightForm):
        raise UserError(f"quantize: expected 'nf4', 'fp8' or None, found {form!r}")
    if source.quantization is not None and source.quantization.form != form:
        raise UserError(
            f"{source.path}: quantize: expected plain weights or {form}, found {source.quantization.form} "
            "(--dequantize, or dequantize=True, decodes them first)"
        )
    return _ROOMS[form].quantized(source)


def dequantized(source: Checkpoint) -> Checkpoint:
    """The checkpoint with its quantised weights decoded, while it is read; for NF4 to the dtypes that they had before.

    Unquantised layers of a mixed stack are cast to the dtype of the others.
    """
    return source if source.quantization is None else _ROOMS[source.quantization.form].dequantized(source)
