"""Files by path or URL: found by pattern, opened as streams, told apart when they change (fsspec)."""

import io
import os
import re
import stat
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
from fsspec.registry import known_implementations

from omniloom.data.source import RemoteMedia
from omniloom.errors import ClusterError, DataError, did_you_mean
from omniloom.modality.files import Media, refuse_large

# What a manifest and the documents themselves may name: no document opens a connection to just anywhere.
REMOTE = ("s3", "gs", "gcs", "hf", "az", "abfs", "memory")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BUFFER_BYTES = 256 << 10
FETCHED_BYTES = 4 << 20  # of a store's medium in memory; a larger one goes by a file
REASON_CHARACTERS = 200
REFUSED = (FileNotFoundError, IsADirectoryError, PermissionError, ValueError)  # by a store that answers
STATE_KEYS = ("size", "ETag", "etag", "md5Hash", "blob_id", "LastModified", "mtime", "updated", "created")


def protocol_of(name: str) -> str | None:
    """The protocol of a URL, or None where `name` is a path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", name)
    return match[1].lower() if match else None


def local_path(name: str) -> Path | None:
    """The local file that a path or a file:// URL names, or None for a URL of a store."""
    protocol = protocol_of(name)
    if protocol is None:
        return Path(name)
    return Path(name[len("file://") :]) if protocol == "file" else None


def refuse_protocol(url: str) -> None:
    """Raise DataError where a URL is of no store that is read."""
    protocol = protocol_of(url)
    if protocol in ("http", "https"):
        raise DataError(
            f"{url[:200]}: {protocol}:// is not read: download the file, or name one of {', '.join(REMOTE)}"
        )
    if protocol not in REMOTE or "::" in url:
        raise DataError(f"{url[:200]}: {protocol}:// is no store; {did_you_mean(str(protocol), (*REMOTE, 'file'))}")


@lru_cache
def _store(protocol: str) -> Any:
    package = known_implementations[protocol]["class"].split(".")[0]
    if find_spec(package) is None:
        raise DataError(f"{protocol}:// needs the package {package}: pip install {package}")
    return fsspec.filesystem(protocol)


def store_of(url: str) -> Any:
    """The fsspec file system of a URL; raises DataError where it is of no store, or its package is not installed."""
    refuse_protocol(url)
    return _store(str(protocol_of(url)))


def match_files(base: Path, pattern: str, enters_folders: bool = False) -> dict[str, int]:
    """Sizes of the files that a pattern names, by path or URL; also of those under the folders it names, if asked.

    A link keeps its own name: in content-addressed caches what it points to has no extension. Raises ValueError for a
    pattern that cannot be read, DataError for no store, ClusterError for one that fails.
    """
    path = local_path(pattern)
    if path is None:
        store = store_of(pattern)
        try:
            found = store.glob(pattern, detail=True)
            folders = [name for name, state in found.items() if enters_folders and state["type"] == "directory"]
            for folder in folders:
                found |= store.find(folder, detail=True)
        except Exception as error:  # each store has its own
            raise ClusterError(f"cannot list {pattern}: {said(error)}") from error
        return {store.unstrip_protocol(n): int(s["size"]) for n, s in found.items() if s["type"] == "file"}
    relative = pattern if protocol_of(pattern) is None else str(path)
    if path.is_absolute():
        base, relative = Path(path.anchor), str(path.relative_to(path.anchor))
    try:
        matched = list(base.glob(relative))
    except IndexError as error:  # what pathlib raises for some patterns
        raise ValueError(str(error)) from error
    if enters_folders:
        matched = [file for entry in matched for file in (entry.rglob("*") if entry.is_dir() else [entry])]
    return {os.path.abspath(file): file.stat().st_size for file in matched if file.is_file()}


def real_name(file: str) -> str:
    """What a file is called once links are followed; a store has none."""
    return os.path.realpath(file) if local_path(file) is not None else file


def names_in(folder: str) -> frozenset[str]:
    """The names in a folder, none where there is no such folder."""
    try:
        path = local_path(folder)
        names = os.listdir(path) if path is not None else store_of(folder).ls(folder, detail=False)
    except OSError:
        return frozenset()
    return frozenset(name.rpartition("/")[2] for name in names)


def file_state(file: str) -> list[Any]:
    """What changes when a file does: path, size, time of change; of a store's, what it knows of these."""
    try:
        path = local_path(file)
        if path is None:
            state = store_of(file).info(file)
            return [file, *(f"{key}={state[key]}" for key in STATE_KEYS if key in state)]
        found = path.stat()
        return [file, found.st_size, found.st_mtime_ns]
    except (OSError, ValueError):
        return [repr(file), -1, -1]  # missing now: another state once it is there


def said(error: Exception) -> str:
    """An error in one short line that is the same from run to run."""
    text = f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace").decode()
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(text.split()))[:REASON_CHARACTERS]


def _failure(url: str, error: Exception) -> ClusterError:
    return ClusterError(f"cannot read {url}: {said(error)}: finished shards are kept, repeat the command")


class _StoreStream(io.RawIOBase):
    """A store's file whose failures are ClusterErrors: that of a network is no damage of the file."""

    def __init__(self, url: str) -> None:
        self._url = url
        try:
            self._stream = store_of(url).open(url, "rb")
        except REFUSED:
            raise
        except Exception as error:
            raise _failure(url, error) from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self._stream.tell())

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except Exception as error:
            raise _failure(self._url, error) from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed and hasattr(self, "_stream"):
            self._stream.close()
        super().close()


def open_file(file: str) -> BinaryIO:
    """Open a file for reading as it stands; raises OSError, ClusterError where its store fails."""
    path = local_path(file)
    if path is None:
        return io.BufferedReader(_StoreStream(file), BUFFER_BYTES)
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would block, a device never end
        raise OSError("not a plain file")
    return path.open("rb", BUFFER_BYTES)


def open_content(file: str) -> BinaryIO:
    """Open a file for reading what it holds: .gz and .zst are unpacked on the way."""
    stream = open_file(file)
    compression = compression_of(file)
    if compression is None:
        return stream
    unpacked = pa.input_stream(stream, compression=compression)
    return io.BufferedReader(cast(io.RawIOBase, unpacked), BUFFER_BYTES)


def compression_of(file: str) -> str | None:
    """How a file is packed, by its name."""
    return COMPRESSIONS.get(os.path.splitext(file)[1].lower())


def size_bytes(media: Media | RemoteMedia) -> int:
    """Of its file; 0 where there is none."""
    try:
        if isinstance(media, RemoteMedia):
            return int(store_of(media.url).size(media.url) or 0)
        return len(media.content) if isinstance(media.content, bytes) else media.content.stat().st_size
    except Exception:  # each store has its own
        return 0  # whoever opens it will say so


def fetch(media: RemoteMedia, limit_bytes: int, key: str, folder: Path) -> Media:
    """Read a store's medium of at most `limit_bytes`, a large one into a file of `folder` that the caller removes.

    `key` names the limit in the error. Raises DataError where it is missing or over its limit, before it is read;
    ClusterError where the store fails.
    """
    store = store_of(media.url)
    copied: Path | None = None
    try:
        size = int(store.size(media.url))
        refuse_large(size, limit_bytes, key)
        if size <= FETCHED_BYTES:
            return Media(media.name, store.cat_file(media.url, 0, limit_bytes))
        with NamedTemporaryFile(prefix="fetch-", dir=folder, delete=False) as file:
            copied = Path(file.name)
        store.get_file(media.url, str(copied))
        return Media(media.name, copied)
    except BaseException as error:
        if copied is not None:
            copied.unlink(missing_ok=True)
        if isinstance(error, DataError) or not isinstance(error, Exception):
            raise
        if isinstance(error, REFUSED):
            raise DataError(f"cannot read {media.url}: {type(error).__name__}") from error
        raise _failure(media.url, error) from error
