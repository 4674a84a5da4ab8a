"""How long a run of two ranks takes from a killed one to its next step, by parts: medians of three kills.

    python tests/benchmarks/recovery.py [overrides of `omniloom train`, such as model=tiny train.global_batch_size=64]

noticed: the failure is known, with its first cause; placed: new processes stand; connected: they share a process group;
model: it is built, with its optimizer; checkpoint: the newest one is loaded; first_step: the stream is opened and the
next step done. The run's median step stands beside them.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OMNILOOM = str(Path(sys.executable).parent / "omniloom")
KILLS, STEPS_BETWEEN, PATIENCE_S = 3, 8, 600
PARTS = ("noticed", "placed", "connected", "model", "checkpoint", "first_step")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in lines(run / "events.jsonl") if event["event"] == kind]


def steps_done(run: Path) -> int:
    metrics = lines(run / "metrics.jsonl")
    return int(metrics[-1]["step"]) if metrics else 0


def wait(command: "subprocess.Popen[bytes]", log: Path, until: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not until():
        if command.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the run did not get there:\n{log.read_text()[-2000:]}")
        time.sleep(0.05)


def main(overrides: list[str]) -> None:
    generator = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="omniloom-recovery-") as name:
        folder, log = Path(name), Path(name) / "log"
        run = folder / "runs" / "recovery"
        words = ["experiment=smoke", "run=recovery", "train.steps=5000", "train.save_every=4", "cluster.workers=2"]
        with log.open("wb") as output:
            command = subprocess.Popen(
                [OMNILOOM, "train", *words, *overrides], cwd=folder, stdout=output, stderr=output
            )
        try:
            for kill in range(KILLS):
                wait(command, log, lambda kill=kill: len(events(run, "start")) > kill)
                start = events(run, "start")[-1]
                goal = start["step"] + STEPS_BETWEEN
                wait(command, log, lambda goal=goal: steps_done(run) >= goal)
                os.kill(generator.choice(start["ranks"])["pid"], signal.SIGKILL)
                wait(command, log, lambda kill=kill: len(events(run, "restart")) > kill)
            restarts, failures = events(run, "restart"), events(run, "failure")
            step_s = statistics.median(line["step_s"] for line in lines(run / "metrics.jsonl"))
        finally:
            command.send_signal(signal.SIGTERM)
            command.wait()
    assert [failure["kind"] for failure in failures] == ["worker_died"] * KILLS
    totals = [restart["seconds"] for restart in restarts]
    print(
        f"from a killed rank to the next step: median {statistics.median(totals):.2f} s of {KILLS} kills "
        f"({', '.join(f'{total:.2f}' for total in totals)}); a step {step_s:.3f} s"
    )
    for part in PARTS:
        seconds = [restart[f"{part}_s"] for restart in restarts]
        print(f"  {part:10} {statistics.median(seconds):6.2f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
