"""Signals to a run: a checkpoint now, a checkpoint and then the end; what the shell is told."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from omniloom.compose import _one_message
from omniloom.errors import Interrupted
from omniloom.settings import TrainSettings

OMNILOOM = [sys.executable, "-m", "omniloom"]


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (Interrupted("SIGTERM, saved at step 5"), 75),
        (KeyboardInterrupt("SIGINT, saved at step 5"), 130),
        (KeyboardInterrupt("SIGTERM"), 143),  # before there was anything to save
        (KeyboardInterrupt(), 130),
    ],
)
def test_the_shell_is_told_how_it_ended(raised: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, _one_message(TrainSettings, debug=False):
        raise raised
    assert ended.value.code == code
    assert "repeat the command to go on" in capsys.readouterr().err


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []


def wait(until: Any) -> None:
    deadline = time.monotonic() + 600
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_saves_when_told_and_leaves_when_told_and_the_same_command_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "told"
    words = ["train", "experiment=smoke", "run=told", "train.save_every=100000", "cluster.workers=2"]

    def start(steps: int) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([*OMNILOOM, *words, f"train.steps={steps}"], cwd=tmp_path)

    def checkpoints() -> list[int]:
        return sorted(int(path.parent.name.removeprefix("step_")) for path in run.glob("checkpoints/*/COMPLETE"))

    command = start(5_000)
    try:
        wait(lambda: lines(run / "metrics.jsonl"))
        ranks = [rank["pid"] for rank in lines(run / "events.jsonl")[0]["ranks"]]
        for pid in (command.pid, ranks[1]):
            before = len(checkpoints())
            os.kill(pid, signal.SIGUSR1)
            wait(lambda before=before: len(checkpoints()) == before + 1)
            wait(lambda: not (run / "save").exists() and len(lines(run / "metrics.jsonl")) > checkpoints()[-1])
        os.kill(ranks[1], signal.SIGTERM)
        assert command.wait(timeout=240) == 75
    finally:
        command.kill()
    record, reached = json.loads((run / "run.json").read_text()), len(lines(run / "metrics.jsonl"))
    assert record["status"] == "interrupted"
    assert record["exit_reason"].startswith("SIGTERM to rank 1 (host ")
    assert record["exit_reason"].endswith(f", pid {ranks[1]}), saved at step {reached}")
    assert checkpoints()[-1] == reached
    assert not [event for event in lines(run / "events.jsonl") if event["event"] == "failure"]
    assert start(reached + 5).wait(timeout=400) == 0
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, reached + 6))
