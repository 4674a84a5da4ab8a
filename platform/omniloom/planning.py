"""Settings to a plan: the configuration, this machine, the corpus and earlier runs are what the planner is handed."""

import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from omniloom.errors import ConfigError, DataError
from omniloom.plan.accuracy import Band, PlannedRun, Prediction, learn
from omniloom.plan.config import HardwareConfig, Measurements, Workload, is_cpu
from omniloom.plan.measured import read_measurements
from omniloom.plan.planner import Plan, make_plan
from omniloom.settings import PlanSettings, TrainSettings
from omniloom.track.planned import finished_plans

SYSTEM_BYTES = 2_000_000_000  # of this machine's memory, that it and Ray's own processes take
RANK_BYTES = 700_000_000  # what a rank holds before there is a model
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def plan_of(settings: TrainSettings) -> Plan:
    """The plan of a train job; raises ConfigError where its degrees do not divide."""

    def is_allowed(candidate: Workload) -> bool:
        train = replace(
            settings.train,
            micro_batch_size=candidate.micro_batch_size,
            activation_checkpointing=candidate.activation_checkpointing,
        )
        parallel = replace(settings.parallel, zero_stage=candidate.zero_stage)
        try:
            replace(settings, train=train, parallel=parallel).check_engine()
        except ConfigError:
            return False
        return True

    return make_plan(workload_of(settings), hardware_of(settings), measurements_of(settings), is_allowed)


def workload_of(settings: TrainSettings) -> Workload:
    """The run as the planner reads it, with the corpus's shares of tokens where there is a corpus."""
    workload = settings.workload(settings.cluster.workers)
    if isinstance(settings, PlanSettings) and settings.shares:
        return _with_media(workload, settings.shares)
    corpus = _read_corpus(Path(settings.corpus)) if settings.corpus else None
    if corpus is None:
        return workload
    return replace(_with_media(workload, corpus.shares), corpus_bytes=corpus.bytes)


def _with_media(workload: Workload, shares: dict[str, float]) -> Workload:
    """Text has what media leave, and every target."""
    text = 1 - sum(shares.values())
    return replace(workload, share_by_modality={"text": text, **shares}, target_share=text)


def hardware_of(settings: TrainSettings) -> HardwareConfig:
    """The cluster as it is described; ranks on this machine's CPU share what it leaves them of its memory."""
    cluster = settings.cluster
    is_here = cluster.nodes == 1 and cluster.address is None and "RAY_ADDRESS" not in os.environ
    if not (is_cpu(cluster) and cluster.device.memory_bytes is None and is_here):
        return cluster
    total = min([psutil.virtual_memory().total, *_cgroup_limits()])
    left = (total - SYSTEM_BYTES) // cluster.workers - RANK_BYTES
    if left <= 0:
        raise ConfigError(
            f"cluster.workers={cluster.workers} ranks of {RANK_BYTES / 1e9:g} GB, before any model, are more than "
            f"this machine's {total / 1e9:.3g} GB hold beside {SYSTEM_BYTES / 1e9:g} GB for itself"
        )
    return replace(cluster, device=replace(cluster.device, memory_bytes=left))


def _cgroup_limits() -> list[int]:
    """What a container may take, where it is less than everything."""
    said = [path.read_text().strip() for path in CGROUP_LIMITS if path.is_file()]
    return [int(limit) for limit in said if limit.isdecimal()]


def measurements_of(settings: TrainSettings) -> Measurements | None:
    """What `omniloom doctor measure=true` found on this cluster, or None; what cannot serve is told, and left aside."""
    name, device = settings.cluster.name, settings.cluster.device.name
    try:
        measured = read_measurements(Path(settings.runs_dir), name)
    except ConfigError as error:
        print(f"not used: {error}", file=sys.stderr)
        return None
    if measured is not None and measured.device != device:
        print(f"not used: cluster {name} was measured with {measured.device}, not {device}", file=sys.stderr)
        return None
    return measured


def bands_of(settings: TrainSettings) -> dict[str, Band]:
    """How wrong the plans of this cluster's finished runs were."""
    found = finished_plans(Path(settings.runs_dir))
    if found.damaged:
        print(f"not used: {len(found.damaged)} damaged plans, the first {found.damaged[0]}", file=sys.stderr)
    runs = (
        PlannedRun(
            plan["run"],
            (plan["cluster"], plan["device"]),
            Prediction(**plan["predicted"]),
            Prediction(**plan["measured"]),
        )
        for plan in found.plans
    )
    return learn(runs, (settings.cluster.name, settings.cluster.device.name))


def record_of(plan: Plan) -> dict[str, object]:
    """What a run keeps of its plan, to be compared with what it measures."""
    predicted = Prediction(plan.memory.total, plan.step.total_s, plan.step.tokens_per_s)
    return {
        "cluster": plan.hardware.name,
        "device": plan.hardware.device.name,
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


@dataclass(frozen=True)
class _Corpus:
    """Of a corpus's training split: each medium's share of the tokens, and the shards' bytes."""

    shares: dict[str, float]
    bytes: int


def _read_corpus(corpus: Path) -> _Corpus | None:
    """None where no corpus stands there yet; raises DataError where its index cannot be read."""
    index = corpus / "index.json"
    if not index.is_file():
        return None
    try:
        sources = [source["train"] for source in json.loads(index.read_text())["sources"]]
        tokens = sum(source["tokens"] for source in sources)
        names = dict.fromkeys(name for source in sources for name in source["media_tokens"])
        media = {name: sum(source["media_tokens"].get(name, 0) for source in sources) for name in names}
        held = sum(source["bytes"] for source in sources)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{index} is no corpus index ({type(error).__name__}: {error}): tokenize again") from error
    return _Corpus({name: count / tokens for name, count in media.items()}, held) if tokens else None
