"""The console script: verbs, each the job of the same name. Imports nothing heavy until a verb runs."""

import runpy
import sys

from omniloom.errors import ConfigError, did_you_mean

JOBS = {
    "demo": "demo.py",
    "tokenize": "tokenize_corpus.py",
    "train": "pretrain.py",
    "evaluate": "run_evals.py",
}
HELP = """\
omniloom: text, images, audio and video in one token sequence, a sparse transformer trained on it, its scores

usage: omniloom VERB [key=value …]

  demo       the whole main job on sample data, on this machine, in minutes
  tokenize   files to shards
  train      shards to a trained model
  evaluate   a trained model to scores, through lm-eval
  report     a run's page: its curves, scores and samples in one file

examples:
  omniloom demo
  omniloom tokenize manifest=corpus.yaml corpus=corpora/mine tokenizer.vocab_size=8192
  omniloom train corpus=corpora/mine run=first model=tiny train.steps=500 cluster.workers=2
  omniloom train experiment=smoke run=smoke
  omniloom evaluate init=first tasks=[perplexity] task_args.perplexity.files=[held-out.txt]
  omniloom report first

`omniloom VERB --help` lists a verb's keys and groups; --cfg job prints its resolved configuration; --debug adds
tracebacks to errors. A run lives in runs/<run>/; repeating a command resumes it.
"""
REPORT_HELP = """\
omniloom report: write a run's page, runs/<run>/report.html, and print its path

usage: omniloom report RUN [runs_dir=runs]

  RUN        the name of a run in runs_dir, at any state, or the path of a run's folder

examples:
  omniloom report first
  omniloom report first runs_dir=/shared/runs
  omniloom report /shared/runs/first
"""


def run_verb(verb: str, overrides: list[str]) -> None:
    """Run a verb's job in this process, as `python jobs/<file> overrides…` would."""
    from omniloom.settings import resource_folder

    sys.argv = [f"omniloom {verb}", *overrides]
    runpy.run_path(str(resource_folder("jobs") / JOBS[verb]), run_name="__main__")


def report(words: list[str]) -> None:
    """Write the page of the run that `words` name; raises ConfigError where they name none."""
    if "--help" in words or "-h" in words:
        print(REPORT_HELP, end="")
        return
    runs_dir = next((word.removeprefix("runs_dir=") for word in words if word.startswith("runs_dir=")), "runs")
    runs = [word for word in words if not word.startswith("runs_dir=") and word != "--debug"]
    if len(runs) != 1:
        raise ConfigError(f"name one run: omniloom report RUN [runs_dir=runs]; here are {', '.join(runs) or 'none'}")
    from omniloom.track.report import find_run, write_report

    folder = find_run(runs[0], runs_dir)
    try:
        print(write_report(folder))
    except OSError as error:
        raise ConfigError(f"the page of {folder} cannot be written: {error}") from error


def main() -> None:
    """Entry of the console script."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if sys.argv[1] == "--version":
        from importlib.metadata import version

        print(version("omniloom"))
        return
    verb = sys.argv[1]
    try:
        if verb == "report":
            report(sys.argv[2:])
            return
        if verb not in JOBS:
            raise ConfigError(f"unknown verb {verb}; {did_you_mean(verb, [*JOBS, 'report'])}")
        run_verb(verb, sys.argv[2:])
    except ConfigError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
