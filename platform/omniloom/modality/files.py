"""A medium's bytes, once its kind and size are known to be harmless."""

import stat
from dataclasses import dataclass
from pathlib import Path

from omniloom.errors import DataError


@dataclass(frozen=True)
class Media:
    """A picture, a sound or a video as a document names it: a plain file's path, or its bytes out of a container."""

    name: str  # what errors call it
    content: Path | bytes


def read_bounded(path: Path, limit_bytes: int, key: str) -> bytes:
    """Read a plain file of at most `limit_bytes`; `key` names the limit in the error.

    Raises DataError for a missing or unreadable file, a pipe or device, and one over the limit, before it is read.
    """
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # a pipe would block, a device never end
            raise DataError(f"cannot read {path}: not a plain file")
        refuse_large(state.st_size, limit_bytes, key)
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot read {path}: {reason}") from error


def refuse_large(size_bytes: int, limit_bytes: int, key: str) -> None:
    """Raise DataError where a file is over its limit."""
    if size_bytes > limit_bytes:
        raise DataError(f"file of {size_bytes} bytes is over {key}={limit_bytes}")
