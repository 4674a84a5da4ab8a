"""Documents that are a list of lengths: all that packing looks at, unless one with media is longer than a row."""

import numpy as np

from omniloom.data.corpus import Documents
from omniloom.data.index import LENGTH
from omniloom.modality.sequence import Document


class Listed(Documents):
    """`tokens[s]` are the lengths of source s's documents; those in `held` have media and are looked at to be cut."""

    def __init__(self, tokens: list[list[int]], held: dict[int, Document] | None = None) -> None:
        self.corpora, self.split, self.held = [], "train", held or {}
        self.names = [f"source_{s}" for s in range(len(tokens))]
        self.first_S = np.cumsum([0, *map(len, tokens)])
        self.corpus_S = np.zeros(len(tokens), int)
        self.is_streamed_S = np.ones(len(tokens), bool)
        self.tokens_S = np.array([sum(lengths) for lengths in tokens])
        self.lengths_S = [np.array([(count, True) for count in lengths], LENGTH) for lengths in tokens]
        for number in self.held:
            source = self.source(number)
            self.lengths_S[source]["plain"][number - self.first_S[source]] = False

    def document(self, document: int) -> Document:
        return self.held[document]


def media_document(*runs: tuple[int, int], segments: list[int] | None = None) -> Document:
    """Runs of (modality, tokens): a text, a picture of one row of patches, a clip, a video of frames of two tokens."""
    modality, position = [], []
    for kind, tokens in runs:
        along = np.arange(tokens, dtype=np.int32)
        zero = np.zeros_like(along)
        columns = {
            0: (zero, zero, zero),
            1: (zero, zero, along),
            2: (along, zero, zero),
            3: (along // 2, zero, along % 2),
        }
        modality.append(np.full(tokens, kind, np.uint8))
        position.append(np.stack(columns[kind], axis=1))
    kinds = np.concatenate(modality)
    starts = np.cumsum([0, *(tokens for _, tokens in runs)])[:-1] if segments is None else segments
    return Document(
        input_ids=np.arange(len(kinds), dtype=np.int32),
        modality=kinds,
        position=np.concatenate(position),
        loss_mask=np.ones(len(kinds), np.uint8),
        segment_starts=np.asarray(starts, np.int32),
        image=np.zeros((int((kinds == 1).sum()), 12), np.uint8),
        audio=np.zeros((2 * int((kinds == 2).sum()), 4), np.float16),
        audio_frames=np.array([2 * tokens for kind, tokens in runs if kind == 2], np.int32),
        video=np.zeros((int((kinds == 3).sum()), 12), np.uint8),
    )
