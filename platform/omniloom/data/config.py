"""What a manifest may say, and how the stream is cut. Imports nothing heavy."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from omniloom.errors import ConfigError
from omniloom.modality.config import ModalityConfig, TokenizerConfig

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")


Format = Literal["text", "jsonl", "parquet", "webdataset", "folder", "chat", "preference", "interleaved"]


@dataclass(kw_only=True)
class Reading:
    """How a source's files are read: which keys or columns hold what, and how large a document may be."""

    text_key: str | None = None  # None: the first of text, caption, transcript, transcription, sentence
    image_key: str = "image"  # columns of a Parquet file
    audio_key: str = "audio"
    video_key: str = "video"
    limit_document_bytes: int = 64 << 20  # as it stands in its file: a line, a row, the members of a tar's sample


@dataclass
class SourceSpec(Reading):
    """One source of a manifest: glob patterns relative to the manifest's folder, or URLs, and its two weights."""

    format: Format
    train: list[str]
    heldout: list[str] = field(default_factory=list)
    weight: float = 1.0  # share of the training tokens, relative to the other sources
    loss_weight: float = 1.0  # weight of each of its targets in the loss


@dataclass
class Manifest:
    """The sources of a corpus by name; their order gives the ids of the `source` field."""

    sources: dict[str, SourceSpec]


@dataclass
class CorpusConfig:
    """Files to shards: a manifest, or sample files made here, into a corpus folder."""

    corpus: str | None = None
    manifest: str | None = None
    samples: str | None = None  # instead of a manifest: demo, library or smoke
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    modality: ModalityConfig = field(default_factory=ModalityConfig)
    max_reject_share: float = 0.01  # of all documents; more than this fails the job
    force: bool = False  # rebuild a corpus that stands there already

    def check_corpus(self) -> None:
        """Raise ConfigError where source or target is missing or given twice."""
        if self.corpus is None:
            raise ConfigError("no corpus folder to write: set corpus=<folder>")
        if (self.manifest is None) == (self.samples is None):
            raise ConfigError(
                f"exactly one of manifest={self.manifest} and samples={self.samples} must be set: a YAML that names "
                "your files, or demo, library or smoke for files made here"
            )
        if not 0 <= self.max_reject_share <= 1:
            raise ConfigError(f"max_reject_share={self.max_reject_share} must lie between 0 and 1")
        self.modality.check()


@dataclass
class PhaseConfig:
    """From a sample on, sources weigh otherwise; a source that is not named keeps its weight."""

    from_sample: int
    weights: dict[str, float]


@dataclass
class DataConfig:
    """How documents become rows and batches."""

    seq_len: int = 1_024
    loader_workers: int = 0
    weights: dict[str, float] = field(default_factory=dict)  # replaces the manifest's, by source
    loss_weights: dict[str, float] = field(default_factory=dict)  # replaces the manifest's, by source

    phases: list[PhaseConfig] = field(default_factory=list)  # in order

    def check(self) -> None:
        """Raise ConfigError where a size or a weight cannot hold."""
        if self.seq_len < 2:
            raise ConfigError(f"a row needs a token and its successor: data.seq_len={self.seq_len} must be at least 2")
        if self.loader_workers < 0:
            raise ConfigError(f"data.loader_workers={self.loader_workers} must not be negative")
        starts = [0, *(phase.from_sample for phase in self.phases)]
        for before, after in pairwise(starts):
            if after <= before:
                raise ConfigError(
                    f"phases begin one after the other: data.phases from_sample={after} must be over {before}"
                )
        mappings = [("weights", self.weights), ("loss_weights", self.loss_weights)]
        mappings += [(f"phases from_sample={phase.from_sample}", phase.weights) for phase in self.phases]
        for key, mapping in mappings:
            for name, weight in mapping.items():
                if not 0 <= weight < float("inf"):
                    raise ConfigError(f"data.{key}.{name}={weight} must be a number of at least 0")
