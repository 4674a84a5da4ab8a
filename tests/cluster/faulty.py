"""Ranks that fail in every way, a few steps of which are one all-reduce each."""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ray import cloudpickle

from omniloom.cluster.elastic import ROOM
from omniloom.cluster.rank import Hooks
from omniloom.errors import DataError
from omniloom.track.run_directory import write_event
from omniloom.train import watch

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test


@dataclass
class Job:
    """`how` rank 1 fails in step `at`, at the first start or at each."""

    folder: str
    how: str
    at: int = 3
    steps: int = 6
    always: bool = False
    victim: int = 1
    step_s: float = 0.0


def steps_of(job: Job) -> None:
    """Steps from the last one saved, each saved: like training with a checkpoint every step."""
    rank, folder = dist.get_rank(), Path(job.folder)
    watch.reached("model")
    first_time = not (folder / "failed").exists()
    dist.barrier()
    for step in range(steps_done(folder) + 1, job.steps + 1):
        if step == job.at and rank == job.victim and (first_time or job.always):
            (folder / "failed").touch()
            fail(job.how)
        total = torch.ones(1)
        dist.all_reduce(total)
        if rank == 0:
            with (folder / "steps").open("a") as steps:
                steps.write(f"{step} {int(total)}\n")
        dist.barrier()
        time.sleep(job.step_s)
        watch.alive()
        if (folder / "stop").exists():
            return


def fail(how: str) -> None:
    if how == "exception":
        raise RuntimeError("surprise")
    if how == "ours":
        raise DataError("the disk is full")
    if how == "memory":
        raise MemoryError("not a byte")
    if how == "torch_memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(3)
    if how == "segfault":
        ctypes.string_at(0)
    if how == "sleep":
        time.sleep(1000)
    if how == "linger":  # longer than cluster.hang_s, not so long as to be ended
        time.sleep(22)
    if how == "hold_python":  # native code that never gives Python back
        ctypes.PyDLL(None).sleep(1000)
    if how == "unpicklable":
        raise Unpicklable(threading.Lock())
    if how == "hog":
        held = bytearray(1 << 30)
        while True:
            held += bytearray(1 << 28)
    if how == "terminated":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    if how == "asked_to_save":
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(1)


class Unpicklable(Exception):
    """An error that nobody else can be handed."""

    def __init__(self, lock: Any) -> None:
        super().__init__("it holds a lock")
        self.lock = lock


def steps_done(folder: Path) -> int:
    path = folder / "steps"
    return int(path.read_text().split()[-2]) if path.is_file() else 0


def hooks(folder: Path) -> Hooks:
    return Hooks(
        folder=folder,
        tell=partial(write_event, folder),
        steps_done=partial(steps_done, folder),
        ask_to_stop=partial(note, folder / "stop"),
        ask_to_save=partial(note, folder / "save", "asked"),
        go_on=partial(go_on, folder / "stop"),
        hear=watch.hear,
    )


def go_on(path: Path) -> bool:
    if not path.is_file() or not path.read_text().startswith(ROOM):
        return False
    path.unlink()
    return True


def note(path: Path, why: str) -> None:
    path.write_text(why)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    path = folder / "events.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]
