"""The safetensors files of an HF folder, tensor by tensor."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from captures.shared import read_json, shown

_FLOATS = ("F32", "BF16", "F16", "F64")
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.\d+\.\w+\.weight")


def local_folder(model_name: str | os.PathLike[str], token: str | None) -> pathlib.Path:
    """The folder `model_name`, or the copy of a hub id that is downloaded if it is missing."""
    folder = pathlib.Path(model_name)
    if folder.is_dir():
        return folder
    return pathlib.Path(snapshot_download(str(model_name), token=token, allow_patterns=["*.safetensors", "*.json"]))


class Shards:
    """The tensors of a folder of safetensors by key, memory-mapped; it records which ones were read."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Opens the shards that the index names, or `model.safetensors`.

        Raises:
            ValueError: neither exists, an index that is broken, or a shard that is missing or broken, or that holds a
                tensor of another shard.
        """
        self.folder = folder
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.is_file():
            names = _named_files(index)
        elif single.is_file():
            names = [single.name]
        else:
            raise ValueError(f"{folder}: expected {single.name} or {index.name}, found neither")
        self._files: dict[str, Any] = {}
        for name in names:
            if pathlib.PurePath(name).name != name or not (folder / name).is_file():
                raise ValueError(f"{folder}: expected the shard {name}, which the index names, found none")
            try:
                file = safe_open(folder / name, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{folder / name}: expected a safetensors file, found a broken one: {error}") from None
            if twice := self._files.keys() & set(file.keys()):
                raise ValueError(f"{folder / name}: {min(twice)}: expected it in one file, found it in another too")
            self._files |= dict.fromkeys(file.keys(), file)
        self._unread = set(self._files)

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def read(self, key: str) -> Tensor:
        """The tensor `key` as it is stored.

        Raises:
            ValueError: the folder has no such tensor.
        """
        self._unread.discard(key)
        if key not in self._files:
            raise ValueError(f"{self.folder}: expected {key}, found none")
        return self._files[key].get_tensor(key)

    def check_plain(self) -> None:
        """Raises a ValueError that names a tensor whose values are codes: without quantization_config in config.json
        transformers would take them for weights."""
        for key, file in self._files.items():
            if (found := file.get_slice(key).get_dtype()) not in _FLOATS:
                raise ValueError(
                    f"{self.folder}: {key}: expected one of {', '.join(_FLOATS)}, as config.json has no "
                    f"quantization_config, found {found}"
                )

    def check_experts(self, num_experts: int) -> None:
        """Raises a ValueError that names a matrix of an expert that is missing beside others of its layer: transformers
        stacks them, and cannot say which one it lacks."""
        for layer in sorted({match[1] for key in self._files if (match := _EXPERT.fullmatch(key))}):
            for expert in range(num_experts):
                for name in ("gate_proj", "up_proj", "down_proj"):
                    if (key := f"{layer}.{expert}.{name}.weight") not in self._files:
                        raise ValueError(f"{self.folder}: expected {key}, found none")

    def check_all_read(self) -> None:
        """Raises a ValueError that names a key that was never read, if there is one."""
        if self._unread:
            raise ValueError(f"{self.folder}: unexpected tensor {min(self._unread)} (of {len(self._unread)})")


def _named_files(index: pathlib.Path) -> list[str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index}: weight_map: expected names of files by key, found {shown(names)}")
    return sorted(set(names.values()))
