"""SIGKILL of drivers, ranks and raylets at random steps: the losses are those of an unbroken run, bit for bit.

Ranks come back by Ray's failure policy; where the driver or its node died, the same command is repeated.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

OMNILOOM = str(Path(sys.executable).parent / "omniloom")
KILLS = 10 if "OMNILOOM_SOAK" in os.environ else 3
VICTIMS = ("driver", "rank", "raylet")
STEPS = 45 * KILLS  # each start goes on for up to 25 steps before its kill, and a few until it is noticed
COMPARED = ("loss/next_token", "loss/mtp", "loss/balance", "grad_norm", "batch_hash", "tokens")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@dataclass
class Run:
    """A run and the command that works on it, again and again."""

    folder: Path
    name: str
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # Steps of about an eighth of a second: a kill hits the step it is meant for.
        words = [
            "experiment=smoke",
            f"run={self.name}",
            f"train.steps={STEPS}",
            "train.save_every=10",
            "train.global_batch_size=32",
            "cluster.workers=2",
            f"cluster.max_failures={2 * KILLS}",
        ]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([OMNILOOM, "train", *words], cwd=self.folder, stdout=log, stderr=log)

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / "runs" / self.name / name
        whole = path.read_text().split("\n")[:-1] if path.is_file() else []
        return [json.loads(line) for line in whole]

    def starts(self) -> list[dict[str, Any]]:
        return [event for event in self.lines("events.jsonl") if event["event"] == "start"]

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def wait_for_steps_since_start(self, number: int, steps: int) -> None:
        """Until the `number`th start has made so many steps."""
        deadline = time.monotonic() + 180
        while True:
            starts, metrics = self.starts(), self.lines("metrics.jsonl")
            if len(starts) >= number and metrics and metrics[-1]["step"] >= starts[-1]["step"] + steps:
                return
            assert self.is_running(), self.log.read_text()[-2000:]
            assert time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.02)

    def pid_of(self, victim: str, generator: random.Random) -> int:
        assert self.process is not None
        if victim == "rank":
            return int(generator.choice(self.starts()[-1]["ranks"])["pid"])
        if victim == "raylet":
            return next(child.pid for child in psutil.Process(self.process.pid).children() if child.name() == "raylet")
        return self.process.pid


def test_a_storm_of_kills_ends_bit_for_bit_as_an_unbroken_run(tmp_path: Path) -> None:
    unbroken, storm = Run(tmp_path, "unbroken"), Run(tmp_path, "storm")
    unbroken.start()
    assert unbroken.process is not None
    assert unbroken.process.wait(timeout=400) == 0, unbroken.log.read_text()[-2000:]

    generator = random.Random(0)
    victims = [*VICTIMS, *generator.choices(VICTIMS, k=KILLS - len(VICTIMS))]
    generator.shuffle(victims)
    for victim in victims:
        begun = len(storm.starts())
        if not storm.is_running():
            storm.start()
        storm.wait_for_steps_since_start(begun + 1, generator.randint(5, 25))
        killed = storm.starts()[-1]["ranks"]
        os.kill(storm.pid_of(victim, generator), signal.SIGKILL)
        assert len(storm.lines("metrics.jsonl")) < STEPS, "the run ended before it was killed"
        if victim != "rank":
            assert storm.process is not None
            storm.process.wait(timeout=120)
            _, alive = psutil.wait_procs([psutil.Process(r["pid"]) for r in killed if psutil.pid_exists(r["pid"])], 60)
            assert not alive, f"ranks go on without their {victim}"
    while not storm.lines("metrics.jsonl") or storm.process is None or storm.process.wait(timeout=600) != 0:
        storm.start()

    after, before = storm.lines("metrics.jsonl"), unbroken.lines("metrics.jsonl")
    assert [line["step"] for line in after] == list(range(1, STEPS + 1))
    for key in COMPARED:
        assert [line[key] for line in after] == [line[key] for line in before], key
    resumed = [start["step"] for start in storm.starts()]
    assert resumed == sorted(resumed)
    assert all(step % 10 == 0 for step in resumed)
    assert resumed[-1] > 0
    told = storm.lines("events.jsonl")
    failures = [event for event in told if event["event"] == "failure"]
    assert len(failures) >= victims.count("rank")
    assert all(event["host"] and event["pid"] and event["cause"] for event in failures)
    assert sum(event["event"] == "command_lost" for event in told) >= victims.count("driver")
    print(f"{KILLS} kills, {len(storm.starts())} starts of ranks: {', '.join(victims)}")
