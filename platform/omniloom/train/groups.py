"""The groups of keys of a training run, each with the rules of its own. Imports nothing heavy."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from omniloom.errors import ConfigError, refuse_unless_one_of

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
    compile: bool = False  # torch.compile each layer: a minute or more at every start
    gradient_clipping: float = 1.0
    next_token_loss_weight: float = 1.0  # 0: a stage of alignment alone
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
        for key in ("next_token_loss_weight", "balance_loss_weight", "mtp_loss_weight"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ConfigError(f"train.{key}={getattr(self, key)} must be a number of at least 0")

    def gradient_accumulation_steps(self, ranks: int) -> int:
        """Micro batches of one rank in one optimizer step, where so many ranks see different rows."""
        return self.global_batch_size // (self.micro_batch_size * ranks)


MEDIA = ("image", "audio", "video")
PAIRS = ("image_text", "audio_text", "video_text", "image_audio", "image_video", "audio_video")


@dataclass
class AlignConfig:
    """Contrastive alignment of what belongs together, a medium and the targets behind it or two media side by side."""

    weight: float = 0.0  # of its loss beside the others; 0: there is none
    pairs: list[str] = field(default_factory=lambda: list(PAIRS[:3]))
    temperature: float = 0.07
    # Of a kind in a step, the first ones of the global batch: each is compared with all others of them.
    max_pairs: int = 4_096

    def check(self) -> None:
        """Raise ConfigError where a number cannot hold."""
        if not 0 <= self.weight < math.inf:
            raise ConfigError(f"align.weight={self.weight} must be a number of at least 0")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"align.temperature={self.temperature} must be a number above 0")
        if self.max_pairs < 2:
            raise ConfigError(f"align.max_pairs={self.max_pairs} must be at least 2: a pair is told from another one")
        for kind in self.pairs:
            refuse_unless_one_of("align.pairs", kind, PAIRS)
        if self.weight and not self.pairs:
            raise ConfigError(f"align.weight={self.weight} and no pairs: set align.pairs=[{PAIRS[0]},…]")


@dataclass
class OptimizerConfig:
    """AdamW; SGD with momentum, v = βv + (1−β)g from v = 0; or Muon for the matrices of the layers, with AdamW for
    everything else.

    `weight_decay` is decoupled from the gradient, w ← (1 − rate·λ)w; `l2` adds λ‖w‖²/2 to the loss, so λw to the
    gradient: one of the two. Norms, biases and embeddings are spared either.
    """

    kind: str = "adamw"  # or sgd, muon
    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.9  # sgd's β
    weight_decay: float = 0.1
    l2: float = 0.0
    decay_all: bool = False  # spare nothing
    muon_lr: float = 2e-2  # follows the same schedule
    muon_momentum: float = 0.95

    def check(self) -> None:
        """Raise ConfigError where a number cannot hold."""
        for key in ("lr", "muon_lr"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(f"optimizer.{key}={getattr(self, key)} must be a number above 0")
        for key in ("beta1", "beta2", "momentum", "muon_momentum"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"optimizer.{key}={getattr(self, key)} must be at least 0 and under 1")
        for key in ("weight_decay", "l2"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ConfigError(f"optimizer.{key}={getattr(self, key)} must be a number of at least 0")


SHARING = ("tensor", "pipeline", "sequence", "expert")


@dataclass
class OffloadConfig:
    """Where a part of the run lies while it is not worked with. The keys are DeepSpeed's."""

    device: str = "none"  # or cpu; at ZeRO 3 also nvme
    nvme_path: str | None = None  # a folder on a disk of each node
    pin_memory: bool = True  # page-locked, so that copies go on beside the work
    buffer_count: int = 5  # nvme: buffers that reading and writing go through
    buffer_size: int = 100_000_000  # nvme: numbers in one of the parameters', at least the largest tensor's shard


@dataclass
class ParallelConfig:
    """How the ranks share the run: ZeRO's stage over those that see different rows, and how many share one thing.

    The trainer knows ZeRO, shared experts and shared rows; the planner knows all of them.
    """

    zero_stage: int = 1
    tensor: int = 1  # ranks that share each layer's matrices
    pipeline: int = 1  # that share the layers
    sequence: int = 1  # that share each row's tokens
    expert: int = 1  # that share the routed experts
    bucket_numbers: int = 500_000_000  # at most, that DeepSpeed exchanges at a time
    offload_optimizer: OffloadConfig = field(default_factory=OffloadConfig)  # masters, moments and the step itself
    offload_parameters: OffloadConfig = field(default_factory=OffloadConfig)

    def check(self) -> None:
        """Raise ConfigError where a number cannot hold."""
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"parallel.zero_stage={self.zero_stage} must be 0, 1, 2 or 3")
        for key in (*SHARING, "bucket_numbers"):
            if getattr(self, key) < 1:
                raise ConfigError(f"parallel.{key}={getattr(self, key)} must be at least 1")


@dataclass
class DebugConfig:
    """What is recorded for somebody who looks into a run: under <run>/debug/."""

    profile_steps: list[int] = field(default_factory=list)  # first and last: a Chrome trace of them, by torch.profiler
    profile_shapes: bool = False  # of every operation's inputs
    profile_memory: bool = False  # what each operation allocates
    memory_snapshot_steps: list[int] = field(default_factory=list)  # first and last: what a GPU's allocator did
    collective_timeout_s: int = 1_800  # how long a rank waits for the others before it fails
    flight_recorder: bool = False  # NCCL: at a time-out each rank writes down its last collectives

    def check(self, steps: int) -> None:
        """Raise ConfigError where a number cannot hold in a run of so many steps."""
        for key in ("profile_steps", "memory_snapshot_steps"):
            chosen = getattr(self, key)
            if chosen and not (len(chosen) == 2 and 1 <= chosen[0] <= chosen[1] <= steps):
                raise ConfigError(
                    f"debug.{key}={chosen} must be a first and a last step of the run's {steps}, such as [10,12], or []"
                )
        for key in ("profile_shapes", "profile_memory"):
            if getattr(self, key) and not self.profile_steps:
                raise ConfigError(f"debug.{key}=true says what a trace holds: set debug.profile_steps=[10,12] too")
        if self.collective_timeout_s < 1:
            raise ConfigError(f"debug.collective_timeout_s={self.collective_timeout_s} must be at least 1")

    def environment(self, run_folder: Path) -> dict[str, str]:
        """Variables that a rank must have before its process group exists, by the names of torch 2.13."""
        if not self.flight_recorder:
            return {}
        return {
            "TORCH_FR_BUFFER_SIZE": "20000",  # collectives
            "TORCH_FR_DUMP_TEMP_FILE": f"{run_folder}/debug/flight_recorder_rank_",  # the rank follows
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
            "TORCH_NCCL_ENABLE_MONITORING": "1",
        }


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


@dataclass
class GuardConfig:
    """Which steps are left out, so that neither weights nor moments nor router biases move: those whose gradient norm
    is not finite, and with `spike_factor` those whose norm is out of line.

    Off by default: clipping bounds what one step can do, and no factor is right for every run.
    """

    spike_factor: float | None = None  # the largest norm over the median of the last `window`
    window: int = 100  # finite norms; before there are as many none is a spike
    max_skipped: int = 10  # in a row; then the run stops

    def check(self) -> None:
        """Raise ConfigError where a number cannot hold."""
        if self.spike_factor is not None and not 1 < self.spike_factor < math.inf:
            raise ConfigError(f"guard.spike_factor={self.spike_factor} must be a number above 1, or null")
        for key in ("window", "max_skipped"):
            if getattr(self, key) < 1:
                raise ConfigError(f"guard.{key}={getattr(self, key)} must be at least 1")


@dataclass
class HealthConfig:
    """When a mixture-of-experts layer raises an alarm: where one of the limits is passed for `alarm_steps` in a row."""

    dead_share: float = 0.1  # of a layer's experts, that get no token of a step
    collapse_share: float = 0.5  # of the way from an even load to every token at the busiest expert
    alarm_steps: int = 100

    def check(self) -> None:
        """Raise ConfigError where a number cannot hold."""
        for key in ("dead_share", "collapse_share"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"health.{key}={getattr(self, key)} must lie between 0 and 1")
        if self.alarm_steps < 1:
            raise ConfigError(f"health.alarm_steps={self.alarm_steps} must be at least 1")
