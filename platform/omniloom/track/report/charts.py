"""The line charts of a run's page: losses, rates, speed and memory, the router, scores by step."""

import html
from collections.abc import Callable
from typing import Any

from omniloom.track.report.figure import Chart, layout_of, rounded
from omniloom.track.report.heatmaps import load_heatmap
from omniloom.track.report.metrics import (
    DEAD_EXPERTS,
    LOWEST_ENTROPY,
    MEAN_ENTROPY,
    MEAN_LOAD,
    STEP_PARTS,
    WIDEST_BIAS,
    WORST_LOAD,
    Curve,
    Metrics,
    time_shares,
)
from omniloom.track.report.scores import Result
from omniloom.track.report.text import count, duration, figure, share, size

SERIES = tuple(f"var(--series-{i})" for i in range(1, 9))
MOST_MARKS = 60  # of one line


def training_charts(metrics: Metrics, restarts: list[int]) -> list[Chart]:
    """Losses, rates, speed and memory over the steps, each where its key was written."""
    curves = metrics.curves
    charts = [_loss_chart(curves)]
    charts.append(_by_source(curves, "val/loss/", "val-sources", "Validation loss by source"))
    charts.append(_by_source(curves, "val/forgetting/", "forgetting", "Forgetting: loss since a corpus joined"))
    charts.append(_by_source(curves, "val/retrieval_at_1/", "retrieval", "Held-out pairs found, from_to"))
    names = {"loss/mtp": "Multi-token prediction loss", "loss/balance": "Load-balance loss"}
    names["loss/contrastive"] = "Contrastive loss of pairs"
    more = {key: names.get(key, key) for key in sorted(curves) if key.startswith("loss/") and key != "loss/next_token"}
    charts += [_single(curves[key], key, title, figure) for key, title in more.items()]
    speed = curves.get("tokens_per_s")
    charts += [
        _single(curves.get("lr"), "lr", "Learning rate", figure, smooth=False),
        _single(curves.get("grad_norm"), "grad_norm", "Gradient norm", figure),
        _single(speed, "tokens_per_s", "Tokens per second", count, from_zero=True, tickformat="~s"),
        _time_chart(curves),
        _memory_chart(curves),
        _single(curves.get("mfu"), "mfu", "Model FLOPs utilisation", share, from_zero=True, tickformat=".0%"),
    ]
    shown = [chart for chart in charts if chart is not None]
    for chart in shown:
        _place_on_steps(chart, metrics, restarts)
    return shown


def router_charts(metrics: Metrics, restarts: list[int]) -> list[Chart]:
    """How evenly the experts are used: a heatmap over time, the most loaded expert, entropy, experts without tokens."""
    charts = [load_heatmap(metrics.load)]
    worst, mean, dead = (metrics.curves.get(key) for key in (WORST_LOAD, MEAN_LOAD, DEAD_EXPERTS))
    if worst is not None and mean is not None:
        traces = [
            _line(worst.smoothed(), "most uneven layer", SERIES[1]),
            _line(mean.smoothed(), "mean of the layers", SERIES[0]),
        ]
        chart = _chart("load-max", "Most loaded expert, over the mean", traces)
        chart.latest, chart.note = figure(worst.last), "1 is an even load; smoothed."
        charts.append(chart)
    lowest, mean_entropy, bias = (metrics.curves.get(key) for key in (LOWEST_ENTROPY, MEAN_ENTROPY, WIDEST_BIAS))
    if lowest is not None and mean_entropy is not None:
        traces = [
            _line(lowest.smoothed(), "lowest layer", SERIES[1]),
            _line(mean_entropy.smoothed(), "mean of the layers", SERIES[0]),
        ]
        chart = _chart("load-entropy", "Entropy of the load", traces)
        chart.latest, chart.note = figure(lowest.last), "1 is an even load, 0 all tokens at one expert; smoothed."
        if bias is not None:
            chart.note += f" The widest range of a layer's bias is {figure(bias.last)}."
        charts.append(chart)
    if dead is not None and (most := dead.best(highest=True)) is not None:
        if most[1] > 0:
            charts.append(_single(dead, "dead", "Experts without a token, all layers", count, smooth=False))
        elif charts[0] is not None:
            charts[0].note += " Every expert got tokens in every step."
    shown = [chart for chart in charts if chart is not None]
    for chart in shown:
        chart.tall = chart.wide and len(shown) == 3
        _place_on_steps(chart, metrics, restarts)
    return shown


def history_charts(history: dict[str, list[Result]]) -> list[Chart]:
    """Scores by the step evaluated, for tasks that were evaluated at two steps or more."""
    charts = []
    for metric, title in (("acc", "Accuracy by training step"), ("bits_per_byte", "Bits per byte by training step")):
        traces: list[dict[str, Any]] = []
        for task, results in history.items():
            points = [(r.step, r.metrics[metric]) for r in results if metric in r.metrics]
            if len(points) < 2:
                continue
            line = ([step for step, _ in points], [score.value for _, score in points])
            trace = _line(line, task, SERIES[len(traces) % len(SERIES)], markers=True)
            trace["error_y"] = {"array": [score.stderr or 0.0 for _, score in points], "thickness": 1, "width": 3}
            traces.append(trace)
        if traces:
            charts.append(_chart(f"history-{metric}", title, traces, tickformat=".0%" if metric == "acc" else ""))
            charts[-1].figure["layout"]["showlegend"] = True  # a single line's task too
            charts[-1].figure["layout"]["margin"]["t"] = 30
    return charts


def _loss_chart(curves: dict[str, Curve]) -> Chart | None:
    training, validation = curves.get("loss/next_token"), curves.get("val/loss")
    traces: list[dict[str, Any]] = []
    notes: list[str] = []
    if training is not None:
        traces += _raw_and_smoothed(training, "training", SERIES[0])
        notes.append(_broken(training, "training loss"))
    if validation is not None:
        traces += _now_and_then(validation, "validation", SERIES[1])
        best = validation.best()
        notes.append(f"Lowest validation loss {figure(best[1])} at step {best[0]:,}." if best else "")
        notes.append(_broken(validation, "validation loss"))
    if not traces:
        return None
    chart = _chart("loss", "Loss, next token", traces)
    chart.latest = figure(training.last if training is not None else None)
    chart.note, chart.wide, chart.height_pixels = " ".join(filter(None, notes)), True, 330
    return chart


def _by_source(curves: dict[str, Curve], prefix: str, name: str, title: str) -> Chart | None:
    """A line a source, of the keys that begin alike."""
    found = {key.removeprefix(prefix): curve for key, curve in curves.items() if key.startswith(prefix)}
    traces = [
        trace
        for i, (source, curve) in enumerate(sorted(found.items()))
        for trace in _now_and_then(curve, source, SERIES[i % len(SERIES)])
    ]
    return _chart(name, title, traces) if traces else None


def _time_chart(curves: dict[str, Curve]) -> Chart | None:
    """The whole step over its parts, one upon the other."""
    step = curves.get("step_s")
    if step is None:
        return None
    traces = _raw_and_smoothed(step, "whole step", SERIES[0])
    parts = [(name, curves[key]) for key, name in STEP_PARTS.items() if key in curves]
    for (name, curve), colour in zip(parts, SERIES[1:], strict=False):
        part = _line(curve.smoothed(), name, colour)
        part["line"]["width"], part["stackgroup"] = 0.5, "parts"
        traces.append(part)
    shares = [f"{name} {share(of_all)}" for name, of_all in time_shares(curves).items()]
    chart = _chart("step_s", "Seconds per step", traces, from_zero=True)
    chart.latest, chart.note = duration(step.last), f"Of all steps' time: {', '.join(shares)}." if shares else ""
    if "checkpoint_s" in curves:
        chart.note += f" Checkpoints held the run up for {duration(curves['checkpoint_s'].total)}."
    return chart


def _memory_chart(curves: dict[str, Curve]) -> Chart | None:
    memory = curves.get("memory_peak_bytes")
    if memory is None or memory.last is None:
        return None
    unit_bytes, unit = (2**30, "GiB") if memory.last >= 2**30 else (2**20, "MiB")
    steps, values = memory.points()
    line = _line((steps, [value / unit_bytes for value in values]), "peak", SERIES[0])
    chart = _chart("memory", f"Peak memory per rank, {unit}", [line], from_zero=True)
    chart.latest = size(memory.last)
    return chart


def _single(
    curve: Curve | None, id_: str, title: str, write: Callable[[float | None], str], smooth: bool = True, **axis: Any
) -> Chart | None:
    if curve is None:
        return None
    traces = _raw_and_smoothed(curve, "value", SERIES[0]) if smooth else [_line(curve.points(), "value", SERIES[0])]
    chart = _chart(id_, title, traces, **axis)
    chart.latest, chart.note = write(curve.last), _broken(curve, "value")
    return chart


def _raw_and_smoothed(curve: Curve, name: str, colour: str) -> list[dict[str, Any]]:
    raw = _line(curve.points(), name, colour)
    steps, values = curve.smoothed()
    if len(steps) < 10:
        return [raw]
    raw["opacity"], raw["line"]["width"], raw["hoverinfo"] = 0.3, 1, "skip"
    raw["showlegend"] = False
    return [raw, _line((steps, values), name, colour)]


def _now_and_then(curve: Curve, name: str, colour: str) -> list[dict[str, Any]]:
    """A key that not every step has: each value has its mark, unless there are many."""
    if curve.count > MOST_MARKS:
        return _raw_and_smoothed(curve, name, colour)
    return [_line(curve.points(), name, colour, markers=True)]


def _line(points: tuple[list[int], list[float]], name: str, colour: str, markers: bool = False) -> dict[str, Any]:
    steps, values = points
    return {
        "type": "scatter",
        "mode": "lines+markers" if markers else "lines" if len(steps) > 1 else "markers",
        "name": html.escape(name),
        "x": steps,
        "y": [rounded(value) for value in values],
        "line": {"color": colour, "width": 2},
        "marker": {"color": colour, "size": 6},
        "cliponaxis": False,
    }


def _chart(id_: str, title: str, traces: list[dict[str, Any]], from_zero: bool = False, tickformat: str = "") -> Chart:
    yaxis: dict[str, Any] = {"rangemode": "tozero" if from_zero else "normal", "tickformat": tickformat}
    named = [trace for trace in traces if trace.get("showlegend", True)]
    layout = layout_of(yaxis=yaxis, showlegend=len(named) > 1)
    if len(named) > 1:
        layout["margin"]["t"] = 30
    return Chart(id_, title, {"data": traces, "layout": layout})


def _place_on_steps(chart: Chart, metrics: Metrics, restarts: list[int]) -> None:
    """Give the charts of a run one common axis of steps, and mark the restarts on it."""
    layout = chart.figure["layout"]
    if metrics.first_step < metrics.step:
        layout["xaxis"]["range"] = [metrics.first_step, metrics.step]
    line = {"color": "var(--restart)", "width": 1, "dash": "dot"}
    layout["shapes"] = [
        {"type": "line", "xref": "x", "yref": "paper", "x0": step, "x1": step, "y0": 0, "y1": 1, "line": line}
        for step in restarts
    ]


def _broken(curve: Curve, what: str) -> str:
    if not curve.not_finite:
        return ""
    return f"The {what} was not finite, first at step {curve.not_finite[0]:,}, last at step {curve.not_finite[-1]:,}."
