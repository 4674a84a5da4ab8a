"""What a manifest's files hold, before media are read and text is encoded."""

from dataclasses import dataclass, field
from typing import Literal

from omniloom.data.config import Reading, Split
from omniloom.modality.files import Media


@dataclass(frozen=True)
class Unit:
    """The files of one source and split that become one shard, or a part of one large file."""

    name: str
    source: str
    split: Split
    format: str
    files: list[str]  # paths or URLs
    part: tuple[int, int] | None = None  # of its only file: from, to; bytes of a jsonl, row groups of a Parquet file
    reading: Reading = field(default_factory=Reading)


@dataclass(frozen=True)
class RemoteMedia:
    """A medium in a store: `storage.fetch` makes it a Media when its document is woven."""

    name: str
    url: str


@dataclass(frozen=True)
class RawSegment:
    """Text, or a medium; `is_target` says whether its text is learned."""

    kind: str  # text, image, audio or video
    content: str | Media | RemoteMedia
    is_target: bool


@dataclass(frozen=True)
class RawDocument:
    """One document before its media are read. `problem` is set instead of segments where it cannot be read.

    Its name is `file` or `file@place`: the byte where its line begins, the number of its row, the key of its sample.
    A preference record is two documents of one name, its answers `chosen` and `rejected`.
    """

    name: str
    segments: list[RawSegment]
    problem: str | None = None
    kind: Literal["document", "chosen", "rejected"] = "document"
