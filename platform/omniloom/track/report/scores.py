"""A run's evaluations, as a page shows them: the newest result of each task, a table, a needle task's grid."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omniloom.track.report.text import figure, share
from omniloom.track.verdict import cell_of

_SHARES = ("acc", "exact_match", "f1", "recall")  # metrics between 0 and 1, where no chance says so


@dataclass
class Score:
    """One metric: its value, and what it is held against."""

    value: float
    stderr: float | None
    chance: float | None
    control: dict[str, float]


@dataclass
class Result:
    """One task at one step."""

    task: str
    step: int
    n: int | None
    metrics: dict[str, Score]
    file: Path

    def as_dict(self) -> dict[str, Any]:
        """What `verdict` and a results file hold."""
        metrics = {name: asdict(score) for name, score in self.metrics.items()}
        return {"task": self.task, "step": self.step, "n": self.n, "metrics": metrics}


@dataclass
class Grid:
    """The cells of a needle task: recall by length in tokens and by depth, a share of the length."""

    cells: dict[tuple[int, float], Score]

    @property
    def lengths(self) -> list[int]:
        """Ascending."""
        return sorted({length for length, _ in self.cells})

    @property
    def depths(self) -> list[float]:
        """Ascending."""
        return sorted({depth for _, depth in self.cells})

    @property
    def mean(self) -> float:
        """Of the cells, each as much as any other."""
        return sum(score.value for score in self.cells.values()) / len(self.cells)

    @property
    def worst(self) -> tuple[tuple[int, float], Score]:
        """The cell with the lowest recall."""
        return min(self.cells.items(), key=lambda item: item[1].value)


@dataclass
class Row:
    """One line of the table of scores, written out."""

    task: str
    first: bool  # of its task
    metric: str
    value: str
    stderr: str
    chance: str
    controls: list[tuple[str, str]]
    n: str
    step: int
    bar: dict[str, Any] | None  # shares, in percent of the bar's width


def read_history(folder: Path) -> tuple[dict[str, list[Result]], list[str]]:
    """Each task's results, oldest step first, and the names of files that could not be read."""
    history: dict[str, list[Result]] = {}
    damaged = []
    for file in sorted(folder.glob("evals/step_*/*.json")):
        try:
            result = _result(json.loads(file.read_bytes()), file)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            damaged.append(str(file.relative_to(folder)))  # half written, or not ours
            continue
        history.setdefault(result.task, []).append(result)
    return history, damaged


def newest(history: dict[str, list[Result]]) -> list[Result]:
    """The last result of each task, by name."""
    return [results[-1] for _, results in sorted(history.items())]


def grid_of(result: Result) -> Grid | None:
    """The grid of a task that has metrics `acc/<length>/<depth>`."""
    named = ((cell_of(name), score) for name, score in result.metrics.items())
    cells = {cell: score for cell, score in named if cell is not None}
    return Grid(cells) if cells else None


def table_rows(results: list[Result]) -> list[Row]:
    """A line a metric; a grid's cells stand in its heatmap instead."""
    rows: list[Row] = []
    for result in results:
        first = True
        for name, score in result.metrics.items():
            if not cell_of(name):
                rows.append(_row(result, name, score, first))
                first = False
    return rows


def _row(result: Result, name: str, score: Score, first: bool) -> Row:
    is_share = 0 <= score.value <= 1 and (score.chance is not None or name.startswith(_SHARES))
    write = share if is_share else figure
    bar = None
    if is_share:
        error = score.stderr or 0.0
        bar = {
            "value": 100 * score.value,
            "low": 100 * max(0.0, score.value - error),
            "high": 100 * min(1.0, score.value + error),
            "chance": None if score.chance is None else 100 * score.chance,
            "controls": [(control, 100 * value) for control, value in score.control.items() if 0 <= value <= 1],
        }
    return Row(
        task=result.task,
        first=first,
        metric=name,
        value=write(score.value),
        stderr="" if score.stderr is None else f"± {write(score.stderr)}",
        chance=write(score.chance),
        controls=[(control, write(value)) for control, value in score.control.items()],
        n="–" if result.n is None else f"{result.n:,}",
        step=result.step,
        bar=bar,
    )


def _result(saved: dict[str, Any], file: Path) -> Result:
    metrics = {
        str(name): Score(
            value=float(metric["value"]),
            stderr=_number(metric.get("stderr")),
            chance=_number(metric.get("chance")),
            control={str(key): float(v) for key, v in (metric.get("control") or {}).items() if _number(v) is not None},
        )
        for name, metric in saved["metrics"].items()
        if _number(metric.get("value")) is not None
    }
    n = saved.get("n")
    return Result(str(saved["task"]), int(saved["step"]), n if isinstance(n, int) else None, metrics, file)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
