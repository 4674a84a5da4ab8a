"""kill -9 of the driver or of a rank: the same command continues, and the losses are those of an unbroken run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

OMNILOOM = str(Path(sys.executable).parent / "omniloom")
LEAST_STEPS_BEFORE_THE_KILL = 15  # past the first checkpoint, before the second


STEPS = 400
KILLS = 10 if "OMNILOOM_SOAK" in os.environ else 4


def start(folder: Path, run: str, *overrides: str) -> subprocess.Popen[bytes]:
    words = ["experiment=smoke", f"run={run}", f"train.steps={STEPS}", "train.save_every=10", "cluster.workers=2"]
    words += overrides
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


def is_as_unbroken(folder: Path, run: str) -> None:
    after, before = metrics(folder, run), metrics(folder, "unbroken")
    assert [line["step"] for line in after] == list(range(1, STEPS + 1))
    for key in ("loss/next_token", "loss/mtp", "loss/balance", "grad_norm", "batch_hash", "tokens"):
        assert [line[key] for line in after] == [line[key] for line in before], key


def events(folder: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / run / "events.jsonl").read_text().splitlines()]


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
    is_as_unbroken(unbroken, victim)
    starts = [json.loads(line) for line in (unbroken / "runs" / victim / "events.jsonl").read_text().splitlines()]
    resumed = [event["step"] for event in starts if event["event"] == "start"]
    assert len(resumed) == 2
    assert resumed[1] >= 10


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_storm_of_kills_ends_bit_for_bit_as_an_unbroken_run(unbroken: Path) -> None:
    """Drivers, ranks and raylets, at random steps: ranks come back by Ray's failure policy, the rest by a repeat."""
    generator = random.Random(0)
    victims = ["driver", "rank", "raylet", *generator.choices(["driver", "rank", "raylet"], k=KILLS - 3)]
    generator.shuffle(victims)
    process = None
    for number, victim in enumerate(victims, start=1):
        if process is None or process.poll() is not None:
            process = start(unbroken, "storm", "cluster.max_failures=20")
        step = number * (STEPS - 100) // KILLS + generator.randint(-8, 8)
        wait_for_a_step_past(unbroken, process, step)
        pid = pid_of(victim, unbroken, process, generator)
        os.kill(pid, signal.SIGKILL)
        assert len(metrics(unbroken, "storm")) < STEPS, "the run ended before it was killed"
        if victim != "rank":
            process.wait(timeout=120)
    assert process is not None
    if process.wait(timeout=240) != 0:
        assert start(unbroken, "storm").wait(timeout=240) == 0, (unbroken / "storm.log").read_text()[-2000:]
    is_as_unbroken(unbroken, "storm")
    told = events(unbroken, "storm")
    failures = [event for event in told if event["event"] == "failure"]
    assert len(failures) >= victims.count("rank")
    assert all(event["host"] and event["pid"] and event["cause"] for event in failures)
    assert sum(event["event"] == "command_lost" for event in told) >= victims.count("driver")


def pid_of(victim: str, folder: Path, process: subprocess.Popen[bytes], generator: random.Random) -> int:
    if victim == "rank":
        return int(generator.choice(last_ranks(folder))["pid"])
    if victim == "raylet":
        return next(child.pid for child in psutil.Process(process.pid).children() if child.name() == "raylet")
    return process.pid


def last_ranks(folder: Path) -> list[dict[str, Any]]:
    return [event for event in events(folder, "storm") if event["event"] == "start"][-1]["ranks"]


def wait_for_a_step_past(folder: Path, process: subprocess.Popen[bytes], step: int) -> None:
    """Past `step`, and past the first step of the ranks that run now: those before may be dead already."""
    deadline = time.monotonic() + 180
    while True:
        lines = metrics(folder, "storm")
        if lines and lines[-1]["step"] > step and psutil.pid_exists(last_ranks(folder)[0]["pid"]):
            return
        assert process.poll() is None, (folder / "storm.log").read_text()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
