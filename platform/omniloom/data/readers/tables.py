"""Rows of a Parquet file as a stream, row group by row group (pyarrow)."""

from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq

from omniloom.data.storage import open_file
from omniloom.errors import did_you_mean

ROWS_AT_ONCE = 64  # a dictionary's value may be repeated: a batch can weigh far more than its bytes in the file
BYTES_AT_ONCE = 4 << 20
METADATA_LIMIT_BYTES = 64 << 20


def open_table(stream: Any) -> pq.ParquetFile:
    """A Parquet file whose pages are read as they are needed."""
    return pq.ParquetFile(
        stream,
        buffer_size=1 << 20,
        pre_buffer=False,
        page_checksum_verification=True,
        thrift_string_size_limit=METADATA_LIMIT_BYTES,
        thrift_container_size_limit=METADATA_LIMIT_BYTES,
    )


def row_group_bytes(file: str) -> list[int]:
    """Unpacked bytes of each row group, from the footer; raises what pyarrow raises for a damaged file."""
    with open_file(file) as stream:
        metadata = open_table(stream).metadata
        return [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]


def holds_bytes(file: str, columns: tuple[str, ...]) -> bool:
    """Whether the columns, as far as they are there, hold bytes in every row and no path, by schema and statistics.

    Raises OSError and what pyarrow raises for a damaged file.
    """
    with open_file(file) as stream:
        metadata = open_table(stream).metadata
        leaves = {metadata.schema.column(number).path: number for number in range(metadata.num_columns)}
        for column in columns:
            inside = [path for path in leaves if path == column or path.startswith(f"{column}.")]
            content = column if column in leaves else f"{column}.bytes"
            if inside and (content not in leaves or not _is_bytes(metadata, leaves[content], content != column)):
                return False
    return True


def _is_bytes(metadata: pq.FileMetaData, leaf: int, is_everywhere: bool) -> bool:
    column = metadata.schema.column(leaf)
    if column.physical_type != "BYTE_ARRAY" or column.logical_type.type != "NONE":
        return False
    groups = (metadata.row_group(number).column(leaf).statistics for number in range(metadata.num_row_groups))
    return not is_everywhere or all(
        group is not None and group.has_null_count and group.null_count == 0 for group in groups
    )


def read_rows(
    file: str, part: tuple[int, int] | None, columns: tuple[str, ...], limit_bytes: int
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Number and values of each row of the part's row groups, of the columns that are there.

    None for the rows of a group whose rows are over the limit on the average: they are not read. Raises ValueError
    where the file has none of the columns, OSError and what pyarrow raises for a damaged file.
    """
    with open_file(file) as stream:
        table = open_table(stream)
        present = table.schema_arrow.names
        read = [name for name in dict.fromkeys(columns) if name in present]
        if not read:
            raise ValueError(f"has no column {columns[0]}; {did_you_mean(columns[0], present)}")
        metadata = table.metadata
        first = 0
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            if part is None or part[0] <= number < part[1]:
                row_bytes = max(group.total_byte_size // max(group.num_rows, 1), 1)
                if row_bytes > limit_bytes:
                    yield from ((row, None) for row in range(first, first + group.num_rows))
                else:
                    rows = max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE // row_bytes))
                    batches = table.iter_batches(rows, row_groups=[number], columns=read, use_threads=False)
                    yield from enumerate((row for batch in batches for row in batch.to_pylist()), first)
            first += group.num_rows
