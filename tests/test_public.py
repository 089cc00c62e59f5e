"""The public interface: names under their documented modules, commands, and annotations that resolve."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
import tomllib
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import CHECKED_PACKAGES, ROOT

PUBLIC = {
    "jaxmoe": ("LoraConfig", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", "__version__"),
    "jaxmoe.config": ("Qwen3MoeConfig", "RopeParameters"),
    "jaxmoe.data": ("Record", "load_tokenizer", "read_records", "tokenize_record"),
    "jaxmoe.generate": ("Generator", "Sampling"),
    "jaxmoe.train": ("TrainConfig", "train"),
    # what the notebooks use
    "jaxmoe.control.interventions": ("Intervention",),
    "jaxmoe.routing": ("metrics", "plots", "pruning"),
    "jaxmoe.routing.capture": ("capture",),
    "jaxmoe.routing.compare": ("compare", "compare_domains"),
    "jaxmoe.routing.figures": ("Lines", "Series", "show"),
    "jaxmoe.routing.generation": ("capture_generation",),
    "jaxmoe.routing.imported": ("import_experts",),
    "jaxmoe.routing.summary": ("summarise",),
    "jaxmoe.routing.text": ("read_text",),
    "jaxmoe.train.paired": ("run_pairs",),
    "captures": ("Capture", "tokenizer_digest"),
    "torch_ref": ("FastQwen3Model", "FastQwen3MoeModel"),
}
COMMANDS = ("convert", "jaxmoe.doctor", "jaxmoe.generate", "jaxmoe.routing", "jaxmoe.train", "torch_ref.capture")
SCRIPTS = ("jaxmoe", "jaxmoe-convert", "jaxmoe-doctor", "jaxmoe-generate", "jaxmoe-routing", "jaxmoe-train")


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_where_they_were(module: str) -> None:
    for name in PUBLIC[module]:
        exec(f"from {module} import {name}", {})


@pytest.mark.parametrize("module", [module for module in PUBLIC if module in ("jaxmoe", "torch_ref")])
def test_all_lists_the_public_names(module: str) -> None:
    assert sorted(importlib.import_module(module).__all__) == sorted(PUBLIC[module])


@pytest.mark.parametrize("module", ["jaxmoe.data", "jaxmoe.generate", "jaxmoe.train"])
def test_a_package_lists_what_it_re_exports(module: str) -> None:
    package = importlib.import_module(module)
    assert set(PUBLIC[module]) <= set(package.__all__) <= set(dir(package))


def test_notebooks_import_public_names_only() -> None:
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        code = ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
        for module, names in re.findall(
            r"^from ((?:jaxmoe|torch_ref|captures)\S*) import (.+)$", "\n".join(code), re.M
        ):
            unknown = {name.strip() for name in names.split(",")} - set(PUBLIC.get(module, ()))
            assert not unknown, f"{path.name}: from {module} import {', '.join(sorted(unknown))}"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command: str) -> None:
    """`python -m COMMAND` finds a module to run."""
    found = importlib.util.find_spec(command)
    assert found is not None
    if found.submodule_search_locations is not None:
        assert importlib.util.find_spec(f"{command}.__main__") is not None


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("convert.__main__", "hf2jax jax2hf peft2jax jax2peft inspect"),
        ("jaxmoe.routing.__main__", "capture compare report"),
    ],
)
def test_subcommands_are_listed(module: str, names: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        importlib.import_module(module).main(["--help"])
    assert left.value.code == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"\b{name}\b", listed) for name in names.split())


def test_console_scripts_name_functions() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert sorted(scripts) == list(SCRIPTS)
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


# CPU builds of torch do not contain Triton; the evaluation harness is an extra.
NEEDS = {"torch_ref.triton_programs": "triton", "jaxmoe.evaluate.harness": "lm_eval"}


def modules() -> Iterator[str]:
    """Every module of the packages that can be imported here; found by file, so that collecting tests imports none."""
    for path in sorted(path for package in CHECKED_PACKAGES for path in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        needed = NEEDS.get(name)
        if needed is None or importlib.util.find_spec(needed) is not None:
            yield name


def public(module: Any) -> Iterator[tuple[str, Callable[..., Any] | type]]:
    """Public functions and classes that `module` defines, and the classes' public methods and properties."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            yield name, value
            for method, found in vars(value).items():
                function = found.fget if isinstance(found, property) else inspect.unwrap(found)
                function = getattr(function, "__func__", function)
                if inspect.isfunction(function) and (method == "__init__" or not method.startswith("_")):
                    yield f"{name}.{method}", function
        elif inspect.isfunction(inspect.unwrap(value)):
            yield name, inspect.unwrap(value)


@pytest.mark.parametrize("module", list(modules()))
def test_annotations_resolve(module: str) -> None:
    failures = []
    for name, value in public(importlib.import_module(module)):
        try:
            typing.get_type_hints(value, include_extras=True)
        except Exception as error:
            failures.append(f"{name}: {error!r}")
    assert not failures, "\n".join(failures)


def test_an_annotation_that_does_not_resolve_is_found() -> None:
    def wrong(x: Nowhere) -> None:  # noqa: F821  # pyright: ignore[reportUndefinedVariable]
        """Annotated with a name that is not imported."""

    with pytest.raises(NameError, match="Nowhere"):
        typing.get_type_hints(wrong)
