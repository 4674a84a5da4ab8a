"""What there is to say of a corpus and of one of its rows, as plain values: `omniloom show` draws or dumps them."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from tqdm import tqdm

from omniloom.data.config import SPLITS, Split
from omniloom.data.corpus import Corpus, Documents
from omniloom.data.index import Reject
from omniloom.data.pack import Piece
from omniloom.data.plan import SHUFFLED_ROWS, PlanRecord, Schedule, Stream, heldout_rows
from omniloom.errors import ConfigError
from omniloom.modality.config import ModalityConfig
from omniloom.modality.sequence import AUDIO, IMAGE, MODALITIES, PADDING, TEXT, VIDEO, Document
from omniloom.modality.text import TextTokenizer

BEGIN, END = "bos", "eos"  # kinds of a stretch beside the modalities
# What differs between two rejects of one reason: something quoted, a path, a number.
PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|(?<!\w)\S*/\S+|(?<![\w.])-?\d[\d.,_]*")


@dataclass
class RejectGroup:
    """Documents that were skipped for one reason, its particulars left out; their share of all documents."""

    reason: str
    count: int
    share: float
    example: Reject


def rejects_by_reason(corpus: Corpus) -> list[RejectGroup]:
    """The rejects of a corpus, the most frequent reason first."""
    groups: dict[str, RejectGroup] = {}
    for reject in corpus.rejects():
        reason = PARTICULARS.sub("…", reject.reason)
        groups.setdefault(reason, RejectGroup(reason, 0, 0.0, reject)).count += 1
    held = [source.split(split) for source in corpus.index.sources for split in SPLITS]
    documents = sum(record.documents + record.rejects for record in held)
    for group in groups.values():
        group.share = group.count / documents
    return sorted(groups.values(), key=lambda group: -group.count)


@dataclass(frozen=True)
class Stretch:
    """One segment of a document in a row, or the mark it begins or ends with: the tokens from `begin` to `end`."""

    kind: str  # a modality, or bos, eos
    begin: int
    end: int
    is_target: bool
    text: str | None = None
    position: dict[str, list[int]] | None = None  # first and last of time, row, column
    frames: int | None = None  # of a video, or of a sound's log-mel
    clips: int | None = None
    seconds: float | None = None
    content: np.ndarray | None = field(default=None, repr=False)  # patches, or log-mel frames

    def as_dict(self) -> dict[str, Any]:
        """For a machine: without what it has not, and without pixels."""
        told = {name: value for name, value in vars(self).items() if value is not None and name != "content"}
        return told | {"tokens": self.end - self.begin}


@dataclass(frozen=True)
class Part:
    """A document's part of a row: its tokens from `start` to `stop`, in the row from `begin` on."""

    document: int  # its number within the split
    name: str  # where it came from
    source: str
    start: int
    stop: int
    tokens: int  # of the whole document
    begin: int
    stretches: list[Stretch]

    def as_dict(self) -> dict[str, Any]:
        """For a machine."""
        told = vars(self) | {"segments": [stretch.as_dict() for stretch in self.stretches]}
        return {name: value for name, value in told.items() if name != "stretches"}


@dataclass(frozen=True)
class RowFacts:
    """One packed row, or one document by itself: per token as in the contract, and document by document."""

    seq_len: int
    parts: list[Part]
    modality: np.ndarray  # (T,)
    document: np.ndarray  # (T,), PADDING where there is none
    loss_mask: np.ndarray  # (T,)

    @property
    def padding(self) -> int:
        """How many positions are empty."""
        return int((self.document == PADDING).sum())

    @property
    def tokens(self) -> dict[str, int]:
        """By modality."""
        counts = np.bincount(self.modality[self.document != PADDING], minlength=len(MODALITIES))
        return dict(zip(MODALITIES, counts.tolist(), strict=True))

    @property
    def mask_runs(self) -> list[tuple[int, int, int]]:
        """`loss_mask` as (begin, end, value), one after the other."""
        runs, begin = [], 0
        for value, run in groupby(self.loss_mask.tolist()):
            runs.append((begin, end := begin + len(list(run)), value))
            begin = end
        return runs

    def as_dict(self) -> dict[str, Any]:
        """For a machine."""
        return {
            "seq_len": self.seq_len,
            "padding": self.padding,
            "tokens": self.tokens,
            "loss_mask": self.mask_runs,
            "documents": [part.as_dict() for part in self.parts],
        }


def corpus_facts(corpus: Corpus) -> dict[str, Any]:
    """Everything the index says, and the rejects by reason."""
    rejects = [asdict(group) for group in rejects_by_reason(corpus)]
    return {"corpus": str(corpus.folder), "sha256": corpus.sha256, "index": asdict(corpus.index), "rejects": rejects}


def stream_row(documents: Documents, schedule: Schedule, row: int) -> tuple[list[Piece], PlanRecord]:
    """That row of the training stream, and what came of packing all rows up to it, or the first block of them.

    Packed anew from the first row on, in memory: nothing is written, and a row far out takes as long as a run's plan of
    so many rows.
    """
    rows = max(row + 1, SHUFFLED_ROWS)
    stream = Stream(documents, schedule)
    found: list[Piece] = []
    with tqdm(total=rows, desc="pack the rows", unit="row", delay=2) as bar:
        for block in stream.blocks(rows):
            first = stream.record.rows - len(block)
            if first <= row < stream.record.rows:
                found = block[row - first]
            bar.update(len(block))
    return found, stream.record


def heldout_row(documents: Documents, seq_len: int, val_rows: int, policy: str, row: int) -> list[Piece]:
    """That row of those that a run of so many `val_rows` validates on; raises ConfigError where there are fewer."""
    rows = heldout_rows(documents, seq_len, val_rows, policy)
    if row >= len(rows):
        raise ConfigError(f"row={row} is not there: the held-out documents make {len(rows)} rows, counted from 0")
    return rows[row]


def whole_document(documents: Documents, split: Split, number: int) -> Piece:
    """All of one document; raises ConfigError where the split has fewer."""
    if number >= len(documents):
        raise ConfigError(f"document={number} is not there: split={split} has {len(documents):,}, counted from 0")
    return Piece(number, 0, int(documents.lengths(np.array([number]))["tokens"][0]))


def dissect(documents: Documents, pieces: list[Piece], seq_len: int) -> RowFacts:
    """What lies in a row of these pieces."""
    parts: list[Part] = []
    padded = {"modality": TEXT, "document": PADDING, "loss_mask": 0}
    fields = {name: np.full(seq_len, fill, np.int32) for name, fill in padded.items()}
    begin = 0
    for number, piece in enumerate(pieces):
        place = slice(begin, begin + piece.tokens)
        window = documents.document(piece.document).window(piece.start, piece.stop)
        fields["modality"][place] = window.modality
        fields["document"][place] = number
        fields["loss_mask"][place] = window.loss_mask
        whole = int(documents.lengths(np.array([piece.document]))["tokens"][0])
        marks = (piece.start == 0, piece.stop == whole)
        parts.append(
            Part(
                document=piece.document,
                name=documents.name(piece.document),
                source=documents.names[documents.source(piece.document)],
                start=piece.start,
                stop=piece.stop,
                tokens=whole,
                begin=begin,
                stretches=list(_stretches(window, begin, marks, documents.tokenizer, documents.modality)),
            )
        )
        begin = place.stop
    return RowFacts(seq_len, parts, **fields)


def _stretches(
    document: Document, begin: int, marks: tuple[bool, bool], tokenizer: TextTokenizer, sizes: ModalityConfig
) -> Iterator[Stretch]:
    """The segments of a document's window that lies at `begin`; `marks`: whether it begins with bos, ends with eos."""
    count = len(document)
    edges = {0, count, *document.segment_starts.tolist()}
    edges |= {*(1 + np.flatnonzero(np.diff(document.loss_mask) | np.diff(document.modality))).tolist()}
    edges |= {count - 1} if marks[1] else set()  # after bos there is a segment or eos
    used = dict.fromkeys(("image", "audio", "clips", "video"), 0)  # media before the segment, in their own entries

    def next_of(name: str, entries: int) -> slice:
        used[name] += entries
        return slice(used[name] - entries, used[name])

    for start, stop in pairwise(sorted(edges)):
        modality, place = int(document.modality[start]), document.position[start:stop]
        is_target = bool(document.loss_mask[start])
        extent = (begin + start, begin + stop, is_target)
        between = zip(("time", "row", "column"), place.min(0).tolist(), place.max(0).tolist(), strict=True)
        position = {axis: [first, last] for axis, first, last in between}
        if modality == IMAGE:
            patches = document.image[next_of("image", stop - start)]
            yield Stretch("image", *extent, position=position, content=patches)
        elif modality == AUDIO:
            clips = next_of("clips", int((place[:, 0] == 0).sum()))
            frames = int(document.audio_frames[clips].sum())
            sound, seconds = document.audio[next_of("audio", frames)], frames * sizes.audio.hop_ms / 1_000
            number = clips.stop - clips.start
            yield Stretch("audio", *extent, None, position, frames, number, seconds, sound)
        elif modality == VIDEO:
            patches = document.video[next_of("video", stop - start)]
            frames = position["time"][1] - position["time"][0] + 1
            seconds = frames / sizes.video.frames_per_second
            yield Stretch("video", *extent, None, position, frames, None, seconds, patches)
        elif (start == 0 and marks[0]) or (stop == count and marks[1]):
            yield Stretch(BEGIN if start == 0 else END, *extent)
        else:
            yield Stretch("text", *extent, tokenizer.decode(document.input_ids[start:stop].tolist()))
