"""What the planner is handed: a machine, and one training configuration on it. Imports nothing heavy."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from omniloom.errors import ConfigError
from omniloom.plan.params import Sizes

MOST_DEVICES = 10_000_000
PLAUSIBLE = {  # by what a key holds: outside, it was meant in another unit
    "memory_bytes_per_s": (1e6, 1e17),
    "memory_bytes": (1e6, 1e17),
    "flops_per_s": (1e6, 1e22),
    "bytes_per_s": (1e3, 1e17),
    "watts": (0.1, 1e6),
    "usd_per_device_hour": (0, 1e6),
}


@dataclass
class DeviceConfig:
    """What one rank computes on, a GPU or a rank's share of a CPU; what is not known is left out, and so is every
    figure that hangs on it.

    A precision is the one products are taken in: fp32, bf16, fp16 or fp8. The data sheet's peaks are what MFU is
    measured by; times follow what was measured (`omniloom doctor measure=true`, or the entries below), else the peaks.
    """

    name: str = "cpu"
    memory_bytes: int | None = None
    peak_flops_per_s: dict[str, float] = field(default_factory=dict)  # dense matrix products, by precision
    matmul_flops_per_s: dict[str, float] = field(default_factory=dict)  # what large ones reach, by precision
    attention_flops_per_s: dict[str, float] = field(default_factory=dict)  # else as matmul
    memory_bytes_per_s: float | None = None
    watts: float | None = None  # at full load


@dataclass
class HardwareConfig:
    """A cluster as the planner sees it."""

    name: str = "local"  # under it measurements, and how wrong predictions were, are kept in runs_dir
    device: DeviceConfig = field(default_factory=DeviceConfig)
    nodes: int = 1
    devices_per_node: int | None = None  # else as many as workers ask for
    node_bytes_per_s: float | None = None  # from one device to the others of its node, each way
    network_bytes_per_s: float | None = None  # from one device to other nodes, each way
    storage_bytes_per_s: float | None = None  # that one node reads of a corpus
    usd_per_device_hour: float | None = None

    def check_hardware(self) -> None:
        """Raise ConfigError where a number cannot hold."""
        for key, value in (("nodes", self.nodes), ("devices_per_node", self.devices_per_node)):
            if value is not None and not 1 <= value <= MOST_DEVICES:
                raise ConfigError(f"cluster.{key}={value} must lie between 1 and {MOST_DEVICES:,}")
        numbers: dict[str, float | None] = {
            "device.memory_bytes": self.device.memory_bytes,
            "device.memory_bytes_per_s": self.device.memory_bytes_per_s,
            "device.watts": self.device.watts,
            "node_bytes_per_s": self.node_bytes_per_s,
            "network_bytes_per_s": self.network_bytes_per_s,
            "storage_bytes_per_s": self.storage_bytes_per_s,
            "usd_per_device_hour": self.usd_per_device_hour,
        }
        for kind in ("peak", "matmul", "attention"):
            by_precision: dict[str, float] = getattr(self.device, f"{kind}_flops_per_s")
            numbers |= {f"device.{kind}_flops_per_s.{name}": value for name, value in by_precision.items()}
        for key, number in numbers.items():
            least, most = next(bounds for quantity, bounds in PLAUSIBLE.items() if quantity in key)
            if number is not None and not least <= number <= most:
                raise ConfigError(
                    f"cluster.{key}={number:g} must lie between {least:g} and {most:g}, in the unit that its name "
                    "says; null where it is not known"
                )


def is_cpu(hardware: HardwareConfig) -> bool:
    """Whether ranks compute on a CPU, whose memory behaves otherwise than a GPU's."""
    return hardware.device.name == "cpu"


@dataclass(frozen=True)
class Workload:
    """One training configuration, as the planner reads it; `train.config.TrainingRun.workload` makes it.

    Of `ranks`, `tensor` share each layer's matrices, `pipeline` the layers, `sequence` each row's tokens; what is left,
    `data_parallel`, share the batch, and ZeRO's shards. `expert` ranks, out of those that do not share a matrix,
    share the routed experts.
    """

    sizes: Sizes
    seq_len: int
    global_batch_size: int
    micro_batch_size: int
    ranks: int = 1
    zero_stage: int = 1
    tensor: int = 1
    pipeline: int = 1
    sequence: int = 1
    expert: int = 1
    precision: str = "fp32"
    optimizer: str = "adamw"  # or sgd with momentum, muon
    activation_checkpointing: bool = False
    bucket_numbers: int = 500_000_000  # that DeepSpeed exchanges at a time
    offload_optimizer: bool = False  # from a GPU: its state, and at ZeRO 3 the shard's gradients
    offload_parameters: bool = False
    steps: int | None = None
    save_every: int = 500
    checkpoints_kept: int | None = None  # at most at a time, one that is being written included; None keeps all
    share_by_modality: Mapping[str, float] = field(default_factory=lambda: {"text": 1.0})  # of positions
    target_share: float = 1.0  # of positions, that have a logit
    corpus_bytes: int | None = None  # of its shards, where there is a corpus

    @property
    def data_parallel(self) -> int:
        """Ranks that see different rows."""
        return self.ranks // (self.tensor * self.pipeline * self.sequence)

    @property
    def accumulation(self) -> int:
        """Micro batches of one replica in one optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel)

    @property
    def tokens_per_step(self) -> int:
        """Positions of one optimizer step."""
        return self.global_batch_size * self.seq_len


Curve = list[tuple[float, float]]  # (size, rate), by size


@dataclass(frozen=True)
class Exchange:
    """A collective among a node's ranks: seconds = latency_s + bytes / bytes_per_s.

    Bytes are what one rank sends by the ring algorithm: of n numbers 2(r − 1)/r of an all-reduce, (r − 1)/r of each
    half of it, an all-gather or a reduce-scatter, and of an all-to-all.
    """

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Rates:
    """What each of so many ranks of one node reaches while all of them work. Precisions are those of the products.

    Products are a linear layer's, by rows. attention counts the keys that causal attention sees, 4·H·d each forward and
    2.5 times that backward, by a head's width d and by tokens of a document; block_attention, sparse attention's kernel
    with a mask, the keys it is handed. elementwise and in_place are what the same operations read and write, by bytes
    of one tensor: each into a tensor of its own, whose memory may have to be made first, and into tensors that are
    there. operation_s passes before the smallest operation is done.
    """

    ranks: int
    matmul_flops_per_s: dict[str, Curve]
    attention_forward_flops_per_s: dict[str, dict[int, Curve]]
    attention_backward_flops_per_s: dict[str, dict[int, Curve]]
    block_attention_flops_per_s: dict[str, float]
    elementwise_bytes_per_s: Curve
    in_place_bytes_per_s: Curve
    operation_s: float
    collectives: dict[str, Exchange] = field(default_factory=dict)  # none for one rank


@dataclass(frozen=True)
class Measurements:
    """A machine's rates, for one rank alone and for as many as were asked for."""

    host: str
    date: str
    torch: str
    device: str  # as the cluster's description names it: they say nothing of another
    accelerator: str  # as torch names it, or cpu
    threads: int  # of each rank
    rates: list[Rates]

    def of(self, ranks: int) -> Rates:
        """Those of the measured number of ranks a node that comes nearest; of two, the larger."""
        return min(self.rates, key=lambda rates: (abs(math.log(rates.ranks / ranks)), -rates.ranks))
