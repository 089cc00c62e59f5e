"""Converted folders, converted adapters and training states: they are exact, and every kind of damage is detected."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from convert.hf2jax import hf2jax
from convert.report import inspect
from jaxmoe.config import LoraConfig
from jaxmoe.errors import UserError
from jaxmoe.store.adapter import read_adapter, write_adapter
from jaxmoe.store.converted import read_converted
from jaxmoe.store.files import output_folder
from jaxmoe.store.items import quiet_orbax
from jaxmoe.store.train_state import TrainCheckpoints
from peers.make_checkpoint import TINY, make_checkpoint
from tests.conftest import ROOT
from tests.test_adapters import random_adapters

MODEL = TINY.replace(mlp_only_layers=(1,))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("converted")
    hf2jax(make_checkpoint(folder / "hf", MODEL, dtype="bfloat16"), folder / "jax")
    return folder / "jax"


def read_all(folder: pathlib.Path, **options: Any) -> None:
    for _ in read_converted(folder, **options).blocks():
        pass


def edit_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[pathlib.Path], None]:
    def apply(folder: pathlib.Path) -> None:
        file = folder / ("manifest.json" if (folder / "manifest.json").exists() else "adapter.json")
        raw = json.loads(file.read_text())
        change(raw)
        file.write_text(json.dumps(raw))

    return apply


def chunk(folder: pathlib.Path, array: str) -> pathlib.Path:
    """A file with the numbers of an array."""
    return max(
        (file for file in folder.glob(f"**/{array}/*") if file.name[0] != "."), key=lambda file: file.stat().st_size
    )


def flip(file: pathlib.Path, at: int = -5) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


NORM = "attention.q_norm"
DAMAGE: dict[str, tuple[Callable[[pathlib.Path], Any], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "another format": (edit_manifest(lambda m: m.update(format="x")), "format"),
    "a later version": (
        edit_manifest(lambda m: m.update(version=8)),
        "version: expected 1 or 2 or 3 or 4 or 5 or 6 or 7, found 8",
    ),
    "no source": (edit_manifest(lambda m: m.pop("source")), "source"),
    "no items": (edit_manifest(lambda m: m.pop("items")), "layers/00000"),
    "an item too few": (edit_manifest(lambda m: m["items"].pop("layers/00001")), "layers/00001"),
    "an item too many": (edit_manifest(lambda m: m["items"].update({"layers/00009": {}})), "layers/00009"),
    "an array too few": (edit_manifest(lambda m: m["items"]["layers/00001"].pop(NORM)), NORM),
    "another shape": (edit_manifest(lambda m: m["items"]["layers/00001"][NORM].update(shape=[17])), "[17]"),
    "another dtype": (edit_manifest(lambda m: m["items"]["layers/00001"][NORM].update(dtype="float32")), "float32"),
    "an integer dtype": (edit_manifest(lambda m: m["items"]["layers/00001"][NORM].update(dtype="int8")), "int8"),
    "half an entry": (edit_manifest(lambda m: m["items"]["layers/00001"][NORM].pop("digest")), "digest"),
    "another checksum": (edit_manifest(lambda m: m["items"]["top"]["norm"].update(digest="0" * 64)), "SHA-256"),
    "another config": (lambda f: (f / "config.json").write_text(json.dumps(TINY.to_hf())), "layers/00001"),
    "a layer missing": (lambda f: shutil.rmtree(f / "layers" / "00001"), "layers/00001"),
    "an array missing": (lambda f: shutil.rmtree(f / "layers" / "00001" / "attention.q_proj"), "layers/00001"),
    "a chunk missing": (lambda f: chunk(f / "layers" / "00001", "attention.q_proj").unlink(), "layers/00001"),
    "a chunk truncated": (
        lambda f: os.truncate(file := chunk(f / "layers" / "00001", "attention.q_proj"), file.stat().st_size // 2),
        "layers/00001",
    ),
    "a chunk emptied": (lambda f: os.truncate(chunk(f / "top", "embed_tokens"), 0), "top"),
    "a bit flipped": (lambda f: flip(chunk(f / "layers" / "00002", "attention.k_proj")), "layers/00002"),
    "layers swapped": (
        lambda f: [
            (f / "layers" / a).rename(f / "layers" / b) for a, b in (("00000", "x"), ("00002", "00000"), ("x", "00002"))
        ],
        "layers/00000",
    ),
    "no metadata": (lambda f: (f / "top" / "_METADATA").unlink(), "top"),
    "broken metadata": (lambda f: (f / "top" / "_METADATA").write_text("{"), "top"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_line(damage: str, converted: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(converted, tmp_path / "jax")
    read_all(tmp_path / "jax")
    apply, says = DAMAGE[damage]
    apply(tmp_path / "jax")
    with pytest.raises(UserError) as caught:
        read_all(tmp_path / "jax")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    if (tmp_path / "jax" / "manifest.json").exists():
        with pytest.raises(UserError):
            inspect(tmp_path / "jax")


def test_a_missing_chunk_is_never_zeros(converted: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """By default Zarr fills missing chunks with zeros; that must be an error, even without checksums."""
    shutil.copytree(converted, tmp_path / "jax")
    chunk(tmp_path / "jax" / "layers" / "00001", "attention.q_proj").unlink()
    with pytest.raises(UserError, match="layers/00001"):
        read_all(tmp_path / "jax", verify=False)


def test_checksums_are_compared_only_on_request(converted: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(converted, tmp_path / "jax")
    DAMAGE["another checksum"][0](tmp_path / "jax")
    read_all(tmp_path / "jax", verify=False)


def test_blocks_are_dropped_before_the_next_is_made(converted: pathlib.Path) -> None:
    """Memory is bounded by one layer: the reader keeps no reference to the blocks that it has returned."""
    import gc
    import weakref

    blocks = read_converted(converted).blocks()
    block = next(blocks)
    arrays = [weakref.ref(array) for array in block.arrays.values()]
    del block
    gc.collect()
    assert all(array() is None for array in arrays)


# --- adapters

LORA = LoraConfig(r=2, alpha=3.0, targets=("q_proj", "experts.gate_up_proj"), alpha_pattern=(("q_proj", 1.5),))


def test_adapters_are_exact(tmp_path: pathlib.Path) -> None:
    adapters = random_adapters(MODEL, LORA, dtype=ml_dtypes.bfloat16)
    as_jax = {name: jnp.asarray(array) for name, array in adapters.items()}
    write_adapter(tmp_path / "adapter", MODEL, LORA, as_jax)
    config, lora, read = read_adapter(tmp_path / "adapter", MODEL)
    assert (config, lora) == (MODEL, LORA)
    assert {name: array.tobytes() for name, array in read.items()} == {n: a.tobytes() for n, a in adapters.items()}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (edit_manifest(lambda m: m.update(version=0)), "version"),
        (edit_manifest(lambda m: m["lora"].pop("r")), "lora"),
        (edit_manifest(lambda m: m["lora"].update(r=3)), "shape"),
        (edit_manifest(lambda m: m["lora"].update(targets=["q_proj"], alpha_pattern=[])), "unexpected"),
        (edit_manifest(lambda m: m.pop("arrays")), "arrays"),
        (edit_manifest(lambda m: m.pop("model")), "model"),
        (lambda f: shutil.rmtree(f / "adapter"), "adapter"),
        (lambda f: flip(chunk(f / "adapter", "attention.q_proj.lora_A")), "adapter"),
    ],
)
def test_a_damaged_adapter_is_one_line(
    damage: Callable[[pathlib.Path], Any], says: str, tmp_path: pathlib.Path
) -> None:
    write_adapter(tmp_path / "adapter", MODEL, LORA, random_adapters(MODEL, LORA))
    damage(tmp_path / "adapter")
    with pytest.raises(UserError, match=says) as caught:
        read_adapter(tmp_path / "adapter")
    assert "\n" not in str(caught.value)


def test_an_adapter_for_another_model_is_refused(tmp_path: pathlib.Path) -> None:
    write_adapter(tmp_path / "adapter", MODEL, LORA, random_adapters(MODEL, LORA))
    with pytest.raises(UserError, match="expected shape"):
        read_adapter(tmp_path / "adapter", TINY)
    with pytest.raises(UserError, match="expected shape"):
        write_adapter(tmp_path / "other", TINY, LORA, random_adapters(MODEL, LORA))
    assert not (tmp_path / "other").exists()


# --- training states


def training_state(scale: float = 1.0) -> dict[str, Any]:
    adapters = {
        "a.lora_A": jnp.arange(12.0).reshape(3, 4) * scale,
        "a.lora_B": jnp.full((2,), 1.5, jnp.bfloat16) * scale,
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {
        "adapters": adapters,
        "optimizer": optimizer.init(adapters),
        "key": jax.random.key_data(jax.random.key(7)),
        "step": np.array(3),
    }


def equal(a: Any, b: Any) -> bool:
    same = lambda x, y: type(x) is type(y) and x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(same, a, b))


def test_a_state_comes_back(tmp_path: pathlib.Path) -> None:
    state = training_state()
    template = jax.tree.map(lambda leaf: leaf * 0, state)
    checkpoints = TrainCheckpoints(tmp_path / "run", keep=2)
    assert checkpoints.latest_step() is None
    assert checkpoints.restore_latest(template) is None
    for step in (10, 20, 30):
        checkpoints.save(step, training_state(step), {"position": step, "large": 2**100, "text": "é"})
    checkpoints.wait()
    checkpoints.close()
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir() if entry.name.isdigit()) == ["20", "30"]
    restored = TrainCheckpoints(tmp_path / "run", keep=2).restore_latest(template)
    assert restored is not None
    step, found, metadata = restored
    assert (step, metadata) == (30, {"position": 30, "large": 2**100, "text": "é"})
    assert equal(found, training_state(30))
    assert not equal(found, training_state(20))
    shapes = jax.eval_shape(lambda: {k: v for k, v in template.items() if k != "step"})
    assert TrainCheckpoints(tmp_path / "run").restore_latest(shapes | {"step": template["step"]}) is not None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state["adapters"].update({"a.lora_A": jnp.zeros((3, 5))}), r"float32 \[3, 5\]"),
        (lambda state: state["adapters"].update({"a.lora_B": jnp.zeros(2)}), r"found .*bfloat16"),
        (lambda state: state["adapters"].update({"a.lora_C": jnp.zeros(2)}), "lora_C"),
        (lambda state: state.pop("step"), "expected 8 arrays, found 9"),
        (lambda state: state.update(zz=jnp.zeros(2)), "expected 10 arrays, found 9"),
    ],
)
def test_another_state_is_refused(change: Callable[[dict[str, Any]], Any], says: str, tmp_path: pathlib.Path) -> None:
    checkpoints = TrainCheckpoints(tmp_path / "run")
    checkpoints.save(1, training_state(), {})
    template = training_state()
    change(template)
    with pytest.raises(UserError, match=says):
        checkpoints.restore_latest(template)


@pytest.mark.parametrize(("damage", "message"), [("state", "expected JSON"), ("metadata", "cannot be read")])
def test_a_damaged_state_is_one_line(damage: str, message: str, tmp_path: pathlib.Path) -> None:
    checkpoints = TrainCheckpoints(tmp_path / "run")
    checkpoints.save(1, training_state(), {})
    checkpoints.close()
    for file in (tmp_path / "run" / "1" / damage).rglob("*"):
        if file.is_file() and "commit" not in file.name:
            os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=message) as caught:
        TrainCheckpoints(tmp_path / "run").restore_latest(training_state())
    assert "\n" not in str(caught.value)


def test_a_state_under_the_number_of_another_step_is_refused(tmp_path: pathlib.Path) -> None:
    checkpoints = TrainCheckpoints(tmp_path / "run")
    checkpoints.save(3, training_state(), {})
    checkpoints.close()
    (tmp_path / "run" / "3").rename(tmp_path / "run" / "99")
    with pytest.raises(UserError, match=r"99: expected the checkpoint of step 99, found that of step 3"):
        TrainCheckpoints(tmp_path / "run").restore_latest(training_state())


SAVER = """
import sys, numpy as np
from jaxmoe.store.train_state import TrainCheckpoints
checkpoints = TrainCheckpoints(sys.argv[1], keep=2)
for step in range(1, 1000):
    checkpoints.save(step, {"x": np.full((512, 1024), step, np.float32)}, {"step": step})
    print(step, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05])
def test_a_kill_in_the_middle_of_a_save_loses_nothing_older(delay: float, tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-c", SAVER, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            done = int(process.stdout.readline())
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        done = max([done, *map(int, process.stdout.read().split())])
    checkpoints = TrainCheckpoints(tmp_path / "run", keep=2)
    restored = checkpoints.restore_latest({"x": np.zeros((512, 1024), np.float32)})
    assert restored is not None
    step, state, metadata = restored
    assert step >= done
    assert metadata == {"step": step}
    assert (state["x"] == step).all()
    checkpoints.save(step + 1, state, {"step": step + 1})
    assert checkpoints.latest_step() == step + 1


FULL_DISK = """
import resource, sys, numpy as np
from jaxmoe.store.train_state import TrainCheckpoints
checkpoints = TrainCheckpoints(sys.argv[1], keep=2)
state = {name: np.random.default_rng(0).random((512, 1024)) for name in "abc"}
checkpoints.save(1, state, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try:
    checkpoints.save(2, state, {})
except OSError as error:
    print(error)
"""


def test_a_full_disk_loses_nothing_older(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("resource")
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "run")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert "File too large" in result.stdout
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""
    template = {name: np.zeros((512, 1024)) for name in "abc"}
    restored = TrainCheckpoints(tmp_path / "run").restore_latest(template)
    assert restored is not None
    assert restored[0] == 1


QUIET = """
import logging
import sys
import absl.logging
import numpy as np
from jaxmoe.store import items
from jaxmoe.store.train_state import TrainCheckpoints
if sys.argv[2] == "loud":
    items._not_from_orbax = lambda record: True
logging.basicConfig(format="%(pathname)s: %(message)s", level=logging.INFO)
absl.logging.set_verbosity(absl.logging.INFO)
hook = sys.unraisablehook
checkpoints = TrainCheckpoints(sys.argv[1])
checkpoints.save(1, {"x": np.zeros(3)}, {})
assert checkpoints.restore_latest({"x": np.zeros(3)}) is not None
assert absl.logging.get_verbosity() == absl.logging.INFO
assert absl.logging.get_absl_logger().filters == []
assert sys.unraisablehook is hook
absl.logging.info("a line of the caller")
"""


@pytest.mark.parametrize("mode", ["quiet", "loud"])
def test_orbax_is_silent_and_the_logging_of_others_is_left_alone(mode: str, tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-c", QUIET, str(tmp_path / "run"), mode]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    lines = result.stderr.splitlines()
    assert lines[-1] == "<string>: a line of the caller"
    assert any("orbax" in line for line in lines) == (mode == "loud"), lines


def test_silence_ends_with_the_last_of_the_calls_that_overlap() -> None:
    logger, hook = absl.logging.get_absl_logger(), sys.unraisablehook
    first, second = quiet_orbax(), quiet_orbax()
    first.__enter__()
    second.__enter__()
    assert sys.unraisablehook is not hook
    first.__exit__(None, None, None)
    assert sys.unraisablehook is not hook
    assert len(logger.filters) == 1
    second.__exit__(None, None, None)
    assert sys.unraisablehook is hook
    assert logger.filters == []


@pytest.mark.parametrize(("file", "shown"), [("/lib/orbax/checkpoint/x.py", False), ("/home/user/x.py", True)])
def test_after_a_failed_call_tasks_of_orbax_log_nothing(
    file: str, shown: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio logs what no one has waited for when the task is collected, which may be long after the call."""
    with pytest.raises(OSError, match="full"), quiet_orbax():
        raise OSError("full")
    try:
        exec(compile("raise OSError('full')", file, "exec"))
    except OSError as error:
        logging.getLogger("asyncio").error("Task exception was never retrieved", exc_info=error)
    assert bool(caplog.records) == shown


# --- output folders


def test_a_folder_appears_whole_or_not_at_all(tmp_path: pathlib.Path) -> None:
    with output_folder(tmp_path / "a" / "b" / "out") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a" / "b" / "out").exists()
    assert [entry.name for entry in (tmp_path / "a" / "b").iterdir()] == ["out"]
    with pytest.raises(UserError, match="new or empty"), output_folder(tmp_path / "a"):
        pass
    with pytest.raises(UserError, match="a file"), output_folder(tmp_path / "a" / "b" / "out" / "file"):
        pass
    interrupted = output_folder(tmp_path / "c" / "d")
    (interrupted.__enter__() / "file").write_text("x")
    assert [entry.name for entry in (tmp_path / "c").iterdir()] != ["d"]
    assert not interrupted.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
