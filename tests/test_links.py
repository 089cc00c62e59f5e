"""Links: followed in folders that others made, refused where they lead out of a folder that this package wrote."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import pytest

from captures import Capture
from convert.__main__ import main
from convert.adapters import write_peft
from convert.hf2jax import hf2jax, read_hf
from jaxmoe.config import LoraConfig, Qwen3MoeConfig
from jaxmoe.errors import UserError
from jaxmoe.store.adapter import read_adapter, write_adapter
from jaxmoe.store.converted import read_converted
from jaxmoe.store.files import check_links, named_in
from jaxmoe.store.train_state import TrainCheckpoints
from peers.make_checkpoint import TINY, make_checkpoint
from tests.test_adapters import random_adapters
from tests.test_routing_capture import write_tiny

LORA = LoraConfig(r=2, targets=("q_proj", "experts.down_proj"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_checkpoint(tmp_path_factory.mktemp("links") / "hf", TINY, shards=2)


def into_a_cache(folder: pathlib.Path, cache: pathlib.Path) -> pathlib.Path:
    """The files of `folder` in the layout of the hub's cache: a snapshot of relative links to blobs."""
    snapshot, blobs = cache / "models--a--b" / "snapshots" / "0123", cache / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(pathlib.Path("..", "..", "blobs", f"{number:040x}"))
    return snapshot


def moved_out(path: pathlib.Path) -> None:
    """Moves a file or folder two levels up and leaves a link in its place."""
    elsewhere = path.parent.parent.parent / f"elsewhere-{path.name}"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


def test_a_model_of_links_equals_its_files(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    snapshot = into_a_cache(model, tmp_path / "cache")
    scattered = tmp_path / "scattered"  # links to files that lie in different places, under other names
    scattered.mkdir()
    for number, file in enumerate(model.iterdir()):
        (tmp_path / f"place-{number}").mkdir()
        shutil.copy(file, tmp_path / f"place-{number}" / "x")
        (scattered / file.name).symlink_to(tmp_path / f"place-{number}" / "x")
    (tmp_path / "whole").symlink_to(snapshot)
    for path in (snapshot, scattered, tmp_path / "whole"):
        for ours, theirs in zip(read_hf(path).blocks(), read_hf(model).blocks(), strict=True):
            assert ours.arrays.keys() == theirs.arrays.keys()
            assert all(np.array_equal(ours.arrays[name], theirs.arrays[name]) for name in theirs.arrays)
    main(["hf2jax", str(tmp_path / "whole"), str(tmp_path / "jax")])
    assert not any(file.is_symlink() for file in (tmp_path / "jax").rglob("*"))
    main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "back")])
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_an_adapter_of_links_is_read(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = Qwen3MoeConfig.from_pretrained(model)
    adapters = random_adapters(config, LORA)
    write_peft(tmp_path / "peft", config, LORA, adapters)
    snapshot = into_a_cache(tmp_path / "peft", tmp_path / "cache")
    main(["peft2jax", str(snapshot), str(tmp_path / "jax"), "--model", str(model)])
    main(["inspect", str(snapshot)])
    found = read_adapter(tmp_path / "jax")[2]
    assert all(np.array_equal(found[name], adapters[name]) for name in adapters)


def in_a_circle(path: pathlib.Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def to_nowhere(path: pathlib.Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("breaks", [in_a_circle, to_nowhere])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "tokenizer.json"]
)
def test_a_broken_link_is_one_line(
    name: str, breaks: Callable[[pathlib.Path], None], model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(model, tmp_path / "hf")
    breaks(tmp_path / "hf" / name)
    with pytest.raises(UserError, match=rf"{name}: .*link") as error:
        hf2jax(tmp_path / "hf", tmp_path / "jax")
    assert "\n" not in str(error.value) and not (tmp_path / "jax").exists()


def test_a_name_that_no_file_can_have_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"found '\\ud800', which is none"):
        named_in(tmp_path, "\ud800", by="x.json")


def test_a_folder_in_a_circle_is_one_line(tmp_path: pathlib.Path) -> None:
    (tmp_path / "hf").symlink_to("hf")
    with pytest.raises(UserError, match="hf"):
        read_hf(tmp_path / "hf")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\0b"])
def test_content_names_plain_files(name: str, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"x\.json: expected names of files in its folder"):
        named_in(tmp_path, name, by="x.json")
    shutil.copytree(model, tmp_path / "hf")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"index\.json: expected names of files in its folder"):
        read_hf(tmp_path / "hf")


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "tokenizer.json", "layers", "layers/00001", "top"])
def test_a_converted_folder_has_no_way_out(name: str, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "a" / "jax"
    hf2jax(model, folder)
    (tmp_path / "whole").symlink_to(folder)
    read_converted(tmp_path / "whole")  # the folder itself may be a link
    (folder / "again").symlink_to("config.json")  # as may a file of the folder
    read_converted(folder)
    (folder / "again").unlink()
    moved_out(folder / name)
    with pytest.raises(UserError, match=f"{name}: .*outside"):
        main(["jax2hf", str(folder), str(tmp_path / "back")])


def test_other_folders_have_no_way_out_either(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = Qwen3MoeConfig.from_pretrained(model)
    write_adapter(tmp_path / "a" / "adapter", config, LORA, random_adapters(config, LORA))
    moved_out(tmp_path / "a" / "adapter" / "adapter")
    with pytest.raises(UserError, match="outside"):
        read_adapter(tmp_path / "a" / "adapter")

    capture = write_tiny(tmp_path / "b" / "capture").folder
    moved_out(capture / "manifest.json")
    with pytest.raises(UserError, match=r"manifest\.json: .*outside"):
        Capture.open(capture)

    checkpoints = TrainCheckpoints(tmp_path / "c" / "run")
    state = {"a": np.ones(2, np.float32)}
    checkpoints.save(1, state, {})
    assert checkpoints.restore_latest(state) is not None
    moved_out(tmp_path / "c" / "run" / "1")
    with pytest.raises(UserError, match="outside"):
        checkpoints.restore_latest(state)
    checkpoints.close()


def test_links_in_a_circle_end(tmp_path: pathlib.Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "up").symlink_to(".")
    check_links(tmp_path)
