"""One run's record: metrics by step, events, and their mirror on W&B. Only rank 0 has one."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock

from omniloom.track import jsonl
from omniloom.track.checkpoints import Folder
from omniloom.track.config import TrackConfig
from omniloom.track.run_directory import read_config, read_record, write_event, write_record
from omniloom.track.wandb_tracker import WandbTracker

WRITER_WAIT_S = 120


class Tracker:
    """Writes metrics.jsonl and events.jsonl of a run directory, and forwards metrics to W&B."""

    def __init__(self, folder: Path, config: TrackConfig, settings: dict[str, Any], resumed_at: int) -> None:
        self._folder = folder
        # A rank of a killed driver may still be about to write for a moment: each step once, by one of them.
        self._only_writer = FileLock(folder / ".writer.lock", timeout=WRITER_WAIT_S)
        self._only_writer.acquire()
        jsonl.cut_back(folder / "metrics.jsonl", resumed_at)
        record = read_record(folder)
        self._wandb = WandbTracker(folder, record, config, settings)
        record.wandb_url = self._wandb.url
        write_record(folder, record)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wandb.close(exit_code=0 if error is None else 1)
        self._only_writer.release()

    def metrics(self, line: dict[str, Any]) -> None:
        """Record one step; `line` holds `step` and the contract's keys."""
        jsonl.append(self._folder / "metrics.jsonl", line)
        self._wandb.metrics(line)

    def checkpoint(self, folder: Folder) -> None:
        """Record that a checkpoint is complete."""
        self._wandb.checkpoint(folder)

    def event(self, kind: str, **facts: Any) -> None:
        """Record that something happened."""
        write_event(self._folder, kind, **facts)


def record_evaluations(
    folder: Path, results: dict[str, dict[str, Any]], samples: dict[str, list[dict[str, Any]]]
) -> None:
    """Write each task's result and samples under evals/step_…/ of a run, and bring its W&B record up to date."""
    for task, result in results.items():
        path = folder / "evals" / f"step_{result['step']:08d}" / f"{task}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1))
        lines = (json.dumps(sample) + "\n" for sample in samples.get(task, []))
        path.with_suffix(".samples.jsonl").write_text("".join(lines), encoding="utf-8")
    settings = read_config(folder)
    WandbTracker(folder, read_record(folder), TrackConfig(**settings["track"]), settings).close(exit_code=0)
