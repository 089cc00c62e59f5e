"""Locks, signals, leftovers of killed runs, damaged checkpoints, and a sample of the trials in `reliability`."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.hf2jax import hf2jax, read_hf
from jaxmoe import broken_environment, stopping
from jaxmoe.cli.arguments import run
from jaxmoe.cli.notices import shown_notices
from jaxmoe.cli.progress import print_line
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.data.inputs import opened
from jaxmoe.errors import UserError, printable
from jaxmoe.json_text import read_json
from jaxmoe.store import lock
from jaxmoe.store.checkpoint import Checkpoint
from jaxmoe.store.converted import read_converted
from jaxmoe.store.digest import WeightsDigest, combined, digest
from jaxmoe.store.files import check_links, claimed, is_file, naming_files, os_error, output_file, output_folder
from jaxmoe.store.lock import InUse, output_lock
from jaxmoe.store.train_state import TrainCheckpoints
from jaxmoe.tokenizer_files import check_small_files
from jaxmoe.train import identity
from jaxmoe.train.settings import TrainConfig
from peers.make_checkpoint import TINY, make_checkpoint
from reliability import bit_flips, full_disk, kill
from reliability.trials import Outcome, run_trials
from tests.conftest import ROOT

# --- locks


def no_flock(file: int) -> None:
    raise OSError(errno.ENOSYS, "no locks here")


@pytest.fixture(params=["flock", "owner file"])
def kind_of_lock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "owner file":
        monkeypatch.setattr(lock, "_flock", no_flock)
    return request.param


def in_another_thread(call: Callable[[], Any]) -> BaseException | None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return caught[0] if caught else None


def locked(path: pathlib.Path) -> None:
    with output_lock(path):
        pass


@pytest.mark.usefixtures("kind_of_lock")
def test_a_second_writer_is_told_who_the_first_is(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "new" / "out"
    with output_lock(output):
        locked(output)  # the same thread may
        error = in_another_thread(lambda: locked(output))
        assert isinstance(error, InUse)
        assert f"process {os.getpid()} on {socket.gethostname()}" in str(error)
        assert "\n" not in str(error)
        assert in_another_thread(lambda: locked(tmp_path / "new" / "other")) is None
    assert list(tmp_path.iterdir()) == []


def test_an_output_beside_a_folder_that_does_not_exist_is_refused(tmp_path: pathlib.Path) -> None:
    """The system would not find it under that name when it is written."""
    for name in ("none/../out", "none/deep/../../out"):
        with pytest.raises(FileNotFoundError, match="none"):
            locked(tmp_path / name)
    (tmp_path / "some").mkdir()
    locked(tmp_path / "some/../out")


@pytest.mark.usefixtures("kind_of_lock")
def test_the_lock_of_a_dead_process_is_free(tmp_path: pathlib.Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    owner = {"process": int(dead.stdout), "host": socket.gethostname(), "command": "x", "since": "y"}
    (tmp_path / f".out{lock.SUFFIX}").write_text(json.dumps(owner))
    locked(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_owner_file_of_another_host_is_judged_by_its_time(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_flock", no_flock)
    file = tmp_path / f".out{lock.SUFFIX}"
    file.write_text(json.dumps({"process": 1, "host": "elsewhere", "command": "x", "since": "y"}))
    with pytest.raises(InUse, match="process 1 on elsewhere"):
        locked(tmp_path / "out")
    for seconds in (-2 * lock.DEAD_AFTER, 10**6):  # long ago, and before the clock was set back
        file.write_text(json.dumps({"process": 1, "host": "elsewhere", "command": "x", "since": "y"}))
        os.utime(file, (time.time() + seconds, time.time() + seconds))
        locked(tmp_path / "out")
        assert not file.exists()


def test_leftovers_of_dead_processes_are_removed_and_those_of_live_ones_kept(tmp_path: pathlib.Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f".{name}.jaxmoe-unfinished-abcd1234" / "content").mkdir(parents=True)
    (tmp_path / f".c{lock.SUFFIX}").touch()
    (tmp_path / ".b-notes").touch()
    live = threading.Event(), threading.Event()

    def hold() -> None:
        with output_lock(tmp_path / "b"):
            live[0].set()
            live[1].wait()

    thread = threading.Thread(target=hold)
    thread.start()
    live[0].wait()
    with output_folder(tmp_path / "out") as folder:
        (folder / "x").touch()
        with output_file(tmp_path / "table.csv") as table:  # does not take the folder above for a leftover
            table.write_text("1")
    names = {path.name for path in tmp_path.iterdir()}
    live[1].set()
    thread.join()
    assert names == {"out", "table.csv", ".b-notes", ".b.jaxmoe-unfinished-abcd1234", f".b{lock.SUFFIX}"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]


def test_a_folder_is_claimed_before_the_work(tmp_path: pathlib.Path) -> None:
    with claimed(tmp_path / "out"), output_folder(tmp_path / "out") as folder:
        (folder / "x").touch()
    with pytest.raises(UserError, match="new or empty"), claimed(tmp_path / "out"):
        pass


def test_a_lock_is_never_written_through_a_link(tmp_path: pathlib.Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("text")
    (tmp_path / f".out{lock.SUFFIX}").symlink_to(precious)
    (tmp_path / ".z.jaxmoe-unfinished-abcd1234").symlink_to(tmp_path)
    with pytest.raises(OSError, match="symbolic links"), output_folder(tmp_path / "out"):
        pass
    with output_folder(tmp_path / "other"):
        pass
    assert precious.read_text() == "text"


@pytest.mark.usefixtures("kind_of_lock")
def test_an_output_that_cannot_be_made_is_named_and_not_its_lock(tmp_path: pathlib.Path) -> None:
    for output in (tmp_path / ("x" * 250), pathlib.Path("/proc/x")):
        with pytest.raises(OSError, match=f"{output}'$"):
            locked(output)


def test_the_current_folder_is_no_output(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("", ".", str(tmp_path)):
        with pytest.raises(UserError, match="found the current one"), output_folder(name):
            pass


# --- files whose reading never ends, and text that a terminal obeys


def test_pipes_and_devices_are_refused_where_files_are_read(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    os.mkfifo(folder / "a.json")
    (folder / "b.json").symlink_to("/dev/zero")
    with (folder / "huge.txt").open("wb") as file:
        file.truncate(2**40)
    for check, found in (
        (lambda: read_json(folder / "a.json"), "a pipe"),
        (lambda: read_json(folder / "b.json"), "a device"),
        (lambda: is_file(folder / "b.json"), "a device"),
        (lambda: check_links(folder), "a pipe"),
        (lambda: check_small_files(folder), "a pipe"),
        (lambda: opened(folder / "a.json"), "a pipe"),
        (lambda: TrainCheckpoints(folder), "a pipe"),
    ):
        with pytest.raises(UserError, match=found):
            check()
    (folder / "a.json").unlink()
    (folder / "b.json").unlink()
    with pytest.raises(UserError, match="found 1,048,576 MiB"):
        check_small_files(folder)


def test_a_run_that_is_resumed_writes_through_no_link(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "out"
    (output / "checkpoints").mkdir(parents=True)
    (output / identity.RUN_FILE).write_text('{"identity": {}}')
    settings = TrainConfig(model=tmp_path, data=tmp_path, output=output, resume=True)
    assert identity.previous_identity(settings) == {}
    (output / "metrics.tmp").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="outside it"):
        identity.previous_identity(settings)


def test_no_name_from_a_file_makes_a_terminal_do_anything(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("a\tb\x1b[2J\x07\r\x9b\u202e\n\u00e4\u200d") == r"a	b\x1b[2J\x07\r\x9b\u202e" + "\n\u00e4\u200d"

    def fail() -> None:
        raise UserError("a\x1b[31mb\nc")

    with shown_notices(on_stderr=True):
        logging.getLogger("jaxmoe").warning("\x1bc")
    with pytest.raises(SystemExit):
        run(fail)
    notice, error = capsys.readouterr().err.splitlines()
    assert notice == r"\x1bc"
    assert error.endswith(r": a\x1b[31mb c")


class Unwritable(io.StringIO):
    """A stream whose reader is gone, or whose disk is full."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


def test_output_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, kind in ((errno.ENOSPC, OSError), (errno.EPIPE, BrokenPipeError)):
        monkeypatch.setattr(sys, "stdout", Unwritable(number))
        with pytest.raises(kind, match="standard output"):
            print_line("x")
    monkeypatch.setattr(sys, "stderr", Unwritable(errno.EPIPE))
    with pytest.raises(SystemExit) as ended:
        run(lambda: os.stat("/nowhere") and None)
    assert ended.value.code == 2


# --- environments


def test_what_the_environment_breaks_is_one_line() -> None:
    explain = broken_environment.explanation
    assert explain(MemoryError()) == "out of memory"
    assert "out of memory" in str(explain(ImportError("x.so: failed to map segment from shared object")))
    assert explain(ImportError("no module")) is None
    assert explain(AssertionError()) is None
    code = "from jaxmoe import stopping; stopping.watch(); import jax"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"JAX_DEBUG_NANS": "maybe"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "JAX_DEBUG_NANS" in done.stderr


def test_devices_that_jax_lacks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices() -> None:
        raise AssertionError

    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(devices=devices))
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert "found 'cuda': AssertionError" in str(broken_environment.explanation(AssertionError()))


def test_strict_settings_of_jax_are_named() -> None:
    with jax.numpy_rank_promotion("raise"), pytest.raises(ValueError, match="promotion") as caught:
        _ = jnp.ones(2) + jnp.ones((2, 2))
    assert str(broken_environment.explanation(caught.value)).startswith("JAX_NUMPY_RANK_PROMOTION: expected JAX's")
    assert broken_environment.explanation(ValueError("another")) is None


@pytest.mark.parametrize("number", ["65537", "9" * 30])
def test_more_threads_than_a_machine_can_start_are_refused(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYON_NUM_THREADS", "64")
    assert broken_environment.too_many_threads() is None
    monkeypatch.setenv("RAYON_NUM_THREADS", number)
    assert str(broken_environment.too_many_threads()).startswith("RAYON_NUM_THREADS: expected at most 65536 threads")


# --- full disks


def test_errors_name_the_users_file(tmp_path: pathlib.Path) -> None:
    def fail(filename: str | None) -> None:
        with naming_files({tmp_path / ".t": pathlib.Path("out")}):
            raise OSError(errno.ENOSPC, "No space left on device", filename)

    for filename, shown in ((None, "out"), (str(tmp_path / ".t" / "a" / "b"), "out/a/b"), ("/else", "/else")):
        with pytest.raises(OSError, match="No space left") as caught:
            fail(filename)
        assert caught.value.filename == shown
    for text in ("I/O error: No space left on device (os error 28)", "x [os_error_code='28'] y"):
        assert os_error(tmp_path, text).errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left"), output_folder(tmp_path / "out") as folder:
        os_error_in(folder)
    with pytest.raises(OSError, match="No space left"), output_file(tmp_path / "table.csv") as file:
        os_error_in(file)
    assert list(tmp_path.iterdir()) == []


def os_error_in(path: pathlib.Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


# --- signals

PROGRAM = """
import sys, time
from jaxmoe import stopping
stopping.watch()
from jaxmoe.store.files import output_folder
with output_folder(sys.argv[1]) as folder:
    (folder / "x").touch()
    print("begun", flush=True)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass  # code that swallows what a handler raises
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_that_catches_everything(number: signal.Signals, tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "new" / "out")]
    inherited = signal.signal(number, signal.SIG_DFL)  # under nohup, commands ignore SIGHUP as their parent does
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        signal.signal(number, inherited)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        try:
            _, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 128 + number
    assert stderr == f"{number.name}: stopped; what it had begun to write was removed\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("delay", "arguments"),
    [
        (0.3, "jaxmoe.routing report nowhere --out {}/out"),
        (0.9, "jaxmoe.routing report nowhere --out {}/out"),
        (0.5, "torch_ref.capture --model nowhere --text nowhere --out {}/out"),
    ],
)
def test_a_signal_during_imports_is_one_line(delay: float, arguments: str, tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", *arguments.format(tmp_path).split()]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    # A fast machine may have refused the bad capture before.
    assert process.returncode in (130, 2)
    assert len(stderr.splitlines()) == 1
    assert process.returncode == 2 or stderr == "SIGINT: stopped\n"


def test_a_program_under_nohup_ignores_that_the_terminal_is_gone() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert signal.SIGHUP in stopping._heard()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert signal.SIGHUP not in stopping._heard()
    finally:
        signal.signal(signal.SIGHUP, before)


# --- training checkpoints


def saved(folder: pathlib.Path) -> TrainCheckpoints:
    checkpoints = TrainCheckpoints(folder)
    for step in (10, 20):
        checkpoints.save(step, {"x": np.full(1000, step, np.float32)}, {"step": step})
    return checkpoints


TEMPLATE = {"x": np.zeros(1000, np.float32)}


def test_an_older_checkpoint_is_chosen_and_later_ones_stay_until_the_next(tmp_path: pathlib.Path) -> None:
    checkpoints = saved(tmp_path)
    for which, step in ((None, 20), ("20", 20), ("10", 10), ("previous", 10)):
        restored = checkpoints.restore_latest(TEMPLATE, which)
        assert restored is not None
        assert (restored[0], restored[1]["x"][0], restored[2]) == (step, step, {"step": step})
    with pytest.raises(UserError, match=r"\(10, 20\), found 15"):
        checkpoints.restore_latest(TEMPLATE, "15")
    assert checkpoints.steps() == [10, 20]
    checkpoints.save(15, {"x": np.full(1000, 15, np.float32)}, {"step": 15})
    assert checkpoints.steps() == [10, 15]
    with pytest.raises(UserError, match="previous"):
        TrainConfig(model=tmp_path, data=tmp_path, output=tmp_path, resume_from="newest")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"shape": [2**40], "chunks": [1000]}, "shape: expected"),
        ({"chunks": [2**40]}, "chunks: expected"),
        ({"dtype": "<f8"}, "expected float32, found '<f8'"),
        ({"dtype": [["a", "<f4", [10**9]]]}, "expected float32"),
        ({"attributes": "x" * 5000}, "expected at most 4096 bytes"),
    ],
)
def test_arrays_are_compared_before_memory_is_taken(change: Any, found: str, tmp_path: pathlib.Path) -> None:
    import tensorstore

    saved(tmp_path).close()
    base = f"file://{tmp_path}/20/state/"
    store: Any = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    about = json.loads(store.read("0/.zarray").result().value)
    store.write("0/.zarray", json.dumps(about | change)).result()
    with pytest.raises(UserError, match=found):
        TrainCheckpoints(tmp_path).restore_latest(TEMPLATE)


def test_an_endless_file_in_a_checkpoint_is_refused(tmp_path: pathlib.Path) -> None:
    saved(tmp_path).close()
    os.truncate(tmp_path / "20" / "state" / "manifest.ocdbt", 2**40)
    with pytest.raises(UserError, match=r"manifest.ocdbt: expected at most .* --resume-from 10"):
        TrainCheckpoints(tmp_path).restore_latest(TEMPLATE)


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.update(Commit_timestamp_nsecs=1, custom_metadata={"unknown": 1}),
        lambda about: about.update(commit_timestamp_nsecs="now"),
        lambda about: about.update(item_handlers=7),
    ],
)
def test_what_is_damaged_about_a_step_is_named(change: Callable[[dict[str, Any]], Any], tmp_path: pathlib.Path) -> None:
    saved(tmp_path).close()
    file = tmp_path / "20" / "_CHECKPOINT_METADATA"
    about = json.loads(file.read_text())
    change(about)
    file.write_text(json.dumps(about))
    with pytest.raises(
        UserError, match=r"20/_CHECKPOINT_METADATA: cannot be read: .*folder away, then --resume-from 10 continues"
    ):
        TrainCheckpoints(tmp_path)
    (tmp_path / "20").rename(tmp_path / "damaged")
    assert TrainCheckpoints(tmp_path).latest_step() == 10


def test_arrays_in_another_form_are_refused(tmp_path: pathlib.Path) -> None:
    saved(tmp_path).close()
    file = tmp_path / "20" / "state" / "_METADATA"
    about = json.loads(file.read_text())
    for change in ({"use_ocdbt": False}, {"use_zarr3": True}):
        file.write_text(json.dumps(about | change))
        with pytest.raises(UserError, match="another form"):
            TrainCheckpoints(tmp_path).restore_latest(TEMPLATE)


def test_a_checkpoint_without_checksums_is_restored_with_a_line(tmp_path: pathlib.Path) -> None:
    saved(tmp_path).close()
    file = tmp_path / "20" / "metadata" / "metadata"
    stored = json.loads(file.read_text())
    old = {"version": 1, "leaves": [entry[:3] for entry in stored["leaves"]], "metadata": stored["metadata"]}
    file.write_text(json.dumps(old))
    checkpoints = TrainCheckpoints(tmp_path)
    restored = checkpoints.restore_latest(TEMPLATE)
    assert restored is not None
    assert restored[0] == 20
    assert checkpoints.notice is not None
    assert "not verified" in checkpoints.notice


def test_flipped_bits_are_refused_or_change_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_trials(bit_flips.trial, bit_flips.prepare, description="", number=25, argv=["--seed", "1"]) == 0
    assert "wrong" in capsys.readouterr().out


# --- kills and full disks, a sample


def prepare_conversion(shared: pathlib.Path) -> None:
    """What the trials of one command need, made in this process: its input and its undisturbed result."""
    make_checkpoint(shared / "hf", TINY.replace(num_hidden_layers=1))
    hf2jax(shared / "hf", shared / "hf2jax")
    (shared / "seconds-hf2jax").write_text("1.5")
    (shared / "count-hf2jax").write_bytes(bytes(40))  # the number of its writes, about


@pytest.mark.parametrize("number", ["KILL", "TERM"])
def test_a_killed_conversion_leaves_nothing_and_is_repeated(
    number: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIGNALS", number)
    assert run_trials(kill.trial, prepare_conversion, description="", number=1, argv=["--seed", "1"]) == 0
    assert "hf2jax" in capsys.readouterr().out


@pytest.mark.skipif(full_disk.unsupported() is not None, reason=f"a full disk {full_disk.unsupported()}")
def test_a_conversion_on_a_full_disk_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def prepare(shared: pathlib.Path) -> None:
        full_disk.build(shared)
        prepare_conversion(shared)

    assert run_trials(full_disk.trial, prepare, description="", number=2, argv=["--seed", "1"]) == 0
    assert "hf2jax" in capsys.readouterr().out


def test_wrong_trials_fail(capsys: pytest.CaptureFixture[str]) -> None:
    verdicts: Any = ("refused", "accepted", "wrong")
    trial = lambda own, shared, index, rng: Outcome(verdicts[index], "kind", "why")
    assert run_trials(trial, lambda shared: None, description="", number=3, argv=[]) == 1
    assert "trial 2: WRONG: kind: why" in capsys.readouterr().out
    assert run_trials(trial, lambda shared: None, description="", number=2, argv=[]) == 0


# --- what a model is


def as_earlier_versions_wrote_it(folder: pathlib.Path) -> None:
    """Gives a converted folder a manifest of version 1, with checksums of whole arrays."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for block in read_converted(folder).blocks():
        entries = manifest["items"]["top" if block.layer is None else f"layers/{block.layer:05d}"]
        for name, array in block.arrays.items():
            del entries[name]["digest"]
            entries[name]["sha256"] = hashlib.sha256(array.tobytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 1}))


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**20 + 1, 33 * 2**20])
def test_the_digest_of_an_array_is_that_of_its_pieces(size: int) -> None:
    array = np.arange(size, dtype=np.uint8)
    pieces = [array[start : start + 2**20].tobytes() for start in range(0, size, 2**20)]
    parts = b"".join(hashlib.sha256(piece).digest() for piece in pieces)
    assert digest(array) == hashlib.sha256(parts).hexdigest()
    assert size < 2 or digest(array[::-1]) != digest(array)


def digest_of(source: Checkpoint, layers: Callable[[list[int | None]], list[int | None]] = list) -> str:
    with WeightsDigest() as whole:
        for layer in layers([None, *range(source.config.num_hidden_layers)]):
            whole.add(source.block(layer))
        return combined(whole.parts())


def test_the_digest_of_a_model_is_that_of_all_its_weights(tmp_path: pathlib.Path) -> None:
    config: Qwen3MoeConfig = TINY.replace(num_hidden_layers=2)
    make_checkpoint(tmp_path / "hf", config)
    hf2jax(tmp_path / "hf", tmp_path / "jax")
    expected = digest_of(read_hf(tmp_path / "hf"))
    assert expected.startswith("weights:")
    assert digest_of(read_converted(tmp_path / "jax")) == expected
    assert digest_of(read_converted(tmp_path / "jax", verify=False)) == expected
    assert digest_of(read_hf(tmp_path / "hf"), lambda layers: layers[::-1]) == expected
    half = digest_of(read_converted(tmp_path / "jax", dtype="bfloat16"))
    assert half == digest_of(read_hf(tmp_path / "hf", "bfloat16")) != expected
    as_earlier_versions_wrote_it(tmp_path / "jax")
    assert digest_of(read_converted(tmp_path / "jax")) == expected
    shards = []
    for layers in ((None, 1), (0,)):
        with WeightsDigest() as part:
            for layer in layers:
                part.add(read_hf(tmp_path / "hf").block(layer))
            shards.append(part.parts())
    assert combined(shards[1] | shards[0]) == expected
    file = tmp_path / "hf" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-len(data) // 3] ^= 1  # in the middle of some array
    file.write_bytes(data)
    assert digest_of(read_hf(tmp_path / "hf")) != expected


# --- folders of runs that did not begin


def test_a_run_without_a_checkpoint_does_not_block_the_next(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "out"
    (output / "checkpoints").mkdir(parents=True)
    (output / identity.RUN_FILE).write_text("{}")
    (output / "metrics.jsonl").write_text("")
    settings = TrainConfig(model=tmp_path, data=tmp_path, output=output)
    assert identity.previous_identity(settings) is None
    (output / "notes.txt").touch()
    with pytest.raises(UserError, match="--resume"):
        identity.previous_identity(settings)
    identity.remove_start(output)
    assert [path.name for path in output.iterdir()] == ["notes.txt"]
