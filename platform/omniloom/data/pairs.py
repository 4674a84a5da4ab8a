"""Which stretches of packed rows belong together: a medium and the text said of it, or two media side by side.

B batch, T tokens, P pairs of a batch, N tokens of one side.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from itertools import groupby, pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from omniloom.modality.batch import MODEL_INPUTS
from omniloom.modality.sequence import AUDIO, IMAGE, MODALITIES, PADDING, TEXT, VIDEO

Array = TypeVar("Array", np.ndarray, Tensor)


class Pair(NamedTuple):
    """Two sides of one thing, the one of `kind`'s first modality first: their tokens in the flattened rows, int64 (N,),
    and a hash of the content of each."""

    kind: str
    sides: tuple[np.ndarray, np.ndarray]
    hashes: tuple[int, int]


class Stretch(NamedTuple):
    """Tokens of one modality in a row, within a document."""

    modality: int
    begin: int
    end: int


def find_pairs(fields: Mapping[str, Tensor], kinds: Collection[str]) -> list[Pair]:
    """The pairs of `kinds`, such as image_text, in order of appearance.

    A medium goes with the targets among the text behind it, up to the next medium or the document's end: what the model
    is to say of it. Media of one modality in a row are one side (the clips of a long sound, an album). Where media of
    several stand together, the text speaks of all of them and makes no pair; two of them are a pair of their own.
    """
    names = ("input_ids", "modality", "position", "document", "loss_mask", "image", "video", "audio", "audio_frames")
    arrays = {name: fields[name].cpu().numpy() for name in names}
    contents = _Contents(arrays)
    is_target = arrays["loss_mask"].reshape(-1) > 0
    found = []
    for (first, second), targets_only in _neighbours(arrays):
        sides = [np.arange(first.begin, first.end), np.arange(second.begin, second.end)]
        stretches = [first, second]
        if targets_only:
            sides[1] = sides[1][is_target[sides[1]]]
        elif first.modality > second.modality:
            sides, stretches = sides[::-1], stretches[::-1]
        kind = "_".join(MODALITIES[stretch.modality] for stretch in stretches)
        if kind in kinds and len(sides[1]):
            left, right = (contents.hash(*side) for side in zip((s.modality for s in stretches), sides, strict=True))
            found.append(Pair(kind, (sides[0], sides[1]), (left, right)))
    return found


def _neighbours(arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[tuple[Stretch, Stretch], bool]]:
    """A lone medium with the text behind it, True; two media that stand together, False."""
    for stretches in _documents(arrays):
        groups = [list(group) for _, group in groupby(stretches, key=lambda stretch: stretch.modality == TEXT)]
        for group, behind in pairwise([*groups, []]):
            if group[0].modality == TEXT:
                continue
            if len(group) == 2:
                yield (group[0], group[1]), False
            elif len(group) == 1 and behind:
                yield (group[0], behind[0]), True


def _documents(arrays: Mapping[str, np.ndarray]) -> Iterator[list[Stretch]]:
    """The stretches of each document, padding excluded."""
    rows, tokens = arrays["document"].shape
    row, document, modality = np.repeat(np.arange(rows), tokens), arrays["document"].reshape(-1), arrays["modality"]
    told = np.stack([row, document, modality.reshape(-1)])
    begins = np.flatnonzero(np.append(True, (told[:, 1:] != told[:, :-1]).any(0)))
    ends = np.append(begins[1:], rows * tokens)
    listed = zip(*told[:, begins].tolist(), begins.tolist(), ends.tolist(), strict=True)
    for (_, number), found in groupby(listed, key=lambda stretch: stretch[:2]):
        if number != PADDING:
            yield [Stretch(*stretch[2:]) for stretch in found]


class _Contents:
    """What stands behind the tokens of a batch."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays, modality = arrays, arrays["modality"].reshape(-1)
        self._number = {kind: np.cumsum(modality == kind) - 1 for kind in (IMAGE, VIDEO)}
        self._clip = np.cumsum(_begins_clip(modality, arrays["position"].reshape(-1, 3))) - 1
        self._first_frame = np.append(0, np.cumsum(arrays["audio_frames"]))

    def hash(self, modality: int, side: np.ndarray) -> int:
        """64 bits of the content, the same in every process."""
        arrays = self._arrays
        if modality == TEXT:
            content = arrays["input_ids"].reshape(-1)[side]
        elif modality == AUDIO:
            clips = self._first_frame[[self._clip[side[0]], self._clip[side[-1]] + 1]]
            content = arrays["audio"][slice(*clips.tolist())]
        else:
            content = arrays[MODALITIES[modality]][self._number[modality][side]]
        digest = hashlib.blake2b(np.ascontiguousarray(content).tobytes(), digest_size=8, person=bytes([modality]))
        return int.from_bytes(digest.digest(), signed=True)


def lay_apart(fields: Mapping[str, Tensor], pairs: list[Pair]) -> dict[str, Tensor]:
    """The model's inputs for one row in which each side is a document of its own: 0 and 1 the first pair's, and so on.

    No side sees the other, nor what stood around it. Behind them is one more document, of a single token of text: what
    a rank without a pair runs, for every rank runs every module as often as the others.
    """
    device = fields["input_ids"].device
    sides = [torch.from_numpy(side) for pair in pairs for side in pair.sides]
    tokens = torch.cat([*sides, torch.zeros(1, dtype=torch.int64)]).to(device)
    lengths = torch.tensor([*map(len, sides), 1], device=device)
    document = torch.arange(len(lengths), dtype=torch.int32, device=device).repeat_interleave(lengths)
    modality, position = fields["modality"].flatten(), fields["position"].flatten(0, 1)
    kept = torch.zeros_like(modality, dtype=torch.bool)
    kept[tokens[:-1]] = True
    kept_clips = kept[_begins_clip(modality, position)]
    laid = {
        "input_ids": fields["input_ids"].flatten()[tokens],
        "modality": modality[tokens],
        "position": position[tokens],
        "document": document,
    }
    for name in ("modality", "position"):
        laid[name][-1] = 0  # text, whatever stands at the rows' first place
    media = {
        "image": fields["image"][kept[modality == IMAGE]],
        "video": fields["video"][kept[modality == VIDEO]],
        "audio": fields["audio"][kept_clips.repeat_interleave(fields["audio_frames"])],
        "audio_frames": fields["audio_frames"][kept_clips],
    }
    inputs = {name: field[None] for name, field in laid.items()} | media
    return {name: inputs[name] for name in MODEL_INPUTS}


def _begins_clip(modality: Array, position: Array) -> Array:
    return (modality == AUDIO) & (position[:, 0] == 0)
