"""Each job's settings: the rooms' dataclasses and what only a command needs to know, checked before anything starts.

Defaults stand on the dataclass fields and nowhere else; conf/ overrides them; the command line overrides conf/.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omniloom.cluster.config import ClusterConfig, LocalClusterConfig, SweepConfig
from omniloom.data.config import CorpusConfig
from omniloom.errors import ConfigError, did_you_mean, refuse_unless_one_of
from omniloom.track.config import TrackConfig
from omniloom.train.config import TrainingRun


@dataclass
class TokenizeSettings(CorpusConfig):
    """The tokenize job."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def check(self) -> None:
        """Raise ConfigError for every contradiction that can be seen before anything starts."""
        self.check_corpus()
        self.cluster.check()


@dataclass
class TrainSettings(TrainingRun, CorpusConfig):
    """The train job; where its corpus does not exist yet and a manifest or samples are named, it is made first."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    like: str | None = None  # a run whose configuration comes before this command's overrides
    fork: str | None = None  # <run>@<step>: a checkpoint to begin at, with its optimizer and place in the data

    def check(self) -> None:
        """Raise ConfigError for every contradiction that can be seen before anything starts."""
        self.cluster.check()
        self.check_run(self.cluster.workers)
        if self.corpus is None:
            raise ConfigError("nothing to train on: set corpus=<folder that `omniloom tokenize` wrote>")
        if self.manifest or self.samples:
            self.check_corpus()
        # Workers may stand in another folder.
        self.corpus, self.runs_dir = str(Path(self.corpus).absolute()), str(Path(self.runs_dir).absolute())


@dataclass
class PlanSettings(TrainSettings):
    """What a train job would take."""

    json: bool = False


@dataclass
class EvaluateSettings:
    """lm-eval tasks on a trained model."""

    init: str | None = None
    tasks: list[str] = field(default_factory=lambda: ["perplexity"])
    task_args: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    batch_tokens: int = 8_192
    runs_dir: str = "runs"
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
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
    tokenizer: str | None = None  # tokenizer.json, or llama2.c's .bin, where the source has none
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
class ClientSettings:
    """What is asked of a cluster's job server."""

    verb: str = "jobs"  # or status, logs, stop
    id: str | None = None
    follow: bool = False
    json: bool = False
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

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

    runs_dir: str = "runs"
    json: bool = False
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
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
}


# Verbs that many runs can be made of.
SWEEPABLE = {verb: SUBMITTABLE[verb] for verb in ("train",)}
