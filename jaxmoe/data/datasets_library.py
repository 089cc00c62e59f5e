"""What the library `datasets` knows: the folders that it writes, folders of files, and data sets of the hub.

Nothing here runs code of a data set: `datasets` has no loading scripts any more, and only files of records are read.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from jaxmoe.data import forms
from jaxmoe.data.extra import library
from jaxmoe.data.json_records import json_input
from jaxmoe.data.raw import File, Input, Raw, joined, naming
from jaxmoe.data.record_forms import check_columns
from jaxmoe.data.tables import TOGETHER, parquet_input, table_records
from jaxmoe.errors import UserError
from jaxmoe.json_text import read_json

DEFAULT_SPLIT = "train"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(/[\w.-]+)?")  # owner/name, or owner/name/subset
# How the files of a data set may be stored: each of these packages of `datasets` only reads records. The last one
# stands for a data set that was read before, where the hub cannot be reached.
_READERS = ("parquet", "json", "arrow", "csv", "text", "cache")
_PATIENCE = 10  # seconds that the hub has to answer
_READ_HERE = ("parquet", "json")  # of these, those whose files this package reads by itself


def is_saved(folder: pathlib.Path) -> bool:
    """Whether `datasets` wrote the folder, with `save_to_disk`."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def saved_input(folder: pathlib.Path, split: str | None) -> Input:
    """The records of a folder that `datasets` wrote with `save_to_disk`; `split` chooses one of several.

    Raises:
        UserError: `datasets` is missing, no such split, or the folder is damaged.
    """
    datasets = _datasets(folder)
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = read_json(splits).get("splits")
        if not isinstance(names, list) or not all(map(_is_plain, names)):
            raise UserError(f"{splits}: splits: expected a list of names, found something else")
        folder, split = folder / _chosen(split, names, folder), None
    state = folder / "state.json"
    about = read_json(state)
    if split not in (None, about.get("_split")):
        raise UserError(f"{folder}: split: expected none, since the folder holds one only; found {split!r}")
    size = sum(file.stat().st_size for file in _files_of(about, state))
    with naming(folder):
        dataset = datasets.load_from_disk(str(folder))
    return _of_dataset(dataset, str(folder), str(about.get("_fingerprint")), size)


def _files_of(about: dict[str, Any], state: pathlib.Path) -> list[pathlib.Path]:
    """The files with the records; what the content of a file names must lie beside it."""
    entries = about.get("_data_files")
    names = [each.get("filename") for each in entries if isinstance(each, dict)] if isinstance(entries, list) else []
    if not names or not all(map(_is_plain, names)):
        raise UserError(f"{state}: _data_files: expected names of files in this folder, found others")
    files = [state.parent / str(name) for name in names]
    if missing := next((file for file in files if not file.is_file()), None):
        raise UserError(forms.missing_file(missing))
    return files


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and name == pathlib.PurePath(name).name


def hub_name(name: str) -> str | None:
    """`name` if it may be a data set of the hub: owner/name or owner/name/subset, and no path."""
    if not _HUB_NAME.fullmatch(name) or pathlib.Path(name.split("/")[0]).exists():
        return None
    return None if name.endswith(forms.FILE_ENDINGS) else name


def hub_input(name: str, split: str | None, streaming: bool) -> Input:
    """The records of a data set of the hub. It is downloaded once and kept by `datasets`, or read over the network if
    `streaming`. If the hub does not answer, what was kept is read.

    Raises:
        UserError: `datasets` is missing, there is no such data set or split, or it cannot be reached.
    """
    owner, short, *subset = name.split("/")
    datasets = _datasets(name)
    problem = _hub_problem(f"{owner}/{short}")
    if problem is not None and (streaming or not _is_kept(datasets, f"{owner}/{short}")):
        raise UserError(f"{name}: no file or folder of this name, and {problem}")
    with naming(name):
        with _without_network(datasets, problem is not None):
            builder = _builder(datasets, f"{owner}/{short}", name, *subset)
        chosen = _chosen(split, list(builder.info.splits or builder.config.data_files or {}), name)
        shown = f"{name} ({chosen})"
        if streaming:
            hub = library("huggingface_hub", name).HfFileSystem()
            files = _files(builder, chosen, shown)
            opened = [File(url, partial(hub.open, url, "rb"), hub.info(url)["size"]) for url in files]
            return joined(shown, [_file_input(builder, file) for file in opened], str(builder.hash))
        builder.download_and_prepare()
        return _of_dataset(builder.as_dataset(split=chosen), shown, str(builder.hash), None)


def _hub_problem(repository: str) -> str | None:
    """Why the hub does not give the data set; None if it does, or says something else about it.

    It is asked once. `datasets` would ask again and again, for half a minute.
    """
    hub = library("huggingface_hub", repository)
    try:
        hub.HfApi().dataset_info(repository, timeout=_PATIENCE)
    except hub.errors.GatedRepoError:
        return None
    except hub.errors.RepositoryNotFoundError:
        return "the hub has no such data set, or does not show it to you (hf auth login)"
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError):
        return None  # `datasets` gets the same answer, and says what it means
    except Exception as error:  # that of an HTTP library, which depends on the version
        return f"the hub does not answer: {' '.join(str(error).split())[:200] or type(error).__name__}"
    return None


def _is_kept(datasets: Any, repository: str) -> bool:
    """Whether `datasets` has kept a data set of the hub that was read before."""
    try:
        datasets.load.CachedDatasetModuleFactory(repository).get_module()
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _without_network(datasets: Any, apply: bool) -> Iterator[None]:
    """If `apply`, `datasets` takes what it has kept at once, as with HF_DATASETS_OFFLINE=1."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = apply or before
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def folder_input(folder: pathlib.Path, split: str | None) -> Input:
    """The records of a folder of files as the hub has them, in Parquet or JSON; `datasets` knows which split a file is
    part of.

    Raises:
        UserError: `datasets` is missing, no such split, or files of another form.
    """
    datasets = _datasets(folder)
    with naming(folder):
        builder = _builder(datasets, str(folder.resolve()), str(folder))
        chosen = _chosen(split, list(builder.config.data_files or {}), folder)
        files = [File.local(pathlib.Path(path)) for path in _files(builder, chosen, str(folder))]
        size = sum(file.size for file in files)
        return joined(f"{folder} ({chosen})", [_file_input(builder, file) for file in files], str(size))


def _builder(datasets: Any, path: str, name: str, *subset: str) -> Any:
    """What `datasets` knows about a data set before it is read."""
    try:
        builder = datasets.load_dataset_builder(path, *subset)
    except ValueError:
        if subset or len(names := datasets.get_dataset_config_names(path)) < 2:
            raise
        found = ", ".join(names := sorted(names))[:300]
        raise UserError(
            f"{name}: expected one subset, found several: {found}; name one, as {name}/{names[0]}"
        ) from None
    if (kind := _kind(builder)) not in _READERS:
        raise UserError(f"{name}: expected a data set of records ({', '.join(_READERS[:-1])}), found {kind}")
    return builder


def _kind(builder: Any) -> str:
    return type(builder).__module__.rpartition(".")[2]


def _files(builder: Any, split: str, name: str) -> list[str]:
    """Paths or addresses of the files of a split."""
    if (kind := _kind(builder)) not in _READ_HERE:
        raise UserError(f"{name}: expected files in {' or '.join(_READ_HERE)}, found {kind}")
    files = [str(file) for file in builder.config.data_files[split]]
    if archive := next((file for file in files if "::" in file), None):
        raise UserError(f"{name}: expected files that are in no archive, found {archive}")
    return files


def _file_input(builder: Any, file: File) -> Input:
    return parquet_input(file) if _kind(builder) == "parquet" else json_input(file)


def _of_dataset(dataset: Any, name: str, content: str, size: int | None) -> Input:
    """`dataset` is one of `datasets`; `size` is that of its files, if they are on disk."""
    unread = check_columns(dataset.column_names, name)
    dataset = dataset.with_format("arrow")

    def read(first: int) -> Iterator[Raw]:
        with naming(name):
            yield from table_records(dataset.skip(first).iter(TOGETHER), name, first, size)

    return Input(name, read, dataset.num_rows, dataset.num_rows, content, unread)


def _chosen(split: str | None, names: Sequence[Any], where: object) -> str:
    """The split to read: the one that is asked for, the only one, or "train"."""
    names = [str(name) for name in names]
    wanted = split or (names[0] if len(names) == 1 else DEFAULT_SPLIT)
    if wanted in names:
        return wanted
    raise UserError(f"{where}: split: expected one of {', '.join(names)[:300] or 'none'}; found {wanted!r}")


def _datasets(where: object) -> Any:
    """The package `datasets`, which shows no progress of its own."""
    datasets = library("datasets", f"{where}: to read a data set")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    return datasets
