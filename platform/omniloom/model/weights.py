"""Tensors in a folder's safetensors, one at a time: read in slices, written in shards. Nothing is ever unpickled."""

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from omniloom.errors import CheckpointError, ConfigError, did_you_mean

INDEX = "model.safetensors.index.json"
# What a model folder holds, ours or theirs, beside vocabularies.
MODEL_FILES = r"model[\w-]*\.safetensors|[\w.]+\.json|merges\.txt|tokenizer\.model|chat_template\.jinja"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}

Index = tuple[int | slice | EllipsisType, ...]


class Weights:
    """The tensors that a folder's safetensors hold; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Open the files; raises CheckpointError where there are none, one is missing or is cut short."""
        self.folder = folder
        self._places: dict[str, tuple[Any, str]] = {}  # of each tensor: its file, and its name there
        named = _indexed(folder)
        for path in sorted(set(named.values())) if named else [folder / "model.safetensors"]:
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"cannot load {path}: {error}") from error
            self._places |= {name: (file, name) for name in set(file.keys())}
        if absent := sorted(named.keys() - self.names):
            raise CheckpointError(f"{folder / INDEX} names tensors that no file holds: {_some(absent)}")

    @property
    def names(self) -> Set[str]:
        """Of all tensors."""
        return self._places.keys()

    def rename(self, name_of: Callable[[str], str | None]) -> None:
        """Call each tensor as `name_of` does; None leaves it out."""
        renamed = {name_of(name): place for name, place in self._places.items()}
        self._places = {name: place for name, place in renamed.items() if name is not None}

    def _slice(self, name: str) -> Any:
        file, kept_as = self._places[name]
        return file.get_slice(kept_as)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor; raises CheckpointError where it is no plain floating type."""
        kept_as = self._slice(name).get_dtype()
        if kept_as not in DTYPES:
            raise CheckpointError(f"{self.folder}: {name} is kept as {kept_as}, not as {', '.join(DTYPES)}: convert it")
        return DTYPES[kept_as]

    def read(self, name: str, index: Index = ()) -> Tensor:
        """One tensor, or the part of it at `index`; nothing else is read."""
        try:
            return self._slice(name)[index or (...,)]
        except SafetensorError as error:
            raise CheckpointError(f"cannot load {name} of {self.folder}: {error}") from error

    def check(self, shapes: Mapping[str, Sequence[int]], optional: Collection[str] = ()) -> None:
        """Raise CheckpointError where the tensors are not those of `shapes`, with both shapes."""
        whose = f"{self.folder}: its weights are not its config.json's"
        if missing := sorted(shapes.keys() - self.names - set(optional)):
            raise CheckpointError(f"{whose}: {len(missing)} missing: {_some(missing)}")
        if unknown := sorted(self.names - shapes.keys()):
            near = did_you_mean(unknown[0], shapes)
            raise CheckpointError(f"{whose}: {len(unknown)} unknown: {_some(unknown)}; {near}")
        for name in sorted(self.names):
            if self.shape(name) != tuple(shapes[name]):
                raise CheckpointError(f"{whose}: {name} is {self.shape(name)} and should be {tuple(shapes[name])}")


def _indexed(folder: Path) -> dict[str, Path]:
    """File by tensor as the index says; empty where one file holds all."""
    if (folder / INDEX).is_file():
        try:
            named = json.loads((folder / INDEX).read_bytes())["weight_map"]
            files = {str(file) for file in named.values()}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{folder / INDEX} is no index of safetensors: {error}") from error
        for file in sorted(files):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(f"{folder / INDEX} names {file}: only safetensors beside it are read")
        return {name: folder / file for name, file in named.items()}
    if not (folder / "model.safetensors").is_file():
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"cannot load {folder}: {_some(pickles)} is a pickle, which may run anything and is never opened; have "
                "whoever made it save the weights as safetensors"
            )
        raise CheckpointError(f"cannot load {folder}: it has neither model.safetensors nor {INDEX}")
    return {}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


@dataclass
class Planned:
    """A tensor that will be written: its name, what it takes, and how it is made."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """What it takes on disk."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def write_shards(folder: Path, tensors: Sequence[Planned], max_shard_bytes: int, title: str) -> None:
    """Write safetensors, holding one shard at a time: model.safetensors, or numbered ones and their index."""
    shards: list[list[Planned]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(each.bytes for each in shards[-1]) + tensor.bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    total = sum(tensor.bytes for tensor in tensors)
    weight_map: dict[str, str] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc=title) as bar:
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            made: dict[str, Tensor] = {}
            for tensor in shard:
                made[tensor.name] = tensor.make().to(tensor.dtype).contiguous()
                bar.update(tensor.bytes)
            save_file(made, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(folder.stat().st_mode & 0o666)  # the library keeps all others out
            weight_map |= dict.fromkeys(made, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1))


@contextmanager
def new_folder(folder: Path, force: bool) -> Iterator[Path]:
    """A folder to write in that becomes `folder` at the end; whatever happens before then, `folder` stays as it was.

    Raises ConfigError where `folder` holds something; with `force` a model folder is replaced, and nothing else is.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not force:
            raise ConfigError(f"to={folder} exists: name another folder, or set force=true to replace it")
        foreign = sorted(path.name for path in folder.iterdir() if not re.fullmatch(MODEL_FILES, path.name))
        if foreign or not (folder / "config.json").is_file() or (folder.parent / "COMPLETE").exists():
            why = f"it holds {_some(foreign)}" if foreign else "it has no config.json, or is a checkpoint's"
            raise ConfigError(f"to={folder} is no model folder that force=true replaces ({why}): name another folder")
    place = folder.resolve()
    partial, old = (place.with_name(f".{place.name}.{state}") for state in ("partial", "replaced"))
    for left in (partial, old):  # by a killed command
        shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"to={folder} cannot be written: {error}") from error
    try:
        yield partial
        if place.exists():
            place.replace(old)
        try:
            partial.replace(place)
        except OSError:
            if old.exists():
                old.replace(place)
            raise
    finally:
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
