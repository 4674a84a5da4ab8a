"""kill -9 of the driver or of a rank: the same command continues, and the losses are those of an unbroken run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

OMNILOOM = str(Path(sys.executable).parent / "omniloom")
LEAST_STEPS_BEFORE_THE_KILL = 15  # past the first checkpoint, before the second


def start(folder: Path, run: str) -> subprocess.Popen[bytes]:
    words = ["experiment=smoke", f"run={run}", "train.steps=400", "train.save_every=10", "cluster.workers=2"]
    with (folder / f"{run}.log").open("ab") as log:
        return subprocess.Popen([OMNILOOM, "train", *words], cwd=folder, stdout=log, stderr=log)


def metrics(folder: Path, run: str) -> list[dict]:
    path = folder / "runs" / run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def wait_for_steps(folder: Path, run: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while len(metrics(folder, run)) < LEAST_STEPS_BEFORE_THE_KILL:
        assert process.poll() is None, (folder / f"{run}.log").read_text()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    assert start(folder, "unbroken").wait(timeout=240) == 0
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", ["driver", "rank"])
def test_the_same_command_continues_bit_for_bit(victim: str, unbroken: Path) -> None:
    process = start(unbroken, victim)
    wait_for_steps(unbroken, victim, process)
    events = (unbroken / "runs" / victim / "events.jsonl").read_text().splitlines()
    os.kill(process.pid if victim == "driver" else json.loads(events[0])["ranks"][0]["pid"], signal.SIGKILL)
    assert process.wait(timeout=120) != 0
    assert len(metrics(unbroken, victim)) < 400, "the run ended before it was killed"

    assert start(unbroken, victim).wait(timeout=240) == 0, (unbroken / f"{victim}.log").read_text()[-2000:]
    after, before = metrics(unbroken, victim), metrics(unbroken, "unbroken")
    assert [line["step"] for line in after] == list(range(1, 401))
    for key in ("loss/next_token", "loss/mtp", "loss/balance", "grad_norm", "batch_hash", "tokens"):
        assert [line[key] for line in after] == [line[key] for line in before], key
    starts = [json.loads(line) for line in (unbroken / "runs" / victim / "events.jsonl").read_text().splitlines()]
    resumed = [event["step"] for event in starts if event["event"] == "start"]
    assert len(resumed) == 2
    assert resumed[1] >= 10
