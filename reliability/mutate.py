"""Mutations of files and folders: what accidents and strangers do to them."""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
from typing import Any

# Values that some field, somewhere, does not expect. A string stands for JSON that `json.dumps` would not write.
ODD_JSON = [
    *"null true false 0 -1 1 2 3 7 64 257 0.5 -0.0 1e400 NaN 1e-320 1000000000 9223372036854775807".split(),
    *'9223372036854775808 "" "x" "../../etc/passwd" "\\ud800" "\\u0000" [] {} [[]] [null] {"a":{"a":{}}}'.split(),
    *('"float16"', '"bfloat16"', "1" + "0" * 400, "9" * 5000, "[" * 100_000, '{"a":' * 100_000),
    *('"' + "a" * 10**6 + '"', "[" + "1," * 10**5 + "1]"),
]


def mutate(folder: pathlib.Path, rng: random.Random, only: tuple[str, ...] = ()) -> str:
    """Changes one file of `folder` (or one whose name is in `only`), and says what was done."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and (not only or p.name in only))
    file = rng.choice(files)
    name = file.relative_to(folder)
    changes = [_bits, _cut, _longer, _zeros, _gone, _empty, _folder, _circle, _outside, _pipe, _endless, _sparse]
    if (file.suffix in (".json", ".zarray") and rng.random() < 0.8) or (only and rng.random() < 0.8):
        changes = [_json]
    if file.suffix == ".safetensors" and rng.random() < 0.5:
        changes = [_header]
    change = rng.choice(changes)
    return f"{name}: {change.__name__.strip('_')}: {change(file, rng)}"


def _bits(file: pathlib.Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    places = [rng.randrange(len(content)) for _ in range(rng.choice((1, 1, 1, 4)))] if content else []
    for place in places:
        content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return str(places)


def _cut(file: pathlib.Path, rng: random.Random) -> str:
    size = rng.randrange(file.stat().st_size + 1)
    os.truncate(file, size)
    return str(size)


def _longer(file: pathlib.Path, rng: random.Random) -> str:
    more = rng.choice((b"\0", b"x" * 1000, b"}", b"\n\n", b"\xff\xfe"))
    file.write_bytes(file.read_bytes() + more)
    return repr(more[:5])


def _zeros(file: pathlib.Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content) + 1)
    count = min(rng.choice((1, 16, 512)), len(content) - start)
    content[start : start + count] = bytes(count)
    file.write_bytes(content)
    return f"{start} +{count}"


def _gone(file: pathlib.Path, rng: random.Random) -> str:
    file.unlink()
    return ""


def _empty(file: pathlib.Path, rng: random.Random) -> str:
    file.write_bytes(b"")
    return ""


def _folder(file: pathlib.Path, rng: random.Random) -> str:
    file.unlink()
    file.mkdir()
    return ""


def _circle(file: pathlib.Path, rng: random.Random) -> str:
    file.unlink()
    file.symlink_to(file.name)
    return ""


def _outside(file: pathlib.Path, rng: random.Random) -> str:
    """The same content, but behind a link that leads out of the folder."""
    target = file.parent.parent / f"{rng.randrange(10**9)}-outside"
    while target.is_relative_to(file.parent):
        target = target.parent.parent / target.name
    shutil.move(file, target)
    file.symlink_to(target)
    return ""


def _pipe(file: pathlib.Path, rng: random.Random) -> str:
    file.unlink()
    os.mkfifo(file)
    return ""


def _endless(file: pathlib.Path, rng: random.Random) -> str:
    file.unlink()
    file.symlink_to("/dev/zero")
    return ""


def _sparse(file: pathlib.Path, rng: random.Random) -> str:
    """A terabyte that takes no room on the disk."""
    os.truncate(file, 2**40)
    return ""


def _header(file: pathlib.Path, rng: random.Random) -> str:
    """Changes the JSON header of a safetensors file and keeps its length consistent."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text, what = _changed(content[8 : 8 + length].decode(), rng)
    encoded = text.encode("utf-8", "surrogatepass")
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])
    return what


def _json(file: pathlib.Path, rng: random.Random) -> str:
    text, what = _changed(file.read_text(encoding="utf-8"), rng)
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    return what


def _changed(text: str, rng: random.Random) -> tuple[str, str]:
    """A JSON text with one value replaced, removed or added; any other text with an odd value before it."""
    try:
        tree = json.loads(text)
    except ValueError:
        return rng.choice(ODD_JSON) + text, "odd start"
    places = list(_places(tree))
    if not places:
        return rng.choice(ODD_JSON), "odd value"
    parent, key = rng.choice(places)
    odd = rng.choice(ODD_JSON)
    mark = "@@odd@@"
    action = rng.choice(("replace", "replace", "replace", "remove", "add", "number"))
    if action == "remove":
        del parent[key]
    elif action == "add" and isinstance(parent, dict):
        parent[rng.choice(("x", "", "__class__", "auto_map", str(key) + "2"))] = mark
    elif action == "number" and type(parent[key]) in (int, float):
        parent[key] += rng.choice((-1, 1, 0.5, 64, 10**9))
    else:
        parent[key] = mark
    return json.dumps(tree).replace(json.dumps(mark), odd), f"{action} {key!r} {odd[:20]}"


def _places(tree: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found.append((tree, key))
        found += _places(value)
    return found
