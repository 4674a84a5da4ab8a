"""A trained model to scores: `omniloom evaluate init=first tasks=[perplexity] task_args.perplexity.files=[a.txt]`."""

import json
import sys
from dataclasses import replace

from omniloom.cluster.session import ray_session
from omniloom.compose import resource_folder, run_job
from omniloom.settings import EvaluateSettings


def main(settings: EvaluateSettings) -> None:
    settings.check()
    from omniloom.cluster.launch import run_each
    from omniloom.evaluation.harness import Item, evaluate_item, gather, variants_of
    from omniloom.model.load import model_folder
    from omniloom.track.run_directory import locate
    from omniloom.track.tracker import record_evaluations
    from omniloom.track.verdict import table

    place = locate(settings.init or "", settings.runs_dir)
    model = str(model_folder(place.with_model()))
    evals = str(resource_folder("evals"))
    asked = [
        Item(task, "kept", model, settings.task_args.get(task) or {}, evals, settings.batch_tokens, settings.limit)
        for task in settings.tasks
    ]
    items = [replace(item, variant=variant) for item in asked for variant in variants_of(item)]
    with ray_session(settings.cluster):
        scores = list(run_each(evaluate_item, items))
    results = gather(scores, place.step_of(model))
    if place.run_folder is not None:
        from omniloom.track.report import write_report

        samples = {score.task: score.samples for score in scores if score.variant == "kept"}
        record_evaluations(place.run_folder, results, samples)
        print(f"report: {write_report(place.run_folder)}", file=sys.stderr)
    print(json.dumps(results) if settings.json else table(list(results.values())))


if __name__ == "__main__":
    run_job("run_evals", EvaluateSettings, main)
