"""A rank's own side of faults: where it runs, the error it ends with, its stacks where it hangs, its signals.

Everything is written by the rank itself, before its end is anybody else's trouble, into the run's folder:

ranks/start_<n>/rank_<r>.json    its record: when it begins, where it seems to hang, and before its error propagates
stacks/start_<n>/rank_<r>.txt    every thread's stack, after a hang or a crash; an empty one is removed
"""

import faulthandler
import json
import os
import platform
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import ray
import torch.distributed as dist
from ray.train import get_context
from ray.train.v2._internal.execution.callback import WorkerCallback

from omniloom.cluster.session import die_with_parent

Kind = Literal["node_lost", "worker_died", "exception", "hang", "out_of_memory"]
FIRST_STEP = 3  # times as long as between steps: building, loading, compiling
END_S = 10.0  # and a tenth of hang_s: from the stacks to the end, so that every rank has written its own
TRACEBACK_LINES = 12
NO_MEMORY = re.compile(r"out of memory|can(?:'t|not) allocate memory|failed to allocate|bad_alloc", re.IGNORECASE)
TIMED_OUT = re.compile(r"Timed out waiting|collective operation timeout|Socket Timeout", re.IGNORECASE)


@dataclass(frozen=True)
class Hooks:
    """What `run_on_ranks` tells its caller, and asks of it: in the driver, beside it, and in the ranks."""

    folder: Path  # for ranks/ and stacks/; every node sees it
    tell: Callable[..., None]  # an event: its kind, then facts by name
    steps_done: Callable[[], int]
    ask_to_stop: Callable[[str], None]  # have all ranks save and end after the step they are in; why
    ask_to_save: Callable[[], None]  # and go on
    go_on: Callable[[], bool]  # whether ranks that have ended were asked to by `ask_to_stop(ROOM…)`, and that is done
    hear: Callable[["Rank"], None]  # in each rank, before the function: whom to tell how it gets on


@dataclass
class Record:
    """Who a rank is and, once it has failed, how; times are seconds since 1970."""

    rank: int
    host: str
    pid: int
    node: str  # Ray's id
    began: float
    oom_kills: int  # of this machine so far
    steps: int = 0  # `alive` so far, and collectives begun: where it was last seen when it seemed to hang
    collectives: int = -1
    failed: float | None = None
    kind: Kind | None = None
    error: str = ""  # its class
    message: str = ""
    traceback: list[str] = field(default_factory=list)


@dataclass
class RankSide(WorkerCallback):
    """What travels to every rank when it is placed; Ray calls it there, on the main thread, before the function."""

    hooks: Hooks
    hang_s: float | None
    start: int = 0  # of the ranks, counted over all commands
    restart: dict[str, float] | None = None  # when the last failure was, and when it was noticed

    def after_init_train_context(self) -> None:
        """Begin the record, watch for a hang, listen to signals."""
        global _this_rank
        die_with_parent()
        _this_rank = Rank(self, get_context().get_world_rank())

    def before_worker_shutdown(self) -> None:
        """The controller ends this rank: what comes now is no failure and no notice."""
        if _this_rank is not None:
            _this_rank.close()


class Rank:
    """This process's record, its watch and its signals."""

    def __init__(self, side: RankSide, rank: int) -> None:
        self._side = side
        self._writing = threading.Lock()
        node = ray.get_runtime_context().get_node_id()
        self._record = Record(rank, platform.node(), os.getpid(), node, time.time(), oom_kills())
        self._write()
        path = stacks_file(side.hooks.folder, side.start, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stacks = path.open("a")
        self._path = path
        faulthandler.enable(self._stacks)  # a crash in native code leaves its stacks too
        self._armed = self._ended = 0.0
        self._reached: dict[str, float] = {}
        self._arm(FIRST_STEP)
        if side.hang_s is not None:
            threading.Thread(target=self._watch, args=(side.hang_s,), daemon=True).start()
        self._before = {
            number: signal.signal(number, handler)
            for number, handler in ((signal.SIGTERM, self._leave), (signal.SIGUSR1, self._save))
        }

    def alive(self) -> None:
        """Something has been done: a step, a validation, a checkpoint."""
        self._record.steps += 1
        if self._record.steps == 1 and self._record.rank == 0 and self._side.restart is not None:
            self._tell_restart(self._side.restart)
        self.busy()

    def busy(self) -> None:
        """Something long gets on that is no step, and no other rank waits for."""
        # Native timers cost a thread and a call of the system each: not at every one of many short steps.
        if self._side.hang_s is not None and time.monotonic() - self._armed > self._side.hang_s / 20:
            self._arm(1)

    def reached(self, what: str) -> None:
        """A part of the way to the first step lies behind."""
        self._reached[what] = time.time()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Write down the error that the body ends with, before anybody else hears of it."""
        self.reached("connected")
        try:
            yield
        except BaseException as error:
            self._record.failed = time.time()
            self._record.kind = kind_of(error)
            self._record.error, self._record.message = type(error).__name__, str(error)
            lines = "".join(traceback.format_exception(error)).splitlines()
            self._record.traceback = lines[-TRACEBACK_LINES:]
            self._write()
            raise
        finally:
            self._disarm()

    def close(self) -> None:
        """Leave no timer, no handler and no empty file."""
        self._disarm()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        faulthandler.enable(sys.__stderr__ or 2)
        self._stacks.close()
        remove_if_empty(self._path)

    def _write(self) -> None:
        path = record_file(self._side.hooks.folder, self._side.start, self._record.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}")
        with self._writing:  # the watch must not put an older one in the place of the last
            partial.write_text(json.dumps(asdict(self._record)))
            partial.replace(path)

    def _arm(self, times: int) -> None:
        """Neither of the two needs Python to run on: one is a thread of C, the other the kernel's own."""
        if self._side.hang_s is None or self._ended:
            return
        self._armed = time.monotonic()
        if os.fstat(self._stacks.fileno()).st_size:  # it took long, and went on
            os.ftruncate(self._stacks.fileno(), 0)
        patience_s = self._side.hang_s * times
        faulthandler.dump_traceback_later(patience_s, file=self._stacks)
        signal.setitimer(signal.ITIMER_REAL, patience_s + END_S + self._side.hang_s / 10)

    def _disarm(self) -> None:
        self._ended = time.monotonic()
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _watch(self, hang_s: float) -> None:
        """Write down where this rank stands while it does not get on: who is behind holds up the others."""
        while not self._ended:
            time.sleep(hang_s / 4)
            if not self._ended and time.monotonic() - self._armed > hang_s / 2:
                self._record.collectives = _collectives()
                self._write()

    def _leave(self, number: int, frame: object) -> None:
        record = self._record
        name = signal.Signals(number).name
        self._side.hooks.ask_to_stop(f"{name} to rank {record.rank} (host {record.host}, pid {record.pid})")

    def _save(self, number: int, frame: object) -> None:
        self._side.hooks.ask_to_save()

    def _tell_restart(self, restart: dict[str, float]) -> None:
        """How long it took from the failure to this first step, and what took how long, as far as it was told."""
        now = time.time()
        marks = {"noticed": restart["noticed"], "placed": self._record.began, **self._reached, "first_step": now}
        parts, before = {}, restart["failed"]
        for name, at in marks.items():
            parts[f"{name}_s"], before = at - before, at
        self._side.hooks.tell("restart", start=self._side.start, seconds=now - restart["failed"], **parts)


_this_rank: Rank | None = None  # of this process, which Ray makes for one rank of one start


def run_as_rank(function: Callable[[Any], None], argument: Any) -> None:
    """Call the function on a rank, watched."""
    assert _this_rank is not None
    _this_rank._side.hooks.hear(_this_rank)
    with _this_rank.recorded():
        function(argument)


def record_file(folder: Path, start: int, rank: int) -> Path:
    """Where a rank's record lies."""
    return folder / "ranks" / f"start_{start}" / f"rank_{rank}.json"


def stacks_file(folder: Path, start: int, rank: int) -> Path:
    """Where its stacks lie, if any."""
    return folder / "stacks" / f"start_{start}" / f"rank_{rank}.txt"


def remove_if_empty(path: Path) -> None:
    """Remove a file without words, and the folders that held no other."""
    with suppress(OSError):
        if not path.stat().st_size:
            path.unlink()
            path.parent.rmdir()
            path.parent.parent.rmdir()


def next_start(folder: Path) -> int:
    """The number of the next start of the ranks."""
    return 1 + max((int(path.name.rpartition("_")[2]) for path in folder.glob("ranks/start_*")), default=0)


def read_record(folder: Path, start: int, rank: int) -> Record | None:
    """A rank's record, if it came to write one."""
    try:
        return Record(**json.loads(record_file(folder, start, rank).read_bytes()))
    except FileNotFoundError:
        return None


def kind_of(error: BaseException) -> Kind:
    """What sort of failure an error is."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or NO_MEMORY.search(str(error)):
        return "out_of_memory"
    return "hang" if TIMED_OUT.search(str(error)) else "exception"


def oom_kills() -> int:
    """How many processes the kernel has killed on this machine for want of memory."""
    files = [Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events")]  # the machine's; a container's own
    counts = []
    for path in files:
        with suppress(OSError):
            words = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
            counts.append(int(words[1]) if words else 0)
    return max(counts, default=0)


def _collectives() -> int:
    """How many collectives this rank has begun in the group of all ranks; -1 where nobody counts."""
    with suppress(RuntimeError, ValueError):
        if dist.is_initialized() and dist.group.WORLD is not None:
            return int(dist.group.WORLD._get_sequence_number_for_group())  # type: ignore[attr-defined]
    return -1
