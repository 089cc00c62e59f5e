"""Python's standard library as training data: `python -m examples.stdlib_corpus OUTPUT`.

Writes four JSONL files. text.jsonl and text.heldout.jsonl hold source files (code) and the language reference (prose)
as `{"text": ...}`. docstrings.jsonl and docstrings.heldout.jsonl hold chats that answer a signature with its docstring.
A hash of a module's name decides whether it is held out from both. The same Python version gives the same bytes;
another version has another library.
"""

from __future__ import annotations

import ast
import hashlib
import json
import pathlib
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from itertools import filterfalse
from typing import Any

from jaxmoe.cli.arguments import ArgumentParser, run

# Installed packages, and data tables in the form of Python source.
_SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "site-packages", "encodings", "pydoc_data"}
_TEST_FOLDERS = {"idle_test", "test", "tests"}
_SKIPPED_FILES = {"html/entities.py"}
_HELD_OUT_SHARE = 20  # one module in twenty

_SIGNATURE_LENGTH = 120  # characters, at most
_DOCSTRING_LENGTH = (16, 120)  # characters, at least and at most


def source_files(root: pathlib.Path) -> list[str]:
    """Names of the library's own modules under `root`, relative and with forward slashes, sorted."""
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(
        name.as_posix()
        for name in names
        if not _SKIPPED_FOLDERS & set(name.parts)
        and name.as_posix() not in _SKIPPED_FILES
        and not name.as_posix().startswith(("_sysconfigdata", "config-"))  # differ from machine to machine
    )


def is_held_out(name: str) -> bool:
    """Whether the module `name` is kept for evaluation: a fixed function of its name."""
    return hashlib.sha256(name.encode()).digest()[0] % _HELD_OUT_SHARE == 0


def is_test(name: str) -> bool:
    """Whether the module `name` belongs to the library's own tests, whose docstrings are not used as chats."""
    return not _TEST_FOLDERS.isdisjoint(name.split("/"))


def read_sources(root: pathlib.Path) -> dict[str, str]:
    """Name -> text of every module that is neither empty nor in an unreadable encoding."""
    sources = {}
    for name in source_files(root):
        try:
            with tokenize.open(root / name) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if text.strip():
            sources[name] = text
    return sources


def read_topics(root: pathlib.Path) -> dict[str, str]:
    """Name -> text of every topic of the language reference that `help()` shows (`pydoc_data/topics.py`)."""
    path = root / "pydoc_data" / "topics.py"
    if not path.is_file():  # some distributions leave it out
        return {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (table,) = (node.value for node in tree.body if isinstance(node, ast.Assign))
    return {f"topics/{name}": text for name, text in sorted(ast.literal_eval(table).items()) if text.strip()}


def signatures(source: str) -> Iterator[tuple[str, str]]:
    """(signature, first paragraph of the docstring) of every public function and method, in order.

    Left out are those that are not ASCII or too long for one line each.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    yield from _signatures(tree, prefix="")


def chat(signature: str, docstring: str) -> dict[str, Any]:
    """The record of one pair: the user gives the signature, the assistant answers with the docstring."""
    return {"messages": [{"role": "user", "content": signature}, {"role": "assistant", "content": docstring}]}


def docstring_records(sources: dict[str, str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training chats, held-out chats); a repeated docstring is used once, for training if it occurs there."""
    seen: set[str] = set()
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    # Training modules first: a docstring that a held-out module repeats is not held out.
    for name in sorted(filterfalse(is_test, sources), key=lambda name: (is_held_out(name), name)):
        for signature, docstring in signatures(sources[name]):
            if docstring not in seen:
                seen.add(docstring)
                parts[is_held_out(name)].append(chat(signature, docstring))
    return parts


def write_corpus(output: pathlib.Path, root: pathlib.Path) -> dict[str, int]:
    """Writes the four files into `output` and returns the number of records in each."""
    sources = read_sources(root)
    train, held_out = docstring_records(sources)
    texts = sources | read_topics(root)
    files: dict[str, Sequence[Any]] = {
        "text.jsonl": [{"text": text} for name, text in texts.items() if not is_held_out(name)],
        "text.heldout.jsonl": [{"text": text} for name, text in texts.items() if is_held_out(name)],
        "docstrings.jsonl": train,
        "docstrings.heldout.jsonl": held_out,
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        _write_jsonl(output / name, records)
    return {name: len(records) for name, records in files.items()}


def write_domains(path: pathlib.Path, root: pathlib.Path, texts: int = 24, characters: int = 1500) -> int:
    """Writes code and prose as two domains, in turn, at most `texts` of each; returns the number of records.

    Code is the beginning of held-out modules, prose the beginning of topics of the language reference. A model trained
    on this corpus has seen nearly all of these topics, since too few are held out.
    """
    code = {name: text for name, text in read_sources(root).items() if is_held_out(name)}
    pairs = zip(list(code.values())[:texts], list(read_topics(root).values())[:texts], strict=False)
    records = [
        {"text": text[:characters], "domain": domain}
        for pair in pairs
        for domain, text in zip(("code", "prose"), pair, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_jsonl(path, records)
    return len(records)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the corpus and prints what is in it."""
    parser = ArgumentParser(description="Write Python's standard library as training data.")
    parser.add_argument("output", type=pathlib.Path, metavar="OUTPUT", help="folder for the four files")
    parser.add_argument(
        "--domains", type=pathlib.Path, metavar="FILE", help="also write code and prose as two domains to this file"
    )
    arguments = parser.parse_args(argv)
    if arguments.domains is not None:
        records = write_domains(arguments.domains, pathlib.Path(sysconfig.get_path("stdlib")))
        print(f"{arguments.domains}: {records} records, code and prose in turn")
    counts = write_corpus(arguments.output, pathlib.Path(sysconfig.get_path("stdlib")))
    for name, records in counts.items():
        size = (arguments.output / name).stat().st_size
        print(f"{arguments.output / name}: {records} records, {size / 1e6:.1f} MB")


def _signatures(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _signatures(child, prefix=f"class {child.name}: ")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            keyword = "async def" if isinstance(child, ast.AsyncFunctionDef) else "def"
            returns = f" -> {ast.unparse(child.returns)}" if child.returns else ""
            signature = f"{prefix}{keyword} {child.name}({ast.unparse(child.args)}){returns}"
            docstring = " ".join((ast.get_docstring(child) or "").split("\n\n")[0].split())
            shortest, longest = _DOCSTRING_LENGTH
            fits = len(signature) <= _SIGNATURE_LENGTH and shortest <= len(docstring) <= longest
            if fits and (signature + docstring).isascii():
                yield signature, docstring


def _write_jsonl(path: pathlib.Path, records: Iterable[Any]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


if __name__ == "__main__":
    run(main)
