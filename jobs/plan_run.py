"""What a training run would take, before anything is submitted: `omniloom plan model=deepseek_v3`."""

import json
from pathlib import Path

from omniloom.compose import preset, run_job
from omniloom.settings import PlanSettings


def main(settings: PlanSettings) -> None:
    settings.check()
    from omniloom.plan.compare import compare
    from omniloom.plan.plan_report import compared, told
    from omniloom.planning import bands_of, measurements_of, plan_of

    if settings.compare:
        models = {name: preset(name) for name in settings.compare}
        like = settings.workload(settings.cluster.workers)
        tokens = None if like.steps is None else like.steps * like.tokens_per_step
        architectures = compare(models, like, settings.cluster, tokens, measurements_of(settings))
        if settings.json:
            print(json.dumps([one.as_dict() for one in architectures]))
        else:
            print(compared(architectures, settings.cluster, like.precision))
        return
    plan, bands = plan_of(settings), bands_of(settings)
    if settings.plot is not None:
        from omniloom.plan.plan_plot import write_plot

        write_plot(plan, Path(settings.plot))
    if settings.json:
        from omniloom.plan.accuracy import as_dict

        print(json.dumps(plan.as_dict() | {"measured_over_predicted": as_dict(bands)}))
    else:
        print(told(plan, bands))


if __name__ == "__main__":
    run_job("plan_run", PlanSettings, main, extends="pretrain")
