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
from omniloom.track.checkpoints import Checkpoints, Folder
from omniloom.track.config import TrackConfig
from omniloom.track.run_directory import GIT_DIFF, RunRecord
from omniloom.track.samples import LIMIT_BYTES, MIME, choose_samples, pieces_of

MOST_CHARACTERS = 2_000  # of a prompt in a table


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
        os.environ["WANDB_SILENT"] = "true"  # its setting of this name leaves some of its words
        # Of a process that started this one: its service would end with it, or outlive a killed run and hold its id.
        os.environ.pop("WANDB_SERVICE", None)
        stale = sorted((folder / "wandb").glob("offline-run-*")) if mode == "offline" else []
        if mode == "offline":  # what earlier starts would have uploaded
            shutil.rmtree(folder / "wandb" / "home" / "artifacts", ignore_errors=True)
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
            config={**settings, "git_revision": record.git_revision},
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
            result = json.loads(file.read_text())
            if mode == "offline" or self._run.summary.get(f"eval/{result['task']}/step") != result["step"]:
                self.evaluation(result, file.with_suffix(".samples.jsonl"))
        checkpoints = Checkpoints(folder)
        for step in checkpoints.complete():
            self.checkpoint(checkpoints.at(step))
        if (folder / GIT_DIFF).is_file():
            self._run.save(str(folder / GIT_DIFF), base_path=str(folder), policy="now")
        mine = Path(self._run.dir).parent.resolve() if mode == "offline" else None
        for old in stale:
            if old.resolve() != mine:
                shutil.rmtree(old)

    def metrics(self, line: dict[str, Any]) -> None:
        """Log one step's metrics; their axis is `step`, W&B's own count goes on through evaluations too."""
        self._run.log(line)

    def evaluation(self, result: dict[str, Any], samples: Path) -> None:
        """Log one evaluation on the evaluations' own axis, with a table of a few samples and their media."""
        task = result["task"]
        values = {f"eval/{task}/{name}": metric["value"] for name, metric in result["metrics"].items()}
        chosen = choose_samples(samples)
        if chosen is not None:
            values[f"eval/{task}/samples"] = _table(chosen.samples, samples.parent)
        self._run.log({"eval/step": result["step"], f"eval/{task}/step": result["step"], **values})

    def checkpoint(self, folder: Folder) -> None:
        """Make a complete checkpoint known, by where it lies: nothing is copied."""
        artifact = wandb.Artifact(f"run-{self._run.id}-checkpoint", type="model")
        artifact.add_reference(folder.uri, checksum=False)  # COMPLETE has every file's hash
        self._run.log_artifact(artifact, aliases=["latest", folder.name])

    def close(self, exit_code: int) -> None:
        """End the W&B run."""
        self._run.finish(exit_code=exit_code)


def _table(samples: list[dict[str, Any]], folder: Path) -> wandb.Table:
    """One row a sample: id, whether right, answer, given, the prompt's text, and a column for each of its media."""
    rows = []
    for sample in samples:
        pieces = pieces_of(sample)
        row: dict[str, Any] = {name: sample.get(name) for name in ("doc_id", "right", "answer", "given")}
        row["prompt"] = " ".join(str(piece["text"]) for piece in pieces if "text" in piece)[:MOST_CHARACTERS]
        for kind, make in (("image", wandb.Image), ("audio", wandb.Audio), ("video", wandb.Video)):
            for number, name in enumerate(str(piece[kind]) for piece in pieces if kind in piece):
                path = folder / name
                if path.is_file() and path.stat().st_size <= LIMIT_BYTES and path.suffix.lower()[1:] in MIME[kind]:
                    row[f"{kind} {number + 1}" if number else kind] = make(str(path))
        rows.append(row)
    columns: list[str | int] = list(dict.fromkeys(name for row in rows for name in row))
    return wandb.Table(columns=columns, data=[[row.get(str(name)) for name in columns] for row in rows])
