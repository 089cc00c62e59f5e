"""Checks what a stranger made, a model folder or an adapter, before transformers and PEFT read it.

Both libraries would otherwise unpickle weights, import modules that a file names, or build what a number in a file asks
for, however large.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

from captures.shared import UserError, check_integer, check_small_files, read_json, shown

_MOST_LAYERS = 10_000
# What transformers divides by and makes tensors of, unchecked.
_SIZES = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_attention_heads num_key_value_heads head_dim"
    " decoder_sparse_step num_experts num_local_experts"
).split()


def check_model_folder(folder: pathlib.Path) -> None:
    """Compares the number of layers, of which transformers makes lists, and the sizes of files with any model's.

    Raises:
        UserError: no config.json that can be read, an adapter, more layers than any model has, a size that is no whole
            number above 0, quantisation settings that are no object, or a file that never ends.
    """
    check_small_files(folder)
    file = folder / "config.json"
    if not file.exists() and (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder}: expected a model, found an adapter: load its base model, then the adapter with PEFT"
        )
    raw = read_json(file)
    layers = raw.get("num_hidden_layers", 0)
    if not isinstance(layers, int) or not 0 <= layers <= _MOST_LAYERS:
        raise UserError(f"{file}: num_hidden_layers: expected at most {_MOST_LAYERS:,}, found {shown(layers)}")
    for name in _SIZES:
        if name in raw:
            check_integer(f"{file}: {name}", raw[name], at_least=0 if "experts" in name else 1)
    if not isinstance(stored := raw.get("quantization_config"), dict | None):
        raise UserError(f"{file}: quantization_config: expected an object, found {shown(stored)}")


@contextlib.contextmanager
def naming(model_name: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turns what transformers raises about `what` of a local folder into one line; errors of the hub stay.

    Raises:
        UserError: the block raises, and `model_name` is a folder.
    """
    try:
        yield
    except Exception as error:  # the type depends on the file that is broken
        if not pathlib.Path(model_name).is_dir():
            raise
        found = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{model_name}: expected {what} that transformers can load, found none: {found}") from error


def check_adapter_folder(folder: pathlib.Path) -> None:
    """Checks that PEFT will read plain LoRA from safetensors, and import nothing that the adapter names.

    Raises:
        UserError: a file is missing, another kind of adapter, or one that names modules to import.
    """
    check_small_files(folder)
    settings = read_json(folder / "adapter_config.json")
    if settings.get("peft_type") != "LORA":
        raise UserError(
            f"{folder / 'adapter_config.json'}: peft_type: expected 'LORA', found {shown(settings.get('peft_type'))}"
        )
    for name in ("megatron_config", "auto_mapping"):
        if settings.get(name) is not None:
            raise UserError(
                f"{folder / 'adapter_config.json'}: {name}: expected none, because it names modules to import, found "
                f"{shown(settings[name])}"
            )
    if not (folder / "adapter_model.safetensors").is_file():
        found = "a pickle, which can run code" if (folder / "adapter_model.bin").exists() else "none"
        raise UserError(f"{folder}: expected adapter_model.safetensors, found {found}")
