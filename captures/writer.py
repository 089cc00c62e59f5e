"""Writes a capture, one shard at a time, while a model runs."""

from __future__ import annotations

import hashlib
import json
import pathlib
import queue
import threading
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from captures.format import DEFAULT_KEEP_LOGITS, FORMAT, MANIFEST, VERSION, LabelledText, Model, Text, layout
from jaxmoe.errors import UserError
from jaxmoe.store.files import os_error, output_folder


class CaptureWriter:
    """Writes a capture, one shard at a time, in a second thread; the folder appears whole or not at all.

        with CaptureWriter(folder, model, ...) as writer:
            writer.put(text, arrays)   # anything that np.asarray takes; the thread fetches arrays from a device

    `put` waits while two shards are unwritten, so that memory stays bounded.
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        model: Model,
        *,
        labels: LabelledText,
        source: Mapping[str, Any],
        control: Mapping[str, Any] | None = None,
        keep_logits: int = DEFAULT_KEEP_LOGITS,
        experts_alone: bool = False,
    ) -> None:
        """Prepares a capture; nothing is written yet.

        Args:
            folder: the folder to write; must be new or empty.
            model: the model whose routing is captured.
            labels: names of domains and roles, tokenizer, longest context. Its stream of tokens is not used: `put` gets
                the tokens.
            source: what was run: framework, model, dtype, versions.
            control: what was imposed on the routing, if anything.
            keep_logits: how many router logits to keep for each token, the largest ones.
            experts_alone: nothing but the experts is known, so no logits are kept.

        Raises:
            UserError: `keep_logits` is too small for the margin.
        """
        self.model = model
        self.keep_logits = model.num_experts if control else min(max(keep_logits, 1), model.num_experts)
        least = min(model.num_experts_per_tok + 1, model.num_experts)
        if experts_alone:
            self.keep_logits = 0
        elif self.keep_logits < least:
            raise UserError(
                f"top: expected at least {least} logits per token, which the margin needs, found {keep_logits}"
            )
        self._manifest = {
            "format": FORMAT,
            "version": VERSION,
            "model": asdict(model),
            "top": self.keep_logits,
            "source": dict(source),
            "control": control and dict(control),
            "text": {
                "tokenizer": labels.tokenizer,
                "seq_length": labels.seq_length,
                "domains": [*labels.domains],
                "roles": [*labels.roles],
            },
        }
        self._shards: list[dict[str, Any]] = []
        self._digest = hashlib.sha256()
        self._queue: queue.Queue[tuple[Text, Mapping[str, Any], Any] | None] = queue.Queue(maxsize=2)
        self._failure: BaseException | None = None
        self._output = output_folder(folder)

    def __enter__(self) -> CaptureWriter:
        self._folder = self._output.__enter__()
        self._thread = threading.Thread(target=self._work, name="capture-writer", daemon=True)
        self._thread.start()
        return self

    def put(self, text: Text, arrays: Mapping[str, Any], valid: np.ndarray | None = None) -> None:
        """Queues one shard. If the arrays are padded, `valid` (bool, along their tokens) selects the tokens of `text`.

        Raises:
            Exception: the error that stopped the writing of an earlier shard.
        """
        self._check()
        self._queue.put((text, arrays, valid))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool | None:
        self._queue.put(None)
        self._thread.join()
        failure = self._failure if kind is None else None
        if failure is not None:
            self._output.__exit__(type(failure), failure, failure.__traceback__)
            raise failure
        if kind is None:
            try:
                self._write_manifest()
            except BaseException as failure:
                self._output.__exit__(type(failure), failure, failure.__traceback__)
                raise
        return self._output.__exit__(kind, error, trace)

    def _write_manifest(self) -> None:
        tokens = sum(shard["tokens"] for shard in self._shards)
        self._manifest["text"] |= {"tokens": tokens, "digest": self._digest.hexdigest()}
        content = json.dumps(self._manifest | {"shards": self._shards}, indent=1) + "\n"
        (self._folder / MANIFEST).write_text(content, encoding="utf-8")

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._failure is None:  # after a failure the queue is still emptied, so that `put` never blocks
                try:
                    self._write(*item)
                except BaseException as failure:
                    self._failure = failure

    def _write(self, text: Text, arrays: Mapping[str, Any], valid: np.ndarray | None) -> None:
        shard = {name: np.ascontiguousarray(array, np.int32) for name, array in text._asdict().items()}
        # The digest runs over tokens, so that it does not depend on where shards end.
        self._digest.update(np.stack([text.token, text.document, text.position, text.next], axis=1).tobytes())
        for name, array in arrays.items():
            array = np.asarray(array)
            if valid is not None and name != "probability_sums":
                array = array[:, valid] if array.ndim > 1 else array[valid]
            shard[name] = np.ascontiguousarray(array)
        n = len(text.token)
        for name, (dtype, shape) in layout(self.model, self.keep_logits, n, "loss" in shard).items():
            if shard[name].dtype != dtype or shard[name].shape != shape:
                found = f"{shard[name].dtype} {list(shard[name].shape)}"
                raise ValueError(f"capture {name}: expected {dtype} {list(shape)}, found {found}")
        if (sums := shard.get("log_sum_exp")) is not None and not np.isfinite(sums).all():
            layer = self.model.layers[int(np.flatnonzero(~np.isfinite(sums).all(axis=1))[0])]
            raise UserError(
                f"model: layer {layer}: expected finite router logits, found NaN or infinity; a weight is NaN, or the "
                "dtype is too narrow for the model"
            )
        file = f"routing-{len(self._shards):05d}.safetensors"
        try:
            save_file(shard, self._folder / file)
        except SafetensorError as error:  # the library's form of a full disk
            raise os_error(self._folder / file, str(error)) from error
        self._shards.append({"file": file, "tokens": n})
