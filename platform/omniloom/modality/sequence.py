"""Segments become the unified sequence: one document, then one packed row of `seq_len` tokens.

T tokens of a row, N tokens of one segment, P values of one patch.
"""

from dataclasses import dataclass

import numpy as np

TEXT, IMAGE, AUDIO, VIDEO = range(4)
PADDING = -1  # the `document` of a position that belongs to none


@dataclass(frozen=True)
class Segment:
    """One stretch of one modality: text ids int32 (N,) or media uint8 (N, P), with position int32 (N, 3)."""

    modality: int
    content: np.ndarray
    position: np.ndarray
    is_target: bool = False

    def __len__(self) -> int:
        return len(self.content)


@dataclass(frozen=True)
class Document:
    """One document of the unified sequence: its fields per token, and the patches of its pictures in order."""

    input_ids: np.ndarray  # int32 (N,)
    modality: np.ndarray  # uint8 (N,)
    position: np.ndarray  # int32 (N, 3)
    loss_mask: np.ndarray  # uint8 (N,)
    image: np.ndarray  # uint8 (N_image, P)

    def __len__(self) -> int:
        return len(self.input_ids)

    def window(self, start: int, stop: int) -> "Document":
        """The tokens from `start` to `stop`, with the patches that belong to them."""
        before = int((self.modality[:start] == IMAGE).sum())
        within = int((self.modality[start:stop] == IMAGE).sum())
        return Document(
            self.input_ids[start:stop],
            self.modality[start:stop],
            self.position[start:stop],
            self.loss_mask[start:stop],
            self.image[before : before + within],
        )


@dataclass(frozen=True)
class Row:
    """One packed training row, one sample: the contract's fields. Shapes: (T,), position (T, 3), image (N, P)."""

    input_ids: np.ndarray
    modality: np.ndarray
    position: np.ndarray
    document: np.ndarray
    source: np.ndarray
    loss_mask: np.ndarray
    image: np.ndarray

    def fields(self) -> dict[str, np.ndarray]:
        """The fields by name, in the contract's order: what batches are made of and `batch_hash` covers."""
        return dict(vars(self))


def weave(segments: list[Segment], bos_id: int, eos_id: int, placeholder_ids: tuple[int, ...], patch: int) -> Document:
    """Join segments into one document: bos, the segments in order, eos.

    A media position holds its modality's placeholder id. `loss_mask` is 1 where the segment is a target; bos never is,
    eos is one exactly when the last segment is (the model learns to stop only where it learned to speak).
    """
    bos = Segment(TEXT, np.array([bos_id], np.int32), np.zeros((1, 3), np.int32))
    ends_in_target = bool(segments) and segments[-1].is_target
    eos = Segment(TEXT, np.array([eos_id], np.int32), np.zeros((1, 3), np.int32), is_target=ends_in_target)
    woven = [bos, *segments, eos]
    pictures = [s.content for s in woven if s.modality == IMAGE]
    return Document(
        input_ids=np.concatenate(
            [s.content if s.modality == TEXT else np.full(len(s), placeholder_ids[s.modality], np.int32) for s in woven]
        ),
        modality=np.concatenate([np.full(len(s), s.modality, np.uint8) for s in woven]),
        position=np.concatenate([s.position for s in woven]),
        loss_mask=np.concatenate([np.full(len(s), s.is_target, np.uint8) for s in woven]),
        image=np.concatenate(pictures) if pictures else np.zeros((0, patch), np.uint8),
    )


def lay_row(pieces: list[tuple[Document, int]], seq_len: int, pad_id: int, patch: int) -> Row:
    """Lay (document, source) pieces side by side in one row of `seq_len` tokens; what is left over is padding."""
    used = sum(len(document) for document, _ in pieces)
    padding = seq_len - used
    if padding < 0:
        raise ValueError(f"{used} tokens do not fit a row of {seq_len}")
    documents = [document for document, _ in pieces]

    def column(name: str, fill: int, dtype: type, tail: tuple[int, ...] = ()) -> np.ndarray:
        parts = [getattr(document, name) for document in documents]
        return np.concatenate([*parts, np.full((padding, *tail), fill, dtype)]).astype(dtype, copy=False)

    def per_piece(values: list[int], fill: int, dtype: type) -> np.ndarray:
        lengths = [len(document) for document in documents]
        return np.repeat(np.array([*values, fill], dtype), [*lengths, padding])

    return Row(
        input_ids=column("input_ids", pad_id, np.int32),
        modality=column("modality", TEXT, np.uint8),
        position=column("position", 0, np.int32, (3,)),
        document=per_piece(list(range(len(pieces))), PADDING, np.int32),
        source=per_piece([source for _, source in pieces], 0, np.uint8),
        loss_mask=column("loss_mask", 0, np.uint8),
        image=np.concatenate([*(d.image for d in documents), np.zeros((0, patch), np.uint8)]),
    )
