"""One forward pass of a decoder with its cache: pieces of several sequences side by side in one packed row."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from omniloom.generate.kv_cache import KVCache
from omniloom.modality.batch import MODEL_INPUTS, stack_rows
from omniloom.modality.config import Widths
from omniloom.modality.sequence import AUDIO, IMAGE, VIDEO, Document, lay_row, weave
from omniloom.modality.text import text_segment
from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder, text_fields


class Piece(NamedTuple):
    """A sequence's next tokens: its slot, a document's window or plain ids, and where logits are wanted."""

    slot: int
    tokens: Document | list[int]
    predicts: int = 1  # logits of so many of its last tokens
    is_prompt: bool = False


class Passed(NamedTuple):
    """What a pass gives of each piece, in order."""

    logits: list[Tensor]  # (predicts, V)
    hidden: list[Tensor]  # (tokens, D), after the final norm
    embedded: list[Tensor]  # (tokens, D), before the first layer


@torch.no_grad()
def forward(decoder: Decoder, cache: KVCache, pieces: list[Piece]) -> Passed:
    """Put the pieces' tokens behind what is cached of their sequences."""
    lengths = [len(piece.tokens) for piece in pieces]
    cache.next_batch([(piece.slot, length) for piece, length in zip(pieces, lengths, strict=True)])
    fields = _fields(pieces, decoder.config)
    device = decoder.embed_tokens.weight.device
    predict_at = torch.zeros(1, sum(lengths), dtype=torch.bool)
    ends = np.cumsum(lengths)
    for piece, end in zip(pieces, ends.tolist(), strict=True):
        predict_at[0, end - piece.predicts : end] = True
    output = decoder(
        **{name: field.to(device) for name, field in fields.items()}, predict_at=predict_at.to(device), past=cache
    )
    cache.advance()
    logits = output.logits.split([piece.predicts for piece in pieces])
    hidden, embedded = (x[0].split(lengths) for x in (output.hidden, output.embedded))
    return Passed(list(logits), list(hidden), list(embedded))


def read(decoder: Decoder, cache: KVCache, slot: int, document: Document, chunk_tokens: int) -> Tensor:
    """Put a document behind what is cached of a slot's sequence, chunk by chunk: logits of what comes next, (V,)."""
    parted, done = glued(document, decoder.config), 0
    while done < len(document):
        end = chunk_end(parted, done, chunk_tokens)
        passed = forward(decoder, cache, [Piece(slot, document.window(done, end), is_prompt=True)])
        cache.settle(slot)
        done = end
    return passed.logits[0][0]


def _fields(pieces: list[Piece], config: ModelConfig) -> dict[str, Tensor]:
    plain = [_plain_ids(piece.tokens) for piece in pieces]
    if None not in plain:  # no media: the usual step, kept short
        ids = torch.tensor([id for one in plain if one is not None for id in one])
        lengths = torch.tensor([len(piece.tokens) for piece in pieces])
        return text_fields(ids[None], config) | {"document": torch.arange(len(pieces)).repeat_interleave(lengths)[None]}
    documents = [as_document(piece.tokens, config) for piece in pieces]
    row = lay_row([(one, 0) for one in documents], sum(map(len, documents)), 0, Widths(*config.widths))
    fields = stack_rows([row])
    return {name: fields[name] for name in MODEL_INPUTS}


def _plain_ids(tokens: Document | list[int]) -> list[int] | None:
    """The ids, where they are text's alone."""
    if isinstance(tokens, Document):
        return None if tokens.modality.any() else tokens.input_ids.tolist()
    return tokens


def as_document(tokens: Document | list[int], config: ModelConfig) -> Document:
    """Plain ids as a document; a document as it is."""
    if isinstance(tokens, Document):
        return tokens
    segment = text_segment(np.asarray(tokens, np.int32), is_target=False)
    return weave([segment], 0, 0, (), Widths(*config.widths)).window(1, 1 + len(tokens))


def glued(document: Document, config: ModelConfig) -> np.ndarray:
    """Whether a token cannot be parted from the one before it, bool (N,): a clip is encoded whole, and the tokens of a
    picture or frame see each other where `media_bidirectional` says so."""
    modality, place = document.modality, document.position
    same = np.zeros(len(document), bool)
    same[1:] = modality[1:] == modality[:-1]
    begins_segment = np.zeros(len(document), bool)
    begins_segment[document.segment_starts] = True
    clip = same & (modality == AUDIO) & ~begins_segment
    if not config.media_bidirectional:
        return clip
    shown = (modality == IMAGE) | (modality == VIDEO)
    return clip | (same & shown & (place[:, 1:] != 0).any(axis=1))


def chunk_end(glued_N: np.ndarray, start: int, most: int) -> int:
    """Where a chunk of about `most` tokens that begins at `start` may end: never inside what cannot be parted."""
    end = min(start + most, len(glued_N))
    back = end
    while back > start and back < len(glued_N) and glued_N[back]:
        back -= 1
    if back > start:
        return back
    while end < len(glued_N) and glued_N[end]:
        end += 1
    return end
