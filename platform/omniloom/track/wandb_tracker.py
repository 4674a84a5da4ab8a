"""The only place that writes to Weights & Biases."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import wandb

from omniloom.errors import ClusterError, ConfigError
from omniloom.track import jsonl
from omniloom.track.config import TrackConfig
from omniloom.track.run_directory import RunRecord


def push(folder: Path) -> str:
    """Push what a run has recorded offline, with W&B's own `sync`; returns the offline folder.

    Raises ConfigError where nothing was recorded offline, ClusterError with W&B's own words where it would not go.
    """
    recorded = sorted((folder / "wandb").glob("offline-run-*"))
    if not recorded:
        raise ConfigError(f"run {folder.name} has nothing recorded offline: {folder / 'wandb'} holds no offline-run-…")
    words = [sys.executable, "-m", "wandb", "sync", "--include-synced", str(recorded[-1])]
    answer = subprocess.run(words, capture_output=True, text=True)
    said = f"{answer.stdout}\n{answer.stderr}".strip()
    if answer.returncode or "error" in said.lower():
        raise ClusterError(f"W&B did not take {recorded[-1].name}: {said.splitlines()[-1] if said else 'no word'}")
    return recorded[-1].name


class WandbTracker:
    """One W&B run per run, across restarts.

    Online, W&B resumes by id. Offline it cannot: the cut-back metrics.jsonl and the evaluations are replayed into one
    fresh file of the same id, and what an earlier start wrote is removed.
    """

    def __init__(self, folder: Path, record: RunRecord, config: TrackConfig, settings: dict[str, Any]) -> None:
        mode = os.environ.get("WANDB_MODE", config.wandb)
        # Everything it writes stays in the run directory.
        for variable in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            os.environ[variable] = str(folder / "wandb" / "home")
        # Of a process that started this one: its service would end with it, or outlive a killed run and hold its id.
        os.environ.pop("WANDB_SERVICE", None)
        stale = sorted((folder / "wandb").glob("offline-run-*")) if mode == "offline" else []
        self._run = wandb.init(
            mode=mode,  # type: ignore[arg-type]
            dir=str(folder),
            id=record.wandb_id,
            name=record.name,
            entity=config.entity,
            project=config.project,
            group=config.group,
            tags=config.tags,
            notes=config.notes,
            config=settings,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("eval/step")
        self._run.define_metric("eval/*", step_metric="eval/step")
        self.url: str | None = self._run.url if mode == "online" else None
        for line in jsonl.read(folder / "metrics.jsonl"):
            if mode == "offline" or line["step"] > (self._run.summary.get("step") or 0):
                self.metrics(line)
        for file in sorted((folder / "evals").glob("step_*/*.json")):
            self.evaluation(json.loads(file.read_text()))
        mine = Path(self._run.dir).parent.resolve() if mode == "offline" else None
        for old in stale:
            if old.resolve() != mine:
                shutil.rmtree(old)

    def metrics(self, line: dict[str, Any]) -> None:
        """Log one step's metrics; their axis is `step`, W&B's own count goes on through evaluations too."""
        self._run.log(line)

    def evaluation(self, result: dict[str, Any]) -> None:
        """Log one evaluation on the evaluations' own axis."""
        values = {f"eval/{result['task']}/{name}": metric["value"] for name, metric in result["metrics"].items()}
        self._run.log({"eval/step": result["step"], **values})

    def close(self, exit_code: int) -> None:
        """End the W&B run."""
        self._run.finish(exit_code=exit_code)
