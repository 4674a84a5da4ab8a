"""A training run of two nodes loses one, and goes on with the rank of the other on the same batches."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from two_nodes import OMNILOOM, User, second_raylet

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]
WORDS = ["train", "experiment=smoke", "cluster.address=up", "cluster.cpus_per_worker=2", "cluster.min_workers=1"]
WORDS += ["cluster.workers=2", "train.steps=80", "train.save_every=5"]


def test_the_same_batches_are_trained_on_by_fewer_ranks(user: User, state: dict[str, Any], tmp_path: Path) -> None:
    unbroken = user.call(*WORDS, "run=unbroken")
    assert unbroken.returncode == 0, unbroken.stderr[-2000:]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            [*OMNILOOM, *WORDS, "run=fewer"], cwd=user.folder, env=user.environment, stdout=log, stderr=log
        )
    try:
        user.wait_for_steps("fewer", 12)
        os.kill(second_raylet(state["pid"]).pid, signal.SIGKILL)
        assert run.wait(timeout=600) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        run.kill()
    assert [failure["kind"] for failure in user.events("fewer", "failure")] == ["node_lost"]
    assert [len(start["ranks"]) for start in user.events("fewer", "start")] == [2, 1]
    fewer, whole = user.metrics("fewer"), user.metrics("unbroken")
    assert [line["batch_hash"] for line in fewer] == [line["batch_hash"] for line in whole]
    losses = [line["loss/next_token"] for line in whole]
    assert [line["loss/next_token"] for line in fewer] == pytest.approx(losses, rel=1e-4)
