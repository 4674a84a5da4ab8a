"""Which cluster, how many workers. Imports nothing heavy."""

from dataclasses import dataclass, field

from omniloom.errors import ConfigError


@dataclass
class ClusterConfig:
    """A Ray cluster: `address`, else RAY_ADDRESS, else one started on this machine for the command's duration.

    `address` is the head's host:port or, to submit jobs, its dashboard's http://host:port; `up` is the cluster that
    `omniloom cluster up` started. Verbs that only talk about jobs take that one where no address is named.
    """

    address: str | None = None
    token_path: str | None = None  # a file with the cluster's token; else Ray's own RAY_AUTH_TOKEN_PATH
    workers: int = 1  # training ranks
    cpus_per_worker: int = 1
    max_failures: int = 0  # restarts of the ranks after a failure, from the newest checkpoint
    env: dict[str, str] = field(default_factory=dict)  # environment of every process of a job: NCCL_… and kin

    def check(self) -> None:
        """Raise ConfigError where a count cannot hold."""
        for key in ("workers", "cpus_per_worker"):
            if getattr(self, key) < 1:
                raise ConfigError(f"cluster.{key}={getattr(self, key)} must be at least 1")
        for name in self.env:
            if any(word in name.upper() for word in ("TOKEN", "SECRET", "PASSWORD", "API_KEY")):
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
