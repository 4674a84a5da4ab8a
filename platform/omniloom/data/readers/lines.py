"""Lines of a text file as a stream: by byte offset, a part of the file at will, none over a limit in memory."""

from collections.abc import Iterator
from typing import BinaryIO

from omniloom.data.storage import open_content

SKIPPED_AT_ONCE = 1 << 20


def read_lines(file: str, part: tuple[int, int] | None, limit_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Offset and bytes of each line that begins in the part; None where a line is over the limit.

    Offsets count the unpacked bytes. Raises OSError and what the unpacking raises for a damaged file.
    """
    start, stop = part if part is not None else (0, None)
    with open_content(file) as stream:
        at = start
        if start:  # a line that begins before the part belongs to the part before
            stream.seek(start - 1)
            at += _skip_line(stream) - 1
        while stop is None or at < stop:
            line = stream.readline(limit_bytes + 1)
            if not line:
                return
            length, is_whole = len(line), len(line.removesuffix(b"\n")) <= limit_bytes
            if not is_whole:
                line = b""
                length += _skip_line(stream)
            yield at, line if is_whole else None
            at += length


def _skip_line(stream: BinaryIO) -> int:
    """Read past the end of this line; how many bytes that were."""
    skipped = 0
    while piece := stream.readline(SKIPPED_AT_ONCE):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped
