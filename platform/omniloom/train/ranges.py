"""Which rank writes which part of a flattened tensor, and where the parts that another number of ranks needs then lie.

Parts are half-open ranges of elements. No file and no tensor is touched here.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from omniloom.errors import CheckpointError


class Part(NamedTuple):
    """Elements `start` to `stop` of one flattened tensor of the state."""

    name: str  # the parameter's
    state: str  # its master, or which of the optimizer's states
    dtype: str
    start: int
    stop: int


def share_out(held: Sequence[Sequence[Part]]) -> list[list[Part]]:
    """Of what each rank holds, what each writes: every element once, bytes spread as evenly as the holders allow.

    Depends on nothing but `held`: every rank finds the same.
    """
    holders: dict[tuple[str, str, str], list[tuple[int, int, int]]] = defaultdict(list)
    for rank, parts in enumerate(held):
        for part in parts:
            if part.start < part.stop:
                holders[part[:3]].append((part.start, part.stop, rank))
    pieces: list[tuple[Part, list[int]]] = []
    for key, ranges in holders.items():
        cuts = sorted({cut for start, stop, _ in ranges for cut in (start, stop)})
        if len(cuts) == 2 or len(ranges) == 1:  # all hold the same, or there is one
            pieces.append((Part(*key, cuts[0], cuts[-1]), sorted({rank for *_, rank in ranges})))
            continue
        for start, stop in pairwise(cuts):
            having = sorted({rank for low, high, rank in ranges if low <= start and stop <= high})
            if having:
                pieces.append((Part(*key, start, stop), having))
    written: list[list[Part]] = [[] for _ in held]
    load = [0] * len(held)
    # Large ones first; of what one rank alone holds there is nothing to decide.
    for part, having in sorted(pieces, key=lambda piece: (len(piece[1]) > 1, piece[0].start - piece[0].stop)):
        rank = min(having, key=lambda each: load[each])
        load[rank] += part.stop - part.start
        written[rank].append(part)
    return [sorted(parts) for parts in written]


class Saved(NamedTuple):
    """A range in a file."""

    start: int
    stop: int
    file: str
    byte: int  # where it begins there


def refuse_gaps(what: str, saved: Sequence[Saved], size: int) -> None:
    """Raise CheckpointError unless sorted ranges cover `size` elements, each once."""
    at = 0
    for part in saved:
        if part.start != at:
            break
        at = part.stop
    if at != size:
        raise CheckpointError(f"{what}: elements {at:,} of {size:,} on are held by no rank")


def overlaps(what: str, saved: Sequence[Saved], start: int, stop: int) -> Iterator[tuple[Saved, int, int]]:
    """The sorted ranges that elements `start` to `stop` lie in, each with the elements to take of it.

    Raises CheckpointError where some lie in none.
    """
    index = max(0, bisect_right(saved, start, key=lambda part: part.start) - 1)
    at = start
    while at < stop:
        if index >= len(saved) or not saved[index].start <= at < saved[index].stop:
            raise CheckpointError(f"{what}: elements {at:,} to {stop:,} are in no file of the checkpoint")
        until = min(stop, saved[index].stop)
        yield saved[index], at, until
        at, index = until, index + 1
