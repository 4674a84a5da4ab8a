"""A verb as a job of a Ray cluster: `omniloom submit train corpus=/shared/mine run=first cluster.address=head:6379`."""

import json
import re
import sys
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from omniloom.cluster.config import looks_secret
from omniloom.compose import Sweep, run_job, run_sweep
from omniloom.errors import ConfigError, did_you_mean
from omniloom.overrides import absolute_paths, quoted
from omniloom.settings import SUBMITTABLE

HELP = """\
omniloom submit: a verb as a job of a Ray cluster; it goes on when this terminal is closed

usage: omniloom submit VERB [key=value …] [-f] [--json]

  VERB         tokenize, train, evaluate, or sweep train, with its own keys; composed and checked here, before anything
               is sent; train is planned first, and a plan that does not fit is refused unless force=true
  -f           show what the job prints until it ends; the exit status is the job's
  --json       one JSON object: the job's id and the cluster's address

The folder this is called in goes with the job (without .git, .venv, runs, corpora); paths of runs, corpora and
manifests become absolute and must mean the same on the cluster.

examples:
  omniloom cluster up nodes=2
  omniloom submit train experiment=smoke run=smoke -f
  omniloom submit train corpus=/shared/mine run=first cluster=h100_2x8 cluster.address=head:6379
  omniloom submit sweep train experiment=smoke run=lr optimizer.lr='tag(log,interval(1e-4,1e-2))'
  omniloom jobs; omniloom logs ID -f; omniloom stop ID
"""


def submit(settings: Any, verb: str, overrides: list[str], follow: bool, as_json: bool, run: str | None = None) -> None:
    from omniloom.cluster.submit import JobClient, Submission
    from omniloom.track.run_directory import REVISION_OF_A_JOB, git_revision

    _refuse_secrets(overrides)
    revision = git_revision()
    told = {"config_sha256": sha256(repr(settings).encode()).hexdigest(), "git_revision": revision or "none"}
    run = run or getattr(settings, "run", None) or getattr(settings, "init", None)
    submission = Submission(verb, overrides, run, Path.cwd(), told)
    client = JobClient(settings.cluster)
    identity = client.submit(submission, settings.cluster.env | ({REVISION_OF_A_JOB: revision} if revision else {}))
    if as_json:
        print(json.dumps({"id": identity, "address": client.address, "run": run}))
    else:
        print(f"submitted {identity} to {client.address}")
        if not follow:
            print(f"follow it: omniloom logs {identity} -f; stop it: omniloom stop {identity}")
    if follow:
        job = client.follow(identity, partial(print, end="", flush=True, file=sys.stderr if as_json else sys.stdout))
        job.say_how_it_ended()


def _refuse_secrets(overrides: list[str]) -> None:
    """A job's command is printed in its log and kept by the cluster."""
    for key, _, value in (word.partition("=") for word in overrides):
        name = key.rpartition(".")[2]
        if looks_secret(name) and not name.endswith("_path") and not re.fullmatch(r"[\d._e+]*", value):
            raise ConfigError(
                f"{key} looks like a secret, and a job's command is written down: set it in the environment of the "
                "cluster's nodes"
            )


def main(words: list[str]) -> None:
    flags = {word for word in words if word in ("-f", "--follow", "--json")}
    rest = [word for word in words if word not in flags]
    if not rest or rest[0] in ("--help", "-h"):
        print(HELP, end="")
        return
    verb, overrides = rest[0], rest[1:]
    how = {"follow": bool(flags & {"-f", "--follow"}), "as_json": "--json" in flags}

    def plan_first(settings: Any) -> None:
        from omniloom.planning import refuse_no_go, told_in_a_line

        print(told_in_a_line(refuse_no_go(settings)), file=sys.stderr if how["as_json"] else sys.stdout)
        overrides[:] = [word for word in overrides if not word.startswith("force=")]  # meant the plan, not the corpus

    def one(settings: Any) -> None:
        settings.check()
        if verb == "train":
            plan_first(settings)
        submit(settings, verb, [*overrides, *absolute_paths(settings)], **how)

    def many(sweep: Sweep) -> None:
        sweep.settings.sweep.check_sweep(sweep.space)
        plan_first(sweep.trial)
        paths = [word for word in absolute_paths(sweep.trial) if not word.startswith("runs_dir=")]
        runs_dir = quoted(str(Path(sweep.settings.runs_dir).absolute()))
        submit(sweep.trial, verb, [*overrides, *paths, f"runs_dir={runs_dir}"], run=sweep.settings.run, **how)

    if verb == "sweep":
        run_sweep(overrides, many)
    elif verb in SUBMITTABLE:
        sys.argv = [f"omniloom submit {verb}", *overrides]
        run_job(*SUBMITTABLE[verb], one)
    else:
        raise ConfigError(f"{verb} cannot be submitted; {did_you_mean(verb, [*SUBMITTABLE, 'sweep'])}")


if __name__ == "__main__":
    main(sys.argv[1:])
