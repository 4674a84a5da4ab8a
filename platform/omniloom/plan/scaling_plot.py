"""A picture of a scaling law: its curves through the runs, the best use of a budget, predicted against measured."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation, LogLocator, NullFormatter

from omniloom.errors import ConfigError
from omniloom.plan.params import short
from omniloom.plan.plot_style import ACCENT, INK, STYLE
from omniloom.plan.scaling_law import FLOPS_PER_PARAMETER_TOKEN
from omniloom.plan.scaling_report import BestUse, Scaling

CURVE_POINTS = 120


def write_plot(scaling: Scaling, path: Path) -> None:
    """Three panels as one png; raises ConfigError where the file cannot be written."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(15, 5.2), dpi=130, layout="constrained")
        curves, plane, residuals = figure.subplots(1, 3, width_ratios=(1.05, 1.15, 0.9))
        _draw_curves(curves, scaling)
        _draw_plane(plane, scaling)
        _draw_residuals(residuals, scaling)
        law = scaling.fit.law
        figure.suptitle(
            f"{scaling.metric} of {len(scaling.points)} runs of {scaling.sweep}:  L(N, D) = {law.E:.3g} + "
            f"{law.A:.3g} / N$^{{{law.alpha:.3g}}}$ + {law.B:.3g} / D$^{{{law.beta:.3g}}}$,  N active parameters, "
            "D tokens",
            x=0.01,
            ha="left",
            color=INK,
        )
        try:
            figure.savefig(path, format="png")
        except OSError as error:
            raise ConfigError(f"plot={path} cannot be written: {error}") from error


def _draw_curves(axes: Any, scaling: Scaling) -> None:
    """Loss against D, a curve of the law for each N, the runs on it."""
    sizes = sorted({point.params_active for point in scaling.points})
    tokens = [point.tokens for point in scaling.points]
    across = np.geomspace(min(tokens) / 1.25, max(tokens) * 1.25, CURVE_POINTS)
    for size, colour in zip(sizes, _colours(sizes), strict=True):
        here = [point for point in scaling.points if point.params_active == size]
        axes.plot(across, [scaling.fit.law.loss(size, d) for d in across], color=colour, linewidth=1.4)
        axes.plot(
            [p.tokens for p in here], [p.loss for p in here], "o", color=colour, markersize=5.5, label=short(size)
        )
    axes.set(xscale="log", xlabel="D, tokens", ylabel=scaling.metric)
    axes.set_title("the runs (points) and the law (curves)")
    axes.legend(title="N, active parameters", title_fontsize=8.5, ncols=2)
    _count_ticks(axes.xaxis)


def _draw_plane(axes: Any, scaling: Scaling) -> None:
    """Lines of one loss over N and D, the runs, the best N and D for every budget."""
    law, points = scaling.fit.law, scaling.points
    try:
        best: BestUse | None = scaling.best_use()
    except ConfigError:
        best = None
    interval = _along(scaling.budget_flops, best) if best else (np.empty(0), np.empty(0))
    n_ends = _ends([*(point.params_active for point in points), *interval[0]])
    d_ends = _ends([*(point.tokens for point in points), *interval[1]])
    axes.set(xscale="log", yscale="log", xlim=n_ends, ylim=d_ends)  # before the labels, which are cut into the lines
    n, d = np.meshgrid(np.geomspace(*n_ends, CURVE_POINTS), np.geomspace(*d_ends, CURVE_POINTS))
    losses = law.E + law.A / n**law.alpha + law.B / d**law.beta
    lines = axes.contour(n, d, losses, levels=10, cmap="viridis_r", linewidths=0.9)
    axes.clabel(lines, fontsize=7.5, fmt="%.2f")
    axes.plot([p.params_active for p in points], [p.tokens for p in points], "o", color=INK, markersize=4, label="runs")
    if best is not None:
        _draw_best_use(axes, scaling, best)
    axes.set(xlabel="N, active parameters", ylabel="D, tokens")
    axes.set_title(f"lines of one {scaling.metric}, and the best use of a budget")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, columnspacing=1.2, handletextpad=0.5)
    _count_ticks(axes.xaxis)
    _count_ticks(axes.yaxis)


def _along(budget_flops: float, best: BestUse) -> tuple[np.ndarray, np.ndarray]:
    """N over its interval, and D = C / (6·N)."""
    params = np.geomspace(best.params.low, best.params.high, CURVE_POINTS)
    return params, budget_flops / FLOPS_PER_PARAMETER_TOKEN / params


def _draw_best_use(axes: Any, scaling: Scaling, best: BestUse) -> None:
    """N and D of least loss for every budget, the one that was asked for, and its interval."""
    budget, law = scaling.budget_flops, scaling.fit.law
    flops = [*(point.flops for point in scaling.points), budget]
    path = [law.optimum(c) for c in np.geomspace(min(flops) / 100, max(flops) * 100, CURVE_POINTS)]
    axes.plot([o.params for o in path], [o.tokens for o in path], color=ACCENT, linewidth=1.6, label="best N and D")
    wide = {"linewidth": 5, "alpha": 0.3, "solid_capstyle": "round"}
    axes.plot(*_along(budget, best), color=ACCENT, label="its interval of 95%", **wide)
    star = {"marker": "*", "markersize": 14, "linestyle": "none", "markeredgecolor": "white", "zorder": 5}
    axes.plot(best.params.value, best.tokens.value, color=ACCENT, label=f"for C = {budget:.3g} FLOP", **star)


def _draw_residuals(axes: Any, scaling: Scaling) -> None:
    """The law's loss against the measured one, for each way of counting N."""
    measured = np.array([point.loss for point in scaling.points])
    ends = (measured.min() * 0.97, measured.max() * 1.03)
    axes.plot(ends, ends, color="#8a94a0", linewidth=1, zorder=1)
    for fit, marker, colour in zip(scaling.fits, ("o", "D"), ("#1d4ed8", "#b45309"), strict=False):
        label = f"N {fit.counted}: {fit.rms_log_residual:.2%} off"
        predicted = [fit.predicted(point) for point in scaling.points]
        axes.plot(measured, predicted, marker, color=colour, markersize=5, alpha=0.8, label=label)
    axes.set(xlabel=f"measured {scaling.metric}", ylabel="the law's", xlim=ends, ylim=ends)
    axes.set_title("predicted against measured")
    axes.legend(loc="upper left")


def _ends(values: Iterable[float]) -> tuple[float, float]:
    """Room around what lies on a logarithmic axis."""
    low, high = min(held := list(values)), max(held)
    room = (high / low) ** 0.08
    return low / room, high * room


def _colours(sizes: list[int]) -> Any:
    """The darker, the more parameters, by ratio."""
    logs = np.log(sizes)
    return matplotlib.colormaps["viridis_r"](0.12 + 0.83 * (logs - logs[0]) / (logs[-1] - logs[0]))


def _count_ticks(axis: Any) -> None:
    """64K, 1.2M: counts as people say them; over a few powers of ten as powers."""
    low, high = axis.get_view_interval()
    if high / low > 1e4:
        axis.set_major_formatter(LogFormatterSciNotation())
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: _said(value)))
    axis.set_minor_formatter(NullFormatter())


def _said(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
