"""What a manifest may say, and how the stream is cut. Imports nothing heavy."""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

from omniloom.errors import ConfigError, refuse_unless_one_of
from omniloom.modality.config import ModalityConfig, TokenizerConfig

Split = Literal["train", "heldout"]
REPLAY = 0.25
LONG_DOCUMENTS = ("segment", "window")
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
class DecodeConfig:
    """What the decoding of one medium may take; one that takes more is a reject."""

    seconds: float = 120.0
    seconds_per_megabyte: float = 10.0  # of the file, on top
    memory_bytes: int = 2 << 30  # address space over what the decoding process has before

    def check(self) -> None:
        """Raise ConfigError where a limit would let nothing through."""
        for key in ("seconds", "memory_bytes"):
            if getattr(self, key) <= 0:
                raise ConfigError(f"decode.{key}={getattr(self, key)} must be over 0")
        if self.seconds_per_megabyte < 0:
            raise ConfigError(f"decode.seconds_per_megabyte={self.seconds_per_megabyte} must not be negative")


@dataclass
class CorpusConfig:
    """Files to shards: a manifest, or sample files made here, into a corpus folder."""

    corpus: str | None = None
    manifest: str | None = None
    samples: str | None = None  # instead of a manifest: demo, library or smoke
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    modality: ModalityConfig = field(default_factory=ModalityConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
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
        self.decode.check()


@dataclass
class PhaseConfig:
    """From a sample on, the stream is another: sources weigh otherwise, rows are longer, a corpus is added."""

    from_sample: int
    weights: dict[str, float] = field(default_factory=dict)  # a source that is not named keeps its weight
    seq_len: int | None = None
    append: str | None = None  # a corpus folder: its sources join, in the proportions of its manifest
    replay: float | None = None  # with `append`: share of the tokens that stays with the sources before it; else 0.25

    @property
    def replay_share(self) -> float:
        """What stays with the sources before an appended corpus."""
        return REPLAY if self.replay is None else self.replay


@dataclass
class DataConfig:
    """How documents become rows and batches."""

    seq_len: int = 1_024
    long_documents: str = "segment"  # one longer than a row is cut between segments, or as late as may be
    loader_workers: int = 0
    weights: dict[str, float] = field(default_factory=dict)  # replaces the manifest's, by source
    loss_weights: dict[str, float] = field(default_factory=dict)  # replaces the manifest's, by source
    phases: list[PhaseConfig] = field(default_factory=list)  # in order
    plans: str | None = None  # a folder for packing plans; else `plans` beside the corpus's shards

    @property
    def longest_row(self) -> int:
        """The most tokens that a row of any phase has."""
        return max([self.seq_len, *(phase.seq_len or 0 for phase in self.phases)])

    def samples_of(self, tokens: int, multiple: int) -> int:
        """How many rows hold that many positions, up to a multiple."""
        sample, seq_len = 0, self.seq_len
        for phase in self.phases:
            held = (phase.from_sample - sample) * seq_len
            if held >= tokens:
                break
            tokens, sample, seq_len = tokens - held, phase.from_sample, phase.seq_len or seq_len
        return -(-(sample + -(-tokens // seq_len)) // multiple) * multiple

    def check(self) -> None:
        """Raise ConfigError where a size or a weight cannot hold."""
        for key, seq_len in [
            ("seq_len", self.seq_len),
            *((self.name(p) + ".seq_len", p.seq_len) for p in self.phases),
        ]:
            if seq_len is not None and seq_len < 2:
                raise ConfigError(f"a row needs a token and its successor: data.{key}={seq_len} must be at least 2")
        if self.loader_workers < 0:
            raise ConfigError(f"data.loader_workers={self.loader_workers} must not be negative")
        refuse_unless_one_of("data.long_documents", self.long_documents, LONG_DOCUMENTS)
        starts = [0, *(phase.from_sample for phase in self.phases)]
        for before, after in pairwise(starts):
            if after <= before:
                raise ConfigError(
                    f"phases begin one after the other: data.phases from_sample={after} must be over {before}"
                )
        for phase in self.phases:
            if phase.replay is not None and phase.append is None:
                raise ConfigError(
                    f"data.{self.name(phase)}.replay={phase.replay} says what stays where a corpus joins: name that in "
                    f"data.{self.name(phase)}.append"
                )
            if not 0 <= phase.replay_share < 1:
                raise ConfigError(
                    f"data.{self.name(phase)}.replay={phase.replay} must be a share, at least 0 and under 1"
                )
        mappings = [("weights", self.weights), ("loss_weights", self.loss_weights)]
        mappings += [(f"{self.name(phase)}.weights", phase.weights) for phase in self.phases]
        for key, mapping in mappings:
            for name, weight in mapping.items():
                if not 0 <= weight < float("inf"):
                    raise ConfigError(f"data.{key}.{name}={weight} must be a number of at least 0")

    def make_absolute(self) -> None:
        """Name folders from the root: ranks may stand in another one."""
        self.plans = str(Path(self.plans).absolute()) if self.plans else None
        for phase in self.phases:
            phase.append = str(Path(phase.append).absolute()) if phase.append else None

    def check_steps(self, global_batch_size: int) -> None:
        """Raise ConfigError where rows of two lengths would meet in one step."""
        for phase in self.phases:
            if phase.seq_len is not None and phase.from_sample % global_batch_size:
                raise ConfigError(
                    f"rows change their length between steps: data.{self.name(phase)}.from_sample="
                    f"{phase.from_sample} must be a multiple of train.global_batch_size={global_batch_size}"
                )

    def name(self, phase: PhaseConfig) -> str:
        """How errors call a phase."""
        return f"phases[{self.phases.index(phase)}]"
