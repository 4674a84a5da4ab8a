"""What a training run would take, before anything is submitted: `omniloom plan model=deepseek_v3`."""

import json

from omniloom.compose import run_job
from omniloom.plan.params import count_parameters
from omniloom.settings import PlanSettings


def main(settings: PlanSettings) -> None:
    settings.model.check()  # and no more: neither a corpus nor a length is needed
    counted = count_parameters(settings.model)
    print(json.dumps(counted.as_dict()) if settings.json else counted.as_table())


if __name__ == "__main__":
    run_job("plan_run", PlanSettings, main, extends="pretrain")
