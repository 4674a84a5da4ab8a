"""Where a run's checkpoints lie, and which of them count: `COMPLETE`, with every file's size and hash, is the commit.

They lie in the run directory. With `checkpoint.url` they lie elsewhere: `checkpoints` is then a link to that folder or,
where it is a store's, `checkpoints.url` holds its URL.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec import filesystem
from fsspec.core import url_to_fs

from omniloom.errors import CheckpointError, ConfigError
from omniloom.track import jsonl

COMPLETE = "COMPLETE"
KEEP = "KEEP"  # beside COMPLETE: somebody named this checkpoint, and it is never removed
MODEL = "model"
READ_BYTES = 16 << 20
READERS = 8  # threads that hash files


@dataclass(frozen=True)
class Damage:
    """A file that is not what COMPLETE says, with both figures; None of what is not there or was not read."""

    file: str
    bytes: int | None
    expected_bytes: int | None
    sha256: str | None
    expected_sha256: str | None

    def __str__(self) -> str:
        if self.expected_bytes is None:
            return f"{self.file} is torn or missing ({self.bytes or 0:,} bytes)"
        if self.bytes == self.expected_bytes:
            return f"{self.file} has the hash {self.sha256} and COMPLETE says {self.expected_sha256}"
        return f"{self.file} has {self.bytes or 0:,} bytes and COMPLETE says {self.expected_bytes:,}"


@dataclass(frozen=True)
class Folder:
    """A folder on this machine or in a store."""

    fs: Any  # fsspec's
    path: str

    @staticmethod
    def of(url: str | Path) -> "Folder":
        """The folder that a path or URL names; raises ConfigError for a store that is not known or installed."""
        try:
            fs, path = url_to_fs(str(url))
        except (ValueError, ImportError) as error:
            raise ConfigError(f"{url} names no folder or store: {error}") from error
        return Folder(fs, path) if not _is_local(fs) else Folder(filesystem("file", auto_mkdir=True), path)

    def __truediv__(self, name: str) -> "Folder":
        return Folder(self.fs, f"{self.path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.path if self.is_local else str(self.fs.unstrip_protocol(self.path))

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine, or mounted there."""
        return _is_local(self.fs)

    @property
    def uri(self) -> str:
        """It as a URL."""
        return Path(self.path).as_uri() if self.is_local else str(self)

    @property
    def name(self) -> str:
        """Its last part."""
        return self.path.rstrip("/").rpartition("/")[2]

    def sizes(self) -> dict[str, int]:
        """Bytes of each file under it, by its name from here; of none where there is no such folder."""
        self.fs.invalidate_cache()
        start = len(self.path.rstrip("/")) + 1
        try:
            return {path[start:]: int(told["size"]) for path, told in self.fs.find(self.path, detail=True).items()}
        except FileNotFoundError:
            return {}

    def names(self) -> list[str]:
        """What lies directly in it."""
        self.fs.invalidate_cache()
        try:
            return sorted(path.rstrip("/").rpartition("/")[2] for path in self.fs.ls(self.path, detail=False))
        except FileNotFoundError:
            return []

    def exists(self, name: str) -> bool:
        """Whether this file is there."""
        self.fs.invalidate_cache()
        return bool(self.fs.isfile((self / name).path))

    def read(self, name: str) -> bytes:
        """A small file."""
        with self.fs.open((self / name).path, "rb") as stream:
            return bytes(stream.read())

    def write(self, name: str, content: bytes) -> dict[str, Any]:
        """Write a small file; returns its entry in COMPLETE."""
        with self.fs.open((self / name).path, "wb") as stream:
            stream.write(content)
            synchronize(stream)
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def remove(self, name: str = "") -> None:
        """Remove a file, or the folder with all in it; what is not there is no error."""
        place = (self / name).path if name else self.path
        with suppress(FileNotFoundError):
            self.fs.rm(place, recursive=not name)

    def sha256(self, name: str) -> tuple[int, str]:
        """Bytes and hash of a file, read in pieces."""
        digest, size = hashlib.sha256(), 0
        with self.fs.open((self / name).path, "rb") as stream:
            while block := stream.read(READ_BYTES):
                digest.update(block)
                size += len(block)
        return size, digest.hexdigest()


def _is_local(fs: Any) -> bool:
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def synchronize(stream: Any) -> None:
    """Have what was written survive the machine, where the stream is that of a file of its own."""
    stream.flush()
    with suppress(AttributeError, OSError):  # a store's has no number, a pipe cannot
        os.fsync(stream.fileno())


class Checkpoints:
    """A run's checkpoints."""

    def __init__(self, run_folder: Path) -> None:
        self._run = run_folder
        url = run_folder / "checkpoints.url"
        self.folder = Folder.of(url.read_text().strip() if url.is_file() else (run_folder / "checkpoints").absolute())

    @staticmethod
    def create(run_folder: Path, url: str | None) -> "Checkpoints":
        """Decide where a new run's checkpoints go; raises ConfigError where there is no such place."""
        link = run_folder / "checkpoints"
        if url is None or link.exists() or (run_folder / "checkpoints.url").exists():
            return Checkpoints(run_folder)
        place = Folder.of(url) / run_folder.name
        if place.names():
            raise ConfigError(
                f"checkpoint.url={url} has a {run_folder.name} of another run: name another run=, or place"
            )
        run_folder.mkdir(parents=True, exist_ok=True)
        if place.is_local:
            Path(place.path).mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path(place.path).absolute())
        else:
            jsonl.replace_text(run_folder / "checkpoints.url", f"{place}\n")
        return Checkpoints(run_folder)

    def at(self, step: int) -> Folder:
        """The folder of a step's checkpoint."""
        return self.folder / step_name(step)

    def steps(self) -> list[int]:
        """Of all checkpoints, whole or not, oldest first."""
        return sorted(step for step in map(step_of, self.folder.names()) if step is not None)

    def complete(self) -> list[int]:
        """The steps of the complete ones, oldest first."""
        return [step for step in self.steps() if self.at(step).exists(COMPLETE)]

    def keep(self, step: int) -> None:
        """Let a checkpoint that somebody named never be removed."""
        with suppress(OSError):  # storage that may only be read loses nothing
            self.at(step).write(KEEP, b"")

    def fetch_model(self, step: int) -> Path:
        """A checkpoint's folder on this machine: of a store's the model is copied beside the run."""
        place = self.at(step)
        if place.is_local:
            return Path(place.path)
        copied = self._run / "fetched" / step_name(step)
        for name, size in place.sizes().items():
            here = copied / name
            if not name.startswith(f"{MODEL}/") or (here.is_file() and here.stat().st_size == size):
                continue
            here.parent.mkdir(parents=True, exist_ok=True)
            place.fs.get_file((place / name).path, str(here))
        (copied / COMPLETE).write_bytes(place.read(COMPLETE))
        return copied

    def best(self, metric: str, mode: str) -> int | None:
        """The complete checkpoint with the best value of a metric, None where it was never measured.

        A checkpoint's value is the last one measured up to its step; of equal ones the oldest is the best.
        """
        complete, measured = self.complete(), jsonl.read(self._run / "metrics.jsonl")
        values: list[tuple[float, int]] = []
        for step in complete:
            told = [line[metric] for line in measured if line["step"] <= step and metric in line]
            if told and told[-1] == told[-1]:  # no number is best where it is none
                values.append((told[-1] if mode == "min" else -told[-1], step))
        return min(values)[1] if values else None


def step_name(step: int) -> str:
    """A checkpoint's folder."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step in a checkpoint folder's name, None where it is no such name."""
    digits = name.removeprefix("step_")
    return int(digits) if digits != name and digits.isdigit() else None


def inventory(folder: Folder) -> dict[str, dict[str, Any]]:
    """What COMPLETE says of each file; raises CheckpointError where it is not there or torn."""
    try:
        said = json.loads(folder.read(COMPLETE))
        return {str(name): {"bytes": int(of["bytes"]), "sha256": str(of["sha256"])} for name, of in said.items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{folder} is not complete: {error}") from error


def find_wrong_size(folder: Folder) -> Damage | None:
    """The first file of a checkpoint that is not as long as COMPLETE says; none of it is read."""
    sizes = folder.sizes()
    try:
        said = inventory(folder)
    except CheckpointError:
        return Damage(COMPLETE, sizes.get(COMPLETE), None, None, None)
    for name, expected in said.items():
        if sizes.get(name) != expected["bytes"]:
            return Damage(name, sizes.get(name), expected["bytes"], None, expected["sha256"])
    return None


def find_damage(folder: Folder, share: int = 0, of: int = 1) -> Damage | None:
    """The first file of a checkpoint that is not what COMPLETE says; of several readers each hashes its share."""
    if (damage := find_wrong_size(folder)) is not None:
        return damage
    said = inventory(folder)
    mine = sorted(said, key=lambda name: -said[name]["bytes"])[share::of]
    with ThreadPoolExecutor(READERS) as readers:
        for name, (size, digest) in zip(mine, readers.map(folder.sha256, mine), strict=True):
            if digest != said[name]["sha256"]:
                return Damage(name, size, said[name]["bytes"], digest, said[name]["sha256"])
    return None


def removable(
    steps: Sequence[int], complete: Sequence[int], kept: Sequence[int], keep_last: int | None, keep_every: int | None
) -> Iterator[int]:
    """The checkpoints that a retention rule no longer keeps, oldest first.

    Whatever is not complete and older than the newest complete one goes. The newest complete one always stays.
    """
    if not complete:
        return
    newest = set(complete[-keep_last:]) if keep_last is not None else set(complete)
    for step in steps:
        if step >= complete[-1] or step in kept:
            continue
        if step not in complete or not (step in newest or (keep_every and step % keep_every == 0)):
            yield step
