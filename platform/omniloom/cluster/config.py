"""Which cluster, how many workers. Imports nothing heavy."""

from dataclasses import dataclass

from omniloom.errors import ConfigError


@dataclass
class ClusterConfig:
    """A Ray cluster: `address`, else RAY_ADDRESS, else one started on this machine for the command's duration."""

    address: str | None = None
    workers: int = 1  # training ranks
    cpus_per_worker: int = 1
    max_failures: int = 0  # restarts of the ranks after a failure, from the newest checkpoint

    def check(self) -> None:
        """Raise ConfigError where a count cannot hold."""
        for key in ("workers", "cpus_per_worker"):
            if getattr(self, key) < 1:
                raise ConfigError(f"cluster.{key}={getattr(self, key)} must be at least 1")
