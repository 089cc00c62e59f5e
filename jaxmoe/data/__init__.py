"""Training data: records, chat templates, packed sequences and batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxmoe.lazy import exports

if TYPE_CHECKING:
    from jaxmoe.data.chat import load_tokenizer
    from jaxmoe.data.records import Record, read_records, tokenize_record

__all__ = ["Record", "load_tokenizer", "read_records", "tokenize_record"]

__getattr__, __dir__ = exports(
    __name__,
    {
        "Record": "jaxmoe.data.records",
        "load_tokenizer": "jaxmoe.data.chat",
        "read_records": "jaxmoe.data.records",
        "tokenize_record": "jaxmoe.data.records",
    },
)
