"""What a corpus folder says about itself: a shard's record while it is built, the index once it is whole."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from omniloom.data.config import DecodeConfig, Split
from omniloom.modality.config import ModalityConfig
from omniloom.modality.sequence import MODALITIES

# One document as packing sees it: a plain one is a single text, which may be cut anywhere.
LENGTH = np.dtype([("tokens", "<i4"), ("plain", "?")])
LONGEST_POWER = 31
MOST_SOURCES = 256  # the `source` field is one byte
PREFERENCE = "preference"  # the format whose documents are pairs of a chosen and a rejected answer


@dataclass
class Reject:
    """A document that was skipped, and why."""

    name: str
    reason: str


@dataclass
class ShardRecord:
    """What one shard holds; `fingerprint` covers its input files, the tokenizer and the modality's sizes."""

    file: str
    source: str
    split: Split
    fingerprint: str
    sha256: str
    bytes: int
    documents: int
    tokens: int
    media_tokens: dict[str, int]  # by modality
    lengths: list[int]  # how many documents have 2^k … 2^(k+1) − 1 tokens
    rejects: list[Reject]
    limits: DecodeConfig  # what they are rejects by


@dataclass
class SplitRecord:
    """What one source holds in one split; its shards and documents follow one another, counted within the split."""

    shards: int = 0
    bytes: int = 0
    documents: int = 0
    tokens: int = 0
    media_tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MODALITIES[1:], 0))
    lengths: list[int] = field(default_factory=lambda: [0] * LONGEST_POWER)
    rejects: int = 0

    @classmethod
    def of(cls, shard: ShardRecord) -> "SplitRecord":
        """What one shard holds."""
        return cls(1, shard.bytes, shard.documents, shard.tokens, shard.media_tokens, shard.lengths, len(shard.rejects))

    def add(self, other: "SplitRecord") -> None:
        """Count in what another holds."""
        self.shards += other.shards
        self.bytes += other.bytes
        self.documents += other.documents
        self.tokens += other.tokens
        self.media_tokens = {kind: count + other.media_tokens[kind] for kind, count in self.media_tokens.items()}
        self.lengths = [ours + more for ours, more in zip(self.lengths, other.lengths, strict=True)]
        self.rejects += other.rejects


@dataclass
class SourceRecord:
    """A source as the manifest weighed it, and what it holds."""

    name: str
    weight: float
    loss_weight: float
    format: str = "text"
    train: SplitRecord = field(default_factory=SplitRecord)
    heldout: SplitRecord = field(default_factory=SplitRecord)

    def split(self, split: Split) -> SplitRecord:
        """Its part of one split."""
        return self.train if split == "train" else self.heldout


@dataclass
class Table:
    """One of the corpus's own files, as it was written."""

    sha256: str
    bytes: int


@dataclass
class Index:
    """The corpus's table of contents: as long as its list of sources, however many documents they have."""

    vocab_size: int
    modality: ModalityConfig
    sources: list[SourceRecord]
    files: dict[str, Table]  # the tokenizer and the corpus's tables, by name


def length_histogram(tokens: np.ndarray) -> list[int]:
    """How many of these documents have 2^k … 2^(k+1) − 1 tokens, k from 0."""
    powers = np.frexp(np.maximum(tokens, 1))[1] - 1
    return np.bincount(powers, minlength=LONGEST_POWER)[:LONGEST_POWER].tolist()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
