"""Go or no-go: what a run takes of each rank and in all, whether it fits, and what near it would."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from omniloom.errors import ConfigError
from omniloom.plan.config import HardwareConfig, Measurements, Workload
from omniloom.plan.cost import RunCost, count_cost
from omniloom.plan.flops import Costs, count_costs
from omniloom.plan.memory import Memory, count_memory
from omniloom.plan.params import ParameterCount, count_parameters
from omniloom.plan.step_time import StepTime, predict_step

MOST_DOUBLINGS = 10  # of the cluster, where nothing smaller fits
KEYS = {  # of a workload, as the command line has them
    "zero_stage": "parallel.zero_stage",
    "micro_batch_size": "train.micro_batch_size",
    "activation_checkpointing": "train.activation_checkpointing",
    "ranks": "cluster.workers",
}


@dataclass(frozen=True)
class Alternative:
    """A configuration near the one asked for that fits, as overrides of it."""

    overrides: tuple[str, ...]
    memory_bytes: float
    step_s: float | None


@dataclass(frozen=True)
class Plan:
    """All that is known of a run before it starts."""

    workload: Workload
    hardware: HardwareConfig
    parameters: ParameterCount
    costs: Costs
    memory: Memory
    step: StepTime
    cost: RunCost
    fits: bool | None  # None where the cluster's memory is not known
    constraint: str  # what binds: said for go and for no-go
    alternatives: tuple[Alternative, ...]

    def as_dict(self) -> dict[str, Any]:
        """For --json: the contract's keys first."""
        said = self.parameters.as_dict() | self.costs.as_dict()
        said |= {
            "memory_bytes_per_rank": {name: round(size) for name, size in self.memory.parts.items()},
            "memory_bytes_per_rank_total": round(self.memory.total),
            "memory_moment": self.memory.moment,
            "fits": self.fits,
            "constraint": self.constraint,
            "step_s_by_part": self.step.seconds,
            "step_s": self.step.total_s,
            "tokens_per_s": self.step.tokens_per_s,
            "mfu": self.step.mfu,
            "missing": self.step.missing,
            "alternatives": [
                {"overrides": list(one.overrides), "memory_bytes": round(one.memory_bytes), "step_s": one.step_s}
                for one in self.alternatives
            ],
        }
        return said | self.cost.as_dict()


def check_degrees(workload: Workload, hardware: HardwareConfig) -> None:
    """Raise ConfigError where the ranks do not divide, or where there are more of them than devices."""
    shared = workload.tensor * workload.pipeline * workload.sequence
    degrees = (
        f"parallel.tensor={workload.tensor} × parallel.pipeline={workload.pipeline} × "
        f"parallel.sequence={workload.sequence} = {shared}"
    )
    if workload.ranks % shared:
        raise ConfigError(f"cluster.workers={workload.ranks} must be a multiple of {degrees}")
    sharing = workload.data_parallel * workload.sequence
    if sharing % workload.expert:
        raise ConfigError(
            f"the ranks that hold the same experts divide by parallel.expert={workload.expert}: cluster.workers="
            f"{workload.ranks} / (tensor {workload.tensor} × pipeline {workload.pipeline}) = {sharing} is no multiple"
        )
    sizes = workload.sizes
    divided = [
        ("expert", "model.n_routed_experts", sizes.n_routed_experts or 1),
        ("tensor", "model.num_attention_heads", sizes.num_attention_heads),
        ("sequence", "data.seq_len", workload.seq_len),
    ]
    for name, key, number in divided:
        degree = getattr(workload, name)
        if number % degree:
            raise ConfigError(f"{key}={number} must be a multiple of parallel.{name}={degree}")
    if workload.pipeline > sizes.num_hidden_layers:
        raise ConfigError(
            f"a stage needs a layer: parallel.pipeline={workload.pipeline} is over model.num_hidden_layers="
            f"{sizes.num_hidden_layers}"
        )
    rows = workload.micro_batch_size * workload.data_parallel
    if workload.global_batch_size % rows:
        raise ConfigError(
            f"train.global_batch_size={workload.global_batch_size} must be a multiple of train.micro_batch_size="
            f"{workload.micro_batch_size} × {workload.data_parallel} replicas = {rows}"
        )
    if hardware.devices_per_node is not None and workload.ranks > hardware.nodes * hardware.devices_per_node:
        raise ConfigError(
            f"cluster.workers={workload.ranks} are over cluster.nodes={hardware.nodes} × cluster.devices_per_node="
            f"{hardware.devices_per_node} = {hardware.nodes * hardware.devices_per_node}"
        )


def make_plan(
    workload: Workload,
    hardware: HardwareConfig,
    measured: Measurements | None = None,
) -> Plan:
    """Everything about one run; raises ConfigError where its degrees do not divide."""
    check_degrees(workload, hardware)
    tokens = None if workload.steps is None else workload.steps * workload.tokens_per_step
    memory = count_memory(workload, is_cpu(hardware))
    step = predict_step(workload, hardware, measured)
    limit = hardware.device.memory_bytes
    fits = None if limit is None else memory.total <= limit
    alternatives = tuple(nearest_that_fit(workload, hardware, measured)) if fits is False else ()
    return Plan(
        workload=workload,
        hardware=hardware,
        parameters=count_parameters(workload.sizes),
        costs=count_costs(workload.sizes, workload.seq_len, tokens),
        memory=memory,
        step=step,
        cost=count_cost(workload, hardware, step.total_s),
        fits=fits,
        constraint=_constraint(memory, limit),
        alternatives=alternatives,
    )


def is_cpu(hardware: HardwareConfig) -> bool:
    """Whether ranks compute on a CPU, whose memory behaves otherwise than a GPU's."""
    return hardware.device.name == "cpu"


def _constraint(memory: Memory, limit: int | None) -> str:
    largest = max(memory.parts, key=lambda name: memory.parts[name])
    peak = f"{memory.total / 1e9:,.3g} GB a rank in the {memory.moment} pass"
    if memory.moment == "step":
        peak = f"{memory.total / 1e9:,.3g} GB a rank at the optimizer's step"
    most = f"most of it {largest}, {memory.parts[largest] / 1e9:,.3g} GB"
    if limit is None:
        return f"memory {peak}, {most}; whether it fits is open: set cluster.device.memory_bytes"
    over = "is over" if memory.total > limit else "of"
    return f"memory {peak} {over} cluster.device.memory_bytes={limit / 1e9:,.4g} GB, {most}"


def nearest_that_fit(
    workload: Workload, hardware: HardwareConfig, measured: Measurements | None = None, count: int = 3
) -> list[Alternative]:
    """The `count` configurations with the fewest and smallest changes that fit, the fastest first.

    Changed are what does not alter what is learned: ZeRO's stage, the micro batch, activation checkpointing, and where
    none of it is enough the number of nodes.
    """
    limit = hardware.device.memory_bytes or 0
    found: list[tuple[float, Workload, HardwareConfig, Memory]] = []
    most = 0 if hardware.devices_per_node is None else MOST_DOUBLINGS  # ranks of one machine share its memory
    for doublings in range(most + 1):
        grown, cluster = _grown(workload, hardware, doublings)
        for distance, candidate in _variations(grown):
            if candidate == workload or candidate.accumulation < 1:
                continue
            if candidate.global_batch_size % (candidate.micro_batch_size * candidate.data_parallel):
                continue
            memory = count_memory(candidate, is_cpu(hardware))
            if memory.total <= limit:
                found.append((distance + 2 * doublings, candidate, cluster, memory))
        if len(found) >= count:
            break
    nearest = sorted(found, key=lambda one: (one[0], one[3].total))[:count]
    alternatives = [
        Alternative(
            _overrides(workload, candidate, hardware, cluster),
            memory.total,
            predict_step(candidate, cluster, measured).total_s,
        )
        for _, candidate, cluster, memory in nearest
    ]
    return sorted(alternatives, key=lambda one: math.inf if one.step_s is None else one.step_s)


def _grown(workload: Workload, hardware: HardwareConfig, doublings: int) -> tuple[Workload, HardwareConfig]:
    ranks = workload.ranks << doublings
    nodes = max(hardware.nodes, math.ceil(ranks / (hardware.devices_per_node or ranks)))
    return replace(workload, ranks=ranks), replace(hardware, nodes=nodes)


def _variations(workload: Workload) -> Iterator[tuple[float, Workload]]:
    """Each way to spend less memory on the same batch, with its distance: a key, or a halving, is one."""
    micro, halvings = workload.micro_batch_size, 0
    while micro >= 1:
        for stage in range(4):
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
