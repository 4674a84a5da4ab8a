"""A medium's bytes, once its kind and size are known to be harmless."""

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from omniloom.errors import DataError


@dataclass(frozen=True)
class Media:
    """A picture, a sound or a video as a document names it: a plain file's path, or its bytes out of a container."""

    name: str  # what errors call it
    content: Path | bytes


def open_bounded(media: Media, limit_bytes: int, key: str) -> BinaryIO:
    """Open a medium of at most `limit_bytes` for reading; `key` names the limit in the error.

    Raises DataError for a missing or unreadable file, a pipe or device, and one over the limit, before it is read.
    """
    if isinstance(media.content, bytes):
        refuse_large(len(media.content), limit_bytes, key)
        return io.BytesIO(media.content)
    path = media.content
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # a pipe would block, a device never end
            raise DataError(f"cannot read {path}: not a plain file")
        refuse_large(state.st_size, limit_bytes, key)
        # By number: FFmpeg would read a protocol or a format into the name.
        return open(os.open(path, os.O_RDONLY), "rb")
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot read {path}: {reason}") from error


def refuse_large(size_bytes: int, limit_bytes: int, key: str) -> None:
    """Raise DataError where a medium is over its limit."""
    if size_bytes > limit_bytes:
        raise DataError(f"file of {size_bytes} bytes is over {key}={limit_bytes}")
