"""Decoders that go wrong in each way native code does; a child runs them by the medium's name."""

import ctypes
import errno
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from omniloom.errors import DataError
from omniloom.modality.config import ModalityConfig
from omniloom.modality.files import Media
from omniloom.modality.sequence import IMAGE, Segment

HELD: list[Any] = []


class Unsendable(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} {two} at {id(self):#x}")


def decode(kind: str, media: Media, config: ModalityConfig, spool: Path) -> Any:
    """Do what `media.name` says; else answer with one token that holds this process's id."""
    spool.write_bytes(b"half a film")
    match media.name:
        case "segfault":
            ctypes.string_at(0)
        case "abort":
            os.abort()
        case "exit":
            os._exit(3)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(3_600)
        case "hang in C":
            ctypes.PyDLL(None).sleep(3_600)  # the interpreter's lock is held: no thread of this process runs
        case "grow":
            while True:
                HELD.append(bytearray(16 << 20))
        case "grow in a reader":
            try:
                np.ones(1 << 40, np.uint8)
            except Exception as error:
                raise DataError("damaged picture: MemoryError") from error
        case "keep 150 MB":
            HELD.append(bytearray(150 << 20))
        case "mistake":
            raise Unsendable(1, 2)
        case "end of file":
            raise EOFError
        case "reject":
            raise DataError("not a readable picture")
        case "leave":
            sys.exit(4)
        case "full disk":
            raise OSError(errno.ENOSPC, "No space left on device")
        case "no answer":
            return (nothing for nothing in ())  # cannot be pickled
        case "wait":
            time.sleep(0.25)
        case "limits":
            import resource

            return [resource.getrlimit(resource.RLIMIT_CORE), sys.stdin.read(), sorted(sys.modules)]
    size = len(media.content) if isinstance(media.content, bytes) else media.content.stat().st_size
    return [Segment(IMAGE, np.full((1, 12), size % 256, np.uint8), np.array([[0, size, os.getpid()]], np.int32))]


def corrupting_decode(kind: str, media: Media, config: ModalityConfig, spool: Path) -> Any:
    """A file called 'poison' decodes, and the next one in the same process crashes."""
    if HELD:
        ctypes.string_at(0)
    if media.name == "poison":
        HELD.append(True)
    return decode(kind, media, config, spool)
