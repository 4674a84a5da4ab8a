"""Files that are there whole or not at all: Tune copies its state into a sweep's folder while anything may kill it."""

import io
import os
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem


class _WholeFile(io.BufferedWriter):
    """Written beside its place, which it takes when it is closed and every byte of it has been written."""

    def __init__(self, path: str) -> None:
        super().__init__(io.FileIO(f"{path}.partial", "wb"))
        self._path, self._lacks = path, False

    def write(self, data: Any) -> int:
        """Raises OSError where the disk does not take it; nothing takes the file's place then."""
        try:
            return super().write(data)
        except OSError:
            self._lacks = True
            raise

    def close(self) -> None:
        """Take the place of what stood there."""
        if not self.closed:
            super().close()
            if not self._lacks:
                os.replace(f"{self._path}.partial", self._path)


class _WholeFileSystem(LocalFileSystem):
    def _open(self, path: str, mode: str = "rb", **settings: Any) -> Any:
        return _WholeFile(path) if mode == "wb" else super()._open(path, mode, **settings)


def whole_files() -> PyFileSystem:
    """This machine's files, for `storage_filesystem`."""
    return PyFileSystem(FSSpecHandler(_WholeFileSystem(auto_mkdir=True)))
