"""What a reader makes of files written on the spot."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from omniloom.data.config import Reading
from omniloom.data.readers import read_documents
from omniloom.data.source import RawDocument, Unit
from omniloom.modality.files import Media

Said = tuple[str, bool]


def unit(format: str, *files: Path, part: tuple[int, int] | None = None, **reading: Any) -> Unit:
    return Unit("a-train-00000", "a", "train", format, [str(file) for file in files], part, Reading(**reading))


def read(format: str, *files: Path, part: tuple[int, int] | None = None, **reading: Any) -> list[RawDocument]:
    return list(read_documents(unit(format, *files, part=part, **reading)))


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records), encoding="utf-8")
    return path


def packed(path: Path) -> Path:
    """The file as path.gz or path.zst says, from the plain file of the rest of its name."""
    data = path.with_suffix("").read_bytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else pa.compress(data, "zstd", asbytes=True))
    return path


def texts(document: RawDocument) -> list[Said]:
    assert document.problem is None
    assert all(segment.kind == "text" for segment in document.segments)
    return [(segment.content, segment.is_target) for segment in document.segments]


def parts(document: RawDocument) -> list[tuple[str, Any]]:
    """Kind and content of each segment: text, path or bytes."""
    assert document.problem is None, document.problem
    return [(s.kind, s.content.content if isinstance(s.content, Media) else s.content) for s in document.segments]
