"""A cluster of two nodes with authentication, and somebody who uses it from a folder of their own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

OMNILOOM = [sys.executable, "-m", "omniloom"]


@dataclass
class User:
    """Somebody in a folder with an environment of their own."""

    folder: Path
    environment: dict[str, str]

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [*OMNILOOM, *words]
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=400
        )

    def json(self, *words: str) -> Any:
        answer = self.call(*words, "--json")
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout)

    def submit(self, run: str, *overrides: str) -> str:
        words = ["experiment=smoke", f"run={run}", "cluster.workers=2", *overrides]
        return str(self.json("submit", "train", *words)["id"])

    def metrics(self, run: str) -> list[dict[str, Any]]:
        path = self.folder / "runs" / run / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        return [json.loads(line) for line in lines]

    def events(self, run: str, kind: str) -> list[dict[str, Any]]:
        path = self.folder / "runs" / run / "events.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def wait_for_steps(self, run: str, steps: int) -> None:
        deadline = time.monotonic() + 180
        while len(self.metrics(run)) < steps:
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def wait_for_end(self, job: str) -> str:
        deadline = time.monotonic() + 240
        while (status := self.json("status", job)["status"]) in ("PENDING", "RUNNING"):
            assert time.monotonic() < deadline, self.call("logs", job).stdout[-2000:]
        return str(status)


@contextmanager
def with_cluster(folder: Path) -> Iterator[User]:
    """A user whose cluster is up; it ends with everything that belongs to it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    user = User(folder, {**environment, "XDG_STATE_HOME": str(folder / "state"), "HOME": str(folder / "home")})
    (folder / "home").mkdir()
    started = user.json("cluster", "up", "nodes=2", "cpus_per_node=2")
    assert started["nodes"] == 2
    yield user
    held = [p for p in psutil.process_iter() if session_of(p) == started["pid"]]
    assert len(held) > 10
    ended = user.json("cluster", "down")
    assert ended["was_up"]
    assert not any(p.is_running() for p in held)
    assert not Path(started["scratch"]).exists()
    assert user.json("cluster", "down") == {"was_up": False, "processes": 0}
    assert list((folder / "home").iterdir()) == []


def session_of(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid)
    except (ProcessLookupError, PermissionError):
        return -1


def second_raylet(session: int) -> psutil.Process:
    """That of the node which is not the head."""
    mine = [p for p in psutil.process_iter() if session_of(p) == session and p.name() == "raylet"]
    (other,) = [p for p in mine if p.status() != psutil.STATUS_ZOMBIE and "--head" not in p.cmdline()]
    return other
