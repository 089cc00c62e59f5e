"""Generation whose routing is captured into a folder, or replayed from one."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from captures import ROLES, Capture, CaptureWriter, LabelledText, Model, Text
from jaxmoe.control.provenance import imposed_routing, model_of, versions
from jaxmoe.control.replay import experts_by_position
from jaxmoe.distributed import launch
from jaxmoe.generate.engine import Generator, RoutingLog
from jaxmoe.generate.sampling import GREEDY, Sampling
from jaxmoe.ops.router import CapturedRouting, RoutingControl


def capture_generation(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    folder: str | pathlib.Path | None,
    *,
    tokenizer: str,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] = (),
    control: RoutingControl | None = None,
    replay: Capture | None = None,
    description: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Generates as `Generator.generate` does and writes the routing of every token that the model reads; of several
    processes the first writes.

    The last token of a sequence is generated but never read. It has no routing; the capture only stores it as the next
    token of the one before it. A captured sequence is therefore what training on prompt and answer reads, so `--replay`
    of the capture covers it. All router logits are kept: a generation has few tokens.

    Args:
        generator: the model.
        prompts: token ids, one list per sequence.
        max_new_tokens: the largest number of tokens generated per sequence.
        folder: the capture to write, new or empty; None writes none.
        tokenizer: the tokenizer's digest (`captures.tokenizer_digest`).
        sampling: how tokens are chosen.
        stop_tokens: ids that end a sequence.
        control: biases, forced and removed experts, [Ls, E].
        replay: a capture whose contexts begin with the prompts, in their order. Its experts are used at every position
            that it holds; after them the model chooses.
        description: what the manifest says about `control`.
        source: what the manifest says about the model.

    Returns:
        The generated token ids, one list per sequence.

    Raises:
        UserError: a replayed capture of other prompts or of another model.
    """
    model = model_of(generator.config)
    if replay is not None:
        experts = experts_by_position(replay, prompts, generator.config)
        control = (control or RoutingControl())._replace(experts=experts)
    log = None if folder is None else RoutingLog(keep_logits=model.num_experts)
    outputs = generator.generate(prompts, max_new_tokens, sampling, stop_tokens, control=control, routing=log)
    if folder is None or log is None or not launch.this().is_first:
        return outputs
    about = {"framework": "jaxmoe", "dtype": str(generator.params["embed_tokens"].dtype), "task": "generation"}
    about |= {**(source or {}), "versions": versions()}
    longest = max(len(prompt) + len(output) for prompt, output in zip(prompts, outputs, strict=True))
    labels = LabelledText(_text_of([], [], 0), ("generation",), ROLES, longest, tokenizer)
    imposed = imposed_routing(control, replay, description)
    prefill, *decoded = jax.device_get(log.steps)
    with CaptureWriter(
        folder, model, labels=labels, source=about, control=imposed, keep_logits=model.num_experts
    ) as writer:
        for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            of_prompt = [array[:, index, : len(prompt)] for array in prefill]
            fed_back = [[array[:, index] for array in step] for step in decoded[: len(output) - 1]]
            parts = [np.concatenate(part, axis=1) for part in zip(of_prompt, *fed_back, strict=True)]
            arrays = dict(zip(CapturedRouting._fields, parts, strict=True))
            sums = {"probability_sums": _probability_sums(arrays, model)}
            writer.put(_text_of(prompt, output, index), arrays | sums)
    return outputs


def _probability_sums(arrays: Mapping[str, np.ndarray], model: Model) -> np.ndarray:
    """Router probabilities [Ls, E] summed over the tokens; `arrays` hold all router logits of each token."""
    probabilities = np.exp(arrays["top_logits"] - arrays["log_sum_exp"][..., None])
    sums = np.zeros((len(model.layers), model.num_experts), np.float32)
    for layer, experts in enumerate(arrays["top_experts"]):
        np.add.at(sums[layer], experts, probabilities[layer])
    return sums


def _text_of(prompt: Sequence[int], output: Sequence[int], index: int) -> Text:
    """The tokens of sequence `index` that the model has read, and the token that follows each."""
    tokens = np.asarray([*prompt, *output], np.int32)
    n = max(len(tokens) - 1, 0)
    roles = [ROLES.index("prompt")] * len(prompt) + [ROLES.index("generated")] * len(output)
    full = lambda value: np.full(n, value, np.int32)
    return Text(
        tokens[:n], full(index), np.arange(n, dtype=np.int32), full(0), np.asarray(roles[:n], np.int32), tokens[1:]
    )
