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
omniloom: text and pictures in one token sequence, a sparse transformer trained on it, and its scores

usage: omniloom VERB [key=value …]

  demo       the whole main job on sample data, on this machine, in minutes
  tokenize   files to shards
  train      shards to a trained model
  evaluate   a trained model to scores, through lm-eval

examples:
  omniloom demo
  omniloom tokenize manifest=corpus.yaml corpus=corpora/mine tokenizer.vocab_size=8192
  omniloom train corpus=corpora/mine run=first model=tiny train.steps=500 cluster.workers=2
  omniloom train experiment=smoke run=smoke
  omniloom evaluate init=first tasks=[perplexity] task_args.perplexity.files=[held-out.txt]

`omniloom VERB --help` lists a verb's keys and groups; --cfg job prints its resolved configuration; --debug adds
tracebacks to errors. A run lives in runs/<run>/; repeating a command resumes it.
"""


def run_verb(verb: str, overrides: list[str]) -> None:
    """Run a verb's job in this process, as `python jobs/<file> overrides…` would."""
    from omniloom.settings import resource_folder

    sys.argv = [f"omniloom {verb}", *overrides]
    runpy.run_path(str(resource_folder("jobs") / JOBS[verb]), run_name="__main__")


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
        if verb not in JOBS:
            raise ConfigError(f"unknown verb {verb}; {did_you_mean(verb, JOBS)}")
        run_verb(verb, sys.argv[2:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
