"""A verb as a job of a Ray cluster: `omniloom submit train corpus=/shared/mine run=first cluster.address=head:6379`."""

import json
import sys
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from omniloom.errors import ConfigError, did_you_mean
from omniloom.settings import SUBMITTABLE, absolute_paths, run_job

HELP = """\
omniloom submit: a verb as a job of a Ray cluster; it goes on when this terminal is closed

usage: omniloom submit VERB [key=value …] [-f] [--json]

  VERB         tokenize, train or evaluate, with its own keys; composed and checked here, before anything is sent
  -f           show what the job prints until it ends; the exit status is the job's
  --json       one JSON object: the job's id and the cluster's address

The folder this is called in goes with the job (without .git, .venv, runs, corpora); paths of runs, corpora and
manifests become absolute and must mean the same on the cluster.

examples:
  omniloom cluster up nodes=2
  omniloom submit train experiment=smoke run=smoke -f
  omniloom submit train corpus=/shared/mine run=first cluster=h100_2x8 cluster.address=head:6379
  omniloom jobs; omniloom logs ID -f; omniloom stop ID
"""


def submit(verb: str, overrides: list[str], follow: bool, as_json: bool, settings: Any) -> None:
    settings.check()
    from omniloom.cluster.submit import JobClient, Submission
    from omniloom.track.run_directory import git_revision

    told = {"config_sha256": sha256(repr(settings).encode()).hexdigest(), "git_revision": git_revision() or "none"}
    run = getattr(settings, "run", None) or getattr(settings, "init", None)
    submission = Submission(verb, [*overrides, *absolute_paths(settings)], run, Path.cwd(), told)
    client = JobClient(settings.cluster)
    identity = client.submit(submission, settings.cluster.env)
    if as_json:
        print(json.dumps({"id": identity, "address": client.address, "run": run}))
    else:
        print(f"submitted {identity} to {client.address}")
        if not follow:
            print(f"follow it: omniloom logs {identity} -f; stop it: omniloom stop {identity}")
    if follow:
        job = client.follow(identity, partial(print, end="", flush=True, file=sys.stderr if as_json else sys.stdout))
        job.say_how_it_ended()


def main(words: list[str]) -> None:
    flags = {word for word in words if word in ("-f", "--follow", "--json")}
    rest = [word for word in words if word not in flags]
    if not rest or rest[0] in ("--help", "-h"):
        print(HELP, end="")
        return
    verb, overrides = rest[0], rest[1:]
    if verb not in SUBMITTABLE:
        raise ConfigError(f"{verb} cannot be submitted; {did_you_mean(verb, SUBMITTABLE)}")
    sys.argv = [f"omniloom submit {verb}", *overrides]
    job, schema = SUBMITTABLE[verb]
    run_job(job, schema, partial(submit, verb, overrides, bool(flags & {"-f", "--follow"}), "--json" in flags))


if __name__ == "__main__":
    main(sys.argv[1:])
