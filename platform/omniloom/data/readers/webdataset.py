"""Samples of a WebDataset tar: members of one key, by their extensions media, then text."""

import json
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from omniloom.data.config import Reading
from omniloom.data.readers.media import MEDIA_KINDS, is_no_medium, unknown
from omniloom.data.readers.record import Place, caption_of, mapping_of
from omniloom.data.source import RawDocument, RawSegment
from omniloom.data.storage import open_file
from omniloom.modality.dialogue import text_of
from omniloom.modality.files import Media

HEADER_LIMIT_BYTES = 1 << 20  # of a long name or of pax fields
TEXTS = ("txt", "json")


class Oversize(NamedTuple):
    """A member that was not read."""

    reason: str


class StrictTarInfo(tarfile.TarInfo):
    """A member's header; where tarfile ends in silence, hangs or asks for all memory, it raises ReadError."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "StrictTarInfo":
        """Read a header of 512 bytes."""
        member = super().frombuf(buf, encoding, errors)
        extends = member.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if member.size < 0 or (extends and member.size > HEADER_LIMIT_BYTES):
            raise tarfile.ReadError(f"a header claims {member.size} bytes")
        return member

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "StrictTarInfo":
        """Read the next member's header."""
        try:
            member = super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:  # tarfile takes it for the end
            raise tarfile.ReadError(str(error)) from error
        if member.size < 0:  # by a pax field: tarfile would go back and never end
            raise tarfile.ReadError(f"a header claims {member.size} bytes")
        return member


def read_samples(file: str, reading: Reading) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and members by extension of each sample, an Oversize for what is over the limit (a sample's members in all).

    Raises ReadError and what the unpacking raises for a damaged file; a sample that it cuts is not given.
    """
    from webdataset.tariterators import base_plus_ext, group_by_keys  # imports torch

    def members(archive: tarfile.TarFile) -> Iterator[dict[str, Any]]:
        key, room = None, 0
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # or it keeps them all
            prefix, suffix = base_plus_ext(member.name)
            if not member.isreg() or prefix is None:
                continue
            if prefix != key:
                key, room = prefix, reading.limit_document_bytes
            data: bytes | Oversize = b""
            if suffix.lower().rpartition(".")[2] in (*MEDIA_KINDS, *TEXTS):
                room -= member.size
                if room < 0:
                    limit = reading.limit_document_bytes
                    data = Oversize(f"its members up to {suffix[:50]} are over limit_document_bytes={limit}")
                else:
                    data = _content(archive, member)
            yield {"fname": member.name, "data": data, "__url__": file}

    def keep_first(error: Exception) -> bool:
        return True  # two members of one name

    with open_file(file) as stream, tarfile.open(None, _mode(file), stream, tarinfo=StrictTarInfo) as archive:
        for sample in group_by_keys(members(archive), handler=keep_first):
            yield sample.pop("__key__"), {name: data for name, data in sample.items() if name != "__url__"}


def _mode(file: str) -> Any:
    """How a tar is packed, by its name."""
    packing = {"gz": "gz", "tgz": "gz", "bz2": "bz2", "xz": "xz"}
    return f"r:{packing.get(file.lower().rpartition('.')[2], '')}"


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    data = stream.read() if stream is not None else b""
    if len(data) != member.size:
        raise tarfile.ReadError(f"a member of {member.size} bytes has {len(data)}")
    return data


def sample_document(record: dict[str, Any], place: Place, reading: Reading) -> list[RawDocument]:
    """A sample: its media in the tar's order, then its txt, or the text in its json, a target.

    A label or an index (cls, id, … media.NO_MEDIA) is passed over. Raises ValueError for a member of any other
    extension: without what may be its picture or sound, the text would say what cannot be seen.
    """
    segments = []
    texts: dict[str, bytes] = {}
    for name, data in record.items():
        extension = name.rpartition(".")[2]
        if isinstance(data, Oversize):
            raise ValueError(data.reason)
        if extension in MEDIA_KINDS:
            medium = Media(f"{place.name}.{name}".encode("utf-8", "backslashreplace").decode(), data)
            segments.append(RawSegment(MEDIA_KINDS[extension], medium, is_target=False))
        elif extension in TEXTS:
            texts.setdefault(extension, data)
        elif not is_no_medium(name):
            raise ValueError(unknown(f"{place.name}.{name}"))
    if "txt" in texts:
        text: str | None = text_of(texts["txt"].decode(), "txt")
    elif "json" in texts:
        text = caption_of(mapping_of(json.loads(texts["json"].decode()), "a text"), reading)
    else:
        text = None
    if text is None:
        raise ValueError("no caption" if segments else "no member of a known extension")
    return [RawDocument(place.name, [*segments, RawSegment("text", text, is_target=True)])]
