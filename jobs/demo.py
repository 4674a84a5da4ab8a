"""The main job on sample data: `omniloom demo`; overrides go to the training, `run=` and `runs_dir=` to every part."""

import sys
import time
from pathlib import Path

from omniloom.cli import run_verb
from omniloom.cluster.config import ClusterConfig
from omniloom.cluster.session import ray_session
from omniloom.track.verdict import read_evaluations, verdict

HELP = """\
omniloom demo: from sample files to a trained, evaluated, tracked model on this machine

examples:
  omniloom demo
  omniloom demo run=seed1 seed=1
  omniloom demo train.steps=100      any key of `omniloom train`
"""


def main(overrides: list[str]) -> None:
    if "--help" in overrides or "-h" in overrides:
        print(HELP, end="")
        return
    given = dict(word.split("=", 1) for word in overrides if "=" in word)
    run, runs_dir = given.get("run", "demo"), given.get("runs_dir", "runs")
    debug = [word for word in overrides if word == "--debug"]
    shared = [*(word for word in overrides if word.startswith("runs_dir=")), *debug]
    passed = [word for word in overrides if not word.startswith(("run=", "runs_dir=", "--debug"))]
    parts = [
        ("tokenize", ["data=demo", *debug]),
        ("train", ["experiment=demo", f"run={run}", *passed, *shared]),
        ("evaluate", [f"init={run}", "suite=demo", *shared]),
    ]
    minutes = []
    with ray_session(ClusterConfig(workers=2)):  # one cluster for all parts
        for verb, arguments in parts:
            print(f"\n$ omniloom {verb} {' '.join(arguments)}", flush=True)
            started = time.monotonic()
            run_verb(verb, arguments)
            minutes.append(f"{verb} {(time.monotonic() - started) / 60:.1f}")
    folder = Path(runs_dir) / run
    print("\nWhat was learned, on files held out before anything was trained:")
    for sentence in verdict(read_evaluations(folder)):
        print(f"  {sentence}")
    print(f"minutes: {', '.join(minutes)}")
    print(f"look at: {folder}/report.html; {folder}/metrics.jsonl, evals, checkpoints; wandb (offline): {folder}/wandb")


if __name__ == "__main__":
    main(sys.argv[1:])
