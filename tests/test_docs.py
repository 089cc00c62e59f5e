"""What the documentation names exists: links, paths, names, commands and flags of README, CONTRIBUTING and docs/."""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

HISTORY = ("CHANGELOG.md", "docs/log/")  # what they name may have moved since
WRITTEN = ("run.toml",)  # by our commands, wherever the user says
GENERATED = re.compile(r"docs/parity/.+/report\.md")
PACKAGES = (
    "jaxmoe",
    "convert",
    "captures",
    "torch_ref",
    "peers",
    "benchmarks",
    "examples",
    "notebooks",
    "reliability",
    "tests",
    "docs",
)

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_DOTTED = re.compile(r"(?<![\w./-])((?:" + "|".join(PACKAGES) + r")(?:\.\w+)+)")
_NAME_IN_FILE = re.compile(r"`(\w+)(?:\(\))?` (?:in |of |\()`([\w/]+\.py)`")


def pages() -> list[str]:
    """The pages that are written by hand, as paths in the repository."""
    found = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    found += [*(ROOT / "docs").rglob("*.md"), ROOT / "tests/parity/README.md", ROOT / "tests/checkpoints/README.md"]
    names = sorted(path.relative_to(ROOT).as_posix() for path in found)
    return [name for name in names if not GENERATED.fullmatch(name)]


PAGES = pages()
PRESENT = [page for page in PAGES if not page.startswith(HISTORY)]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken_links(page: str, text: str) -> list[str]:
    """Relative links without a target."""
    broken = []
    for link in _LINK.findall(_FENCE.sub("", text)):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


def absent_paths(text: str) -> list[str]:
    """Paths in backticks, or among a command's arguments, that the repository does not have."""
    top = {path.name for path in ROOT.iterdir()} | {"docs", "tests"}
    spans = [*_CODE.findall(_FENCE.sub("", text)), *re.findall(r"(?<![\w/.])tests/[\w/]+\.py", text)]
    absent = []
    for span in spans:
        for word in span.split():
            word = word.split("::")[0].rstrip(",;")
            if word in WRITTEN:
                continue
            is_path = re.fullmatch(r"\.?[\w-]+(?:/[\w.-]+)+/?", word) and word.split("/")[0] in top
            if (is_path or re.fullmatch(r"[\w-]+\.(?:toml|yml|md)", word)) and not (ROOT / word).exists():
                absent.append(word)
    return absent


@functools.cache
def module_file(name: str) -> pathlib.Path | None:
    """The source of a module or package, or None."""
    path = ROOT / name.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def absent_names(text: str) -> list[str]:
    """Modules and their names (`jaxmoe.train.train`), and commands (`python -m ...`), that do not exist."""
    absent = []
    for name in _DOTTED.findall(text):
        parts = name.split(".")
        if parts[-1] in ("md", "py", "json", "toml", "txt", "sh", "safetensors", "gz") or parts == ["docs", "rs"]:
            continue
        length = next((n for n in range(len(parts), 0, -1) if module_file(".".join(parts[:n]))), 0)
        package = ROOT / name.replace(".", "/")
        if package.is_dir() or length == len(parts):
            continue
        file = module_file(".".join(parts[:length]))
        if file is None or not re.search(rf"\b{parts[length]}\b", file.read_text(encoding="utf-8")):
            absent.append(name)
    for name in re.findall(r"python -m (\w[\w.]*)", text):
        package = ROOT / name.replace(".", "/")
        ours = name.split(".")[0] in PACKAGES
        if ours and module_file(name) is None and not (package / "__main__.py").is_file():
            absent.append(f"python -m {name}")
    return absent


def absent_from_files(text: str) -> list[str]:
    """ "`name` in `file.py`" where the file does not have that word."""
    absent = []
    for name, path in _NAME_IN_FILE.findall(_FENCE.sub("", text)):
        file = ROOT / path
        if file.is_file() and not re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")):
            absent.append(f"{name} in {path}")
    return absent


@functools.cache
def words_of_the_code() -> frozenset[str]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path.name != "test_docs.py"]
    return frozenset(re.findall(r"[\w-]+", "\n".join(path.read_text(encoding="utf-8") for path in files)))


def unknown_flags(text: str) -> list[str]:
    """Long flags of our commands that no code mentions, neither as a flag nor as a field."""
    lines = [line for line in text.splitlines() if not re.search(r"\b(?:git|pip|pytest|apt|vllm|sglang|gguf)\b", line)]
    # a flag with an underscore is another program's
    flags = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)(?!\w)", "\n".join(lines)))
    known = words_of_the_code()
    return sorted(
        f for f in flags if not {f"--{f}", f.replace("-", "_"), f.removeprefix("no-").replace("-", "_")} & known
    )


def unknown_targets(text: str) -> list[str]:
    """`make NAME` without such a target."""
    targets = set(re.findall(r"^([a-z][a-z-]*):", read("Makefile"), re.MULTILINE))
    named = re.findall(r"(?:^|`)make ([a-z][a-z-]+)", text, re.MULTILINE)
    return sorted(set(named) - targets)


def entries(log: str) -> Iterator[tuple[str, list[str]]]:
    """(heading, the lines after it that are not empty) of each entry."""
    for entry in re.split(r"^## ", log, flags=re.MULTILINE)[1:]:
        heading, *lines = entry.splitlines()
        yield heading, [line for line in lines if line.strip()]


def malformed_entries(log: str) -> list[str]:
    """Entries whose heading has no date, or that do not open with question, result and decision."""
    openings = ("- **Question:** ", "- **Result:** ", "- **Decision:** ")
    bad = []
    for heading, lines in entries(log):
        opens = len(lines) >= 3 and all(
            line.startswith(opening) for line, opening in zip(lines, openings, strict=False)
        )
        if not (opens and re.match(r"20\d\d-\d\d-\d\d: \S", heading)):
            bad.append(heading)
    return bad


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert broken_links(page, read(page)) == []


@pytest.mark.parametrize("page", PRESENT)
def test_what_a_page_names_exists(page: str) -> None:
    text = read(page)
    found = [
        absent_paths(text),
        absent_names(text),
        absent_from_files(text),
        unknown_flags(text),
        unknown_targets(text),
    ]
    assert found == [[], [], [], [], []], f"{page}: paths, names, names in files, flags, make targets"


def test_the_readme_is_a_page() -> None:
    lines = read("README.md").splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("log", [page for page in PAGES if re.fullmatch(r"docs/log/\d{4}-\d\d\.md", page)])
def test_a_log_entry_opens_with_question_result_and_decision(log: str) -> None:
    headings = [heading for heading, _ in entries(read(log))]
    assert headings
    assert malformed_entries(read(log)) == []
    month = pathlib.PurePath(log).stem
    assert [heading for heading in headings if not heading.startswith(month)] == []
    assert [heading[:10] for heading in headings] == sorted((heading[:10] for heading in headings), reverse=True)


def test_every_page_is_in_the_site() -> None:
    site = read("mkdocs.yml")
    names = {page.removeprefix("docs/") for page in PAGES} - {"README.md"} | {"index.md"}
    names |= {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert sorted(name for name in names if not re.search(rf"(?:: |- ){re.escape(name)}$", site, re.MULTILINE)) == []


def test_every_how_to_page_is_listed_and_ends_with_tests() -> None:
    listing = read("docs/how-to/README.md")
    for path in sorted((ROOT / "docs/how-to").glob("*.md")):
        if path.name != "README.md":
            assert f"({path.name})" in listing
            assert "Must pass" in path.read_text(encoding="utf-8"), path.name


def test_the_reference_has_every_public_name() -> None:
    from tests.test_public import PUBLIC

    listed = set(re.findall(r'"([\w.]+\.\w+)"', read("docs/site_pages.py")))
    names = {f"{module}.{name}" for module, names in PUBLIC.items() for name in names if name != "__version__"}
    assert sorted(names - listed) == ["jaxmoe.Qwen3MoeConfig"], "jaxmoe.config has it"


def test_usage_names_the_variable_of_every_operation() -> None:
    from jaxmoe.ops.implementations import OPERATIONS

    forcing = read("docs/usage.md").partition("## Forcing an implementation\n")[2].partition("\n## ")[0]
    assert {f"JAXMOE_{name.upper()}" for name in OPERATIONS} <= set(re.findall(r"`(JAXMOE_\w+)`", forcing))


def test_the_picture_is_that_of_the_walls() -> None:
    from docs.draw_architecture import BARS, PICTURE, PLACES, draw
    from tests.test_walls import MODULES

    assert {*MODULES} - {*PLACES, *BARS} == {"commands"}, "a room without a place in docs/draw_architecture.py"
    assert PICTURE.read_text(encoding="utf-8") == draw(), "python -m docs.draw_architecture draws it again"


@pytest.mark.parametrize(
    ("check", "text", "found"),
    [
        (lambda text: broken_links("README.md", text), "[a](docs/none.md) [b](LICENSE)", ["docs/none.md"]),
        (lambda text: broken_links("docs/usage.md", text), "[a](usage.md#none)", ["usage.md#none"]),
        (absent_paths, "`jaxmoe/none.py`, `jaxmoe/config.py`, `mistake.toml`", ["jaxmoe/none.py", "mistake.toml"]),
        (absent_paths, "```\npytest tests/test_none.py\n```", ["tests/test_none.py"]),
        (absent_names, "`jaxmoe.config.Nothing`, `jaxmoe.config.read_json`", ["jaxmoe.config.Nothing"]),
        (absent_names, "python -m jaxmoe.none, python -m pytest", ["jaxmoe.none", "python -m jaxmoe.none"]),
        (absent_from_files, "`nothing` in `jaxmoe/config.py`", ["nothing in jaxmoe/config.py"]),
        (absent_from_files, "`nothing` (`jaxmoe/config.py`)", ["nothing in jaxmoe/config.py"]),
        (unknown_flags, "--lora-targets --no-pack --lora-target-nothing", ["lora-target-nothing"]),
        (unknown_targets, "`make nothing`, `make demo`", ["nothing"]),
        (malformed_entries, "## 2026-11-01: x\n\n- **Question:** a\n- **Result:** b\n", ["2026-11-01: x"]),
    ],
)
def test_a_planted_mistake_is_found(check, text: str, found: list[str]) -> None:
    assert check(text) == found
