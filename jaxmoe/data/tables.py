"""Records in tables of Arrow, such as Parquet files.

Only the columns that some form of record has are read. A key whose value is null is left out of what a column holds: a
table has every key in every record.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxmoe.data.compressed import check_growth
from jaxmoe.data.extra import library
from jaxmoe.data.raw import File, Input, Raw, naming
from jaxmoe.data.record_forms import check_columns, columns_that_are_read
from jaxmoe.json_text import parse_json

PARQUET = b"PAR1"
TOGETHER = 16  # records that are decoded at once: a table can say in a few bytes that each of them is huge


def parquet_input(file: File) -> Input:
    """The records of a Parquet file.

    Raises:
        UserError: pyarrow is missing, the file is damaged, or it has no columns of a known form.
    """
    parquet = library("pyarrow.parquet", f"{file.name}: to read Parquet")

    @contextmanager
    def opened() -> Iterator[Any]:
        with (
            naming(file.name),
            file.open() as source,
            parquet.ParquetFile(source, page_checksum_verification=True) as table,
        ):
            yield table

    def read(first: int) -> Iterator[Raw]:
        with opened() as table:
            groups, before = _groups_from(table.metadata, first)
            for group in groups:
                about = table.metadata.row_group(group)
                held = sum(about.column(i).total_uncompressed_size for i in range(about.num_columns))
                check_growth(f"{file.name}: row group {group}", held, file.size)
            names = columns_that_are_read(table.schema_arrow.names)
            batches = table.iter_batches(TOGETHER, row_groups=groups, columns=names, use_threads=False)
            yield from itertools.islice(table_records(batches, file.name, before, file.size), first - before, None)

    with opened() as table:
        rows = table.metadata.num_rows
        unread = check_columns(table.schema_arrow.names, file.name)
    return Input(file.name, read, rows, rows, str(file.size), unread)


def _groups_from(metadata: Any, first: int) -> tuple[list[int], int]:
    """The row groups from the one with record `first` on, and how many records lie before them."""
    before = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if before + rows > first:
            return list(range(group, metadata.num_row_groups)), before
        before += rows
    return [], first


def table_records(tables: Iterable[Any], where: str, before: int, size: int | None) -> Iterator[Raw]:
    """The records of `tables`, which `before` others precede; `size` bytes of files hold all (None: unknown)."""
    number, became = before, 0
    for table in tables:
        table = table.select(columns_that_are_read(table.schema.names))
        became += table.nbytes
        if size is not None:
            check_growth(where, became, size)
        kinds = {field.name: field.type for field in table.schema}
        each = table.nbytes // max(1, table.num_rows)
        for row in table.to_pylist():
            number += 1
            here = f"{where}: record {number}"
            value = {name: _plain(value, kinds[name], here) for name, value in row.items()}
            yield Raw(here, value, each, number)


def _plain(value: Any, kind: Any, where: str) -> Any:
    """What JSON can hold, of a value of Arrow's type `kind`."""
    if value is None:
        return None
    if getattr(kind, "extension_name", None) == "arrow.json":
        return parse_json(value, where)
    if isinstance(value, dict):
        kinds = {field.name: field.type for field in kind}
        return {name: _plain(each, kinds[name], where) for name, each in value.items() if each is not None}
    if isinstance(value, list) and hasattr(kind, "key_type"):  # a map
        return {name: _plain(each, kind.item_type, where) for name, each in value if each is not None}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_plain(each, kind.value_type, where) for each in value]
    return value
