"""What a training run is, and the rules between its keys. Imports nothing heavy."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from omniloom.data.config import DataConfig
from omniloom.errors import ConfigError, refuse_unless_one_of
from omniloom.model.config import ModelConfig
from omniloom.plan.config import Workload
from omniloom.track.config import TrackConfig

if TYPE_CHECKING:
    from omniloom.data.index import Index


PRECISIONS = ("fp32", "bf16_autocast", "bf16", "fp16", "fp8")  # train/precision.py says what each means


@dataclass
class TrainConfig:
    """How long, how large a batch, in which precision, how often to look.

    The three batch terms: `global_batch_size`, sequences per optimizer step; `micro_batch_size`, sequences per rank per
    forward; `gradient_accumulation_steps`, derived from both and the number of ranks.
    """

    steps: int | None = None
    tokens: int | None = None  # instead of steps: positions seen, rows × seq_len
    global_batch_size: int = 32
    micro_batch_size: int = 8
    # or bf16_autocast: fp32 parameters, products in bf16; bf16, fp16: parameters and products in it, fp32 masters, fp16
    # with a loss scale that follows the gradients; fp8: as bf16, the layers' products in float8, on a GPU that has them
    precision: str = "fp32"
    activation_checkpointing: bool = False  # keep each layer's input alone, and run the layer again backward
    gradient_clipping: float = 1.0
    balance_loss_weight: float = 1e-4
    mtp_loss_weight: float = 0.3
    expert_bias_rate: float = 1e-3
    expert_bias_tolerance: float = 0.0
    val_every: int = 100
    val_rows: int = 64
    save_every: int = 500

    def check(self) -> None:
        """Raise ConfigError where a number cannot hold, whatever the rest of the run."""
        refuse_unless_one_of("train.precision", self.precision, PRECISIONS)
        for key in ("steps", "tokens", "global_batch_size", "micro_batch_size", "val_every", "val_rows", "save_every"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"train.{key}={value} must be at least 1")

    def gradient_accumulation_steps(self, ranks: int) -> int:
        """Micro batches of one rank in one optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * ranks)


@dataclass
class OptimizerConfig:
    """AdamW; or Muon for the matrices of the layers, with AdamW for everything else. Norms, biases and embeddings are
    spared the weight decay."""

    kind: str = "adamw"  # or muon
    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    muon_lr: float = 2e-2  # follows the same schedule
    muon_momentum: float = 0.95


@dataclass
class ScheduleConfig:
    """Linear warm-up, then cosine to the floor, or a plateau with a linear decay over the last `decay_share`."""

    kind: str = "cosine"  # or warmup_stable_decay
    warmup_steps: int = 100
    decay_share: float = 0.3
    floor: float = 0.1  # last rate over peak rate


@dataclass
class CheckpointConfig:
    """Where checkpoints go and which of them stay; `train.save_every` says how often there is one.

    The newest complete one stays whatever is said here, and so does one that a fork or an evaluation named by its step.
    """

    keep_last: int | None = 3  # null keeps all
    keep_every: int | None = None  # steps: checkpoints of their multiples stay
    keep_best: str | None = "val/loss"  # the one with the best value of this metric stays, and is what @best means
    keep_best_mode: str = "min"  # or max
    url: str | None = None  # a folder or store (s3://…) that takes the place of the run directory's checkpoints/

    def check(self, save_every: int) -> None:
        """Raise ConfigError where a number cannot hold."""
        refuse_unless_one_of("checkpoint.keep_best_mode", self.keep_best_mode, ("min", "max"))
        for key in ("keep_last", "keep_every"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"checkpoint.{key}={value} must be at least 1, or null")
        if self.keep_every is not None and self.keep_every % save_every:
            raise ConfigError(
                f"checkpoint.keep_every={self.keep_every} must be a multiple of train.save_every={save_every}: other "
                "steps have no checkpoint"
            )

    def most(self, steps: int) -> int | None:
        """How many lie there at most in a run of so many steps, one that is being written included; None: all."""
        if self.keep_last is None:
            return None
        return self.keep_last + 1 + bool(self.keep_best) + (steps // self.keep_every if self.keep_every else 0)

    def make_absolute(self) -> None:
        """Write a folder's path out: workers may stand in another folder."""
        if self.url is not None and "://" not in self.url:
            self.url = str(Path(self.url).absolute())


OPTIMIZERS = ("adamw", "muon")
SHARING = ("tensor", "pipeline", "sequence", "expert")


@dataclass
class ParallelConfig:
    """How the ranks share the run: ZeRO's stage over those that see different rows, and how many share one thing.

    The trainer knows ZeRO; the planner knows all of them.
    """

    zero_stage: int = 1
    tensor: int = 1  # ranks that share each layer's matrices
    pipeline: int = 1  # that share the layers
    sequence: int = 1  # that share each row's tokens
    expert: int = 1  # that share the routed experts
    bucket_numbers: int = 500_000_000  # at most, that DeepSpeed exchanges at a time

    def check(self) -> None:
        """Raise ConfigError where a number cannot hold."""
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"parallel.zero_stage={self.zero_stage} must be 0, 1, 2 or 3")
        for key in (*SHARING, "bucket_numbers"):
            if getattr(self, key) < 1:
                raise ConfigError(f"parallel.{key}={getattr(self, key)} must be at least 1")


@dataclass
class TrainingRun:
    """Everything a rank needs to know; the resolved configuration of a run."""

    run: str = "run"
    runs_dir: str = "runs"
    corpus: str | None = None
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.runs_dir).absolute() / self.run

    @property
    def tokens_per_step(self) -> int:
        """Positions of one optimizer step at the first sequence length, rows × seq_len."""
        return self.train.global_batch_size * self.data.seq_len

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.train.steps is not None:
            return self.train.steps
        return (
            self.data.samples_of(self.train.tokens or 0, self.train.global_batch_size) // self.train.global_batch_size
        )

    def workload(self, ranks: int) -> Workload:
        """What the planner reads of this run."""
        is_known = self.train.steps is not None or self.train.tokens is not None
        return Workload(
            sizes=self.model,
            seq_len=self.data.longest_row,
            global_batch_size=self.train.global_batch_size,
            micro_batch_size=self.train.micro_batch_size,
            ranks=ranks,
            zero_stage=self.parallel.zero_stage,
            **{name: getattr(self.parallel, name) for name in SHARING},
            precision=self.train.precision,
            optimizer=self.optimizer.kind,
            activation_checkpointing=self.train.activation_checkpointing,
            bucket_numbers=self.parallel.bucket_numbers,
            steps=self.steps if is_known else None,
            save_every=self.train.save_every,
            checkpoints_kept=self.checkpoint.most(self.steps) if is_known else None,
        )

    def check_context(self) -> None:
        """Raise ConfigError where rows are longer than the model's context."""
        if self.data.longest_row > self.model.max_position_embeddings:
            raise ConfigError(
                f"rows are longer than the model's context: data.seq_len={self.data.longest_row} is over "
                f"model.max_position_embeddings={self.model.max_position_embeddings}"
            )

    def check_engine(self) -> None:
        """Raise ConfigError for what DeepSpeed does not do."""
        refuse_unless_one_of("optimizer.kind", self.optimizer.kind, OPTIMIZERS)
        if self.train.precision == "fp16" and self.parallel.zero_stage == 0:
            raise ConfigError(
                "at ZeRO 0 DeepSpeed divides the gradients by a loss scale that it never multiplied by: "
                "train.precision=fp16 needs parallel.zero_stage=1, 2 or 3 (it is 0)"
            )
        clipping = self.train.gradient_clipping
        if self.optimizer.kind == "muon" and self.parallel.zero_stage and clipping:
            raise ConfigError(
                "from ZeRO 1 on DeepSpeed clips Muon's orthogonal updates instead of the gradients, and nothing is "
                f"learned: set train.gradient_clipping=0 (it is {clipping}), or parallel.zero_stage=0"
            )

    def check_run(self, ranks: int) -> None:
        """Raise ConfigError for every contradiction that can be seen before anything starts."""
        self.model.check()
        self.data.check()
        self.track.check()
        self.train.check()
        self.checkpoint.check(self.train.save_every)
        train = self.train
        refuse_unless_one_of("schedule.kind", self.schedule.kind, ("cosine", "warmup_stable_decay"))
        if not self.run or Path(self.run).name != self.run or self.run.startswith("."):
            raise ConfigError(f"run={self.run!r} must be a plain name: it becomes a folder under runs_dir")
        if (train.steps is None) == (train.tokens is None):
            raise ConfigError(
                f"say how long: exactly one of train.steps={train.steps} and train.tokens={train.tokens} must be set"
            )
        if train.global_batch_size % (train.micro_batch_size * ranks):
            raise ConfigError(
                f"train.global_batch_size={train.global_batch_size} must be a multiple of train.micro_batch_size="
                f"{train.micro_batch_size} × cluster.workers={ranks} = {train.micro_batch_size * ranks}"
            )
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must not be negative")
        self.data.check_steps(train.global_batch_size)
        self.check_context()
        self.parallel.check()
        for name in SHARING:
            if getattr(self.parallel, name) > 1:
                raise ConfigError(
                    f"training shares a run by ZeRO alone so far, planning knows more: parallel.{name}="
                    f"{getattr(self.parallel, name)} must be 1"
                )
        self.check_engine()
        if self.schedule.warmup_steps >= self.steps:
            raise ConfigError(
                f"warm-up must end before the run does: schedule.warmup_steps={self.schedule.warmup_steps} is not "
                f"under train.steps={self.steps}"
            )
        for key in ("decay_share", "floor"):
            if not 0 <= getattr(self.schedule, key) <= 1:
                raise ConfigError(f"schedule.{key}={getattr(self.schedule, key)} must lie between 0 and 1")
        for key in ("lr", "muon_lr"):
            if not 0 < getattr(self.optimizer, key) < math.inf:
                raise ConfigError(f"optimizer.{key}={getattr(self.optimizer, key)} must be a number above 0")

    def check_index(self, index: "Index") -> None:
        """Raise ConfigError where the model cannot read the corpus; asked before anything starts."""
        if index.vocab_size > self.model.vocab_size:
            raise ConfigError(
                f"the corpus has {index.vocab_size:,} ids, the model embeds {self.model.vocab_size:,}: "
                f"set model.vocab_size={index.vocab_size}"
            )
        media = index.modality
        sizes = [  # medium, the model's key, the corpus's value
            ("image", "image_patch_pixels", media.image.patch_pixels),
            ("video", "video_patch_pixels", media.video.patch_pixels),
            ("audio", "audio_mels", media.audio.mels),
        ]
        if self.model.audio_mels is not None:
            sizes.append(("audio", "audio_frames_per_token", media.audio.frames_per_token))
        for medium, key, corpus_has in sizes:
            tokens = sum(source.train.media_tokens[medium] for source in index.sources)
            model_reads = getattr(self.model, key)
            if tokens and model_reads is None:
                raise ConfigError(
                    f"the corpus holds {tokens:,} tokens of {medium} and the model has no encoder for it: "
                    f"set model.{key}={corpus_has}"
                )
            if model_reads is not None and model_reads != corpus_has:
                raise ConfigError(
                    f"{medium}: the corpus was cut with {key}={corpus_has}, the model reads {model_reads}: "
                    f"set model.{key}={corpus_has}"
                )

    def batch_terms(self, ranks: int) -> str:
        """The three terms and what follows from them, for the first lines of a run."""
        train, tokens = self.train, self.tokens_per_step
        return (
            f"global_batch_size {train.global_batch_size} = micro_batch_size {train.micro_batch_size} × "
            f"{ranks} ranks × gradient_accumulation_steps {train.gradient_accumulation_steps(ranks)}; "
            f"{tokens:,} tokens a step, {self.steps:,} steps, {self.steps * tokens:,} tokens"
        )
