"""Whether this machine, and the cluster it is to talk to, can do what is asked: `omniloom doctor`."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from omniloom.cluster.config import ClusterConfig
from omniloom.cluster.local import is_guarded, read_local
from omniloom.compose import run_job
from omniloom.doctor import Finding, accelerator, deepspeed_ops, machine, versions, wandb_mode
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


def main(settings: DoctorSettings) -> None:
    findings: list[Finding] = []
    rooms = [
        machine(Path(settings.runs_dir).absolute()),
        versions(),
        (look() for look in (accelerator, deepspeed_ops, partial(wandb_mode, settings.track.wandb))),
        cluster(settings.cluster),
    ]
    for room in rooms:
        for finding in room:
            findings.append(finding)
            if not settings.json:
                print(f"{SIGNS[finding.state]} {finding.name:16} {finding.what}", flush=True)
                if finding.remedy:
                    print(f"{'':21} → {finding.remedy}")
    failed = [finding.name for finding in findings if finding.state == "fail"]
    if settings.json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}))
    elif failed:
        print(f"{len(failed)} of {len(findings)} do not hold: {', '.join(failed)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_job("doctor", DoctorSettings, main)
