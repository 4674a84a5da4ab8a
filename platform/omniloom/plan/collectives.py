"""Seconds that ranks spend exchanging numbers, over the links inside a node and those between nodes.

r ranks of a group, g of them on one node, B bytes that each holds; n(r) = (r − 1)/r.
"""

import math
from dataclasses import dataclass

from omniloom.plan.config import Exchange, HardwareConfig, Workload

RING_PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}


def ranks_per_node(workload: Workload, hardware: HardwareConfig) -> int:
    """Ranks on one node: its devices, or an even share of all ranks."""
    return min(workload.ranks, hardware.devices_per_node or math.ceil(workload.ranks / hardware.nodes))


@dataclass(frozen=True)
class Group:
    """Ranks that exchange something: so many, each `stride` ranks from the next; a node holds ranks in a row."""

    size: int
    stride: int = 1

    def on_one_node(self, per_node: int) -> int:
        """Members that one node holds."""
        return max(1, min(self.size, per_node // self.stride))


@dataclass(frozen=True)
class Links:
    """What carries the numbers; a speed that is not known is None."""

    per_node: int
    node_bytes_per_s: float | None
    network_bytes_per_s: float | None
    measured: dict[str, Exchange]  # inside a node; they take the place of its speed

    def missing(self, group: Group) -> list[str]:
        """The cluster's keys that are needed for this group and not known."""
        here, keys = group.on_one_node(self.per_node), []
        if here > 1 and self.node_bytes_per_s is None and not self.measured:
            keys.append("cluster.node_bytes_per_s")
        if here < group.size and self.network_bytes_per_s is None:
            keys.append("cluster.network_bytes_per_s")
        return keys

    def seconds(self, kind: str, held: float, group: Group, calls: float = 1) -> float:
        """What `calls` collectives over `held` bytes a rank, in all, take; 0 for one rank.

        Rings run through all of a node's members, so that a node's traffic leaves by g links at once, and the slower
        of both binds: passes · n(r) · B / max(1 / node, 1 / (g · network)), two passes for an all-reduce, one for
        all-gather and reduce-scatter. All-to-all: (g − 1)/r · B over node links, (r − g)/r · B over the network.
        """
        if group.size == 1 or not held:
            return 0.0
        here = group.on_one_node(self.per_node)
        sent = RING_PASSES[kind] * (group.size - 1) / group.size * held
        inside = across = sent
        if kind == "all_to_all":
            inside, across = (here - 1) / group.size * held, (group.size - here) / group.size * held
        else:
            across /= here
        took = 0.0
        if here > 1 and self.measured:
            took = calls * self.measured[kind].latency_s + inside / self.measured[kind].bytes_per_s
        elif here > 1 and self.node_bytes_per_s is not None:
            took = inside / self.node_bytes_per_s
        if here < group.size and self.network_bytes_per_s is not None:
            took = max(took, across / self.network_bytes_per_s)
        return took
