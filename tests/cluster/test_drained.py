"""A node that is to go says so: the run saves, ends so that a scheduler repeats it, and goes on elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from two_nodes import OMNILOOM, User

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]
WORDS = ["train", "experiment=smoke", "run=drained", "cluster.address=up", "cluster.workers=2"]
# As an autoscaler does at a spot notice: of the ranks' nodes, that which is not the head.
DRAIN = """
import sys, time, ray
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from omniloom.cluster.config import ClusterConfig
from omniloom.cluster.session import ray_session
with ray_session(ClusterConfig(address="up")):
    (node,) = [n["NodeID"] for n in ray.nodes() if "node:__internal_head__" not in n["Resources"]]
    client = ray._private.worker.global_worker.gcs_client
    deadline_ms = int(time.time() * 1000) + 600_000
    taken, why = client.drain_node(node, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot", deadline_ms)
    assert taken, why
    print(node)
"""


def test_a_run_leaves_a_node_that_goes_and_is_to_be_repeated(user: User, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        command = subprocess.Popen(
            [*OMNILOOM, *WORDS, "train.steps=5000", "train.save_every=100000", "cluster.cpus_per_worker=2"],
            cwd=user.folder,
            env=user.environment,
            stdout=log,
            stderr=log,
        )
    try:
        user.wait_for_steps("drained", 3)
        drained = subprocess.run(
            [sys.executable, "-c", DRAIN], env=user.environment, capture_output=True, text=True, timeout=240
        )
        assert drained.returncode == 0, drained.stderr
        assert command.wait(timeout=400) == 75, (tmp_path / "log").read_text()[-3000:]
    finally:
        command.kill()
    reached = len(user.metrics("drained"))
    record = json.loads((user.folder / "runs" / "drained" / "run.json").read_text())
    assert record["status"] == "interrupted"
    assert record["exit_reason"].startswith(f"Ray's notice: node {drained.stdout.strip()} goes, with rank ")
    assert record["exit_reason"].endswith(f", saved at step {reached}")
    assert user.events("drained", "failure") == []
    again = user.call(*WORDS, f"train.steps={reached + 5}", "train.save_every=100000")  # both ranks on the head
    assert again.returncode == 0, again.stderr[-2000:]
    assert [line["step"] for line in user.metrics("drained")] == list(range(1, reached + 6))
