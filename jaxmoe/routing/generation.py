"""The routing of generation: captured while a model writes, or imposed on it from a capture."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

from captures import Capture, CaptureWriter, LabelledText, Text
from jaxmoe.errors import UserError
from jaxmoe.generate.engine import GREEDY, Generator, Sampling
from jaxmoe.ops.router import CapturedRouting, RoutingControl
from jaxmoe.routing.capture import model_of, versions
from jaxmoe.routing.text import ROLES


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
    """Generates as `Generator.generate` does and writes the routing of every token that the model has read.

    A row's last token is only written, never read: it has no routing, and stands in the capture as what follows. So a
    row holds what training on prompt and answer reads, and `--replay` of the capture covers it. All router logits are
    kept: a few thousand tokens are little beside a capture of text.

    Args:
        generator: the model.
        prompts: token ids, one list a row.
        max_new_tokens: the most tokens generated for a row.
        folder: the capture to write; None writes none.
        tokenizer: its digest (`captures.tokenizer_digest`).
        sampling: how tokens are chosen.
        stop_tokens: ids that end a row.
        control: biases, forced and removed experts, [Ls, E].
        replay: a capture whose contexts begin with the prompts, in their order; its experts are used at every position
            that it holds, the model's own choice behind them.
        description: what the manifest says about `control`.
        source: what the manifest says about the model.

    Raises:
        UserError: a replayed capture of other prompts or another model.
    """
    model = model_of(generator.config)
    if replay is not None:
        control = (control or RoutingControl())._replace(experts=_replayed(replay, prompts, generator))
    imposed = dict(description or {}) | ({"replay": str(replay.folder)} if replay else {}) if control else None
    steps: list[CapturedRouting] = []
    outputs = generator.generate(
        prompts,
        max_new_tokens,
        sampling,
        stop_tokens,
        control=control,
        on_routing=steps.append if folder is not None else None,
        capture=model.num_experts,
    )
    if folder is None:
        return outputs
    about = {"framework": "jaxmoe", "dtype": str(generator.params["embed_tokens"].dtype), "task": "generation"}
    about |= {**(source or {}), "versions": versions()}
    longest = max(len(prompt) + len(output) for prompt, output in zip(prompts, outputs, strict=True))
    labels = LabelledText(_text([], [], 0), ("generation",), ROLES, longest, tokenizer)
    prefill, *decoded = jax.device_get(steps)
    with CaptureWriter(folder, model, labels=labels, source=about, control=imposed, top=model.num_experts) as writer:
        for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            read, written = len(prompt), len(output)
            fed_back = [CapturedRouting(*(a[:, row] for a in step)) for step in decoded[: written - 1]]
            parts = [CapturedRouting(*(a[:, row, :read] for a in prefill)), *fed_back]
            arrays = {
                name: np.concatenate([getattr(part, name) for part in parts], axis=1)
                for name in CapturedRouting._fields
            }
            probabilities = np.exp(arrays["top_logits"] - arrays["log_sum_exp"][..., None])
            sums = np.zeros((len(model.layers), model.num_experts), np.float32)
            for layer, order in enumerate(arrays["top_experts"]):
                np.add.at(sums[layer], order, probabilities[layer])
            writer.put(_text(prompt, output, row), arrays | {"probability_sums": sums})
    return outputs


def _text(prompt: Sequence[int], output: Sequence[int], row: int) -> Text:
    """What the model has read of one row, and what followed each token."""
    tokens = np.asarray([*prompt, *output], np.int32)
    n = max(len(tokens) - 1, 0)
    roles = [ROLES.index("prompt")] * len(prompt) + [ROLES.index("generated")] * len(output)
    full = lambda value: np.full(n, value, np.int32)
    return Text(
        tokens[:n], full(row), np.arange(n, dtype=np.int32), full(0), np.asarray(roles[:n], np.int32), tokens[1:]
    )


def _replayed(replay: Capture, prompts: Sequence[Sequence[int]], generator: Generator) -> Int32[np.ndarray, "Ls B S k"]:
    """The captured experts of each row by position, -1 behind its end."""
    model = model_of(generator.config)
    found = replay.model
    same = (found.layers, found.num_experts, found.num_experts_per_tok)
    if same != (model.layers, model.num_experts, model.num_experts_per_tok):
        raise UserError(f"{replay.folder}: expected a capture of this model's layers and experts, found another")
    text, experts = replay.read_text(), replay.read_experts()
    contexts = text.contexts()
    if len(contexts) != len(prompts):
        raise UserError(
            f"{replay.folder}: expected one context for each of {len(prompts)} prompts, found {len(contexts)}"
        )
    longest = max(context.stop - context.start for context in contexts)
    rows = np.full((experts.shape[0], len(prompts), longest, experts.shape[2]), -1, np.int32)
    for row, (prompt, context) in enumerate(zip(prompts, contexts, strict=True)):
        n = context.stop - context.start
        shared = min(len(prompt), n)
        if not np.array_equal(text.token[context][:shared], np.asarray(prompt[:shared])):
            raise UserError(f"{replay.folder}: expected context {row} to begin with prompt {row}, found other tokens")
        rows[:, row, :n] = experts[:, context]
    return rows
