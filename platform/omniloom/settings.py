"""Each job's settings: the rooms' dataclasses and what only a command needs to know, checked before anything starts.

Defaults stand on the dataclass fields and nowhere else; conf/ overrides them; the command line overrides conf/.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omniloom.cluster.config import ClusterConfig, LocalClusterConfig, SweepConfig
from omniloom.data.config import SPLITS, CorpusConfig, DataConfig
from omniloom.errors import ConfigError, did_you_mean, refuse_unless_one_of
from omniloom.generate.config import ChatConfig, GenerateConfig
from omniloom.modality.config import ModalityConfig
from omniloom.plan.config import HardwareConfig
from omniloom.plan.speeds import PRODUCTS_IN
from omniloom.track.config import TrackConfig
from omniloom.train.config import TrainingRun
from omniloom.train.groups import TrainConfig


@dataclass
class ClusterSettings(ClusterConfig, HardwareConfig):
    """Which cluster, and what it is made of: conf/cluster/."""

    def check(self) -> None:
        """Raise ConfigError for every contradiction that can be seen before anything starts."""
        self.check_workers()
        self.check_hardware()
        if self.nodes > 1 and self.address is None and "RAY_ADDRESS" not in os.environ:
            raise ConfigError(
                f"cluster.nodes={self.nodes} are more than this machine: name their head, cluster.address=head:6379 "
                "(http://head:8265 to submit)"
            )


@dataclass
class TokenizeSettings(CorpusConfig):
    """The tokenize job."""

    cluster: ClusterSettings = field(default_factory=ClusterSettings)

    def check(self) -> None:
        """Raise ConfigError for every contradiction that can be seen before anything starts."""
        self.check_corpus()
        self.cluster.check()


@dataclass
class TrainSettings(TrainingRun, CorpusConfig):
    """The train job; where its corpus does not exist yet and a manifest or samples are named, it is made first."""

    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    like: str | None = None  # a run whose configuration comes before this command's overrides
    fork: str | None = None  # <run>@<step>: a checkpoint to begin at, with its optimizer and place in the data

    @property
    def peak_flops_per_s(self) -> float | None:
        """Of one rank in the precision of its products, by its data sheet; None where the cluster does not say."""
        return self.cluster.device.peak_flops_per_s.get(PRODUCTS_IN[self.train.precision])

    def check(self) -> None:
        """Raise ConfigError for every contradiction that can be seen before anything starts."""
        self.cluster.check()
        self.check_run(self.cluster.workers)
        least, numbers = self.cluster.min_workers, self.numbers_of_ranks
        if least is not None and least not in numbers:
            raise ConfigError(
                f"cluster.min_workers={least}: so many ranks cannot share train.global_batch_size="
                f"{self.train.global_batch_size} by train.micro_batch_size={self.train.micro_batch_size}; up to "
                f"cluster.workers={self.cluster.workers} those that can are {', '.join(map(str, numbers))}"
            )
        if self.corpus is None:
            raise ConfigError("nothing to train on: set corpus=<folder that `omniloom tokenize` wrote>")
        if self.manifest or self.samples:
            self.check_corpus()
        # Workers may stand in another folder.
        self.corpus, self.runs_dir = str(Path(self.corpus).absolute()), str(Path(self.runs_dir).absolute())
        self.data.make_absolute()
        self.checkpoint.make_absolute()

    @property
    def numbers_of_ranks(self) -> list[int]:
        """From cluster.min_workers to cluster.workers, smallest first, those that this run can be shared by."""
        numbers = []
        for number in range(self.cluster.min_workers or self.cluster.workers, self.cluster.workers + 1):
            try:
                self.check_run(number)
            except ConfigError:
                continue
            numbers.append(number)
        return numbers


@dataclass
class PlanSettings(TrainSettings):
    """What a train job would take."""

    compare: list[str] = field(default_factory=list)  # models, side by side
    shares: dict[str, float] = field(default_factory=dict)  # of the tokens, by medium; else the corpus's, or all text
    plot: str | None = None  # a png
    json: bool = False

    def check(self) -> None:
        """Raise ConfigError for what no plan can be made of; no corpus, address or length of the run is needed."""
        self.model.check()
        self.data.check()
        self.train.check()
        self.parallel.check()
        self.cluster.check_workers()
        self.cluster.check_hardware()
        self.check_engine()
        if self.train.steps is not None and self.train.tokens is not None:
            raise ConfigError(
                f"say how long once: train.steps={self.train.steps} or train.tokens={self.train.tokens}, not both"
            )
        for medium, share in self.shares.items():
            refuse_unless_one_of("shares", medium, ModalityConfig.__dataclass_fields__)
            if not 0 <= share <= 1:
                raise ConfigError(f"shares.{medium}={share} must lie between 0 and 1")
        if sum(self.shares.values()) > 1:
            raise ConfigError(f"the media's shares of the tokens are {sum(self.shares.values()):g} in all, over 1")
        if self.compare and self.plot:
            raise ConfigError(f"compare prints a table and has no picture: leave out plot={self.plot}")
        if not self.compare:
            self.check_context()
        _check_plot(self.plot)


@dataclass
class ScalingSettings:
    """A law of loss, model size and data."""

    sweep_run: str | None = None  # its runs
    runs_dir: str = "runs"
    metric: str = "val/loss"
    budget: float | None = None  # FLOPs; else the largest run's
    resamples: int = 200  # for the intervals
    seed: int = 0  # of what is drawn for them
    plot: str | None = None  # a png
    json: bool = False

    def check(self) -> None:
        """Raise ConfigError where no sweep is named or a number cannot hold."""
        if self.sweep_run is None:
            here = ", ".join(sorted(path.parent.name for path in Path(self.runs_dir).glob("*/sweep.json")))
            raise ConfigError(f"name one sweep: omniloom plan scaling SWEEP [runs_dir=runs]; here are {here or 'none'}")
        if self.budget is not None and not 0 < self.budget < float("inf"):
            raise ConfigError(f"budget={self.budget:g} must be a number of FLOPs above 0")
        if self.resamples < 20:
            raise ConfigError(f"resamples={self.resamples} must be at least 20: an interval of 95% is read off them")
        _check_plot(self.plot)


def _check_plot(plot: str | None) -> None:
    if plot is not None and Path(plot).suffix != ".png":
        raise ConfigError(f"plot={plot} must end in .png")
    if plot is not None and not Path(plot).parent.is_dir():
        raise ConfigError(f"plot={plot}: there is no folder {Path(plot).parent}")


@dataclass
class EvaluateSettings:
    """lm-eval tasks on a trained model."""

    init: str | None = None
    tasks: list[str] = field(default_factory=lambda: ["perplexity"])
    task_args: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    batch_tokens: int = 8_192
    runs_dir: str = "runs"
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    json: bool = False

    def check(self) -> None:
        """Raise ConfigError where nothing is named to evaluate."""
        if self.init is None:
            raise ConfigError("no model to evaluate: set init=<run, checkpoint or model folder>")
        if not self.tasks:
            raise ConfigError("no task to run: set tasks=[perplexity,…]")
        for name in self.task_args:
            if name not in self.tasks:
                raise ConfigError(f"task_args.{name} is for no task of this command; {did_you_mean(name, self.tasks)}")
        if self.batch_tokens < 1 or (self.limit is not None and self.limit < 1):
            raise ConfigError(f"batch_tokens={self.batch_tokens} and limit={self.limit} must be at least 1")


@dataclass
class GenerateSettings(GenerateConfig):
    """What a trained model writes."""

    cluster: ClusterSettings = field(default_factory=ClusterSettings)  # for `omniloom submit generate`
    json: bool = False


@dataclass
class ChatSettings(ChatConfig):
    """A conversation with a trained model."""


@dataclass
class ExportSettings:
    """A model of ours as a Hugging Face folder."""

    init: str | None = None  # a run, a checkpoint or a model folder
    to: str | None = None
    dtype: str | None = None  # fp32, bf16 or fp16; as it is kept
    max_shard_bytes: int = 4_000_000_000
    force: bool = False  # replace the folder where it is a model's
    runs_dir: str = "runs"

    def check(self) -> None:
        """Raise ConfigError where nothing is named to export, or nowhere."""
        if self.init is None or self.to is None:
            raise ConfigError("name a model and a new folder: omniloom export RUN FOLDER")
        _refuse_no_bytes(self.max_shard_bytes)


@dataclass
class ImportSettings:
    """Somebody else's model as one of ours."""

    source: str | None = None  # a Hugging Face folder, or a file of llama2.c's
    to: str | None = None
    tokenizer_path: str | None = None  # tokenizer.json, or llama2.c's .bin, where the source has none
    max_shard_bytes: int = 4_000_000_000
    force: bool = False  # replace the folder where it is a model's

    def check(self) -> None:
        """Raise ConfigError where nothing is named to import, or nowhere."""
        if self.source is None or self.to is None:
            raise ConfigError("name a source and a new folder: omniloom import SOURCE FOLDER")
        _refuse_no_bytes(self.max_shard_bytes)


def _refuse_no_bytes(max_shard_bytes: int) -> None:
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes={max_shard_bytes} must be at least 1")


@dataclass
class SweepSettings:
    """What a sweep needs to know beside its trials' own keys."""

    run: str = "sweep"
    runs_dir: str = "runs"
    sweep: SweepConfig = field(default_factory=SweepConfig)


@dataclass
class ReportSettings:
    """A run's page."""

    run: str | None = None  # a name in runs_dir, or a run's folder
    runs_dir: str = "runs"

    def check(self) -> None:
        """Raise ConfigError where no run is named."""
        if self.run is None:
            here = ", ".join(sorted(path.parent.name for path in Path(self.runs_dir).glob("*/run.json")))
            raise ConfigError(f"name one run: omniloom report RUN [runs_dir=runs]; here are {here or 'none'}")


@dataclass
class ShowSettings:
    """A corpus and one of its rows, or a run."""

    what: str | None = None  # a corpus folder, a name in runs_dir, or a run's folder
    row: int = 0  # global sample index
    document: int | None = None  # instead of a row: its number within the split
    split: str = "train"  # or heldout
    seed: int = TrainingRun.seed
    val_rows: int = TrainConfig.val_rows  # of the run whose held-out rows are meant
    data: DataConfig = field(default_factory=DataConfig)
    runs_dir: str = "runs"
    json: bool = False

    def check(self) -> None:
        """Raise ConfigError where nothing is named or a number cannot hold."""
        if self.what is None:
            places = ", ".join(self.corpora()) or "none"
            raise ConfigError(f"name a corpus or a run: omniloom show CORPUS | RUN; corpora here are {places}")
        refuse_unless_one_of("split", self.split, SPLITS)
        for key in ("row", "document", "val_rows", "seed"):
            value, least = getattr(self, key), int(key == "val_rows")
            if value is not None and value < least:
                raise ConfigError(f"{key}={value} must be at least {least}")
        self.data.check()

    def corpora(self) -> list[str]:
        """Corpus folders near the one that is named, and in corpora/."""
        places = {Path("corpora"), Path(self.what or "").parent}
        return sorted({str(path.parent) for place in places for path in place.glob("*/index.json")})


@dataclass
class ClientSettings:
    """What is asked of a cluster's job server."""

    verb: str = "jobs"  # or status, logs, stop
    id: str | None = None
    follow: bool = False
    json: bool = False
    cluster: ClusterSettings = field(default_factory=ClusterSettings)

    def check(self) -> None:
        """Raise ConfigError where no job is named."""
        refuse_unless_one_of("verb", self.verb, ("jobs", "status", "logs", "stop"))
        if self.id is None and self.verb != "jobs":
            raise ConfigError(f"name a job: omniloom {self.verb} ID; `omniloom jobs` lists them")


@dataclass
class LocalClusterSettings(LocalClusterConfig):
    """A cluster on this machine."""

    action: str | None = None  # up or down
    json: bool = False

    def check(self) -> None:
        """Raise ConfigError where the action is neither up nor down."""
        refuse_unless_one_of("action", self.action or "", ("up", "down"))
        super().check()


@dataclass
class DoctorSettings:
    """What is looked at."""

    measure: bool = False  # what the cluster's ranks reach, for the planner: some 90 s of all their cores
    runs_dir: str = "runs"
    json: bool = False
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    track: TrackConfig = field(default_factory=TrackConfig)


@dataclass
class SyncSettings:
    """An offline run, to be pushed."""

    run: str | None = None
    runs_dir: str = "runs"

    def check(self) -> None:
        """Raise ConfigError where no run is named."""
        if self.run is None:
            raise ConfigError("name one run: omniloom sync RUN [runs_dir=runs]")


# Verbs that can be submitted: their root in conf/ and their settings.
SUBMITTABLE: dict[str, tuple[str, type]] = {
    "tokenize": ("tokenize_corpus", TokenizeSettings),
    "train": ("pretrain", TrainSettings),
    "evaluate": ("run_evals", EvaluateSettings),
    "generate": ("generate_text", GenerateSettings),
}


# Verbs that many runs can be made of.
SWEEPABLE = {verb: SUBMITTABLE[verb] for verb in ("train",)}
