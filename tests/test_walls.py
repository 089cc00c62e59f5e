"""Who may import whom: the layers of the project, held by its imports."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

PACKAGES = ("jaxmoe", "torch_ref", "convert", "captures")

# The modules of jaxmoe that a module may import when it is loaded; a module that is not named may import any of these.
STANDARD_LIBRARY_ONLY = {"errors", "config", "parameters", "presets", "memory", "cli", "commands", "progress"}
LAYERS = {
    "errors": set(),
    "cli": {"errors"},
    "config": {"errors"},
    "parameters": {"config"},
    "presets": {"config"},
    "memory": {"config", "parameters"},
    "commands": {"cli"},
    "progress": set(),
    "layers": {"config", "errors"},
    "implementations": {"errors"},
    "cudnn": {"layers"},
    "attention": {"cudnn", "implementations", "layers"},
    "router": {"layers"},
    "quantize": {"parameters"},
    "recode": {"checkpoint", "errors", "parameters", "quantize"},
    "dequantize": {"layers", "parameters", "quantize"},
    "dispatch": {"dequantize", "implementations", "kernels", "layers", "router"},
    "kernels.tiled": {"dequantize", "layers"},
    "kernels.grouped_matmul": set(),
    "kernels.norm_rotary": set(),
    "kernels.swiglu_gradient": set(),
    "projections": {"dispatch", "layers"},
    "loss": {"layers"},
    "data": {"errors"},
    "files": {"errors"},
    "checkpoint": {"config", "errors", "files", "parameters"},
    "export": {"checkpoint", "config", "data", "parameters"},
    "metrics": set(),
    "xla": set(),
    "loading": {"checkpoint", "config", "parameters"},
    "model": {
        "attention",
        "checkpoint",
        "config",
        "cudnn",
        "dequantize",
        "dispatch",
        "implementations",
        "kernels",
        "layers",
        "loading",
        "memory",
        "parameters",
        "projections",
        "recode",
        "router",
    },
}


def imports(path: pathlib.Path, *, deferred: bool) -> Iterator[str]:
    """Full names of what a file imports when loaded, or (`deferred`) anywhere; not what only type checkers see."""
    yield from _imports(ast.parse(path.read_text(encoding="utf-8")), path, deferred)


def _imports(node: ast.AST, path: pathlib.Path, deferred: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
            continue
        if isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{path}: relative import"
            # `from jaxmoe import memory` imports the module jaxmoe.memory.
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
            continue
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        is_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if (deferred or not is_function) and not is_typing:
            yield from _imports(child, path, deferred)


def files(package: str) -> list[pathlib.Path]:
    return sorted((ROOT / package).rglob("*.py"))


def violations(path: pathlib.Path) -> list[str]:
    """Every import of the file `path` (relative to the repository) that crosses a wall."""
    package = path.relative_to(ROOT).parts[0]
    loaded = set(imports(path, deferred=False))
    anywhere = set(imports(path, deferred=True))
    roots_loaded = {name.split(".")[0] for name in loaded}
    roots = {name.split(".")[0] for name in anywhere}
    found = []
    forbidden = {
        "jaxmoe": {"torch", "torch_ref", "peft", "bitsandbytes", "tests", "examples", "benchmarks"},
        "torch_ref": {"jax", "jaxlib", "flax", "optax", "orbax", "jaxmoe", "tests", "examples", "benchmarks"},
        # what both frameworks' sides write and read: it loads neither
        "captures": {"jax", "jaxlib", "flax", "torch", "torch_ref", "convert", "tests", "examples", "benchmarks"},
        "convert": {"torch", "torch_ref", "flax", "optax", "peft", "bitsandbytes", "tests", "examples", "benchmarks"},
    }[package]
    found += [f"imports {root}" for root in sorted(roots & forbidden)]
    if package == "jaxmoe":
        if "convert" in roots_loaded:
            found.append("imports convert when loaded; import it where it is used")
        stem = ".".join(path.relative_to(ROOT / "jaxmoe").with_suffix("").parts)
        own = {name.split(".")[1] for name in loaded if name.startswith("jaxmoe.")} - {"__version__"}
        if stem in LAYERS:
            found += [f"imports jaxmoe.{name}" for name in sorted(own - LAYERS[stem])]
        if stem == "routing.metrics":  # pure functions over arrays: whoever has some can use them
            known = sys.stdlib_module_names | {"numpy", "scipy", "jaxtyping"}
            found += [f"imports {root}, and may import arrays only" for root in sorted(roots - known)]
        if stem in STANDARD_LIBRARY_ONLY:
            foreign = roots_loaded - sys.stdlib_module_names - {"jaxmoe"}
            found += [f"imports {root}, and may import the standard library only" for root in sorted(foreign)]
    if package == "captures":
        own = {name.split(".")[1] for name in anywhere if name.startswith("jaxmoe.")}
        found += [f"imports jaxmoe.{name}" for name in sorted(own - {"errors", "files"})]
    if package == "convert":
        allowed = {"cli", "config", "parameters", "errors", "files", "checkpoint", "quantize", "recode", "memory"}
        allowed |= {"progress"}
        own = {name.split(".")[1] for name in anywhere if name.startswith("jaxmoe.")}
        found += [f"imports jaxmoe.{name}" for name in sorted(own - allowed)]
    return found


@pytest.mark.parametrize(
    "path", [str(path.relative_to(ROOT)) for package in PACKAGES for path in files(package)], ids=str
)
def test_imports_stay_inside_the_walls(path: str) -> None:
    assert violations(ROOT / path) == []


@pytest.mark.parametrize(
    ("name", "source", "wall"),
    [
        ("jaxmoe/train/loop.py", "def f():\n    import torch\n", "imports torch"),
        (
            "jaxmoe/model/decoder.py",
            "from convert import names\n",
            "imports convert when loaded; import it where it is used",
        ),
        ("jaxmoe/ops/linear.py", "from jaxmoe.model.decoder import forward\n", "imports jaxmoe.model.decoder"),
        ("jaxmoe/ops/linear.py", "from jaxmoe import model\n", "imports jaxmoe.model.decoder"),
        ("jaxmoe/config.py", "import numpy\n", "imports numpy, and may import the standard library only"),
        (
            "convert/names.py",
            "def f():\n    from jaxmoe.model.decoder import forward\n",
            "imports jaxmoe.model.decoder",
        ),
        ("torch_ref/model.py", "import jax.numpy as jnp\n", "imports jax"),
        ("captures/format.py", "import torch\n", "imports torch"),
        ("captures/format.py", "from jaxmoe.ops.router import route\n", "imports jaxmoe.ops.router"),
        ("jaxmoe/routing/metrics.py", "from captures import Capture\n", "imports captures, and may import arrays only"),
    ],
)
def test_a_planted_import_is_found(
    name: str, source: str, wall: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    planted = tmp_path / name
    planted.parent.mkdir(parents=True)
    planted.write_text(source)
    assert violations(planted) == [wall]


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("jaxmoe", {"jax", "flax", "numpy", "transformers", "torch"}),
        ("jaxmoe.config", {"jax", "flax", "numpy", "transformers", "torch"}),
        ("jaxmoe.memory", {"jax", "flax", "numpy", "transformers", "torch"}),
        ("jaxmoe.model.decoder", {"torch", "transformers"}),
        ("convert", {"flax", "torch", "transformers"}),
        ("captures", {"jax", "flax", "torch", "transformers"}),
        ("jaxmoe.routing.metrics", {"jax", "flax", "torch", "transformers", "captures"}),
        ("jaxmoe.routing.report", {"jax", "flax", "torch", "transformers"}),
    ],
)
def test_what_an_import_loads(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted({{n.split('.')[0] for n in sys.modules}} & {heavy!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_public_names_resolve() -> None:
    import jaxmoe

    assert {name: getattr(jaxmoe, name).__name__ for name in jaxmoe.__all__ if name != "__version__"} == {
        name: name for name in jaxmoe.__all__ if name != "__version__"
    }
    assert set(jaxmoe.__all__) <= set(dir(jaxmoe))
    with pytest.raises(AttributeError, match="has no attribute 'Qwen4'"):
        _ = jaxmoe.Qwen4  # pyright: ignore[reportAttributeAccessIssue]
