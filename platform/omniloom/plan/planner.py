"""Go or no-go: what a run takes of each rank and in all, whether it fits, and what near it would."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omniloom.errors import ConfigError
from omniloom.plan.alternatives import Alternative, nearest_that_fit
from omniloom.plan.config import HardwareConfig, Measurements, Workload, is_cpu
from omniloom.plan.cost import RunCost, count_cost
from omniloom.plan.flops import Costs, count_costs
from omniloom.plan.memory import Memory, by_stage, count_memory
from omniloom.plan.params import ParameterCount, count_parameters
from omniloom.plan.step_time import StepTime, predict_step

OF_THE_STEP = ("step_s", "tokens_per_s", "mfu", "days", "gpu_hours", "cost_usd", "energy_kwh")
MOST_PARAMETERS, MOST_TOKENS = 1e15, 1e18  # beyond, a key was mistyped


@dataclass(frozen=True)
class Plan:
    """All that is known of a run before it starts."""

    workload: Workload
    hardware: HardwareConfig
    parameters: ParameterCount
    costs: Costs
    memory: Memory
    stages: dict[tuple[int, bool], Memory]  # at every ZeRO stage, without and with activation checkpointing
    step: StepTime
    cost: RunCost
    fits: bool | None  # None where the cluster's memory is not known
    constraint: str  # what binds: said for go and for no-go
    alternatives: tuple[Alternative, ...]

    @property
    def missing(self) -> dict[str, list[str]]:
        """Each key of the cluster that is not known, with the figures that hang on it."""
        missing = {key: [*parts, *OF_THE_STEP] for key, parts in self.step.missing.items()}
        if self.hardware.usd_per_device_hour is None:
            missing["cluster.usd_per_device_hour"] = ["cost_usd"]
        if self.hardware.device.watts is None:
            missing["cluster.device.watts"] = ["energy_kwh"]
        if self.hardware.device.memory_bytes is None:
            missing["cluster.device.memory_bytes"] = ["fits"]
        return missing

    def as_dict(self) -> dict[str, Any]:
        """For --json: the contract's keys first."""
        said = self.parameters.as_dict() | self.costs.as_dict()
        said |= {
            "memory_bytes_per_rank": {name: round(size) for name, size in self.memory.parts.items()},
            "memory_bytes_per_rank_total": round(self.memory.total),
            "memory_moment": self.memory.moment,
            "memory_bytes_by_stage": [
                {
                    "zero_stage": stage,
                    "activation_checkpointing": checkpointing,
                    "total": round(memory.total),
                    "parts": {name: round(size) for name, size in memory.parts.items()},
                }
                for (stage, checkpointing), memory in self.stages.items()
            ],
            "fits": self.fits,
            "constraint": self.constraint,
            "step_s_by_part": self.step.seconds,
            "step_s": self.step.total_s,
            "tokens_per_s": self.step.tokens_per_s,
            "mfu": self.step.mfu,
            "missing": self.missing,
            "alternatives": [
                {
                    "overrides": list(one.overrides),
                    "memory_bytes": round(one.memory_bytes),
                    "step_s": one.step_s,
                    "missing": list(one.missing),
                }
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
    if workload.expert > 1 and not sizes.n_routed_experts:
        raise ConfigError(f"parallel.expert={workload.expert} shares experts, and the model has none: set it to 1")
    divided = [
        ("model.n_routed_experts", sizes.n_routed_experts, ("expert",)),
        ("model.num_attention_heads", sizes.num_attention_heads, ("tensor", "sequence")),
        ("data.seq_len", workload.seq_len, ("sequence",)),
    ]
    if sizes.attention == "grouped":
        divided.append(("model.num_key_value_heads", sizes.key_value_heads, ("tensor",)))
    for key, number, names in divided:
        degree = math.prod(getattr(workload, name) for name in names)
        if number % degree:
            of = " × ".join(f"parallel.{name}={getattr(workload, name)}" for name in names)
            product = f" = {degree}" if len(names) > 1 else ""
            raise ConfigError(f"{key}={number} must be a multiple of {of}{product}")
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


def check_size(workload: Workload) -> None:
    """Raise ConfigError for a model, or a run, of a size that nobody means."""
    counted = count_parameters(workload.sizes)
    parameters = counted.params_total + counted.params_mtp
    if parameters > MOST_PARAMETERS:
        raise ConfigError(f"a model of {parameters:.3g} parameters is over {MOST_PARAMETERS:.0e}: look at its sizes")
    tokens = (workload.steps or 1) * workload.tokens_per_step
    if tokens > MOST_TOKENS:
        raise ConfigError(
            f"train.steps={workload.steps} of train.global_batch_size={workload.global_batch_size} × data.seq_len="
            f"{workload.seq_len} are {tokens:.3g} tokens, over {MOST_TOKENS:.0e}"
        )


def make_plan(
    workload: Workload,
    hardware: HardwareConfig,
    measured: Measurements | None = None,
    is_allowed: Callable[[Workload], bool] = lambda workload: True,
) -> Plan:
    """Everything about one run; raises ConfigError where its degrees do not divide. Of what near it fits, `is_allowed`
    says what can be trained."""
    check_degrees(workload, hardware)
    check_size(workload)
    tokens = None if workload.steps is None else workload.steps * workload.tokens_per_step
    memory = count_memory(workload, is_cpu(hardware))
    step = predict_step(workload, hardware, measured)
    limit = hardware.device.memory_bytes
    fits = None if limit is None else memory.total <= limit
    alternatives = tuple(nearest_that_fit(workload, hardware, measured, is_allowed)) if fits is False else ()
    return Plan(
        workload=workload,
        hardware=hardware,
        parameters=count_parameters(workload.sizes),
        costs=count_costs(workload.sizes, workload.seq_len, tokens),
        memory=memory,
        stages=by_stage(workload, is_cpu(hardware)),
        step=step,
        cost=count_cost(workload, hardware, step.total_s),
        fits=fits,
        constraint=_constraint(memory, limit),
        alternatives=alternatives,
    )


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
