"""Preference pairs from chats: `python -m examples.preference_pairs CHATS.jsonl PAIRS.jsonl`.

The chosen answer of a pair is the chat's own, the rejected one that of another chat. With the docstrings of
`examples.stdlib_corpus` the question is a signature, and the rejected answer describes another function.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.errors import UserError


def pairs(chats: Sequence[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """One pair for each chat whose answer differs from that of the chat half the file away."""
    for number, messages in enumerate(chats):
        *prompt, chosen = messages
        rejected = chats[(number + len(chats) // 2) % len(chats)][-1]
        if rejected != chosen:
            yield {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the pairs and prints how many there are."""
    parser = ArgumentParser(description="Make preference pairs from chats.")
    parser.add_argument("chats", type=pathlib.Path, metavar="CHATS", help='JSONL file of {"messages": [...]} records')
    parser.add_argument("pairs", type=pathlib.Path, metavar="PAIRS", help="JSONL file to write")
    options = parser.parse_args(argv)
    if not options.chats.is_file():
        raise UserError(f"file not found: {options.chats}")
    with options.chats.open(encoding="utf-8") as file:
        records = [*pairs([json.loads(line)["messages"] for line in file])]
    options.pairs.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    print(f"{options.pairs}: {len(records)} pairs")


if __name__ == "__main__":
    run(main)
