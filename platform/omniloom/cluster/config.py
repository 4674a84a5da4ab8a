"""Which cluster, how many workers, how a space of overrides is searched. Imports nothing heavy."""

import math
from dataclasses import dataclass, field

from omniloom.errors import ConfigError, refuse_unless_one_of


def looks_secret(name: str) -> bool:
    """Whether a variable or key of this name would hold what must not be written down."""
    upper = name.upper()
    return any(word in upper for word in ("TOKEN", "SECRET", "PASSW", "API_KEY")) and "TOKENIZER" not in upper


@dataclass
class ClusterConfig:
    """A Ray cluster: `address`, else RAY_ADDRESS, else one started on this machine for the command's duration.

    `address` is the head's host:port or, to submit jobs, its dashboard's http://host:port; `up` is the cluster that
    `omniloom cluster up` started. Verbs that only talk about jobs take that one where no address is named.
    """

    address: str | None = None
    token_path: str | None = None  # a file with the cluster's token; else Ray's own RAY_AUTH_TOKEN_PATH
    workers: int = 1  # training ranks
    # null: that many always, waited for where a node was lost. Else as many, down to this, as the cluster has room for
    # when they start, of the numbers that share the global batch; where room grows, they save and start again.
    min_workers: int | None = None
    cpus_per_worker: int = 1
    # Restarts from the newest checkpoint after failures of ranks between which no new step was done; the next one ends
    # the run. Each step further makes them good again, so that a long run outlives any number of nodes. An error that
    # is meant for the user, or that comes before the run's first step, is not tried again.
    max_failures: int = 3
    # Seconds without a step, validation or checkpoint on a rank before its stacks are written and it is ended, which is
    # a failure; three times as long before the first step; null: never. Under the 1,800 s after which torch's
    # collectives give up.
    hang_s: float | None = 1200.0
    env: dict[str, str] = field(default_factory=dict)  # environment of every process of a job: NCCL_… and kin

    def check_workers(self) -> None:
        """Raise ConfigError where a count cannot hold."""
        for key in ("workers", "cpus_per_worker"):
            if getattr(self, key) < 1:
                raise ConfigError(f"cluster.{key}={getattr(self, key)} must be at least 1")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise ConfigError(
                f"cluster.min_workers={self.min_workers} must lie between 1 and cluster.workers={self.workers}"
            )
        if self.max_failures < 0:
            raise ConfigError(f"cluster.max_failures={self.max_failures} must not be negative")
        if self.hang_s is not None and not 0 < self.hang_s < math.inf:
            raise ConfigError(f"cluster.hang_s={self.hang_s} must be a number of seconds above 0, or null")
        for name in self.env:
            if looks_secret(name):
                raise ConfigError(
                    f"cluster.env.{name} looks like a secret, and configurations are written down: set it in the "
                    "environment of the cluster's nodes"
                )


@dataclass
class LocalClusterConfig:
    """A head and worker nodes on this machine, on loopback, with token authentication."""

    nodes: int = 1
    cpus_per_node: int | None = None  # else this machine's, divided
    gpus_per_node: int = 0
    port: int = 0  # 0: any free one
    dashboard_port: int = 0

    def check(self) -> None:
        """Raise ConfigError where a count or a port cannot hold."""
        for key in ("nodes", "cpus_per_node"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"{key}={value} must be at least 1")
        if self.gpus_per_node < 0 or (self.gpus_per_node and self.nodes > 1):
            raise ConfigError(
                f"gpus_per_node={self.gpus_per_node} with nodes={self.nodes}: the nodes of one machine would share its "
                "GPUs; set nodes=1, or gpus_per_node=0"
            )
        for key in ("port", "dashboard_port"):
            if not 0 <= getattr(self, key) < 65_536:
                raise ConfigError(f"{key}={getattr(self, key)} must lie between 0 (any free one) and 65535")


@dataclass(frozen=True)
class Choice:
    """The values of a swept key, as overrides spell them."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Interval:
    """A swept key's numbers from `low` to `high`, both within; `log`: evenly by ratio instead of by difference."""

    low: float
    high: float
    log: bool = False
    whole: bool = False


Space = dict[str, Choice | Interval]


@dataclass
class SweepConfig:
    """Which trials a sweep runs, and which of them it ends early.

    `search`: a grid runs every combination once; random and tpe (Optuna) run `trials` of them. `scheduler`: asha
    compares trials of one age and ends the worse ones; pbt lets the worse ones go on from a better one's checkpoint
    with other values, and draws its first values at random.
    """

    search: str = "random"  # or grid, tpe
    scheduler: str | None = None  # asha, pbt
    trials: int = 16
    minimize: list[str] = field(default_factory=lambda: ["val/loss"])  # keys of metrics.jsonl
    maximize: list[str] = field(default_factory=list)
    concurrent: int | None = None  # trials at a time; else as many as the cluster's CPUs or GPUs hold
    seed: int = 0
    reduction_factor: int = 3  # asha: of this many trials of one age, one goes on
    grace_steps: int | None = None  # asha: what every trial gets; else steps / reduction_factor²
    perturb_steps: int | None = None  # pbt: between two comparisons; else a fifth of the steps
    max_failures: int = 2  # times that a trial is taken up again after its process or node died

    @property
    def objectives(self) -> list[tuple[str, str]]:
        """Each metric and its mode, min or max."""
        return [(metric, "min") for metric in self.minimize] + [(metric, "max") for metric in self.maximize]

    def check_sweep(self, space: Space) -> None:
        """Raise ConfigError for every contradiction that can be seen before anything starts."""
        refuse_unless_one_of("sweep.search", self.search, ("grid", "random", "tpe"))
        if self.scheduler is not None:
            refuse_unless_one_of("sweep.scheduler", self.scheduler, ("asha", "pbt"))
        if not space:
            raise ConfigError(
                "nothing is swept: give a key several values, such as optimizer.lr='tag(log,interval(1e-4,1e-2))' or "
                "model.num_experts_per_tok='choice(1,2,4)'"
            )
        for key in ("trials", "concurrent", "grace_steps", "perturb_steps"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"sweep.{key}={value} must be at least 1")
        for key, low in (("reduction_factor", 2), ("max_failures", 0)):
            if getattr(self, key) < low:
                raise ConfigError(f"sweep.{key}={getattr(self, key)} must be at least {low}")
        if not self.objectives:
            raise ConfigError("nothing to look for: set sweep.minimize=[val/loss] or sweep.maximize=[…]")
        if len(self.objectives) > 1 and self.scheduler is not None:
            raise ConfigError(
                f"sweep.scheduler={self.scheduler} compares trials by one metric, and here are {len(self.objectives)}: "
                "set sweep.scheduler=null, or name one metric"
            )
        if self.scheduler == "pbt" and self.search != "random":
            raise ConfigError(
                f"sweep.scheduler=pbt chooses its values itself: set sweep.search=random (it is {self.search})"
            )
        fixed = [key for key in space if key.split(".")[0] in ("model", "data", "corpus", "parallel", "cluster")]
        if self.scheduler == "pbt" and fixed:
            raise ConfigError(
                f"pbt changes values in the middle of a run, and {', '.join(fixed)} cannot: sweep keys such as "
                "optimizer.lr, or set another sweep.scheduler"
            )
        for key, values in space.items():
            if self.search == "grid" and isinstance(values, Interval):
                raise ConfigError(
                    f"a grid has no end over {key}=interval({values.low:g},{values.high:g}): use choice(…) or "
                    "range(…), or sweep.search=random"
                )
