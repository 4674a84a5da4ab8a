"""Segments become the unified sequence: one document, then one packed row of `seq_len` tokens.

T tokens of a row, N tokens of one segment, P values of one patch, F frames, M mel bands.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from omniloom.modality.config import Widths

MODALITIES = ("text", "image", "audio", "video")
TEXT, IMAGE, AUDIO, VIDEO = range(4)
PADDING = -1  # the `document` of a position that belongs to none


@dataclass(frozen=True)
class Segment:
    """One stretch of one modality: its content, and the position of each of its tokens, int32 (N, 3).

    Content: text ids int32 (N,); the patches of a picture or video, uint8 (N, P); a clip's log-mel frames, float16
    (F, M), several of which make one token.
    """

    modality: int
    content: np.ndarray
    position: np.ndarray
    is_target: bool = False

    def __len__(self) -> int:
        return len(self.position)


@dataclass(frozen=True)
class Document:
    """One document of the unified sequence: its fields per token, and its media in order of appearance."""

    input_ids: np.ndarray  # int32 (N,)
    modality: np.ndarray  # uint8 (N,)
    position: np.ndarray  # int32 (N, 3)
    loss_mask: np.ndarray  # uint8 (N,)
    segment_starts: np.ndarray  # int32 (segments,), the first token of each that has one, in order
    image: np.ndarray  # uint8 (N_image, P)
    audio: np.ndarray  # float16 (frames of all clips, M)
    audio_frames: np.ndarray  # int32 (clips,)
    video: np.ndarray  # uint8 (N_video, P)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def nbytes(self) -> int:
        """What its arrays take."""
        return sum(array.nbytes for array in vars(self).values())

    def window(self, start: int, stop: int) -> "Document":
        """The tokens from `start` to `stop`, with the media that belong to them; a clip must lie inside whole."""
        if start == 0 and stop == len(self):
            return self
        modality = self.modality

        def patches(kind: int) -> slice:
            before = np.count_nonzero(modality[:start] == kind)
            return slice(before, before + np.count_nonzero(modality[start:stop] == kind))

        # A clip is a segment: where each begins is known without a look at every token of an hour's film.
        clip_starts = self.segment_starts[modality[self.segment_starts] == AUDIO]
        if any(at < len(self) and modality[at] == AUDIO and at not in clip_starts for at in (start, stop)):
            raise ValueError(f"the window {start} … {stop} cuts a clip")
        clips = slice(*np.searchsorted(clip_starts, [start, stop]).tolist())
        first_frame = int(self.audio_frames[: clips.start].sum())
        last_frame = first_frame + int(self.audio_frames[clips].sum())
        starts = self.segment_starts[(self.segment_starts >= start) & (self.segment_starts < stop)] - start
        return Document(
            self.input_ids[start:stop],
            modality[start:stop],
            self.position[start:stop],
            self.loss_mask[start:stop],
            starts,
            self.image[patches(IMAGE)],
            self.audio[first_frame:last_frame],
            self.audio_frames[clips],
            self.video[patches(VIDEO)],
        )


@dataclass(frozen=True)
class Row:
    """One packed training row, one sample: the contract's fields. Shapes: (T,), position (T, 3), media as Document."""

    input_ids: np.ndarray
    modality: np.ndarray
    position: np.ndarray
    document: np.ndarray
    source: np.ndarray
    loss_mask: np.ndarray
    image: np.ndarray
    video: np.ndarray
    audio: np.ndarray
    audio_frames: np.ndarray

    def fields(self) -> dict[str, np.ndarray]:
        """The fields by name, in the contract's order: what batches are made of and `batch_hash` covers."""
        return dict(vars(self))


TOKEN_FIELDS = ("input_ids", "modality", "position", "document", "source", "loss_mask")  # one entry a token
MEDIA_FIELDS = ("image", "video", "audio", "audio_frames")  # joined in order of appearance


def weave(
    segments: list[Segment], bos_id: int, eos_id: int, placeholder_ids: tuple[int, ...], widths: Widths
) -> Document:
    """Join segments into one document: bos, the segments in order, eos.

    A media position holds its modality's placeholder id. `loss_mask` is 1 where the segment is a target; bos never is,
    eos is one exactly when the last segment is (the model learns to stop only where it learned to speak).
    """
    starts_S = np.cumsum([1, *(len(s) for s in segments)], dtype=np.int32)
    tokens = int(starts_S[-1]) + 1
    input_ids, modality = np.empty(tokens, np.int32), np.zeros(tokens, np.uint8)
    position, loss_mask = np.zeros((tokens, 3), np.int32), np.zeros(tokens, np.uint8)
    input_ids[0], input_ids[-1] = bos_id, eos_id
    loss_mask[-1] = bool(segments) and segments[-1].is_target
    for segment, start, stop in zip(segments, starts_S, starts_S[1:], strict=False):
        loss_mask[start:stop] = segment.is_target
        if segment.modality == TEXT:  # whose positions are 0
            input_ids[start:stop] = segment.content
        else:
            input_ids[start:stop] = placeholder_ids[segment.modality]
            modality[start:stop] = segment.modality
            position[start:stop] = segment.position

    def media(kind: int, empty: np.ndarray) -> np.ndarray:
        return _joined([s.content for s in segments if s.modality == kind], empty)

    return Document(
        input_ids=input_ids,
        modality=modality,
        position=position,
        loss_mask=loss_mask,
        segment_starts=starts_S[:-1][np.diff(starts_S) > 0],
        image=media(IMAGE, np.zeros((0, widths.image), np.uint8)),
        audio=media(AUDIO, np.zeros((0, widths.audio), np.float16)),
        audio_frames=np.array([len(s.content) for s in segments if s.modality == AUDIO], np.int32),
        video=media(VIDEO, np.zeros((0, widths.video), np.uint8)),
    )


def _joined(parts: list[np.ndarray], empty: np.ndarray) -> np.ndarray:
    """The parts one after the other; without a copy where they lie so already, as the frames of a long video do."""
    parts = [part for part in parts if len(part)]
    if not parts:
        return empty
    follow = parts[0].base is not None and all(
        a.base is b.base and a.flags.c_contiguous and a.ctypes.data + a.nbytes == b.ctypes.data
        for a, b in pairwise(parts)
    )
    if not follow:
        return np.concatenate(parts)
    return np.lib.stride_tricks.as_strided(parts[0], (sum(map(len, parts)), *parts[0].shape[1:]), writeable=False)


def lay_row(pieces: list[tuple[Document, int]], seq_len: int, pad_id: int, widths: Widths) -> Row:
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

    def media(name: str, empty: np.ndarray) -> np.ndarray:
        return np.concatenate([empty, *(getattr(document, name) for document in documents)])

    return Row(
        input_ids=column("input_ids", pad_id, np.int32),
        modality=column("modality", TEXT, np.uint8),
        position=column("position", 0, np.int32, (3,)),
        document=per_piece(list(range(len(pieces))), PADDING, np.int32),
        source=per_piece([source for _, source in pieces], 0, np.uint8),
        loss_mask=column("loss_mask", 0, np.uint8),
        image=media("image", np.zeros((0, widths.image), np.uint8)),
        video=media("video", np.zeros((0, widths.video), np.uint8)),
        audio=media("audio", np.zeros((0, widths.audio), np.float16)),
        audio_frames=media("audio_frames", np.zeros(0, np.int32)),
    )
