"""Routed experts that an inference server returned -> a capture, which training replays.

Each record is one response, as JSON; a server's fields keep their names. Both servers return the experts of every token
but the last, [tokens - 1, layers, k], since the last one is never read by the model. `layers` counts the layers with
experts, or all layers.

- vLLM (`--enable-return-routed-experts`, and `"return_token_ids": true` in the request): `choices[].routed_experts` is
  the base64 of a .npy file, beside `choices[].token_ids`; `prompt_token_ids` lies in the choice (completions) or in the
  response (chat). Some versions return the prompt's experts apart, as `prompt_routed_experts` of the response. Offline,
  `RequestOutput.prompt_token_ids`, `CompletionOutput.token_ids` and `.routed_experts.tolist()` make one record.
- SGLang (`--enable-return-routed-experts`, and `"return_routed_experts": true`): `meta_info.routed_experts` is the
  base64 of int32 numbers, beside `output_ids`. The response lacks the prompt's ids: add the request's `input_ids`, or
  ask for `"return_logprob": true, "logprob_start_len": 0` (`meta_info.input_token_logprobs`).

Sources, read in November 2026: vLLM, vllm/entrypoints/openai/completion/protocol.py, `CompletionResponseChoice`, and
vllm/outputs.py, `CompletionOutput`; SGLang, python/sglang/srt/managers/tokenizer_manager.py, `meta_info`, and
python/sglang/srt/layers/moe/routed_experts_capturer.py.
"""

from __future__ import annotations

import base64
import io
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Integer

from captures import ROLES, Capture, CaptureWriter, LabelledText, Text, expert_dtype
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.control.provenance import model_of, versions
from jaxmoe.data.inputs import opened
from jaxmoe.errors import UserError, shown

_PROMPT, _ANSWER = ("prompt_token_ids", "input_ids"), ("token_ids", "output_ids")
_NPY = b"\x93NUMPY"


class Response(NamedTuple):
    """One sequence: the ids of the prompt and of the answer, and the experts of every token but the last."""

    prompt: Int32[np.ndarray, " p"]
    answer: Int32[np.ndarray, " a"]
    experts: Integer[np.ndarray, "n Ls k"]

    @property
    def tokens(self) -> Int32[np.ndarray, " n1"]:
        """All ids."""
        return np.concatenate([self.prompt, self.answer])


def import_experts(
    path: pathlib.Path,
    folder: str | pathlib.Path,
    config: Qwen3MoeConfig,
    tokenizer: str,
    text: LabelledText | None = None,
) -> Capture:
    """Writes the responses in the file `path` as the capture `folder`, which must be new or empty.

    Args:
        path: JSON, one response a line or one array; also compressed.
        folder: the capture. It holds experts, no router logits.
        config: the model that the server ran.
        tokenizer: the digest of its tokenizer.
        text: what training will read: its contexts are the sequences of the responses, in their order. The capture
            takes its labels.

    Returns:
        The capture, opened.

    Raises:
        UserError: a response without ids or experts, of another model, with other ids than `text`, or with experts that
            are not those of all its tokens.
    """
    found = [(where, response) for where, response in read_responses(path, config) if len(response.tokens) > 1]
    if not found:
        raise UserError(f"{path}: expected at least one response of two tokens, found none")
    parts = _aligned(found, text) if text is not None else [_text_of(each, i) for i, (_, each) in enumerate(found)]
    longest = max(len(response.tokens) for _, response in found)
    domains, roles = (text.domains, text.roles) if text is not None else (("generation",), ROLES)
    length = text.seq_length if text is not None else longest
    labels = LabelledText(parts[0], domains, roles, length, tokenizer)
    source = {"framework": "imported", "file": path.name, "versions": versions()}
    with CaptureWriter(folder, model_of(config), labels=labels, source=source, experts_alone=True) as writer:
        for part, (_, response) in zip(parts, found, strict=True):
            experts = response.experts[: len(part.token)].swapaxes(0, 1)
            writer.put(part, {"experts": experts.astype(expert_dtype(config.num_experts))})
    return Capture.open(folder)


def read_responses(path: pathlib.Path, config: Qwen3MoeConfig) -> Iterator[tuple[str, Response]]:
    """(place in the file, sequence) of every answer in every response; a response may have several.

    Raises:
        UserError: which starts with the place.
    """
    for where, raw, *_ in opened(path).read(0):
        for name, answer in _answers(where, raw):
            try:
                yield name, _response(answer, config)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None


def _answers(where: str, raw: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, the fields of one answer and those of its response)."""
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected an object, the response of a server, found {shown(raw)}")
    choices = raw.get("choices")
    if not isinstance(choices, list):
        yield where, raw
        return
    for number, choice in enumerate(choices):
        if not isinstance(choice, dict):
            raise UserError(f"{where}: choices: expected objects, found {shown(choice)}")
        yield f"{where}: choice {number}", raw | {name: value for name, value in choice.items() if value is not None}


def _response(fields: Mapping[str, Any], config: Qwen3MoeConfig) -> Response:
    meta = fields.get("meta_info")
    meta = meta if isinstance(meta, dict) else {}
    prompt = _ids(fields, _PROMPT, meta.get("input_token_logprobs"), config)
    answer = _ids(fields, _ANSWER, meta.get("output_token_logprobs"), config)
    encoded = meta.get("routed_experts") if fields.get("routed_experts") is None else fields["routed_experts"]
    n = len(prompt) + len(answer)
    if n < 2:  # nothing was routed
        return Response(prompt, answer, np.zeros((0, len(config.sparse_layers), config.num_experts_per_tok), np.int32))
    experts = _experts(encoded, config, n)
    if (of_prompt := fields.get("prompt_routed_experts")) is not None:
        experts = np.concatenate([_experts(of_prompt, config, len(prompt)), experts])
    if len(experts) not in (n - 1, n):
        raise UserError(
            f"routed_experts: expected those of {n - 1} tokens (all but the last, which is never read), found "
            f"{len(experts)}; ask the server for those of the whole sequence"
        )
    return Response(prompt, answer, experts[: n - 1])


def _ids(fields: Mapping[str, Any], names: Sequence[str], logprobs: Any, config: Qwen3MoeConfig) -> np.ndarray:
    """Token ids under one of the names, or those in SGLang's list of (logprob, id, text); both must agree."""
    name = next((name for name in names if fields.get(name) is not None), None)
    listed = [entry[1] for entry in logprobs] if _are_logprobs(logprobs) else None
    found = listed if name is None else fields[name]
    if found is None:
        raise UserError(f"{' or '.join(names)}: expected token ids, found none")
    size = config.vocab_size
    if not isinstance(found, list) or any(type(one) is not int or not 0 <= one < size for one in found):
        raise UserError(f"{name or names[0]}: expected token ids from 0 to {size - 1}, found {shown(found)}")
    if listed is not None and listed != found:
        raise UserError(f"{name}: expected the ids that meta_info has, found others")
    return np.asarray(found, np.int32)


def _are_logprobs(entries: Any) -> bool:
    return isinstance(entries, list) and all(isinstance(entry, list) and len(entry) > 1 for entry in entries)


def _experts(encoded: Any, config: Qwen3MoeConfig, n: int) -> Integer[np.ndarray, "n Ls k"]:
    """Checked experts of the layers with experts, from a list of numbers, a .npy file or int32 numbers in base64, whose
    shape is not stored: they are those of `n` tokens or of all but the last."""
    E, k, layers = config.num_experts, config.num_experts_per_tok, config.num_hidden_layers
    sparse = list(config.sparse_layers)
    array = _array(encoded)
    if array.ndim == 1:  # int32 numbers, without a shape
        shapes = [(tokens, count, k) for tokens in (n - 1, n) for count in (layers, len(sparse))]
        fits = [shape for shape in shapes if array.size == math.prod(shape)]
        if not fits:
            raise UserError(
                f"routed_experts: expected {n - 1} tokens x {layers} layers x {k} experts, found {array.size} numbers; "
                "ask the server for those of the whole sequence"
            )
        array = array.reshape(fits[0])
    if array.ndim != 3 or array.shape[1] not in (len(sparse), layers) or array.shape[2] != k:
        raise UserError(f"routed_experts: expected [tokens, {len(sparse)}, {k}], found {list(array.shape)}")
    array = array if array.shape[1] == len(sparse) else array[:, sparse]
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < 0 or high >= E:
        found = low if low < 0 else high
        raise UserError(f"routed_experts: expected experts from 0 to {E - 1}, found {found}")
    ordered = np.sort(array, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise UserError(f"routed_experts: expected {k} different experts for each token and layer, found one twice")
    return array


def _array(encoded: Any) -> np.ndarray:
    if isinstance(encoded, list):
        try:
            array = np.asarray(encoded)
        except ValueError:
            raise UserError("routed_experts: expected lists of equal length, found others") from None
        if array.dtype.kind not in "iu":
            raise UserError(f"routed_experts: expected whole numbers, found {shown(encoded)}")
        return array
    if encoded is None:
        raise UserError(
            "routed_experts: expected those of every token, found none (server option: --enable-return-routed-experts)"
        )
    if not isinstance(encoded, str):
        raise UserError(f"routed_experts: expected an array or base64, found {shown(encoded)}")
    try:
        content = base64.b64decode(encoded, validate=True)
        if content.startswith(_NPY):
            array = np.load(io.BytesIO(content), allow_pickle=False)
        else:
            array = np.frombuffer(content, "<i4")
    except Exception as error:  # what NumPy raises depends on what is wrong with the file's header
        raise UserError(f"routed_experts: expected the base64 of a .npy file or of int32 numbers ({error})") from None
    if array.dtype.kind not in "iu":
        raise UserError(f"routed_experts: expected whole numbers, found {array.dtype}")
    return array


def _text_of(response: Response, number: int) -> Text:
    """The tokens of a sequence that the model read, and the token after each."""
    tokens, n = response.tokens, len(response.tokens) - 1
    roles = [ROLES.index("prompt")] * len(response.prompt) + [ROLES.index("generated")] * len(response.answer)
    zero = np.zeros(n, np.int32)
    return Text(
        tokens[:n], zero + number, np.arange(n, dtype=np.int32), zero, np.asarray(roles[:n], np.int32), tokens[1:]
    )


def _aligned(found: Sequence[tuple[str, Response]], labels: LabelledText) -> list[Text]:
    """The contexts of a text without the last token of each; each must be the sequence of one response."""
    contexts = labels.text.contexts()
    if len(contexts) != len(found):
        raise UserError(f"data: expected as many contexts as there are responses ({len(found)}), found {len(contexts)}")
    parts = []
    for context, (where, response) in zip(contexts, found, strict=True):
        ours, theirs = labels.text.token[context], response.tokens
        shared = min(len(ours), len(theirs))
        differ = np.flatnonzero(ours[:shared] != theirs[:shared])
        if len(differ):
            at = int(differ[0])
            raise UserError(
                f"{where}: token {at}: expected the id {ours[at]}, which the data has there, found {theirs[at]}"
            )
        if len(ours) > len(theirs):
            raise UserError(f"{where}: expected {len(ours)} tokens, as the data has, found {len(theirs)}")
        part = slice(context.start, context.start + min(len(ours), len(theirs) - 1))
        parts.append(Text(*(array[part] for array in labels.text)))
    return parts
