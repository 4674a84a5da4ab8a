"""What a training run would take, before anything is submitted: `omniloom plan model=deepseek_v3`."""

import json

from omniloom.compose import run_job
from omniloom.plan.flops import count_costs
from omniloom.plan.params import count_parameters
from omniloom.settings import PlanSettings


def main(settings: PlanSettings) -> None:
    settings.model.check()  # no corpus is needed
    settings.data.check()
    settings.train.check()
    counted = count_parameters(settings.model)
    document_tokens = min(settings.data.seq_len, settings.model.max_position_embeddings)
    is_known = settings.train.steps is not None or settings.train.tokens is not None
    tokens = settings.steps * settings.tokens_per_step if is_known else None
    costs = count_costs(settings.model, document_tokens, tokens)
    if settings.json:
        print(json.dumps(counted.as_dict() | costs.as_dict()))
    else:
        print(counted.as_table(), costs.as_table(), sep="\n\n")


if __name__ == "__main__":
    run_job("plan_run", PlanSettings, main, extends="pretrain")
