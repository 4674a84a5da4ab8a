"""A sweep's folder: `sweep.json`, which says what is searched and how every trial stands; each trial a run in it."""

import json
import math
import shlex
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omniloom.errors import ConfigError
from omniloom.track import jsonl
from omniloom.track.checkpoints import COMPLETE, Checkpoints
from omniloom.track.run_directory import MAY_CHANGE, ask_to_stop, read_as, read_record, wait_until_free

FILE = "sweep.json"


@dataclass
class Trial:
    """One combination of values: its newest run, how it stands, and what it measured last."""

    trial: str
    run: str  # in a population a trial goes on as another run
    values: dict[str, Any]
    status: str  # waiting, running, finished, pruned, failed
    step: int = 0
    objectives: list[float] | None = None
    cause: str | None = None


@dataclass
class SweepRecord:
    """`sweep.json`."""

    name: str
    verb: str
    words: list[str]  # the overrides that all trials share, as they were given
    space: dict[str, Any]
    sweep: dict[str, Any]  # its own configuration
    objectives: list[tuple[str, str]]  # metric, and min or max
    status: str = "running"  # or finished, interrupted, failed
    exit_reason: str | None = None
    git_revision: str | None = None
    started: str = ""
    trials: list[Trial] = field(default_factory=list)

    def best(self) -> list[Trial]:
        """The best trial; of several objectives, each that no other beats or equals in all of them, in trials' order.

        Those that came to their end go first: a pruned trial's last figure is of a younger one.
        """
        measured = [trial for trial in self.trials if trial.objectives]
        ended = [trial for trial in measured if trial.status == "finished"] or measured
        if len(self.objectives) == 1:
            return sorted(ended, key=self._losses)[:1]
        return [trial for trial in ended if not any(self._dominates(other, trial) for other in ended)]

    def _losses(self, trial: Trial) -> list[float]:
        """What it measured, the lower the better; infinite where that is nothing, or not finite."""
        signs = [1 if mode == "min" else -1 for _, mode in self.objectives]
        losses = [sign * value for sign, value in zip(signs, trial.objectives or [math.inf] * len(signs), strict=True)]
        return [loss if math.isfinite(loss) else math.inf for loss in losses]

    def _dominates(self, one: Trial, other: Trial) -> bool:
        pairs = list(zip(self._losses(one), self._losses(other), strict=True))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    def command_of(self, trial: Trial) -> str:
        """The command that runs a trial's configuration again, as a run of its own."""
        words = [self.verb, *self.words, *_chosen(trial.values), f"run={self.name}-{trial.trial}"]
        return shlex.join(["omniloom", *words])

    def table(self) -> str:
        """One line a trial, the best first."""
        keys = list(self.space)
        rows = [["trial", "status", "step", *(metric for metric, _ in self.objectives), *keys]]
        for trial in self.ranked():
            objectives = [f"{value:.4g}" for value in trial.objectives or [float("nan")] * len(self.objectives)]
            shown = [spelled(trial.values[key]) for key in keys]
            rows.append([trial.trial, trial.status, str(trial.step), *objectives, *shown])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        causes = [f"{trial.trial} failed: {trial.cause}" for trial in self.trials if trial.status == "failed"]
        return "\n".join([*lines, *causes])

    def ranked(self) -> list[Trial]:
        """The trials, the best by the first objective first; what measured nothing last."""
        return sorted(self.trials, key=lambda t: (not t.objectives, t.status != "finished", self._losses(t), t.trial))


def open_sweep(folder: Path, sweep: SweepRecord) -> SweepRecord:
    """Start a sweep, or find the one to go on with; raises ConfigError where that one searches something else."""
    if (folder / "run.json").is_file():
        raise ConfigError(f"{folder} is a run, not a sweep: name another run=")
    if not (folder / FILE).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        sweep.started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write_sweep(folder, sweep)
        return sweep
    old, asked = read_sweep(folder), json.loads(json.dumps(asdict(sweep)))
    for what in ("verb", "words", "space", "sweep"):
        before, now = getattr(old, what), asked[what]
        if what == "words":  # another cluster, say: as a repeated run may
            before, now = ([word for word in words if not word.startswith(MAY_CHANGE)] for words in (before, now))
        if before != now:
            raise ConfigError(
                f"sweep {sweep.name} exists with another {what}:\n  was {before}\n  now {now}\nname another run=, or "
                "take it back"
            )
    if old.status != "finished":
        old.status, old.exit_reason, old.words = "running", None, sweep.words
    return old


def read_sweep(folder: Path) -> SweepRecord:
    """Read `sweep.json`; raises ConfigError where the folder is no sweep."""
    return read_as(SweepRecord, folder / FILE, "sweep")


def write_sweep(folder: Path, sweep: SweepRecord) -> None:
    """Write `sweep.json`."""
    jsonl.replace_text(folder / FILE, json.dumps(asdict(sweep), indent=1) + "\n")


def spelled(value: Any) -> str:
    """A chosen value as an override spells it."""
    return value if isinstance(value, str) else repr(value)


def _chosen(values: dict[str, Any]) -> list[str]:
    return [f"{key}={spelled(value)}" for key, value in values.items()]


@dataclass
class TrialRuns:
    """What a sweep's actors ask about their trial's run; see `omniloom.cluster.search.Program`."""

    verb: str
    words: list[str]  # the overrides that all trials share, runs_dir= the sweep's folder among them
    folder: Path  # that folder, on storage that every node sees
    objectives: list[str]
    every: int = 1  # steps: other measurements are not told

    def command(self, run: str, values: dict[str, Any], fork: str | None) -> list[str]:
        """The words after `omniloom` that begin or resume a trial's run."""
        return [self.verb, *self.words, *_chosen(values), f"run={run}", *([f"fork={fork}"] if fork else [])]

    def output(self, run: str) -> Path:
        """The file for what a run prints."""
        (self.folder / run).mkdir(parents=True, exist_ok=True)
        return self.folder / run / "output.log"

    def measured(self, run: str, offset: int) -> tuple[list[tuple[int, list[float]]], int]:
        """Each step at which all objectives were measured, with their values, and the offset to ask for more from."""
        lines, offset = jsonl.read_from(self.folder / run / "metrics.jsonl", offset)
        return [one for one in _measurements(lines, self.objectives) if one[0] % self.every == 0], offset

    def checkpoint(self, run: str, step: int) -> str | None:
        """The run's checkpoint of this step, as fork= takes it, once it is complete."""
        folder = Checkpoints(self.folder / run).at(step)
        return f"{run}@{step}" if folder.exists(COMPLETE) else None

    def cause(self, run: str) -> str:
        """Why a run's command has failed."""
        folder = self.folder / run
        if (folder / "run.json").is_file():
            record = read_record(folder)
            if record.status in ("failed", "interrupted") and record.exit_reason:
                return record.exit_reason
            if record.status == "finished":
                measured = {key for line in jsonl.read(folder / "metrics.jsonl") for key in line}
                missing = [name for name in self.objectives if name not in measured]
                if not missing:
                    return "its run ended before it was measured, or saved, at the step that was asked for"
                return f"its run never measured {', '.join(missing)}; it has {', '.join(sorted(measured))}"
        output = self.output(run)
        said = output.read_text(errors="replace").strip().splitlines() if output.is_file() else []
        return said[-1] if said else "it ended without a word"

    def wait_until_free(self, run: str) -> None:
        """Return when no command works on the run any more."""
        if (self.folder / run / "run.json").is_file():
            wait_until_free(self.folder / run)

    def stop(self) -> None:
        """Have all runs save a checkpoint and end, and wait until they have."""
        running = [f.parent for f in self.folder.glob("*/run.json") if read_record(f.parent).status == "running"]
        for run in running:
            ask_to_stop(run)
        for run in running:
            wait_until_free(run)


def _measurements(lines: Iterable[dict[str, Any]], objectives: list[str]) -> Iterable[tuple[int, list[float]]]:
    for line in lines:
        if all(name in line for name in objectives):
            yield line["step"], [float(line[name]) for name in objectives]


def curve(folder: Path, run: str, objective: str) -> list[tuple[int, float]]:
    """What a run measured of one objective, by step."""
    return [(s, values[0]) for s, values in _measurements(jsonl.read(folder / run / "metrics.jsonl"), [objective])]
