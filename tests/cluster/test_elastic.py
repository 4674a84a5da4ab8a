"""Ranks on two nodes, of which one is lost: they go on, fewer, on the other."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from faulty import events, steps_done
from two_nodes import User, second_raylet

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]
# A rank takes the two CPUs of a node.
TWO_OR_ONE = """
import sys
from pathlib import Path
from faulty import Job, hooks, steps_of
from omniloom.cluster.config import ClusterConfig
from omniloom.cluster.launch import run_on_ranks
from omniloom.cluster.session import ray_session
(folder,) = sys.argv[1:]
config = ClusterConfig(address="up", workers=2, min_workers=1, cpus_per_worker=2, max_failures=2, hang_s=None)
with ray_session(config):
    run_on_ranks(steps_of, Job(folder, "", at=0, steps=60, step_s=0.5), config, hooks(Path(folder)), [1, 2])
"""


def test_where_a_node_is_lost_the_job_goes_on_with_fewer_ranks(
    user: User, state: dict[str, Any], tmp_path: Path
) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), user.environment.get("PYTHONPATH", "")])
    words = [sys.executable, "-c", TWO_OR_ONE, str(tmp_path)]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(words, env={**user.environment, "PYTHONPATH": path}, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 240
        while steps_done(tmp_path) < 5:
            assert job.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(second_raylet(state["pid"]).pid, signal.SIGKILL)
        assert job.wait(timeout=600) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        job.kill()
    (failure,) = events(tmp_path, "failure")
    assert failure["kind"] == "node_lost"
    ranks = [int(line.split()[1]) for line in (tmp_path / "steps").read_text().splitlines()]
    assert len(ranks) == 60
    assert ranks == sorted(ranks, reverse=True)
    assert set(ranks) == {1, 2}
