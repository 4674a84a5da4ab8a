"""The page of one sweep: how its trials stand, which did best, and what made the difference."""

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState, create_trial

from omniloom.track.report import text
from omniloom.track.report.charts import SERIES
from omniloom.track.report.figure import Chart, layout_of, rounded
from omniloom.track.report.page import write_or_say, write_page
from omniloom.track.run_directory import Status, telling_how_it_ends
from omniloom.track.sweep import SweepRecord, Trial, curve, read_sweep, spelled, write_sweep

FEWEST_FOR_IMPORTANCE = 4
MOST_CURVES = 60
MOST_IN_A_FRONT = 3
RAMP = [[place / 3, f"var(--ramp-{1 + place})"] for place in range(4)]


@contextmanager
def reported(folder: Path, sweep: SweepRecord) -> Iterator[None]:
    """Write down how the sweep ended, and its page, however the body ends."""

    def tell(status: Status, reason: str | None) -> None:
        if status == "finished" and not any(trial.status == "finished" for trial in sweep.trials):
            status, reason = "failed", "no trial came to its end; the same command tries again"
        sweep.status, sweep.exit_reason = status, reason
        write_sweep(folder, sweep)
        write_or_say(write_sweep_report, folder)

    with telling_how_it_ends(tell):
        yield


def write_sweep_report(folder: Path) -> Path:
    """Write a sweep's page, whole or not at all, and return its path; raises ConfigError where it is no sweep."""
    sweep = read_sweep(folder)
    best = {trial.trial for trial in sweep.best()}
    charts = sweep_charts(folder, sweep)
    contents = {
        "name": sweep.name,
        "status": sweep.status,
        "sweep": sweep,
        "metrics": [f"{metric} ({'lowest' if mode == 'min' else 'highest'})" for metric, mode in sweep.objectives],
        "counts": Counter(trial.status for trial in sweep.trials),
        "best": [(trial.trial, [text.figure(v) for v in trial.objectives or []]) for trial in sweep.best()],
        "commands": [sweep.command_of(trial) for trial in sweep.best()],
        "keys": list(sweep.space),
        "rows": [_row(folder, sweep, trial, trial.trial in best) for trial in sweep.ranked()],
        "failures": [(trial.trial, trial.cause or "") for trial in sweep.trials if trial.status == "failed"],
        "charts": charts,
        "space": [(key, _told(values)) for key, values in sweep.space.items()],
        "config": text.flat_redacted(sweep.sweep),
        "command": " ".join(["omniloom sweep", sweep.verb, *sweep.words]),
    }
    return write_page(folder.absolute(), "sweep.html.j2", contents, charts)


def _row(folder: Path, sweep: SweepRecord, trial: Trial, is_best: bool) -> dict[str, Any]:
    nothing = ["–"] * len(sweep.objectives)
    return {
        "trial": trial.trial,
        "page": f"{trial.run}/report.html" if (folder / trial.run / "report.html").is_file() else None,
        "status": trial.status,
        "step": trial.step,
        "objectives": [text.figure(value) for value in trial.objectives] if trial.objectives else nothing,
        "values": [_shown(value) for value in trial.values.values()],
        "is_best": is_best,
    }


def _shown(value: Any) -> str:
    return text.figure(value) if isinstance(value, float) else spelled(value)


def _told(values: dict[str, Any]) -> str:
    if "values" in values:
        return ", ".join(values["values"])
    kind = "whole numbers" if values["whole"] else "numbers"
    return f"{values['low']:g} to {values['high']:g}, {kind}{', evenly by ratio' if values['log'] else ''}"


def sweep_charts(folder: Path, sweep: SweepRecord) -> list[Chart]:
    """Each trial's curve; of several objectives their front; parallel coordinates; which keys made the difference."""
    measured = [trial for trial in sweep.trials if trial.objectives and all(map(math.isfinite, trial.objectives))]
    if not measured:
        return []
    charts = [_curves(folder, sweep, measured)]
    study = _study(sweep, measured)
    names = [metric for metric, _ in sweep.objectives]
    if 1 < len(names) <= MOST_IN_A_FRONT:
        front = _restyled(optuna.visualization.plot_pareto_front(study, target_names=names))
        charts.append(Chart("front", "What no trial beats in everything", front, height_pixels=330))
    for index, (name, mode) in enumerate(sweep.objectives):

        def target(trial: FrozenTrial, index: int = index) -> float:
            return float(trial.values[index])

        suffix = f" on {name}" if len(names) > 1 else ""
        lines = optuna.visualization.plot_parallel_coordinate(study, target=target, target_name=name)
        chart = Chart(
            f"parallel-{index}", f"Parallel coordinates{suffix}", _coordinates(lines, mode == "min"), wide=True
        )
        chart.height_pixels = 380
        chart.note = "Each line is a trial, a pruned one with its last figure; the strongest is the best."
        charts.append(chart)
        if len(measured) >= FEWEST_FOR_IMPORTANCE:
            sign = 1 if mode == "min" else -1

            def loss(trial: FrozenTrial, index: int = index, sign: int = sign) -> float:
                return sign * float(trial.values[index])

            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that it looks for the lowest: so it is asked to
                importance = optuna.visualization.plot_param_importances(
                    study, evaluator=PedAnovaImportanceEvaluator(), target=loss, target_name=name
                )
            chart = Chart(f"importance-{index}", f"Importance of the keys{suffix}", _restyled(importance))
            chart.height_pixels = 380
            chart.note = (
                "How far the values of the better trials differ from all trials' (PED-ANOVA); few trials say little."
            )
            charts.append(chart)
    return charts


def _curves(folder: Path, sweep: SweepRecord, trials: list[Trial]) -> Chart:
    metric = sweep.objectives[0][0]
    best = {trial.trial for trial in sweep.best()}
    traces = []
    for trial in sorted(trials, key=lambda trial: trial.trial in best)[-MOST_CURVES:]:
        points = curve(folder, trial.run, metric)
        is_best = trial.trial in best
        colour = SERIES[0] if is_best else "var(--restart)"
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": trial.trial,
                "x": [step for step, _ in points],
                "y": [rounded(value) for _, value in points],
                "line": {"color": colour, "width": 3 if is_best else 1},
                "marker": {"color": colour, "size": 6 if is_best else 4},
                "opacity": 1 if is_best else 0.7,
            }
        )
    layout = layout_of(hovermode="closest")
    chart = Chart("curves", f"{metric} of each trial", {"data": traces, "layout": layout}, wide=True)
    chart.height_pixels, chart.note = 330, "By training step; the best trial is the strong line."
    return chart


def _study(sweep: SweepRecord, trials: list[Trial]) -> optuna.Study:
    """The trials as Optuna's own, for its plots."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    kinds = optuna.study.StudyDirection
    directions = [kinds.MINIMIZE if mode == "min" else kinds.MAXIMIZE for _, mode in sweep.objectives]
    study = optuna.create_study(directions=directions)
    distributions = {key: _distribution(values) for key, values in sweep.space.items()}
    for trial in trials:
        params = {key: _plain(value) for key, value in trial.values.items()}
        study.add_trial(
            create_trial(state=TrialState.COMPLETE, params=params, distributions=distributions, values=trial.objectives)
        )
    return study


def _distribution(values: dict[str, Any]) -> optuna.distributions.BaseDistribution:
    if "values" in values:
        return optuna.distributions.CategoricalDistribution([_plain(value) for value in values["values"]])
    kind = optuna.distributions.IntDistribution if values["whole"] else optuna.distributions.FloatDistribution
    return kind(values["low"], values["high"], log=values["log"])


def _plain(value: Any) -> Any:
    """A choice as the number it spells, where it spells one: plots order numbers."""
    try:
        return int(value) if str(value).lstrip("+-").isdigit() else float(value)
    except ValueError:
        return str(value)


def _coordinates(figure: Any, lowest: bool) -> dict[str, Any]:
    """Optuna's parallel coordinates, axes and figures included, in this page's colours: the best stand out."""
    figure.update_layout(template=None, title=None)
    drawn = json.loads(figure.to_json())
    own = {key: drawn["layout"][key] for key in ("xaxis", "yaxis", "shapes", "annotations")}
    lines = [trace for trace in drawn["data"] if trace["mode"] == "lines"]
    measured = [float(line["customdata"][0][1]) for line in lines]  # the first axis is the metric
    spread = max(measured) - min(measured) or 1.0
    for line, value in zip(lines, measured, strict=True):
        share = (max(measured) - value if lowest else value - min(measured)) / spread
        line |= {"opacity": 1, "line": {"color": f"var(--ramp-{1 + round(3 * share)})", "width": 1 + share}}
    for trace in drawn["data"]:
        if trace["mode"] == "markers":  # only there for the bar beside it
            trace["marker"] |= {"colorscale": RAMP, "reversescale": lowest}
    for annotation in own["annotations"]:
        annotation["font"] = {"color": "var(--muted)", "size": 11}
    layout = layout_of(hovermode="closest", margin={"l": 30, "r": 8, "t": 20, "b": 30})
    return {"data": drawn["data"], "layout": layout | own}


def _restyled(figure: Any) -> dict[str, Any]:
    """Optuna's bars or front in this page's colours and type."""
    figure.update_layout(template=None, title=None)
    drawn = json.loads(figure.to_json())
    layout = layout_of(
        hovermode="closest", margin={"l": 8, "r": 44, "t": 8, "b": 8}
    )  # room for the longest bar's figure
    for trace in drawn["data"]:
        if trace["type"] == "bar":
            trace |= {"marker": {"color": SERIES[0]}, "cliponaxis": False}
        else:  # the front: what is on it, and what is not
            on_it = "Best Trial" in trace.get("hovertemplate", "")
            trace |= {"marker": {"color": SERIES[0] if on_it else "var(--restart)", "size": 9}, "showlegend": False}
    for axis in ("xaxis", "yaxis"):
        layout[axis] = {"gridcolor": "var(--grid)", "automargin": True} | drawn["layout"].get(axis, {})
        if drawn["data"][0]["type"] == "bar":
            layout[axis]["title"] = None
    return {"data": drawn["data"], "layout": layout}
