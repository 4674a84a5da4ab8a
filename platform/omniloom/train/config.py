"""What a training run is, and the rules between its groups of keys. Imports nothing heavy."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from omniloom.data.config import DataConfig
from omniloom.errors import ConfigError
from omniloom.model.config import ModelConfig
from omniloom.plan.config import Workload
from omniloom.track.config import TrackConfig
from omniloom.train.deepspeed_json import refuse_contradictions
from omniloom.train.groups import (
    MEDIA,
    SHARING,
    AlignConfig,
    CheckpointConfig,
    DebugConfig,
    GuardConfig,
    HealthConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from omniloom.train.schedule import ScheduleConfig

if TYPE_CHECKING:
    from omniloom.data.index import Index

NOT_SHARED = {
    "tensor": "matrices: DeepSpeed's AutoTP cuts Hugging Face's layers by their names, and this decoder has its own",
    "pipeline": "layers: DeepSpeed's pipeline hands one tensor on, and this decoder hands on places and routing too",
}


@dataclass
class TrainingRun:
    """Everything a rank needs to know; the resolved configuration of a run."""

    run: str = "run"
    runs_dir: str = "runs"
    corpus: str | None = None
    init: str | None = None  # a run[@step], a checkpoint or a model folder whose weights are the first ones
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def peak_flops_per_s(self) -> float | None:
        """Of one rank in the precision of its products, by its data sheet; None where the run does not know."""
        return None

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
            offload_optimizer=self.parallel.offload_optimizer.device != "none",
            offload_parameters=self.parallel.offload_parameters.device != "none",
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
        refuse_contradictions(self)

    def check_sharing(self, ranks: int) -> None:
        """Raise ConfigError where the ranks cannot share what `parallel` has them share."""
        for name, reason in NOT_SHARED.items():
            if getattr(self.parallel, name) > 1:
                raise ConfigError(
                    f"training does not share {reason}; `omniloom plan` does: parallel.{name}="
                    f"{getattr(self.parallel, name)} must be 1"
                )
        sequence, heads = self.parallel.sequence, self.model.num_attention_heads
        if ranks % sequence or heads % sequence:
            raise ConfigError(
                f"parallel.sequence={sequence} must divide cluster.workers={ranks} and "
                f"model.num_attention_heads={heads}"
            )
        for seq_len in (self.data.seq_len, *(phase.seq_len or 0 for phase in self.data.phases)):
            if seq_len % sequence:
                raise ConfigError(f"parallel.sequence={sequence} must divide rows of data.seq_len={seq_len} tokens")
        expert, experts, precision = self.parallel.expert, self.model.n_routed_experts, self.train.precision
        if expert == 1:
            return
        if not experts or experts % expert or ranks % expert:
            raise ConfigError(
                f"parallel.expert={expert} must divide model.n_routed_experts={experts} and cluster.workers={ranks}"
            )
        if self.parallel.zero_stage == 0 and precision not in ("fp32", "bf16_autocast"):
            raise ConfigError(
                f"at ZeRO 0 DeepSpeed leaves shared experts out of the norm that gradients are clipped by: "
                f"parallel.expert={expert} with train.precision={precision} needs parallel.zero_stage=1, 2 or 3"
            )
        if self.optimizer.kind == "muon":
            raise ConfigError(
                "DeepSpeed's Muon takes gradients reduced whole and shared experts scattered ones: "
                f"parallel.expert={expert} needs optimizer.kind=adamw"
            )

    def check_run(self, ranks: int) -> None:
        """Raise ConfigError for every contradiction that can be seen before anything starts."""
        self.model.check()
        self.data.check()
        self.track.check()
        self.train.check()
        self.check_alignment()
        self.checkpoint.check(self.train.save_every)
        train = self.train
        if not self.run or Path(self.run).name != self.run or self.run.startswith("."):
            raise ConfigError(f"run={self.run!r} must be a plain name: it becomes a folder under runs_dir")
        if (train.steps is None) == (train.tokens is None):
            raise ConfigError(
                f"say how long: exactly one of train.steps={train.steps} and train.tokens={train.tokens} must be set"
            )
        sequence = self.parallel.sequence
        if train.global_batch_size * sequence % (train.micro_batch_size * ranks):
            shared = f" / parallel.sequence={sequence}" if sequence > 1 else ""
            raise ConfigError(
                f"train.global_batch_size={train.global_batch_size} must be a multiple of train.micro_batch_size="
                f"{train.micro_batch_size} × cluster.workers={ranks}{shared} = "
                f"{train.micro_batch_size * ranks // sequence}"
            )
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must not be negative")
        self.data.check_steps(train.global_batch_size)
        self.check_context()
        self.parallel.check()
        self.check_sharing(ranks)
        self.check_engine()
        self.optimizer.check()
        self.schedule.check(self.steps)
        self.debug.check(self.steps)
        self.guard.check()
        self.health.check()
        if self.guard.spike_factor and self.optimizer.kind == "muon" and self.parallel.zero_stage:
            raise ConfigError(
                "from ZeRO 1 on DeepSpeed tells the norm of Muon's orthogonal updates, which no spike moves: set "
                f"guard.spike_factor=null (it is {self.guard.spike_factor}), or parallel.zero_stage=0"
            )

    def check_alignment(self) -> None:
        """Raise ConfigError where nothing would be learned, or ranks share what alignment needs whole."""
        self.align.check()
        if not self.train.next_token_loss_weight and not self.align.weight:
            raise ConfigError(
                f"nothing to learn: train.next_token_loss_weight={self.train.next_token_loss_weight} and align.weight="
                f"{self.align.weight} are both 0"
            )
        for name in ("tensor", "pipeline", "sequence"):
            if self.align.weight and getattr(self.parallel, name) > 1:
                raise ConfigError(
                    f"alignment runs whole rows on each rank: align.weight={self.align.weight} needs parallel.{name}=1 "
                    f"(it is {getattr(self.parallel, name)})"
                )

    def check_index(self, index: "Index") -> None:
        """Raise ConfigError where the model cannot read the corpus; asked before anything starts."""
        if index.vocab_size > self.model.vocab_size:
            raise ConfigError(
                f"the corpus has {index.vocab_size:,} ids, the model embeds {self.model.vocab_size:,}: "
                f"set model.vocab_size={index.vocab_size}"
            )
        held = {m: sum(source.train.media_tokens[m] for source in index.sources) for m in MEDIA}
        there = {"text", *(medium for medium, tokens in held.items() if tokens)}
        if self.align.weight and not any(there.issuperset(kind.split("_")) for kind in self.align.pairs):
            raise ConfigError(
                f"nothing to align: align.pairs=[{','.join(self.align.pairs)}] and the corpus holds "
                f"{', '.join(sorted(there))}: set align.weight=0 or other pairs"
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
            tokens = held[medium]
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
        replicas = ranks // self.parallel.sequence
        shared = f" / {self.parallel.sequence} that share rows" if replicas < ranks else ""
        return (
            f"global_batch_size {train.global_batch_size} = micro_batch_size {train.micro_batch_size} × "
            f"{ranks} ranks{shared} × gradient_accumulation_steps {train.gradient_accumulation_steps(replicas)}; "
            f"{tokens:,} tokens a step, {self.steps:,} steps, {self.steps * tokens:,} tokens"
        )
