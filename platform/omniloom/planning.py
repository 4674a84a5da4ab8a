"""Settings to a plan: the configuration, this machine, the corpus and earlier runs are what the planner is handed."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import psutil

from omniloom.errors import ConfigError
from omniloom.plan.accuracy import Band, PlannedRun, Prediction, learn
from omniloom.plan.config import HardwareConfig, Measurements, Workload
from omniloom.plan.measured import read_measurements
from omniloom.plan.planner import Plan, is_cpu, make_plan
from omniloom.settings import TrainSettings
from omniloom.track.planned import finished_plans


def plan_of(settings: TrainSettings) -> Plan:
    """The plan of a train job; raises ConfigError where its degrees do not divide."""
    return make_plan(workload_of(settings), hardware_of(settings), measurements_of(settings))


def workload_of(settings: TrainSettings) -> Workload:
    """The run as the planner reads it, with the corpus's shares of tokens where there is a corpus."""
    workload = settings.workload(settings.cluster.workers)
    shares = _shares(Path(settings.corpus)) if settings.corpus else None
    if shares is None:
        return workload
    return replace(workload, share_by_modality=shares, target_share=shares.get("text", 0.0))


def hardware_of(settings: TrainSettings) -> HardwareConfig:
    """The cluster as it is described; ranks on this machine's CPU share its memory."""
    cluster = settings.cluster
    is_here = cluster.nodes == 1 and cluster.address is None
    if is_cpu(cluster) and cluster.device.memory_bytes is None and is_here:
        memory = psutil.virtual_memory().total // cluster.workers
        return replace(cluster, device=replace(cluster.device, memory_bytes=memory))
    return cluster


def measurements_of(settings: TrainSettings) -> Measurements | None:
    """What `omniloom doctor measure=true` found on this cluster, or None."""
    return read_measurements(Path(settings.runs_dir), settings.cluster.name)


def bands_of(settings: TrainSettings) -> dict[str, Band]:
    """How wrong the plans of this cluster's finished runs were."""
    runs = (
        PlannedRun(
            plan["run"], plan["cluster"], plan["ranks"], Prediction(**plan["predicted"]), Prediction(**plan["measured"])
        )
        for plan in finished_plans(Path(settings.runs_dir))
    )
    return learn(runs, settings.cluster.name)


def record_of(plan: Plan) -> dict[str, object]:
    """What a run keeps of its plan, to be compared with what it measures."""
    predicted = Prediction(plan.memory.total, plan.step.total_s, plan.step.tokens_per_s)
    return {
        "cluster": plan.hardware.name,
        "ranks": plan.workload.ranks,
        "zero_stage": plan.workload.zero_stage,
        "memory_by_part": plan.memory.parts,
        "seconds_by_part": plan.step.seconds,
        "predicted": asdict(predicted),
    }


def told_in_a_line(plan: Plan) -> str:
    """The verdict, what binds, and the time of a step where it is known."""
    word = {True: "go", False: "no-go", None: "open"}[plan.fits]
    step = "" if plan.step.total_s is None else f"; a step of {plan.step.total_s:,.3g} s"
    return f"plan: {word}, {plan.constraint}{step}"


def refuse_no_go(settings: TrainSettings) -> Plan:
    """The plan; raises ConfigError, with what would fit, where it is a no-go and is not forced."""
    plan = plan_of(settings)
    if plan.fits is False and not settings.force:
        nearest = "".join(f"\n  {' '.join(one.overrides)}" for one in plan.alternatives)
        near = f"; nearest that fit, the fastest first:{nearest}" if nearest else ""
        raise ConfigError(f"no-go: {plan.constraint}; force=true submits it all the same{near}")
    return plan


def _shares(corpus: Path) -> dict[str, float] | None:
    """Each modality's share of a corpus's training tokens; None where no corpus stands there yet."""
    index = corpus / "index.json"
    if not index.is_file():
        return None
    shards = [shard for shard in json.loads(index.read_text())["shards"] if shard["split"] == "train"]
    tokens = sum(shard["tokens"] for shard in shards)
    media: dict[str, int] = {}
    for shard in shards:
        for name, count in shard["media_tokens"].items():
            media[name] = media.get(name, 0) + count
    if not tokens:
        return None
    return {"text": 1 - sum(media.values()) / tokens, **{name: count / tokens for name, count in media.items()}}
