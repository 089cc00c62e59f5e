"""The flags that several commands share, and the model and the text that they name."""

from __future__ import annotations

import argparse
import contextlib
import logging
import pathlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from captures import Capture, tokenizer_digest
from jaxmoe.cli.arguments import whole_number
from jaxmoe.cli.notices import LOGGER
from jaxmoe.errors import UserError


def add_model(parser: argparse.ArgumentParser, adapter: bool = True) -> None:
    """The flags that name a model and a text."""
    from jaxmoe.data import chat_flags

    add = parser.add_argument
    add("--model", type=pathlib.Path, required=True, metavar="DIR", help="HF folder or converted folder")
    if adapter:
        add("--adapter", type=pathlib.Path, metavar="DIR", help="PEFT folder or converted adapter")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    add("--quantize", choices=("nf4", "fp8"), help="hold projections, dense MLPs and experts in 4 or 8 bits")
    add("--dequantize", action="store_true", help="decode weights in FP8 or NF4 while they are read")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument(
        "--data",
        type=pathlib.Path,
        action="append",
        metavar="FILE",
        help="text or records (docs/data.md); may be repeated",
    )
    add("--split", metavar="NAME", help="part of a folder of datasets or of a data set of the hub (default: train)")
    text.add_argument("--text", type=pathlib.Path, metavar="DIR", help="instead of --data: the tokens of this capture")
    add("--seq-length", type=whole_number, default=1024, metavar="N", help="most tokens per context (default: 1024)")
    add("--max-tokens", type=whole_number, metavar="N", help="stop after the record that reaches this many tokens")
    add("--batch-size", type=whole_number, default=8, metavar="N", help="sequences per step (default: 8)")
    chat_flags.add_arguments(parser, "in conversations of --data")


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """The flags for several devices and processes."""
    from jaxmoe.distributed import launch

    text = "GPUs that share model and text: auto, or axes such as expert=8 (default: one)"
    parser.add_argument("--mesh", metavar="MESH", help=text)
    launch.add_arguments(parser)


def loaded(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(model, labelled text) that the flags name.

    Raises:
        UserError: flags that exclude each other or are missing; a model or a text that cannot be read.
    """
    from jaxmoe.cli.progress import reading_weights
    from jaxmoe.config import Qwen3MoeConfig
    from jaxmoe.data.chat import AS_WRITTEN, load_tokenizer
    from jaxmoe.data.chat_flags import chat_settings, notices
    from jaxmoe.distributed import launch
    from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM
    from jaxmoe.model.mesh_flag import Inputs, inference_mesh
    from jaxmoe.model.opening import open_checkpoint
    from jaxmoe.routing.text import read_text

    check_at_least_1(arguments, "seq_length", "batch_size", "max_tokens")
    config = Qwen3MoeConfig.from_pretrained(arguments.model)  # before anything else in the folder is read
    if arguments.seq_length > config.max_position_embeddings:
        raise UserError(
            f"seq-length: expected at most the model's max_position_embeddings {config.max_position_embeddings}, "
            f"found {arguments.seq_length}"
        )
    opened = partial(open_checkpoint, arguments.model, arguments.dtype, arguments.quantize, arguments.dequantize)
    shape, about_mesh = inference_mesh(
        arguments.mesh, config, opened, Inputs(arguments.batch_size, arguments.seq_length)
    )
    shape.check_batch(arguments.batch_size)
    shape.check_length(arguments.seq_length)
    tokenizer = load_tokenizer(arguments.model)
    settings = chat_settings(tokenizer, arguments.system, arguments.thinking, arguments.template_arg)
    if arguments.text is not None:
        if settings != AS_WRITTEN:
            raise UserError("system, no-thinking and template-arg: only valid with data, found text")
        if arguments.split is not None:
            raise UserError("split: only valid with data, found text")
        labels = Capture.open(arguments.text).labelled_text()
        if labels.tokenizer != tokenizer_digest(tokenizer):
            raise UserError(f"{arguments.text}: expected a text made with the model's tokenizer, found another")
    else:
        labels = read_text(
            arguments.data,
            tokenizer,
            config.vocab_size,
            arguments.seq_length,
            arguments.max_tokens,
            settings,
            split=arguments.split,
        )
    for line in [*about_mesh, *notices(settings, tokenizer)] if launch.this().is_first else ():
        logging.getLogger(LOGGER).info(line)
    with reading_weights() as on_layer:
        model = Qwen3MoeForCausalLM.from_pretrained(
            arguments.model,
            arguments.dtype,
            arguments.quantize,
            getattr(arguments, "adapter", None),
            on_layer,
            arguments.dequantize,
            shape,
        )
    if not model.config.sparse_layers:
        raise UserError(f"{arguments.model}: expected a model with mixture-of-experts layers, found none")
    return model, labels


def check_at_least_1(arguments: argparse.Namespace, *names: str) -> None:
    """Raises UserError for a flag of these names that is given and below 1."""
    for name in names:
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"{name.replace('_', '-')}: expected at least 1, found {value}")


@contextlib.contextmanager
def together(arguments: argparse.Namespace) -> Iterator[bool]:
    """Joins the other processes of the command, if there are any; yields whether this one writes and prints."""
    from jaxmoe.cli import progress
    from jaxmoe.distributed import ending, launch
    from jaxmoe.distributed.agreement import check_same_command

    process = launch.start(arguments)
    with ending.together(), progress.shown(process.is_first):
        check_same_command(vars(arguments))
        yield process.is_first
