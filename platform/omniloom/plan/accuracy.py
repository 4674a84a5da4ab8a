"""How wrong predictions have been: measured over predicted of a cluster's finished runs."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import median

QUANTITIES = ("memory_bytes", "step_s", "tokens_per_s")
LEAST_MEMORY_BYTES = 500_000_000  # below, what libraries load after the model is most of a CPU rank's


@dataclass(frozen=True)
class Band:
    """Measured over predicted of one quantity: the lowest, the median and the highest of `runs` runs."""

    runs: int
    lowest: float
    median: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} × predicted ({self.lowest:.2f} to {self.highest:.2f}, {self.runs} runs)"


@dataclass(frozen=True)
class Prediction:
    """What a plan said of a run, or what the run then was; None where it was not known."""

    memory_bytes: float | None
    step_s: float | None
    tokens_per_s: float | None


@dataclass(frozen=True)
class PlannedRun:
    """A run's plan, and what it measured once it was finished."""

    run: str
    cluster: tuple[str, str]  # its name, and its device's
    predicted: Prediction
    measured: Prediction | None = None


def learn(runs: Iterable[PlannedRun], cluster: tuple[str, str]) -> dict[str, Band]:
    """The bands of a cluster's runs, by quantity; nothing where no finished run has both numbers."""
    ratios: dict[str, list[float]] = {name: [] for name in QUANTITIES}
    for run in runs:
        if run.cluster != cluster or run.measured is None:
            continue
        for name in QUANTITIES:
            predicted, measured = getattr(run.predicted, name), getattr(run.measured, name)
            if predicted and measured and not (name == "memory_bytes" and predicted < LEAST_MEMORY_BYTES):
                ratios[name].append(measured / predicted)
    return {name: Band(len(v), min(v), median(v), max(v)) for name, v in ratios.items() if v}


def as_dict(bands: Mapping[str, Band]) -> dict[str, dict[str, float]]:
    """For --json."""
    return {name: asdict(band) for name, band in bands.items()}
