"""Tensors into a safetensors file piece by piece, hashed on the way.

The library writes a file from whole tensors alone, and what it has written would have to be read again for its hash.
"""

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from omniloom.errors import CheckpointError
from omniloom.track.checkpoints import Folder, synchronize

DTYPES = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
BLOCK_BYTES = 16 << 20


class Entry(NamedTuple):
    """A tensor in a file, before there are values."""

    name: str
    dtype: str  # torch's name
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What its values take."""
        return prod(self.shape) * dtype_of(self.dtype).itemsize


class Abandoned(Exception):
    """Nobody waits for this file any more."""


def dtype_of(name: str) -> torch.dtype:
    """torch's type of this name; raises CheckpointError where there is none."""
    if name not in DTYPES:
        raise CheckpointError(f"{name} is no type that a checkpoint holds: {', '.join(DTYPES)}")
    return getattr(torch, name)


def name_of(dtype: torch.dtype) -> str:
    """The name of one of torch's types."""
    return str(dtype).removeprefix("torch.")


def header(entries: Sequence[Entry]) -> tuple[bytes, list[int]]:
    """What a file of these tensors begins with, and the byte at which the values of each begin."""
    told: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, places = 0, []
    for entry in entries:
        told[entry.name] = {
            "dtype": DTYPES[name_of(dtype_of(entry.dtype))],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.bytes],
        }
        places.append(at)
        at += entry.bytes
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values are then aligned
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + place for place in places]


def bytes_of(values: Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    return values.view(-1).view(torch.uint8).numpy().data


class Writing:
    """What those who write and those who wait for it know of each other."""

    def __init__(self) -> None:
        self.abandoned = threading.Event()  # nobody waits any more
        self.done = 0  # grows while something is being done

    def get_on(self) -> None:
        """Something has been done; raises Abandoned once nobody waits for it."""
        if self.abandoned.is_set():
            raise Abandoned
        self.done += 1


class HashedStream:
    """A file that is being written: what went into it so far, and its hash."""

    def __init__(self, stream: Any, writing: Writing) -> None:
        self._stream, self._writing = stream, writing
        self._digest, self._size = hashlib.sha256(), 0

    def write(self, content: memoryview | bytes) -> None:
        """Write; raises Abandoned once nobody waits for it."""
        for start in range(0, len(content), BLOCK_BYTES):
            self._writing.get_on()
            block = content[start : start + BLOCK_BYTES]
            self._stream.write(block)
            self._digest.update(block)
        self._size += len(content)

    @property
    def entry(self) -> dict[str, Any]:
        """For COMPLETE."""
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}


@contextmanager
def hashed(folder: Folder, name: str, writing: Writing) -> Iterator[HashedStream]:
    """Open a file for writing."""
    with folder.fs.open((folder / name).path, "wb") as stream:
        yield HashedStream(stream, writing)
        synchronize(stream)


def write_tensors(
    folder: Folder, name: str, entries: Sequence[Entry], values: Iterable[Tensor], writing: Writing
) -> dict[str, Any]:
    """Write a file of one tensor after the other; returns its entry in COMPLETE."""
    with hashed(folder, name, writing) as stream:
        stream.write(header(entries)[0])
        for entry, tensor in zip(entries, values, strict=True):
            assert (name_of(tensor.dtype), tensor.numel()) == (entry.dtype, prod(entry.shape)), entry
            if tensor.numel():
                stream.write(bytes_of(tensor.contiguous()))
    return stream.entry


def read_values(folder: Folder, name: str, byte: int, count: int, dtype: torch.dtype) -> Tensor:
    """`count` values from a byte of a file on; raises CheckpointError where the file ends before they do."""
    values = torch.empty(count, dtype=dtype)
    memory = np.asarray(bytes_of(values))
    for start in range(0, len(memory), BLOCK_BYTES):
        stop = min(start + BLOCK_BYTES, len(memory))
        block = folder.fs.cat_file((folder / name).path, start=byte + start, end=byte + stop)
        if len(block) != stop - start:
            raise CheckpointError(f"{folder / name} ends at byte {byte + start + len(block):,}, before its values do")
        memory[start:stop] = np.frombuffer(block, np.uint8)
    return values
