"""The console script: verbs, each the job of the same name. Imports nothing heavy until a verb runs."""

import re
import runpy
import sys
from dataclasses import dataclass

from omniloom.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Verb:
    """A verb: its job's file, the keys that words without = are for, in order, and what the verb itself sets."""

    file: str
    words: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()


VERBS = {
    "demo": Verb("demo.py"),
    "tokenize": Verb("tokenize_corpus.py"),
    "plan": Verb("plan_run.py"),
    "train": Verb("pretrain.py"),
    "evaluate": Verb("run_evals.py"),
    "generate": Verb("generate_text.py", words=("init",)),
    "chat": Verb("chat.py", words=("init",)),
    "export": Verb("export_model.py", words=("init", "to")),
    "import": Verb("import_model.py", words=("source", "to")),
    "show": Verb("show.py", words=("what",)),
    "report": Verb("write_report.py", words=("run",)),
    "sweep": Verb("sweep_runs.py"),
    "submit": Verb("submit_job.py"),
    "jobs": Verb("client.py", sets=("verb=jobs",)),
    "status": Verb("client.py", words=("id",), sets=("verb=status",)),
    "logs": Verb("client.py", words=("id",), sets=("verb=logs",)),
    "stop": Verb("client.py", words=("id",), sets=("verb=stop",)),
    "cluster": Verb("local_cluster.py", words=("action",)),
    "sync": Verb("sync_run.py", words=("run",)),
    "doctor": Verb("doctor.py"),
}
TWO_WORDS = {"plan scaling": Verb("plan_scaling.py", words=("sweep_run",))}  # verbs of two words
HYDRA_FLAGS = ("--cfg", "-c", "--info", "-i", "--package", "-p")  # each with a word of its own
HELP = """\
omniloom: text, images, audio and video in one token sequence, a sparse transformer trained on it, its scores

usage: omniloom VERB [key=value …]

  demo       the whole main job on sample data, on this machine, in minutes
  tokenize   files to shards
  plan       memory, time and cost of a training run, before anything is submitted; plan scaling: a sweep's law
  train      shards to a trained model
  evaluate   a trained model to scores, through lm-eval
  generate   what a trained model writes after a prompt of text, images, audio and video, or after many
  chat       a conversation with it, in the terminal
  export     a model as a Hugging Face folder, for transformers and for servers
  import     a Hugging Face folder, or a file of llama2.c's, as a model of ours
  show       a corpus and what lies in one of its rows, or a run's summary, in the terminal
  report     a run's page: its curves, scores and samples in one file
  sweep      train, many times, over values of any keys; what is clearly worse ends early

  submit     a verb as a job of a Ray cluster: it goes on when this terminal is closed
  jobs       a cluster's jobs; status ID, logs ID [-f] and stop ID for one of them
  cluster    up and down: a cluster on this machine, to try things out
  sync       an offline run to Weights & Biases
  doctor     what is installed here, what fits together, what does not answer, and what to do about it

examples:
  omniloom demo
  omniloom tokenize manifest=corpus.yaml corpus=corpora/mine tokenizer.vocab_size=8192
  omniloom show corpora/mine row=5
  omniloom plan model=deepseek_v3
  omniloom plan scaling SWEEP budget=1e18
  omniloom train corpus=corpora/mine run=first model=tiny train.steps=500 cluster.workers=2
  omniloom train experiment=smoke run=smoke
  omniloom evaluate init=first tasks=[perplexity] task_args.perplexity.files=[held-out.txt]
  omniloom generate init=demo prompt="{image:seven.png} Which digit is this?"
  omniloom chat init=first
  omniloom export first exported/first
  omniloom report first
  omniloom sweep train experiment=smoke run=lr optimizer.lr='tag(log,interval(1e-4,1e-2))' sweep=asha
  omniloom cluster up nodes=2
  omniloom submit train experiment=smoke run=smoke -f

`omniloom VERB --help` lists a verb's keys and groups; --cfg job prints its resolved configuration; --debug adds
tracebacks to errors. A run lives in runs/<run>/; repeating a command resumes it. Exit status 75: it had to make room,
by SIGTERM or as its node goes, and has saved: repeat the command. SIGUSR1 has it save and go on.
"""


def run_verb(verb: str, words: list[str]) -> None:
    """Run a verb's job in this process, as `python jobs/<file> key=value…` would."""
    from omniloom.compose import resource_folder

    known = VERBS[verb]
    if (both := " ".join([verb, *words[:1]])) in TWO_WORDS:
        verb, known, words = both, TWO_WORDS[both], words[1:]
    sys.argv = [f"omniloom {verb}", *known.sets, *_as_overrides(verb, known.words, words)]
    runpy.run_path(str(resource_folder("jobs") / known.file), run_name="__main__")


def _as_overrides(verb: str, keys: tuple[str, ...], words: list[str]) -> list[str]:
    """Words without = as the verb's own keys, in order; raises ConfigError on one too many."""
    from omniloom.overrides import quoted

    if not keys:
        return words
    free = list(keys)
    overrides = []
    for before, word in zip(["", *words], words, strict=False):
        if word.startswith("-") or before in HYDRA_FLAGS or re.match(r"[+~]*[A-Za-z_][\w.@/]*=", word):
            overrides.append(word)
        elif free:
            overrides.append(f"{free.pop(0)}={quoted(word)}")
        else:
            raise ConfigError(f"omniloom {verb} takes {' '.join(keys).upper()} and then key=value: {word} is too many")
    return overrides


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
        if verb not in VERBS:
            raise ConfigError(f"unknown verb {verb}; {did_you_mean(verb, VERBS)}")
        run_verb(verb, sys.argv[2:])
    except ConfigError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
