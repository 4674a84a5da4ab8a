"""SIGKILL of whatever takes part in a run of two nodes: its losses are those of an unbroken run, bit for bit.

Ranks come back by themselves; where the driver died, the same command is repeated; a lost node is given back.
"""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from two_nodes import OMNILOOM, User, second_raylet

from omniloom.track.checkpoints import Checkpoints

# A driver or a rank is what dies during a checkpoint.
VICTIMS = ("raylet", "driver", "checkpoint", "rank", "loader")
SAVE_EVERY, PATIENCE_S = 4, 240
COMPARED = ("loss/next_token", "loss/mtp", "loss/balance", "grad_norm", "batch_hash", "tokens")


@dataclass
class Run:
    """A run and the command that works on it, again and again; a rank takes both CPUs of a node."""

    user: User
    name: str
    steps: int
    kills: int
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = ["experiment=smoke", f"run={self.name}", f"train.steps={self.steps}", f"train.save_every={SAVE_EVERY}"]
        words += ["train.global_batch_size=32", "data.loader_workers=1", "cluster.address=up", "cluster.workers=2"]
        words += ["cluster.cpus_per_worker=2", f"cluster.max_failures={self.kills + 1}"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*OMNILOOM, "train", *words], cwd=self.user.folder, env=self.user.environment, stdout=log, stderr=log
            )

    @property
    def log(self) -> Path:
        return self.user.folder / f"{self.name}.log"

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.user.folder / "runs" / self.name)

    def starts(self) -> list[dict[str, Any]]:
        return self.user.events(self.name, "start")

    def lines(self) -> list[dict[str, Any]]:
        return self.user.metrics(self.name)

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def wait(self, until: Callable[[], Any], every_s: float = 0.02) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (answer := until()):
            assert self.is_running(), self.log.read_text()[-2000:]
            assert time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(every_s)
        return answer

    def has_made(self, number: int, steps: int) -> bool:
        """Whether the `number`th start has made so many steps."""
        starts, metrics = self.starts(), self.lines()
        return len(starts) >= number and bool(metrics) and metrics[-1]["step"] >= starts[-1]["step"] + steps

    def torn(self) -> list[Path]:
        """Checkpoints that are being written, or never were to their end."""
        return [path for path in (self.user.folder / "runs" / self.name / "checkpoints").iterdir() if is_torn(path)]


def is_torn(folder: Path) -> bool:
    return folder.is_dir() and not (folder / "COMPLETE").exists()


def loaders(pid: int) -> Iterator[psutil.Process]:
    """The processes that read rows ahead for a rank: children of its fork server."""
    for server in psutil.Process(pid).children():
        if any("forkserver" in word for word in server.cmdline()):
            yield from server.children()


@dataclass
class Storm:
    """Who was killed so far, and how many checkpoints that tore."""

    run: Run
    generator: random.Random
    session: int  # of the cluster
    torn: int = 0

    def kill(self, victim: str) -> None:
        """Kill one of the kind a few steps after the newest start, and see that no checkpoint went with it."""
        run, begun = self.run, len(self.run.starts())
        steps = self.generator.randint(SAVE_EVERY, 2 * SAVE_EVERY)
        run.wait(lambda: run.has_made(begun, steps))
        ranks = [int(rank["pid"]) for rank in run.starts()[-1]["ranks"]]
        assert run.process is not None
        pid = {
            "driver": lambda: run.process.pid,
            "rank": lambda: self.generator.choice(ranks),
            "raylet": lambda: second_raylet(self.session).pid,
            "loader": lambda: next(loaders(self.generator.choice(ranks))).pid,
            "checkpoint": lambda: self.generator.choice([run.process.pid, *ranks]),
        }[victim]()
        if victim == "checkpoint":
            before = set(run.torn())
            run.wait(lambda: set(run.torn()) - before, every_s=0)
        os.kill(pid, signal.SIGKILL)
        self.torn += victim == "checkpoint" and bool(set(run.torn()) - before)
        complete = max(run.checkpoints.complete(), default=0)
        assert len(run.lines()) < run.steps, "the run ended before it was killed"
        if victim == "raylet":
            os.kill(self.session, signal.SIGUSR1)  # another node
        if pid == run.process.pid:
            run.process.wait(timeout=120)
            _, alive = psutil.wait_procs([psutil.Process(rank) for rank in ranks if psutil.pid_exists(rank)], 60)
            assert not alive, "ranks go on without their driver"
            run.start()
        run.wait(lambda: len(run.starts()) > begun)
        assert run.starts()[-1]["step"] >= complete, "a complete checkpoint was lost"


@pytest.mark.parametrize(
    ("kills", "steps"),
    [
        pytest.param(3, 40, marks=pytest.mark.timeout(900)),
        pytest.param(30, 300, marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
)
def test_a_storm_of_kills_ends_bit_for_bit_as_an_unbroken_run(
    kills: int, steps: int, user: User, state: dict[str, Any]
) -> None:
    unbroken, run = Run(user, f"unbroken{kills}", steps, 0), Run(user, f"storm{kills}", steps, kills)
    unbroken.start()
    assert unbroken.process is not None
    assert unbroken.process.wait(timeout=600) == 0, unbroken.log.read_text()[-2000:]

    storm = Storm(run, random.Random(0), int(state["pid"]))
    victims = [*VICTIMS[:kills], *storm.generator.choices(VICTIMS, k=max(kills - len(VICTIMS), 0))]
    storm.generator.shuffle(victims)
    began = time.monotonic()
    run.start()
    try:
        run.wait(run.starts)
        for victim in victims:
            storm.kill(victim)
        assert run.process is not None
        assert run.process.wait(timeout=600) == 0, run.log.read_text()[-3000:]
    finally:
        if run.process is not None:
            run.process.kill()

    after, before = run.lines(), unbroken.lines()
    assert [line["step"] for line in after] == list(range(1, steps + 1))
    for key in COMPARED:
        assert [line[key] for line in after] == [line[key] for line in before], key
    resumed = [start["step"] for start in run.starts()]
    assert resumed == sorted(resumed)
    assert all(step % SAVE_EVERY == 0 for step in resumed)
    failures = user.events(run.name, "failure")
    assert len(failures) >= sum(victims.count(victim) for victim in ("rank", "raylet", "loader"))
    assert all(event["host"] and event["cause"] for event in failures)
    assert len(user.events(run.name, "command_lost")) >= victims.count("driver")
    counts = ", ".join(f"{victims.count(victim)} {victim}" for victim in VICTIMS)
    print(
        f"{kills} kills ({counts}; {storm.torn} checkpoints torn), {len(resumed)} starts, {steps} steps each once, "
        f"losses bit for bit; {time.monotonic() - began:.0f} s"
    )
