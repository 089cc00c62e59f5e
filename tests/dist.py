"""The sdist and the wheel that is built from it: checked, installed into an empty environment, and every command run
from there. `make dist` runs it: `python -m tests.dist`.

The environment has the installed libraries of the running interpreter on its path, so that nothing is downloaded; it
does not see this source tree.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import venv
import zipfile
from collections.abc import Sequence

from packaging.metadata import Metadata

import jaxmoe
from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.errors import UserError
from tests.conftest import ROOT

PACKAGES = {"captures", "convert", "jaxmoe", "torch_ref"}
CHECKPOINT = ROOT / "tests/checkpoints/qwen3-moe-stdlib"
_QUICK = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONDONTWRITEBYTECODE": "1"}

# Calls every script with --help, in one process: starting each alone would import JAX again and again.
_HELP_OF_ALL = """
import contextlib, importlib.metadata, io, pathlib, sys
import jaxmoe
assert pathlib.Path(jaxmoe.__file__).is_relative_to(sys.prefix), jaxmoe.__file__
for script in importlib.metadata.distribution("jaxmoe").entry_points:
    sys.argv = [script.name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            script.load()()
        except SystemExit as end:
            assert not end.code, (script.name, end.code)
    assert shown.getvalue().startswith(f"usage: {script.name}"), (script.name, shown.getvalue()[:200])
    print(script.name)
"""


def build(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Builds the sdist from this source tree, and the wheel from the sdist: their paths."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    _run(command, ROOT, dict(os.environ))
    name = f"jaxmoe-{jaxmoe.__version__}"
    return folder / f"{name}.tar.gz", folder / f"{name}-py3-none-any.whl"


def check(sdist: pathlib.Path, wheel: pathlib.Path) -> None:
    """Raises UserError unless both hold what they should, and their metadata are valid and the same."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"jaxmoe-{jaxmoe.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA")
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    with tarfile.open(sdist) as archive:
        file = archive.extractfile(f"jaxmoe-{jaxmoe.__version__}/PKG-INFO")
        assert file is not None
        same = file.read() == metadata
    found = Metadata.from_email(metadata, validate=True)
    sources = {f.relative_to(ROOT).as_posix() for package in PACKAGES for f in (ROOT / package).rglob("*.py")}
    sources |= {f.relative_to(ROOT).as_posix() for f in (ROOT / "jaxmoe/figures/page").iterdir()}
    for what, holds in {
        f"the packages {', '.join(sorted(PACKAGES))}": {name.split("/")[0] for name in names} == {*PACKAGES, info},
        "every module of them": not sources - names,
        "the same metadata in both": same,
        f"the version {jaxmoe.__version__}": str(found.version) == jaxmoe.__version__,
        "the extras of pyproject.toml": {*(found.provides_extra or ())} == {*project["optional-dependencies"]},
        "the scripts of pyproject.toml": all(" = ".join(script) in scripts for script in project["scripts"].items()),
        "the README": bool(found.description) and found.description_content_type == "text/markdown",
        "the license": found.license_expression == project["license"] and f"{info}/licenses/LICENSE" in names,
    }.items():
        if not holds:
            raise UserError(f"{wheel.name}: expected {what}, found otherwise")


def install(wheel: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Installs the wheel into a new environment in `folder`; returns the folder of its commands."""
    venv.create(folder, symlinks=True)
    bin_folder = folder / "bin"
    (site,) = folder.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if pathlib.Path(path).name in ("site-packages", "dist-packages")]
    # Paths in a .pth file are not searched for further ones, so the editable installation in them does not count.
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", bin_folder / "python", "--disable-pip-version-check"]
    _run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], folder, dict(os.environ))
    return bin_folder


def run_all(commands: pathlib.Path, folder: pathlib.Path) -> None:
    """Runs every command of the environment in `folder`, away from the source tree."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | _QUICK
    _run([commands / "python", "-c", _HELP_OF_ALL], folder, environment)
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "num_experts": 8}))
    (folder / "data.jsonl").write_text('{"text": "def f(): pass"}\n')
    scratch = f"--from-scratch config.json --tokenizer {CHECKPOINT} --data data.jsonl --output run --report-to none"
    for line in (
        "jaxmoe --version",
        "jaxmoe completion bash",
        "jaxmoe-doctor --model qwen3-30b-a3b",
        f"jaxmoe-convert inspect {CHECKPOINT}",
        f"jaxmoe train {scratch} --max-steps 1 --batch-size 1 --seq-length 16",
        "jaxmoe runs list",
        "jaxmoe generate --model run/model --prompt x --max-new-tokens 2",
        "jaxmoe routing capture --model run/model --data data.jsonl --out capture",
    ):
        script, *words = line.split()
        _run([commands / script, *words], folder, environment)


def _run(command: Sequence[object], folder: pathlib.Path, environment: dict[str, str]) -> None:
    start = time.perf_counter()
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300)
    shown = " ".join([pathlib.Path(words[0]).name, *words[1:]])[:100].replace("\n", " ")
    if done.returncode:
        raise UserError(f"{shown}: exit code {done.returncode}: {done.stdout[-1000:]} {done.stderr[-3000:]}")
    print(f"{time.perf_counter() - start:5.1f} s  {shown}", flush=True)


def main() -> None:
    """Builds, checks, installs and runs."""
    parser = ArgumentParser(description="Build the sdist and the wheel, install them, and run every command.")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "dist", metavar="DIR", help="default: dist")
    out = parser.parse_args().out.resolve()
    sdist, wheel = build(out)
    check(sdist, wheel)
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder, "work")
        work.mkdir()
        run_all(install(wheel, pathlib.Path(folder, "environment")), work)
    print(f"{wheel} and {sdist.name}: every command runs")


if __name__ == "__main__":
    run(main)
