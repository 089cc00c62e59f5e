"""What was trained, written so that transformers and PEFT load it: an adapter, a model, or a merged model."""

from __future__ import annotations

import json
import logging
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from jaxmoe import stopping
from jaxmoe.config import LoraConfig, Qwen3MoeConfig
from jaxmoe.control import router_bias
from jaxmoe.data.chat import load_tokenizer
from jaxmoe.distributed import launch
from jaxmoe.distributed.placement import whole
from jaxmoe.model.interface import Params
from jaxmoe.model.opening import open_checkpoint
from jaxmoe.parameters import CHOICE_BIAS, layer_paths, top_level_paths
from jaxmoe.runs.card import Kind
from jaxmoe.store.checkpoint import Block, cast
from jaxmoe.store.files import naming_files, unfinished_folder
from jaxmoe.train.data import tokenizer_folder
from jaxmoe.train.prepare import Plan
from jaxmoe.train.publish import publish

if TYPE_CHECKING:
    from convert.jax2hf import HFForm

_log = logging.getLogger("jaxmoe")


def export_results(plan: Plan, trainable: Params) -> None:
    """Writes what a run trained, with a card beside it: the adapter, also merged if the settings say so, or the model.
    Uploads it if the settings name a repository.

    All processes of a run call it; the first one writes.
    """
    settings, config, lora = plan.settings, plan.model.config, plan.model.lora
    arrays = {path: whole(array) for path, array in trainable.items()}
    if not launch.this().is_first:
        return
    if lora is None:
        if settings.model is None:
            export_model(settings.output / "model", tokenizer_folder(settings), config, arrays)
            if (bias := arrays.get(CHOICE_BIAS)) is not None:
                _log.info(
                    f"{settings.output / 'model'}: Qwen3-MoE has no place for the router's bias (at most "
                    f"{np.abs(bias).max():.2g}); it is in {router_bias.FILE}, for commands with --router-bias"
                )
        else:
            export_full(settings.output / "model", settings.model, config, arrays, settings.dequantize)
        publish(settings.output, {"model": settings.output / "model"}, settings.push_to_hub)
        return
    export_adapter(settings.output, config, lora, arrays)
    if settings.merge:
        assert settings.model is not None
        export_merged(settings.output / "merged", settings.model, config, lora, arrays, settings.dequantize)
    folders: dict[Kind, pathlib.Path] = {"adapter": settings.output}
    if settings.merge:
        folders["merged"] = settings.output / "merged"
    publish(settings.output, folders, settings.push_to_hub)


def export_adapter(
    output: pathlib.Path, config: Qwen3MoeConfig, lora: LoraConfig, adapters: Mapping[str, np.ndarray]
) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json`, PEFT's own form, into the folder `output`."""
    from convert.adapters import write_peft

    with unfinished_folder(output / "adapter") as draft, naming_files({draft / "adapter": output}):
        write_peft(draft / "adapter", config, lora, adapters)
        with stopping.uninterrupted():
            for file in (draft / "adapter").iterdir():
                file.replace(output / file.name)


def export_model(
    target: pathlib.Path, tokenizer: pathlib.Path, config: Qwen3MoeConfig, params: Mapping[str, np.ndarray]
) -> None:
    """Writes a model that was trained from scratch in HF form, cast once to the config's dtype (float32 without one),
    with the tokenizer files from the folder `tokenizer`; an earlier `target` is replaced. `CHOICE_BIAS`, for which
    Qwen3-MoE has no place, goes into a file of its own (`jaxmoe.control.router_bias`)."""
    from convert.hf2jax import companion_files

    stored = config.replace(dtype=config.dtype or "float32")
    raw = stored.to_hf() | {"eos_token_id": load_tokenizer(tokenizer).eos_token_id}
    files = {**companion_files(tokenizer), "config.json": (json.dumps(raw, indent=2) + "\n").encode()}
    if (bias := params.get(CHOICE_BIAS)) is not None:
        files[router_bias.FILE] = router_bias.as_bytes(bias, config)
    _write(target, stored, {path: array for path, array in params.items() if path != CHOICE_BIAS}, files)


def export_full(
    target: pathlib.Path,
    model: pathlib.Path,
    config: Qwen3MoeConfig,
    params: Mapping[str, np.ndarray],
    dequantize: bool = False,
) -> None:
    """Writes the trained parameters of the model in the folder `model` in HF form, cast once to the config's dtype
    (float32 without one); an earlier `target` is replaced.

    All fields of config.json stay, and so do the other files. `dequantize` is that with which the model was read.
    """
    from convert.hf2jax import companion_files, config_bytes
    from convert.jax2hf import HFForm, changed_config

    stored = config.replace(dtype=config.dtype or "float32")
    source = open_checkpoint(model, stored.dtype, dequantize=dequantize)[1]
    content = config_bytes(source, stored.dtype)
    if "eos_token_id" not in json.loads(content):
        content = changed_config(content, {"eos_token_id": load_tokenizer(model).eos_token_id})
    files = {**companion_files(model), "config.json": content}
    _write(target, stored, params, files, HFForm(layout=source.layout, stored_tied_head=source.stored_tied_head))


def _write(
    target: pathlib.Path,
    config: Qwen3MoeConfig,
    params: Mapping[str, np.ndarray],
    files: Mapping[str, pathlib.Path | bytes],
    form: HFForm | None = None,
) -> None:
    """Writes all parameters, cast to the config's dtype."""
    from convert.jax2hf import HFForm, write_hf

    dtype = np.dtype(config.dtype)

    def blocks() -> Iterator[Block]:
        yield Block(None, {path: cast(path, params[path], dtype) for path in top_level_paths(config)})
        for layer in range(config.num_hidden_layers):
            slots = layer_paths(config, layer)
            yield Block(layer, {path: cast(path, params[path][slot], dtype) for path, slot in slots})

    shutil.rmtree(target, ignore_errors=True)
    write_hf(target, config, dict.fromkeys(params, dtype), blocks(), files, form or HFForm())


def export_merged(
    target: pathlib.Path,
    model: pathlib.Path,
    config: Qwen3MoeConfig,
    lora: LoraConfig,
    adapters: Mapping[str, np.ndarray],
    dequantize: bool = False,
) -> None:
    """Writes the model in the folder `model` with the adapter merged, in HF form and the source's dtypes, one layer at
    a time; an earlier `target` is replaced. `dequantize` decodes weights in FP8 or NF4 first."""
    from convert.adapters import merge
    from convert.hf2jax import companion_files, config_bytes
    from convert.jax2hf import HFForm, changed_config, write_hf
    from convert.saved_modules import merged_form

    source = open_checkpoint(model, dequantize=dequantize)[1]
    merged = merged_form(source, lora)
    config_file = changed_config(config_bytes(source, None), merged.config_changes)
    files = {**companion_files(model), "config.json": config_file}
    shutil.rmtree(target, ignore_errors=True)
    blocks = (merge(config, block, lora, adapters) for block in source.blocks())
    form = HFForm(layout=source.layout, stored_tied_head=merged.stored_tied_head)
    write_hf(target, merged.config, merged.dtypes, blocks, files, form)
