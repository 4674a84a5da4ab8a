"""Whether this machine, and the cluster it is to talk to, can do what is asked: `omniloom doctor`."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from omniloom.cluster.config import ClusterConfig
from omniloom.cluster.local import is_guarded, read_local
from omniloom.compose import run_job
from omniloom.doctor import Finding, accelerator, counted, deepspeed_ops, machine, quiet, versions, wandb_mode
from omniloom.errors import OmniloomError
from omniloom.settings import DoctorSettings

SIGNS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}


def cluster(config: ClusterConfig) -> Iterator[Finding]:
    """Whether the cluster answers, at the same version, and to whom."""
    if not (config.address or os.environ.get("RAY_ADDRESS") or read_local()):
        yield Finding("ray", "ok", "no cluster is named: each command starts one of its own, on loopback")
        return
    from omniloom.cluster.submit import JobClient

    try:
        client = JobClient(config)
        yield Finding("ray", "ok", f"{client.address} answers, at this version; {len(client.jobs())} jobs")
    except OmniloomError as error:
        problem, _, remedy = str(error).rpartition(": ")
        yield Finding("ray", "fail", problem or remedy, remedy if problem else None)
        return
    if is_guarded(client.dashboard):
        yield Finding("authentication", "ok", "the cluster asks for a token")
    else:
        remedy = "start its nodes with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=<file>"
        yield Finding("authentication", "warn", "the cluster runs the commands of anybody who reaches it", remedy)


def measured(settings: DoctorSettings) -> Iterator[Finding]:
    """What a rank of the cluster reaches; kept where the planner reads it."""
    # Before the session: torch, loaded while Ray's threads start, now and then dies in its MKL.
    from omniloom.cluster.launch import run_on_ranks
    from omniloom.cluster.session import ray_session
    from omniloom.plan.measured import describe, measurements_path, read_measurements
    from omniloom.train.machine import Task, measure

    runs_dir, name = Path(settings.runs_dir).absolute(), settings.cluster.name
    task = Task(str(runs_dir), name, settings.cluster.device.name)
    yield quiet()
    with ray_session(settings.cluster), counted(task.progress):
        run_on_ranks(measure, task, settings.cluster)
    found = read_measurements(runs_dir, name)
    assert found is not None  # its rank 0 has just written it
    for what, told in describe(found).items():
        yield Finding(what, "ok", told)
    yield Finding(
        "measurements", "ok", f"kept at {measurements_path(runs_dir, name)}; `omniloom plan` reads them there"
    )


def rates_of(settings: DoctorSettings) -> dict[str, Any]:
    """What `measured` has written down."""
    from omniloom.plan.measured import measurements_path

    return json.loads(measurements_path(Path(settings.runs_dir), settings.cluster.name).read_bytes())


def main(settings: DoctorSettings) -> None:
    findings: list[Finding] = []
    rooms = [
        machine(Path(settings.runs_dir).absolute()),
        versions(),
        (look() for look in (accelerator, deepspeed_ops, partial(wandb_mode, settings.track.wandb))),
        cluster(settings.cluster),
    ]
    if settings.measure:
        settings.cluster.check()
        rooms.append(measured(settings))
    for room in rooms:
        for finding in room:
            findings.append(finding)
            if not settings.json:
                print(f"{SIGNS[finding.state]} {finding.name:16} {finding.what}", flush=True)
                if finding.remedy:
                    print(f"{'':21} → {finding.remedy}")
    failed = [finding.name for finding in findings if finding.state == "fail"]
    if settings.json:
        told = {"ok": not failed, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(told | ({"measured": rates_of(settings)} if settings.measure else {})))
    elif failed:
        print(f"{len(failed)} of {len(findings)} do not hold: {', '.join(failed)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_job("doctor", DoctorSettings, main)
