"""A run's metrics.jsonl as curves short enough for a page, however long the run was.

The file is read line by line and never held whole. What is kept of a key, or of the experts' load, is bounded: when a
curve has too many buckets, neighbours are merged, so that each bucket covers twice as many steps. A bucket keeps its
lowest and highest value: one step's spike is still drawn after a million steps.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeGuard

import numpy as np
from numpy.typing import NDArray

BUCKETS = 1000  # of a curve; two points each
LOAD_BINS = 200  # columns of the experts' heatmap
SMOOTHED_SHARE = 0.02  # of a curve's buckets, to each side


@dataclass(slots=True)
class _Bucket:
    first_step: int
    last_step: int
    count: int
    total: float
    low: tuple[int, float]  # step, value
    high: tuple[int, float]

    def take(self, step: int, value: float) -> None:
        self.last_step = step
        self.count += 1
        self.total += value
        if value < self.low[1]:
            self.low = (step, value)
        if value > self.high[1]:
            self.high = (step, value)

    def merge(self, later: Self) -> None:
        self.last_step = later.last_step
        self.count += later.count
        self.total += later.total
        self.low = min(self.low, later.low, key=lambda point: point[1])
        self.high = max(self.high, later.high, key=lambda point: point[1])


class Curve:
    """One key's values over the steps."""

    def __init__(self) -> None:
        self._buckets: list[_Bucket] = []
        self._stride = 1
        self.last: float | None = None
        self.count = 0
        self.total = 0.0
        self.not_finite: list[int] = []  # the first and the last such step

    def add(self, step: int, value: float) -> None:
        """Take the value of the next step."""
        if not math.isfinite(value):
            self.not_finite = [*self.not_finite[:1], step]
            return
        self.last = value
        self.count += 1
        self.total += value
        if self._buckets and self._buckets[-1].count < self._stride:
            self._buckets[-1].take(step, value)
            return
        if len(self._buckets) == BUCKETS:
            self._stride *= 2
            for early, later in zip(self._buckets[::2], self._buckets[1::2], strict=True):
                early.merge(later)
            del self._buckets[1::2]
        self._buckets.append(_Bucket(step, step, 1, value, (step, value), (step, value)))

    def points(self) -> tuple[list[int], list[float]]:
        """Each bucket's extremes, in order of their steps: at most 2 · BUCKETS points."""
        points = [point for b in self._buckets for point in sorted({b.low, b.high})]
        return [step for step, _ in points], [value for _, value in points]

    def smoothed(self) -> tuple[list[int], list[float]]:
        """The centred moving mean; its window narrows towards the first step, where a loss falls steeply."""
        totals = np.concatenate([[0.0], np.cumsum([b.total for b in self._buckets])])
        counts = np.concatenate([[0], np.cumsum([b.count for b in self._buckets])])
        steps = [(b.first_step + b.last_step) // 2 for b in self._buckets]
        to_each_side = max(1, round(len(steps) * SMOOTHED_SHARE))
        values = []
        for i in range(len(steps)):
            half = min(to_each_side, i)
            begin, end = i - half, min(i + half + 1, len(steps))
            values.append(float((totals[end] - totals[begin]) / (counts[end] - counts[begin])))
        return steps, values

    def best(self, highest: bool = False) -> tuple[int, float] | None:
        """The step and value of the lowest, or the highest, point."""
        if not self._buckets:
            return None
        if highest:
            return max((b.high for b in self._buckets), key=lambda point: point[1])
        return min((b.low for b in self._buckets), key=lambda point: point[1])

    @property
    def mean(self) -> float | None:
        """Over every step."""
        return self.total / self.count if self.count else None


@dataclass
class _LoadBin:
    first_step: int
    last_step: int
    lines: int
    tokens: dict[str, NDArray[np.float64]]  # by layer, (E,)

    def merge(self, later: Self) -> None:
        self.last_step = later.last_step
        self.lines += later.lines
        for layer, tokens_E in later.tokens.items():
            mine = self.tokens.get(layer)
            if mine is None:
                self.tokens[layer] = tokens_E
            elif mine.shape == tokens_E.shape:
                mine += tokens_E


class Load:
    """How many tokens each expert got, in at most LOAD_BINS bins of time."""

    def __init__(self) -> None:
        self.bins: list[_LoadBin] = []
        self._stride = 1

    def add(self, step: int, tokens: dict[str, list[float]]) -> None:
        """Take one step's counts by layer."""
        bin_ = _LoadBin(step, step, 1, {layer: np.asarray(of_E, dtype=np.float64) for layer, of_E in tokens.items()})
        if self.bins and self.bins[-1].lines < self._stride:
            self.bins[-1].merge(bin_)
            return
        if len(self.bins) == LOAD_BINS:
            self._stride *= 2
            for early, later in zip(self.bins[::2], self.bins[1::2], strict=True):
                early.merge(later)
            del self.bins[1::2]
        self.bins.append(bin_)

    def over_mean(self) -> dict[str, NDArray[np.float64]]:
        """By layer, (E, bins): each expert's tokens over the mean expert's; NaN where there were none."""
        layers = {layer: tokens_E.shape for bin_ in self.bins for layer, tokens_E in bin_.tokens.items()}
        ratios = {}
        for layer in sorted(layers, key=lambda name: (len(name), name)):
            nothing = np.full(layers[layer], np.nan)
            columns = [bin_.tokens.get(layer, nothing) for bin_ in self.bins]
            tokens_EB = np.stack([c if c.shape == nothing.shape else nothing for c in columns], axis=1)
            mean_B = tokens_EB.mean(axis=0)
            ratios[layer] = tokens_EB / np.where(mean_B > 0, mean_B, np.nan)
        return ratios


@dataclass
class Metrics:
    """What a page shows of metrics.jsonl."""

    curves: defaultdict[str, Curve] = field(default_factory=lambda: defaultdict(Curve))
    load: Load = field(default_factory=Load)
    first_step: int = 0
    last: dict[str, Any] = field(default_factory=dict)  # the last line

    @property
    def step(self) -> int:
        """The last step written."""
        return int(self.last.get("step", 0))


# Of a step's time, in the order they come in; what is left is nobody's.
STEP_PARTS = {
    "data_wait_s": "waiting for data",
    "forward_s": "forward",
    "backward_s": "backward",
    "optimizer_s": "optimizer",
    "communication_s": "communication",
}
_KEYS = {"lr", "grad_norm", "tokens_per_s", "step_s", *STEP_PARTS, "checkpoint_s", "memory_peak_bytes", "mfu"}
# Curves of ours over all layers of a step: there may be dozens of layers, and one curve each would show nothing.
WORST_LOAD, MEAN_LOAD, DEAD_EXPERTS = "router: worst layer", "router: mean layer", "router: dead experts"
LOWEST_ENTROPY, MEAN_ENTROPY = "router: lowest entropy of the load", "router: mean entropy of the load"
WIDEST_BIAS = "router: widest range of a bias"


def read_metrics(path: Path) -> Metrics:
    """Read a run's metrics.jsonl, line by line; no file is no curve."""
    metrics = Metrics()
    for line in whole_lines(path):
        step = line.get("step")
        if not _is_number(step):
            continue
        values = {k: v for k, v in line.items() if _is_number(v) and (k in _KEYS or k.startswith(("loss/", "val/")))}
        values |= _of_all_layers(line)
        for key, value in values.items():
            metrics.curves[key].add(int(step), float(value))
        tokens = {
            key.split("/")[1]: of_E
            for key, of_E in line.items()
            if key.endswith("/tokens_per_expert") and isinstance(of_E, list) and of_E and all(map(_is_number, of_E))
        }
        if tokens:
            metrics.load.add(int(step), tokens)
        metrics.first_step = metrics.first_step or int(step)
        metrics.last = line
    return metrics


def _of_all_layers(line: dict[str, Any]) -> dict[str, float]:
    """What a step's routers did, in a few figures for dozens of layers."""

    def each(name: str) -> list[float]:
        return [v for k, v in line.items() if k.startswith("router/") and k.endswith(f"/{name}") and _is_number(v)]

    load, dead, entropy = each("load_max_over_mean"), each("dead_experts"), each("load_entropy")
    lowest, highest = each("bias_min"), each("bias_max")
    values: dict[str, float] = {}
    if load:
        values |= {WORST_LOAD: max(load), MEAN_LOAD: sum(load) / len(load)}
    if dead:
        values[DEAD_EXPERTS] = sum(dead)
    if entropy:
        values |= {LOWEST_ENTROPY: min(entropy), MEAN_ENTROPY: sum(entropy) / len(entropy)}
    if lowest and len(lowest) == len(highest):
        values[WIDEST_BIAS] = max(high - low for low, high in zip(lowest, highest, strict=True))
    return values


def time_shares(curves: dict[str, Curve]) -> dict[str, float]:
    """Each part's share of all steps' time, by what it is called."""
    step = curves.get("step_s")
    if step is None or not step.total:
        return {}
    return {name: curves[key].total / step.total for key, name in STEP_PARTS.items() if key in curves}


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """A file's objects, one a line and one in memory at a time; a torn or damaged line is passed over."""
    if not path.is_file():
        return
    with path.open("rb") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                return  # still being written, or torn off
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                yield entry


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
