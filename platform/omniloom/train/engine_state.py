"""The engine's part of a checkpoint: what each rank has written, and the way from it to any other rank.

engine/rank_00000.safetensors   the parts that rank 0 wrote, flat, `<state>/<name>[<start>:<stop>]`
engine/index.json               of each tensor its shape, and in which file and from which byte on each part lies
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from omniloom.errors import CheckpointError, did_you_mean
from omniloom.track.checkpoints import Folder
from omniloom.train.ranges import Part, Saved, overlaps, refuse_gaps
from omniloom.train.tensor_file import Entry, dtype_of, header, name_of, read_values

if TYPE_CHECKING:
    from omniloom.train.engine import Engine
    from omniloom.train.fragments import Fragment, Whole

FOLDER, INDEX = "engine", "engine/index.json"
READERS = 8  # threads that read parts


@dataclass
class SavedState:
    """Where the parts of one tensor of the state lie, in order."""

    dtype: str
    ranges: list[Saved]


@dataclass
class SavedTensor:
    """A parameter or buffer, and the optimizer's states of it."""

    shape: list[int]
    dtype: str  # that the model computes with
    step: int | None  # of the optimizer's own count
    states: dict[str, SavedState]


@dataclass
class Index:
    """All that the ranks have written."""

    optimizer: str
    counters: dict[str, int | float]
    tensors: dict[str, SavedTensor]


def part_of(fragment: "Fragment") -> Part:
    """What is told of a fragment to other ranks."""
    stop = fragment.offset + fragment.values.numel()
    return Part(fragment.name, fragment.state, name_of(fragment.values.dtype), fragment.offset, stop)


def rank_file(rank: int) -> str:
    """Of what a rank writes."""
    return f"{FOLDER}/rank_{rank:05d}.safetensors"


def lay_out(parts: Sequence[Part]) -> tuple[list[Part], list[Entry]]:
    """A rank's parts in the order of its file, wide types first, so that all lie aligned."""
    ordered = sorted(parts, key=lambda part: (-dtype_of(part.dtype).itemsize, part))
    names = (f"{part.state}/{part.name}[{part.start}:{part.stop}]" for part in ordered)
    return ordered, [Entry(n, part.dtype, (part.stop - part.start,)) for n, part in zip(names, ordered, strict=True)]


def make_index(
    optimizer: str,
    counters: dict[str, float],
    wholes: Mapping[str, "Whole"],
    shares: Sequence[Sequence[Part]],
    steps: Mapping[str, int],
) -> Index:
    """Where everything lies, of what each rank writes; raises CheckpointError where a tensor has a gap."""
    tensors = {
        name: SavedTensor(list(whole.shape), name_of(whole.dtype), steps.get(name), {})
        for name, whole in wholes.items()
    }
    for rank, share in enumerate(shares):
        ordered, entries = lay_out(share)
        for part, byte in zip(ordered, header(entries)[1], strict=True):
            state = tensors[part.name].states.setdefault(part.state, SavedState(part.dtype, []))
            state.ranges.append(Saved(part.start, part.stop, rank_file(rank), byte))
    for name, tensor in tensors.items():
        for which, saved in tensor.states.items():
            saved.ranges.sort()
            refuse_gaps(f"{which} of {name}", saved.ranges, prod(tensor.shape))
    return Index(optimizer, counters, tensors)


def write_index(index: Index) -> bytes:
    """As index.json."""
    return json.dumps(asdict(index), separators=(",", ":")).encode()


def read_index(folder: Folder) -> Index:
    """Of a checkpoint; raises CheckpointError where it has none of this version."""
    try:
        return TypeAdapter(Index).validate_json(folder.read(INDEX))
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{folder / INDEX} is none of this version ({error}): start another run=") from error


def read_part(folder: Folder, what: str, saved: SavedState, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
    """Elements `start` to `stop` of a tensor, file by file, each with the element at which it begins."""
    dtype = dtype_of(saved.dtype)
    for piece, low, high in overlaps(what, saved.ranges, start, stop):
        byte = piece.byte + (low - piece.start) * dtype.itemsize
        yield low, read_values(folder, piece.file, byte, high - low, dtype)


def read_whole(folder: Folder, name: str, tensor: SavedTensor, state: str) -> Tensor:
    """A tensor as the model computes with it."""
    count = prod(tensor.shape)
    values = torch.empty(count, dtype=dtype_of(tensor.dtype))
    for start, part in read_part(folder, name, tensor.states[state], 0, count):
        values[start : start + len(part)].copy_(part)
    return values


def restore(engine: "Engine", folder: Folder) -> None:
    """Give the engine what a checkpoint holds of this rank's parts; all ranks call it, however many wrote it.

    Raises CheckpointError where it is another model's or another optimizer's.
    """
    index = read_index(folder)
    if index.optimizer != engine.optimizer:
        raise CheckpointError(
            f"{folder} was saved by optimizer.kind={index.optimizer}, whose state {engine.optimizer} cannot use: set "
            f"optimizer.kind={index.optimizer}"
        )
    _refuse_other_shapes(folder, index, engine.wholes())
    states = {name: list(tensor.states) for name, tensor in index.tensors.items()}
    steps = {name: tensor.step for name, tensor in index.tensors.items() if tensor.step is not None}
    engine.restore(states, steps, index.counters, partial(_fill, folder, index))


def _fill(folder: Folder, index: Index, fragments: list["Fragment"]) -> None:
    """Read every fragment's values."""

    def fill(fragment: "Fragment") -> None:
        states = index.tensors[fragment.name].states
        if fragment.state not in states:
            raise CheckpointError(f"{folder} has no {fragment.state} of {fragment.name}")
        stop = fragment.offset + fragment.values.numel()
        what = f"{folder}: {fragment.state} of {fragment.name}"
        for start, part in read_part(folder, what, states[fragment.state], fragment.offset, stop):
            fragment.values.narrow(0, start - fragment.offset, len(part)).copy_(part)

    with ThreadPoolExecutor(READERS) as readers:
        for _ in readers.map(fill, fragments):
            pass


def _refuse_other_shapes(folder: Folder, index: Index, wholes: Mapping[str, "Whole"]) -> None:
    if unknown := sorted(index.tensors.keys() ^ wholes.keys()):
        whose = "this model has no" if unknown[0] in index.tensors else "it holds no"
        near = did_you_mean(unknown[0], wholes if unknown[0] in index.tensors else index.tensors)
        raise CheckpointError(f"{folder} is another model's: {whose} {unknown[0]}; {near}")
    for name, whole in wholes.items():
        if tuple(index.tensors[name].shape) != whole.shape:
            shapes = f"{tuple(index.tensors[name].shape)} there and {whole.shape} here"
            raise CheckpointError(f"{folder} is another model's: {name} is {shapes}")
