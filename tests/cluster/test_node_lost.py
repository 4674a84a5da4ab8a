"""A run with a rank on each of two nodes loses one of them, and goes on with both ranks on the other, bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from two_nodes import OMNILOOM, User, second_raylet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
COMPARED = ("step", "loss/next_token", "loss/mtp", "loss/balance", "grad_norm", "batch_hash")
WORDS = ["train", "experiment=smoke", "cluster.address=up", "cluster.workers=2", "train.steps=80", "train.save_every=5"]
# Of the two CPUs of each node one is taken, so that the two ranks cannot share a node.
HOLD = """
import time, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
from omniloom.cluster.config import ClusterConfig
from omniloom.cluster.session import ray_session
class Holder: pass
with ray_session(ClusterConfig(address="up")):
    holders = [
        ray.remote(num_cpus=1)(Holder).options(scheduling_strategy=On(node["NodeID"], soft=False)).remote()
        for node in ray.nodes()
    ]
    ray.get([holder.__ray_ready__.remote() for holder in holders])
    print("held", flush=True)
    time.sleep(1000)
"""


def test_a_lost_node_is_the_first_cause_and_the_run_ends_as_one_that_lost_none(
    user: User, state: dict[str, Any], tmp_path: Path
) -> None:
    unbroken = user.call(*WORDS, "run=unbroken")
    assert unbroken.returncode == 0, unbroken.stderr[-2000:]

    hold = [sys.executable, "-c", HOLD]
    holder = subprocess.Popen(hold, env=user.environment, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            [*OMNILOOM, *WORDS, "run=broken"], cwd=user.folder, env=user.environment, stdout=log, stderr=log
        )
    try:
        user.wait_for_steps("broken", 12)
        ranks = {rank["pid"] for rank in user.events("broken", "start")[-1]["ranks"]}
        raylet = second_raylet(state["pid"])
        lost = ranks & {child.pid for child in raylet.children()}
        assert len(lost) == 1, "both ranks are on one node: the test shows nothing"
        os.kill(raylet.pid, signal.SIGKILL)
        assert len(user.metrics("broken")) < 80
        holder.kill()  # makes room on the other
        assert run.wait(timeout=600) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        holder.kill()
        run.kill()
    (failure,) = user.events("broken", "failure")
    assert (failure["kind"], {failure["pid"]}) == ("node_lost", lost)
    assert failure["host"]
    assert len(failure["node"]) == 56
    assert "died" in failure["cause"]
    broken, whole = user.metrics("broken"), user.metrics("unbroken")
    for key in COMPARED:
        assert [line[key] for line in broken] == [line[key] for line in whole], key
