"""Opens a folder, in HF form or converted, as a checkpoint or an adapter that the model can load."""

from __future__ import annotations

import pathlib

import jax.numpy as jnp

from convert.adapters import read_peft
from convert.hf2jax import read_hf
from jaxmoe.config import LoraConfig, Qwen3MoeConfig
from jaxmoe.errors import UserError
from jaxmoe.model.interface import Params
from jaxmoe.recode import dequantized, quantized
from jaxmoe.store.adapter import is_adapter, read_adapter
from jaxmoe.store.checkpoint import Checkpoint
from jaxmoe.store.converted import is_converted, read_converted


def open_checkpoint(
    path: str | pathlib.Path, dtype: str | None = None, quantize: str | None = None, dequantize: bool = False
) -> tuple[Qwen3MoeConfig, Checkpoint]:
    """Opens the checkpoint in a folder, HF form or converted, without reading its weights; arguments and errors as in
    `Qwen3MoeForCausalLM.from_pretrained`."""
    source: Checkpoint = read_hf(path, dtype, dequantize) if not is_converted(path) else read_converted(path, dtype)
    if dequantize and is_converted(path):
        if source.quantization is None:
            raise UserError(f"{path}: dequantize: expected weights in FP8 or NF4, found neither")
        source = dequantized(source)
    if quantize is not None:
        source = quantized(source, quantize)
    return source.config if dtype is None else source.config.replace(dtype=dtype), source


def load_adapter(
    path: str | pathlib.Path, config: Qwen3MoeConfig, base: Checkpoint | None = None
) -> tuple[LoraConfig, Params]:
    """The adapter in a folder, PEFT's form or converted, in float32.

    Embeddings that are stored beside it are dropped if they equal those of the checkpoint `base`.

    Raises:
        UserError: a broken adapter, or one for another model.
    """
    lora, arrays = read_adapter(path, config)[1:] if is_adapter(path) else read_peft(path, config, base=base)
    return lora, {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
