"""What a sweep's trials came to: of each that finished the configuration, and what its last step measured."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omniloom.errors import ConfigError, did_you_mean
from omniloom.track import jsonl
from omniloom.track.run_directory import read_config
from omniloom.track.sweep import FILE, Trial, read_sweep


@dataclass(frozen=True)
class Ended:
    """A trial that finished: the configuration of its run and the last line of its metrics."""

    trial: str
    config: dict[str, Any]
    measured: dict[str, Any]


@dataclass
class Trials:
    """A sweep's trials: those that count, and why the others do not, by name."""

    ended: list[Ended] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def read_trials(sweep: str, runs_dir: str, metric: str) -> Trials:
    """The trials of a sweep that finished and measured `metric`, a finite number, at their last step.

    Raises ConfigError where runs_dir holds no such sweep, or none of its trials measured such a metric.
    """
    folder = Path(runs_dir) / sweep
    if not (folder / FILE).is_file():
        sweeps = [path.parent.name for path in Path(runs_dir).glob(f"*/{FILE}")]
        what = "is a run" if (folder / "run.json").is_file() else "is unknown"
        raise ConfigError(f"sweep {sweep} {what} in runs_dir={runs_dir}; {did_you_mean(sweep, sweeps)}")
    trials, measured = Trials(), set[str]()
    for trial in read_sweep(folder).trials:
        if trial.status != "finished":
            trials.left_out[trial.trial] = _unfinished(trial)
            continue
        try:
            ended = Ended(trial.trial, read_config(folder / trial.run), _last_line(folder / trial.run))
        except ConfigError as error:
            trials.left_out[trial.trial] = str(error)
            continue
        measured |= ended.measured.keys()
        value = ended.measured.get(metric)
        if value is None:
            trials.left_out[trial.trial] = f"its last step did not measure {metric}"
        elif not isinstance(value, int | float) or not math.isfinite(value):
            trials.left_out[trial.trial] = f"{metric} is {value}"
        else:
            trials.ended.append(ended)
    if measured and metric not in measured:
        raise ConfigError(f"no trial of {sweep} measured metric={metric} at its end; {did_you_mean(metric, measured)}")
    return trials


def _unfinished(trial: Trial) -> str:
    where = f"{trial.status} at step {trial.step:,}" if trial.step else trial.status
    return f"{where}: {trial.cause}" if trial.cause else where


def _last_line(run: Path) -> dict[str, Any]:
    path = run / "metrics.jsonl"
    try:
        lines = jsonl.read(path)
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error})") from error
    if not lines:
        raise ConfigError(f"{path} holds no step")
    return lines[-1]
