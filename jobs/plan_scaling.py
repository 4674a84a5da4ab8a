"""A law of loss, model size and data from a sweep's runs: `omniloom plan scaling sweep_run=scaling budget=1e18`."""

import json
from pathlib import Path

from omniloom.compose import run_job
from omniloom.settings import ScalingSettings


def main(settings: ScalingSettings) -> None:
    settings.check()
    from pydantic import TypeAdapter

    from omniloom.model.config import ModelConfig
    from omniloom.plan.params import count_parameters
    from omniloom.plan.scaling_law import RunPoint, fit_laws
    from omniloom.plan.scaling_report import Scaling
    from omniloom.track.trials import read_trials

    trials = read_trials(settings.sweep_run or "", settings.runs_dir, settings.metric)
    points = []
    for trial in trials.ended:
        counted = count_parameters(TypeAdapter(ModelConfig).validate_python(trial.config["model"]))
        seen, loss = trial.measured["tokens"], trial.measured[settings.metric]
        points.append(RunPoint(trial.trial, counted.params_active, counted.params_total, seen, loss))
    fits = fit_laws(points, settings.resamples, settings.seed)
    budget = settings.budget or max(point.flops for point in points)
    scaling = Scaling(settings.sweep_run or "", settings.metric, fits, trials.left_out, budget)
    if settings.plot is not None:
        from omniloom.plan.scaling_plot import write_plot

        write_plot(scaling, Path(settings.plot))
    print(json.dumps(scaling.as_dict()) if settings.json else scaling.as_table())


if __name__ == "__main__":
    run_job("plan_scaling", ScalingSettings, main)
