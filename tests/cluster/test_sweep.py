"""Sweeps on a cluster of two nodes: what is planted best wins, whatever is killed; every trial says how it ended."""

import json
import os
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import psutil
import pytest
from two_nodes import OMNILOOM, User

SOAK = "OMNILOOM_SOAK" in os.environ
PLANTED = "0.01"
POOR = [f"{digit}e-07" for digit in range(1, 10)] + ["1e-08", "2e-08"]
RATES = [*POOR[:2], PLANTED, *POOR[2:]] if SOAK else [*POOR[:2], PLANTED, POOR[2]]
STEPS = 60
ENDED = ("finished", "pruned")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def start(user: User, run: str, *words: str) -> subprocess.Popen[bytes]:
    command = [*OMNILOOM, "sweep", "train", "experiment=smoke", f"run={run}", "cluster.address=up", *words]
    with (user.folder / f"{run}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=user.folder, env=user.environment, stdout=log, stderr=log)


def asha(user: User, run: str) -> subprocess.Popen[bytes]:
    """A trial for each rate: all but one learn next to nothing."""
    swept = [f"optimizer.lr=choice({','.join(RATES)})", "sweep=asha", "sweep.search=grid", "sweep.reduction_factor=2"]
    return start(user, run, f"train.steps={STEPS}", "cluster.max_failures=3", *swept)


def read(user: User, run: str) -> dict[str, Any]:
    path = user.folder / "runs" / run / "sweep.json"
    return json.loads(path.read_text()) if path.is_file() else {"trials": []}


def wait_for_ends(user: User, run: str, ends: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 600
    while sum(trial["status"] in ENDED for trial in read(user, run)["trials"]) < ends:
        assert process.poll() is None, (user.folder / f"{run}.log").read_text()[-3000:]
        assert time.monotonic() < deadline, (user.folder / f"{run}.log").read_text()[-3000:]
        time.sleep(0.2)


def planted_won(user: User, run: str) -> None:
    sweep = read(user, run)
    log = (user.folder / f"{run}.log").read_text()
    assert sweep["status"] == "finished", log[-3000:]
    trials = sweep["trials"]
    assert sorted(trial["values"]["optimizer.lr"] for trial in trials) == sorted(RATES)
    counts = Counter(trial["status"] for trial in trials)
    assert counts.total() == counts["finished"] + counts["pruned"] + counts["failed"], counts
    assert all(trial["cause"] for trial in trials if trial["status"] == "failed")
    assert counts["finished"] >= 1
    assert counts["pruned"] >= 1, counts
    best = min((trial for trial in trials if trial["status"] == "finished"), key=lambda trial: trial["objectives"][0])
    assert best["values"]["optimizer.lr"] == PLANTED
    assert f"best: trial {best['trial']}" in log
    assert f"optimizer.lr={PLANTED} run={run}-{best['trial']}" in log
    page = (user.folder / "runs" / run / "report.html").read_text()
    assert all(f'data-chart="{name}"' in page for name in ("curves", "parallel-0", "importance-0"))
    for trial in trials:  # each a run like any other, in the sweep's group, each step once
        folder = user.folder / "runs" / run / trial["run"]
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, len(steps) + 1))
        assert f"group: {run}" in (folder / "config.yaml").read_text()
    print(run, dict(counts))


only_in_soak = pytest.mark.skipif(not SOAK, reason="all kills in one sweep show the same")


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param([], marks=only_in_soak),
        pytest.param(["command"], marks=only_in_soak),
        pytest.param(["node"], marks=only_in_soak),
        ["signal", "command", "node"],
    ],
    ids=lambda kills: "-".join(kills) or "nothing",
)
def test_what_is_planted_best_wins_whatever_is_killed(kills: list[str], user: User, state: dict[str, Any]) -> None:
    run = "-".join(["planted", *kills])
    process = asha(user, run)
    if "signal" in kills:
        process = stopped_and_begun_again(user, run, process)
    if "command" in kills:
        wait_for_ends(user, run, 1, process)
        ended = {trial: _starts(user, run, trial) for trial in saved_as_ended(user, run)}
        process.kill()
        process.wait()
        process = asha(user, run)
    if "node" in kills:
        wait_for_ends(user, run, len(RATES) // 2, process)
        killed = 0
        for child in psutil.Process(state["pid"]).children():
            with suppress(psutil.NoSuchProcess):  # children come and go
                if child.name() == "raylet" and "--head" not in child.cmdline():
                    child.kill()
                    killed += 1
        assert killed == 1
    assert process.wait(timeout=900) == 0, (user.folder / f"{run}.log").read_text()[-3000:]
    planted_won(user, run)
    if "command" in kills:
        assert {trial: _starts(user, run, trial) for trial in ended} == ended, "what had ended was run again"
        again = asha(user, run)
        assert again.wait(timeout=120) == 0
        assert (user.folder / f"{run}.log").read_text().count(f"sweep {run} is finished") == 2


def stopped_and_begun_again(user: User, run: str, process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """SIGTERM lets every trial that trains save a checkpoint and end."""
    folder = user.folder / "runs" / run
    deadline = time.monotonic() + 300
    while not any(path.stat().st_size for path in folder.glob("*/metrics.jsonl")):
        assert process.poll() is None, (user.folder / f"{run}.log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=300) == 128 + signal.SIGTERM, (user.folder / f"{run}.log").read_text()[-3000:]
    assert (read(user, run)["status"], read(user, run)["exit_reason"]) == ("interrupted", "SIGTERM")
    trained = [path.parent for path in folder.glob("*/metrics.jsonl") if path.stat().st_size]
    for trial in trained:
        record = json.loads((trial / "run.json").read_text())
        assert record["status"] in ("interrupted", "finished"), record
        step = len((trial / "metrics.jsonl").read_text().splitlines())
        assert (trial / "checkpoints" / f"step_{step:08d}" / "COMPLETE").is_file(), record
    return asha(user, run)


@only_in_soak
@pytest.mark.parametrize("kind", ["tpe", "pbt"])
def test_other_searches_come_to_their_end(kind: str, user: User) -> None:
    words = ["optimizer.lr=tag(log,interval(1e-6,1e-2))", f"sweep={kind}", "sweep.trials=4"]
    more = {
        "tpe": ["model.num_experts_per_tok=choice(1,2)", "sweep.minimize=[val/loss,memory_peak_bytes]"],
        "pbt": ["optimizer.weight_decay=choice(0,0.1,0.3)", "sweep.perturb_steps=10", "train.steps=60"],
    }[kind]
    assert start(user, kind, *words, *more).wait(timeout=900) == 0, (user.folder / f"{kind}.log").read_text()[-3000:]
    sweep = read(user, kind)
    assert [trial["status"] for trial in sweep["trials"]] == ["finished"] * 4
    if kind == "tpe":
        assert all(len(trial["objectives"]) == 2 for trial in sweep["trials"])
        assert 'data-chart="front"' in (user.folder / "runs" / kind / "report.html").read_text()
    for path in (user.folder / "runs" / kind).glob("*-from-*/run.json"):  # what went on from another's checkpoint
        record = json.loads(path.read_text())
        donor, step = record["parent_run"].split("@")
        lines = [json.loads(line) for line in path.with_name("metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 61))
        theirs = (user.folder / "runs" / kind / donor / "metrics.jsonl").read_text().splitlines()
        assert [json.dumps(line) for line in lines[: int(step)]] == theirs[: int(step)]
        print(record["name"], "from", record["parent_run"])


def saved_as_ended(user: User, run: str) -> list[str]:
    """The trials whose end Tune has written down, once there is one: what it knows after a kill."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        newest = max((user.folder / "runs" / run / "tune").glob("experiment_state-*.json"))
        try:
            trials = [json.loads(trial) for trial, _ in json.loads(newest.read_text())["trial_data"]]
        except ValueError:
            continue  # Tune is writing it
        ended = [trial["trial_id"] for trial in trials if trial["status"] == "TERMINATED"]
        if ended:
            return [f"{int(identity.rpartition('_')[2]):03d}" for identity in ended]
        time.sleep(0.2)
    raise AssertionError("Tune wrote no trial's end down in a minute")


def _starts(user: User, run: str, trial: str) -> int:
    lines = (user.folder / "runs" / run / trial / "events.jsonl").read_text().splitlines()
    return sum(json.loads(line)["event"] == "start" for line in lines)
