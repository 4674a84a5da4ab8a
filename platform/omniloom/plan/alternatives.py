"""Configurations near one that does not fit, that do."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from omniloom.plan.config import HardwareConfig, Measurements, Workload, is_cpu
from omniloom.plan.memory import Memory, count_memory
from omniloom.plan.step_time import predict_step

MOST_DOUBLINGS = 10  # of the cluster, where nothing smaller fits
KEYS = {  # of a workload, as the command line has them
    "zero_stage": "parallel.zero_stage",
    "micro_batch_size": "train.micro_batch_size",
    "activation_checkpointing": "train.activation_checkpointing",
    "ranks": "cluster.workers",
}


@dataclass(frozen=True)
class Alternative:
    """A configuration near the one asked for that fits, as overrides of it; `missing` are the keys of the cluster
    without which its time is not known."""

    overrides: tuple[str, ...]
    memory_bytes: float
    step_s: float | None
    missing: tuple[str, ...] = ()


Found = tuple[float, Workload, HardwareConfig, Memory]


def nearest_that_fit(
    workload: Workload,
    hardware: HardwareConfig,
    measured: Measurements | None = None,
    is_allowed: Callable[[Workload], bool] = lambda workload: True,
    count: int = 3,
) -> list[Alternative]:
    """The `count` configurations with the fewest and smallest changes that fit, the fastest first.

    Changed are what does not alter what is learned: ZeRO's stage, the micro batch, activation checkpointing, and where
    none of it is enough the number of nodes. Those that training would refuse are none: `is_allowed` says which.
    """
    limit = hardware.device.memory_bytes or 0
    found: list[Found] = []
    most = 0 if hardware.devices_per_node is None else MOST_DOUBLINGS  # ranks of one machine share its memory
    for doublings in range(most + 1):
        grown, cluster = _grown(workload, hardware, doublings)
        for distance, candidate in _variations(grown):
            if candidate == workload or not _divides(candidate) or not is_allowed(candidate):
                continue
            memory = count_memory(candidate, is_cpu(hardware))
            if memory.total <= limit:
                found.append((distance + 2 * doublings, candidate, cluster, memory))
        if len(found) >= count:
            break
    nearest = sorted(found, key=lambda one: (one[0], one[3].total))[:count]
    alternatives = [_alternative(one, workload, hardware, measured) for one in nearest]
    return sorted(alternatives, key=lambda one: math.inf if one.step_s is None else one.step_s)


def _alternative(
    found: Found, workload: Workload, hardware: HardwareConfig, measured: Measurements | None
) -> Alternative:
    _, candidate, cluster, memory = found
    step = predict_step(candidate, cluster, measured)
    overrides = _overrides(workload, candidate, hardware, cluster)
    return Alternative(overrides, memory.total, step.total_s, tuple(step.missing))


def _grown(workload: Workload, hardware: HardwareConfig, doublings: int) -> tuple[Workload, HardwareConfig]:
    ranks = workload.ranks << doublings
    nodes = max(hardware.nodes, math.ceil(ranks / (hardware.devices_per_node or ranks)))
    return replace(workload, ranks=ranks), replace(hardware, nodes=nodes)


def _divides(workload: Workload) -> bool:
    rows = workload.micro_batch_size * workload.data_parallel
    return rows > 0 and workload.accumulation >= 1 and workload.global_batch_size % rows == 0


def _variations(workload: Workload) -> Iterator[tuple[float, Workload]]:
    """Each way to spend less memory on the same batch, with its distance: a key, or a halving, is one. A pipeline keeps
    whole gradients: DeepSpeed's runs at ZeRO 0 and 1."""
    micro, halvings = workload.micro_batch_size, 0
    while micro >= 1:
        for stage in range(4 if workload.pipeline == 1 else 2):
            for checkpointing in (False, True):
                changed = (stage != workload.zero_stage) + (checkpointing != workload.activation_checkpointing)
                yield (
                    changed + halvings,
                    replace(workload, micro_batch_size=micro, zero_stage=stage, activation_checkpointing=checkpointing),
                )
        micro, halvings = micro // 2 if micro > 1 else 0, halvings + 1


def _overrides(before: Workload, after: Workload, hardware: HardwareConfig, cluster: HardwareConfig) -> tuple[str, ...]:
    words = [
        f"{key}={str(getattr(after, name)).lower()}"
        for name, key in KEYS.items()
        if getattr(after, name) != getattr(before, name)
    ]
    return (*words, *([f"cluster.nodes={cluster.nodes}"] if cluster.nodes != hardware.nodes else []))
