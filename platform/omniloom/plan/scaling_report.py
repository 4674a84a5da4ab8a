"""Scaling laws as they are told: in columns, and as one object for --json."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from omniloom.errors import ConfigError
from omniloom.plan.scaling_law import COVERAGE, Fit, Interval, RunPoint

NUMBERS = {"E": "E", "A": "A", "B": "B", "alpha": "α", "beta": "β"}


@dataclass(frozen=True)
class BestUse:
    """The model and the data of least loss for a budget, and how far they lie beyond the largest runs.

    `beyond` is C, N and D over the largest measured; up to 1 it is within what was measured, or below.
    """

    params: Interval
    tokens: Interval
    tokens_per_parameter: Interval
    loss: Interval
    beyond: dict[str, float]


@dataclass(frozen=True)
class Scaling:
    """The laws of a sweep's runs, and a budget; the first fit is by active parameters, a second by total ones."""

    sweep: str
    metric: str
    fits: tuple[Fit, ...]
    left_out: Mapping[str, str]  # trials that do not count, and why
    budget_flops: float

    @property
    def fit(self) -> Fit:
        """By active parameters: those that C = 6·N·D counts."""
        return self.fits[0]

    @property
    def points(self) -> tuple[RunPoint, ...]:
        """The runs."""
        return self.fit.points

    @property
    def better(self) -> Fit:
        """The fit with the smaller sum of eq. 3: all have as many numbers and the same points."""
        return min(self.fits, key=lambda fit: fit.law.huber)

    def best_use(self) -> BestUse:
        """Raises ConfigError where the law has none, or most of the laws that were drawn again."""
        budget, fit = self.budget_flops, self.fit
        best = fit.law.optimum(budget)
        if 2 * fit.without_optimum > len(fit.resampled):
            raise ConfigError(
                f"in {fit.without_optimum} of {len(fit.resampled)} draws of these runs the loss does not fall with "
                "both N and D"
            )
        largest = {
            "flops": budget / max(point.flops for point in self.points),
            "params": best.params / max(point.params_active for point in self.points),
            "tokens": best.tokens / max(point.tokens for point in self.points),
        }
        return BestUse(
            params=fit.interval(lambda law: law.optimum(budget).params),
            tokens=fit.interval(lambda law: law.optimum(budget).tokens),
            tokens_per_parameter=fit.interval(lambda law: law.optimum(budget).tokens_per_parameter),
            loss=fit.interval(lambda law: law.optimum(budget).loss),
            beyond=largest,
        )

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        why, best = None, None
        try:
            best = asdict(self.best_use())
        except ConfigError as error:
            why = str(error)
        return {
            "sweep": self.sweep,
            "metric": self.metric,
            "points": [
                asdict(point) | {f"predicted_{fit.counted}": fit.predicted(point) for fit in self.fits}
                for point in self.points
            ],
            "left_out": dict(self.left_out),
            "fits": {fit.counted: _as_dict(fit) for fit in self.fits},
            "better": self.better.counted,
            "budget_flops": self.budget_flops,
            "best_use": best,
            "no_best_use": why,
        }

    def as_table(self) -> str:
        """For reading."""
        blocks = [self._head(), *map(_law_table, self.fits)]
        if len(self.fits) > 1:
            blocks.append(self._comparison())
        return "\n\n".join([*blocks, self._runs_table(), self._budget_table()])

    def _head(self) -> str:
        lines = [
            f"{self.metric} of {len(self.points)} runs of sweep {self.sweep}: L(N, D) = E + A/N^α + B/D^β; intervals "
            f"of {COVERAGE:.0%}, from {len(self.fit.resampled)} draws of the runs"
        ]
        if self.left_out:
            lines.append(f"left out: {len(self.left_out)}")
            lines += [f"  {trial}  {reason}" for trial, reason in self.left_out.items()]
        return "\n".join(lines)

    def _comparison(self) -> str:
        one, other = sorted(self.fits, key=lambda fit: fit.law.huber)
        return (
            f"{one.counted} parameters explain these runs better than {other.counted} ones: they leave "
            f"{one.rms_log_residual:.2%} of the loss, against {other.rms_log_residual:.2%}"
        )

    def _runs_table(self) -> str:
        counts = [fit.counted for fit in self.fits]
        rows = [["run", *(f"N {counted}" for counted in counts), "D", "measured", *(f"law, {c}" for c in counts)]]
        for point in sorted(self.points, key=lambda point: (point.params_active, point.params_total, point.tokens)):
            laws = [f"{fit.predicted(point):.4f} ({fit.predicted(point) / point.loss - 1:+z.1%})" for fit in self.fits]
            sizes = [f"{point.params(counted):,}" for counted in counts]
            rows.append([point.name, *sizes, f"{point.tokens:,}", f"{point.loss:.4f}", *laws])
        return _columns(rows)

    def _budget_table(self) -> str:
        head = f"best use of C = {self.budget_flops:.4g} FLOP = 6·N·D, N active"
        try:
            best = self.best_use()
        except ConfigError as error:
            return f"{head}: none; {error}"
        rows = [
            _row("N", best.params, ".4g"),
            _row("D", best.tokens, ".4g"),
            _row("D / N", best.tokens_per_parameter, ".4g"),
            _row(self.metric, best.loss, ".4f"),
        ]
        lines = [head, _columns(rows)]
        if self.fit.without_optimum:
            lines.append(
                f"in {self.fit.without_optimum} of {len(self.fit.resampled)} draws the loss does not fall with both N "
                "and D, and nothing is best: these intervals are too narrow"
            )
        c, n, d = (f"{best.beyond[name]:,.3g}" for name in ("flops", "params", "tokens"))
        told = f"C is {c} times the largest run's, N {n} times the largest measured, D {d} times"
        if max(best.beyond.values()) <= 1:
            return "\n".join([*lines, f"within what was measured: {told}"])
        warning = "the intervals say how well these runs fix the law, not whether it holds that far"
        return "\n".join([*lines, f"beyond what was measured: {told}; {warning}"])


def _law_table(fit: Fit) -> str:
    rows = [_row(shown, fit.number(name), ".4g") for name, shown in NUMBERS.items()]
    left = f"left unexplained: {fit.rms_log_residual:.2%} of the loss (root mean square), Huber {fit.law.huber:.3g}"
    return "\n".join([f"N: {fit.counted} parameters", _columns(rows), left])


def _row(name: str, interval: Interval, form: str) -> list[str]:
    return [f"  {name}", f"{interval.value:{form}}", f"{interval.low:{form}} to {interval.high:{form}}"]


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _as_dict(fit: Fit) -> dict[str, Any]:
    return {
        **{name: asdict(fit.number(name)) for name in NUMBERS},
        "huber": fit.law.huber,
        "rms_log_residual": fit.rms_log_residual,
        "resamples": len(fit.resampled),
        "resamples_without_optimum": fit.without_optimum,
    }
