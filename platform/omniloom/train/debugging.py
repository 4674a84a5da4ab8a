"""What is written down of chosen steps for somebody who looks into a run, and how long its ranks wait for each other.

<run>/debug/trace_steps_10_12_rank_0.json.gz      for chrome://tracing or Perfetto
            memory_steps_10_12_rank_0.pickle      for pytorch.org/memory_viz
            flight_recorder_rank_0                torch's own, at a time-out of NCCL
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch
from torch.distributed import distributed_c10d
from torch.profiler import ProfilerActivity, profile, record_function

from omniloom.errors import ConfigError
from omniloom.track.run_directory import write_event
from omniloom.train.groups import DebugConfig

MEMORY_EVENTS = 1_000_000  # allocations and frees that a snapshot goes back


class Recorder(Protocol):
    """Something that can be recorded, from `start` to `finish`, which writes it, or to `drop`."""

    name: str
    ending: str

    def start(self) -> None: ...

    def finish(self, path: Path) -> None: ...

    def drop(self) -> None: ...


class Trace:
    """What torch's profiler sees."""

    name, ending = "trace", "json.gz"

    def __init__(self, config: DebugConfig) -> None:
        self._config = config

    def start(self) -> None:
        self._profile = profile(
            activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available(),
            record_shapes=self._config.profile_shapes,
            profile_memory=self._config.profile_memory,
        )
        self._profile.start()

    def finish(self, path: Path) -> None:
        self._profile.stop()
        self._profile.export_chrome_trace(str(path))

    def drop(self) -> None:
        self._profile.stop()


class Memory:
    """What a GPU's allocator does."""

    name, ending = "memory", "pickle"

    def start(self) -> None:
        torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)

    def finish(self, path: Path) -> None:
        torch.cuda.memory._dump_snapshot(str(path))
        self.drop()

    def drop(self) -> None:
        torch.cuda.memory._record_memory_history(enabled=None)


class Recording:
    """Records this rank's chosen steps; a file has its name once it is whole."""

    def __init__(self, config: DebugConfig, run_folder: Path, rank: int) -> None:
        if config.memory_snapshot_steps and not torch.cuda.is_available():
            raise ConfigError(
                f"debug.memory_snapshot_steps={config.memory_snapshot_steps} is of a CUDA device's memory, and this "
                "rank has none: set debug.memory_snapshot_steps=[]; debug.profile_memory=true has a CPU's in its trace"
            )
        self._run_folder, self._rank = run_folder, rank
        asked: list[tuple[list[int], Recorder]] = [(config.profile_steps, Trace(config))]
        asked.append((config.memory_snapshot_steps, Memory()))
        self._windows = [_Window(steps, recorder) for steps, recorder in asked if steps]
        for torn in self._folder.glob(f".*_rank_{rank}.*"):  # a kill's
            torn.unlink()

    @property
    def _folder(self) -> Path:
        return self._run_folder / "debug"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for window in self._windows:
            if window.began is not None:  # it holds fewer steps than were asked for
                window.recorder.drop()
                self._tell("recording_dropped", window, reason=f"ended before step {window.last}")

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around an optimizer step."""
        for window in self._windows:
            if window.began is None and window.first <= step <= window.last:
                window.recorder.start()
                window.began = step
        try:
            with record_function(f"step {step}"):
                yield
        except torch.OutOfMemoryError:
            for window in self._windows:
                if window.began is not None and isinstance(window.recorder, Memory):
                    self._write(window, step)  # what was asked for it is worth most now
            raise
        for window in self._windows:
            if window.began is not None and step == window.last:
                self._write(window, step)

    def _write(self, window: "_Window", last: int) -> None:
        recorder = window.recorder
        path = self._folder / f"{recorder.name}_steps_{window.began}_{last}_rank_{self._rank}.{recorder.ending}"
        partial = path.with_name(f".{path.name}")
        path.parent.mkdir(exist_ok=True)
        recorder.finish(partial)
        partial.replace(path)
        self._tell("recorded", window, file=str(path.relative_to(self._run_folder)))
        window.began = None

    def _tell(self, kind: str, window: "_Window", **facts: str) -> None:
        if self._rank == 0:
            write_event(self._run_folder, kind, what=window.recorder.name, steps=[window.began, window.last], **facts)


class _Window:
    """What is recorded from a first step to a last one."""

    def __init__(self, steps: list[int], recorder: Recorder) -> None:
        self.first, self.last = steps
        self.recorder = recorder
        self.began: int | None = None  # the step, while it records


def set_collective_timeout(seconds: int) -> None:
    """Let every process group that exists wait so long for its other ranks; one that is made later has torch's own."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
