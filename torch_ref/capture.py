"""Captures routing with PyTorch, in the format of `captures`.

The text comes from another capture, with its tokens, contexts and labels, so that both can be compared token by token.
"""

from __future__ import annotations

from captures.shared import ArgumentParser, UserError, claimed, counted, path_name, run, watch, whole_number

if __name__ == "__main__":
    watch()  # before the other imports, which take seconds

import argparse
import contextlib
import logging
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captures import Capture, CaptureWriter, LabelledText, Model, Text, expert_dtype, tokenizer_digest
from captures.format import DEFAULT_KEEP_LOGITS
from torch_ref.strangers import check_adapter_folder, check_model_folder

_CONTEXT_BATCH_TOKENS = 8192


def capture(
    model: Any,
    labels: LabelledText,
    folder: str | pathlib.Path,
    *,
    keep_logits: int = DEFAULT_KEEP_LOGITS,
    predictions: bool = True,
    source: Mapping[str, Any] | None = None,
) -> Capture:
    """Runs a Qwen3-MoE of transformers, patched or not, with adapters or not, once over the text.

    Neighbouring contexts share a batch, padded on the right. The experts are those that each layer's router module
    returns, in its order. Logits are stored as float32, after rounding in the model's dtype.

    Raises:
        ValueError: a model without experts, or a token outside its vocabulary.
    """
    about = _model(model)
    if int(labels.text.token.max()) >= about.vocab_size:
        raise ValueError(f"text: expected token ids below {about.vocab_size}, found {int(labels.text.token.max())}")
    known = {"framework": "torch_ref", "dtype": str(model.dtype).removeprefix("torch."), **(source or {})}
    known["versions"] = {name: version(name) for name in ("torch", "transformers", "numpy")}
    known["versions"]["device"] = torch.cuda.get_device_name() if model.device.type == "cuda" else model.device.type
    with CaptureWriter(folder, about, labels=labels, source=known, keep_logits=keep_logits) as writer, torch.no_grad():
        head = model.get_output_embeddings()
        for part, ids, mask in _batches(labels.text, model.device):
            text = Text(*(a[part] for a in labels.text))
            with _Routers(model, about, writer.keep_logits, mask) as routers:
                hidden = _backbone(model)(input_ids=ids, attention_mask=mask, use_cache=False)[0]
            arrays = routers.arrays()
            if predictions:
                arrays["predicted"], arrays["loss"] = _predict(hidden[mask.bool()], head, text.next)
            writer.put(text, arrays)
    return Capture.open(folder)


def _model(model: Any) -> Model:
    config = model.config
    layers = [i for i, layer in enumerate(_layers(model)) if hasattr(layer.mlp, "gate")]
    return Model(
        tuple(layers), config.num_experts, config.num_experts_per_tok, config.norm_topk_prob, config.vocab_size
    )


def _backbone(model: Any) -> Any:
    """The `Qwen3MoeModel`, without PEFT's wrapper."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).model


def _layers(model: Any) -> Any:
    return _backbone(model).layers


def _batches(text: Text, device: torch.device) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields (place in the stream, token ids [B, T], mask [B, T]) of consecutive contexts that fit in one batch."""
    batch: list[slice] = []
    longest = 0
    for context in [*text.contexts(), None]:
        length = 0 if context is None else context.stop - context.start
        if batch and (context is None or max(longest, length) * (len(batch) + 1) > _CONTEXT_BATCH_TOKENS):
            ids, mask = (torch.zeros(len(batch), longest, dtype=torch.long) for _ in range(2))
            for sequence, each in enumerate(batch):
                n = each.stop - each.start
                ids[sequence, :n] = torch.from_numpy(text.token[each]).long()
                mask[sequence, :n] = 1
            yield slice(batch[0].start, batch[-1].stop), ids.to(device), mask.to(device)
            batch, longest = [], 0
        if context is not None:
            batch.append(context)
            longest = max(longest, length)


class _Routers:
    """Records what each layer's router returns while the model runs: logits [M, E] and chosen experts [M, k]."""

    def __init__(self, model: Any, about: Model, keep_logits: int, mask: Tensor) -> None:
        self._about, self._keep_logits, self._valid = about, keep_logits, mask.reshape(-1).bool()
        self._modules = [_layers(model)[i].mlp.gate for i in about.layers]
        self._records: list[dict[str, np.ndarray]] = []

    def __enter__(self) -> _Routers:
        self._handles = [module.register_forward_hook(self._record) for module in self._modules]
        return self

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()

    def arrays(self) -> dict[str, np.ndarray]:
        """The recorded arrays, stacked over the layers."""
        assert len(self._records) == len(self._modules), "every router runs once per forward pass"
        return {name: np.stack([record[name] for record in self._records]) for name in self._records[0]}

    def _record(self, module: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        logits, _, experts = output
        logits, experts = logits.reshape(-1, logits.shape[-1])[self._valid].float(), experts[self._valid]
        probabilities = torch.softmax(logits, dim=-1)
        # Stable, so that equal probabilities keep the order of their experts, as in jaxmoe.
        order = torch.sort(probabilities, dim=-1, descending=True, stable=True).indices[:, : self._keep_logits]
        log_sum_exp = torch.logsumexp(logits, dim=-1)
        small = expert_dtype(self._about.num_experts)
        numbers = {
            "top_logits": logits.gather(-1, order),
            "log_sum_exp": log_sum_exp,
            "entropy": log_sum_exp - (probabilities * logits).sum(dim=-1),
            "probability_sums": probabilities.sum(dim=0),
        }
        record = {name: value.cpu().numpy() for name, value in numbers.items()}
        record["top_experts"], record["experts"] = (
            order.cpu().numpy().astype(small),
            experts.cpu().numpy().astype(small),
        )
        self._records.append(record)


def _predict(hidden: Tensor, head: Any, following: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The most probable next token, and -log p(next), NaN if there is no next token; 1024 tokens' logits at a time."""
    labels = torch.from_numpy(following).long().to(hidden.device)
    predicted, loss = [], []
    for rows, wanted in zip(hidden.split(1024), labels.split(1024), strict=True):
        log_p = torch.log_softmax(head(rows).float(), dim=-1)
        at = -log_p.gather(-1, wanted.clamp(min=0)[:, None])[:, 0]
        loss.append(torch.where(wanted < 0, math.nan, at))
        predicted.append(log_p.argmax(dim=-1))
    return torch.cat(predicted).int().cpu().numpy(), torch.cat(loss).cpu().numpy()


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m torch_ref.capture`."""
    parser = ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument(
        "--model", type=path_name, required=True, metavar="DIR", help="model folder in HF form, or a hub id"
    )
    parser.add_argument("--adapter", type=pathlib.Path, metavar="DIR", help="PEFT adapter folder")
    parser.add_argument("--text", required=True, type=pathlib.Path, metavar="DIR", help="capture that holds the text")
    parser.add_argument("--out", required=True, type=pathlib.Path, metavar="DIR", help="folder to write; new or empty")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: bfloat16 or float16 on a GPU, float32 on a CPU",
    )
    parser.add_argument("--load-in-4bit", action="store_true", help="load the weights as NF4, experts included")
    parser.add_argument(
        "--top",
        type=whole_number,
        default=DEFAULT_KEEP_LOGITS,
        metavar="N",
        help="number of router logits to keep per token",
    )
    args = parser.parse_args(argv)
    with claimed(args.out):
        labels = Capture.open(args.text).labelled_text()
        model = _load(args, labels)
        about = {
            "model": args.model,
            "adapter": None if args.adapter is None else str(args.adapter),
            "quantization": "nf4" if args.load_in_4bit else None,
        }
        try:
            result = capture(model, labels, args.out, keep_logits=args.top, source=about)
        except (ValueError, torch.OutOfMemoryError) as error:
            raise UserError(str(error)) from error
    print(f"{args.out}: {counted(result.tokens, 'token')}, {counted(len(result.model.layers), 'MoE layer')}")


def _load(args: argparse.Namespace, labels: LabelledText) -> Any:
    """The model that the flags describe, if its tokenizer is that of the text."""
    if (folder := pathlib.Path(args.model)).is_dir():
        check_model_folder(folder)
    if args.adapter is not None:
        check_adapter_folder(args.adapter)
    with _one_error(args.model):
        from torch_ref.model import FastQwen3MoeModel

        model, tokenizer = FastQwen3MoeModel.from_pretrained(
            args.model,
            max_seq_length=None,
            dtype=args.dtype,
            load_in_4bit=args.load_in_4bit,
            fix_tokenizer=False,
            trust_remote_code=False,
        )
    if tokenizer_digest(tokenizer) != labels.tokenizer:
        raise UserError(
            f"{args.text}: expected a text made with the tokenizer of {args.model}, found another tokenizer"
        )
    if args.adapter is not None:
        with _one_error(args.adapter):
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, args.adapter)
    return model.eval()


@contextlib.contextmanager
def _one_error(source: object) -> Iterator[None]:
    """Turns what a library raises about the folder `source` into a UserError: its type depends on what is broken."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{source}: cannot be loaded: {str(error).strip() or type(error).__name__}") from error


def _quiet_libraries() -> None:
    """Standard error holds this command's own lines only: no bars and no advice."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


if __name__ == "__main__":
    _quiet_libraries()
    run(main)
