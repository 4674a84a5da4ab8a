"""Append-only files of one JSON object a line; a torn last line is never taken for whole."""

import json
import os
from pathlib import Path
from typing import Any

LOOK_BYTES = 1 << 16  # at a file's end, at a time


def append(path: Path, entry: dict[str, Any]) -> None:
    """Write one line; it reaches the operating system before this returns."""
    with path.open("a+b") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                _drop_torn_line(path)
        stream.write(json.dumps(entry).encode() + b"\n")


def _drop_torn_line(path: Path) -> None:
    whole = path.read_bytes().rpartition(b"\n")
    os.truncate(path, len(whole[0]) + len(whole[1]))


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole line, in order; no file is no line."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline was torn off


def last(path: Path) -> dict[str, Any] | None:
    """The last whole line of a file, read from its end."""
    if not path.is_file():
        return None
    tail = b""
    with path.open("rb") as stream:
        at = stream.seek(0, os.SEEK_END)
        while at and tail.count(b"\n") < 2:  # its own end and that of the one before
            at, before = max(0, at - LOOK_BYTES), at
            stream.seek(at)
            tail = stream.read(before - at) + tail
    lines = tail.split(b"\n")[:-1]
    return json.loads(lines[-1]) if lines else None


def read_from(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines after byte `offset`, and where they end; a file that was cut back is read from its start."""
    if not path.is_file():
        return [], 0
    with path.open("rb") as stream:
        stream.seek(max(0, offset - 1))
        # Where no line ends just before `offset`, the file was cut back and has grown again.
        start = offset if offset and stream.read(1) == b"\n" else 0
        stream.seek(start)
        whole = stream.read().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()], start + len(whole) + bool(whole)


def cut_back(path: Path, step: int) -> None:
    """Drop every line after `step`: a resumed run writes them again, each step once."""
    kept = [entry for entry in read(path) if entry["step"] <= step]
    replace_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))


def replace_text(path: Path, text: str) -> None:
    """Replace a file whole: a reader, or a start after kill -9, finds the old or the new one, never half of one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
