"""Many runs over values of any keys: `omniloom sweep train experiment=smoke optimizer.lr='interval(1e-4,1e-2)'`."""

import os
import sys
from dataclasses import asdict
from pathlib import Path

from omniloom.compose import Sweep, run_sweep
from omniloom.errors import ConfigError
from omniloom.overrides import absolute_paths, quoted


def main(sweep: Sweep) -> None:
    settings, trial = sweep.settings, sweep.trial
    trial.check()
    settings.sweep.check_sweep(sweep.space)
    if settings.sweep.scheduler == "pbt" and trial.train.val_every % trial.train.save_every:
        raise ConfigError(
            f"a population goes on from checkpoints of the steps it compares: train.val_every={trial.train.val_every} "
            f"must be a multiple of train.save_every={trial.train.save_every}"
        )
    import torch  # noqa: F401 — before the session: loaded while Ray's threads start, it now and then dies in its MKL

    from omniloom.cluster.search import Outcome, Search, search
    from omniloom.cluster.session import ray_session
    from omniloom.data.build import open_or_build
    from omniloom.track.progress import count_trials
    from omniloom.track.report.sweep import reported
    from omniloom.track.run_directory import REVISION_OF_A_JOB, claim, git_revision
    from omniloom.track.sweep import SweepRecord, Trial, TrialRuns, open_sweep, write_sweep

    revision = git_revision()
    if revision:
        os.environ[REVISION_OF_A_JOB] = revision  # of the trials too, which begin in another folder
    folder = Path(settings.runs_dir).absolute() / settings.run
    asked = SweepRecord(
        name=settings.run,
        verb=sweep.verb,
        words=sweep.words,
        space={key: asdict(values) for key, values in sweep.space.items()},
        sweep=asdict(settings.sweep),
        objectives=settings.sweep.objectives,
        git_revision=revision,
    )
    with ray_session(trial.cluster):
        trial.check_index(open_or_build(trial).index)
        with claim(folder):
            record = open_sweep(folder, asked)

            def watch(outcomes: list[Outcome]) -> None:
                trials = [Trial(**asdict(outcome)) for outcome in outcomes]
                if trials != record.trials:
                    record.trials = trials
                    write_sweep(folder, record)
                    show()

            if record.status != "finished":
                names = [metric for metric, _ in record.objectives]
                own = [f"runs_dir={quoted(str(folder))}", f"track.group={quoted(settings.run)}"]
                every = trial.train.save_every if settings.sweep.scheduler == "pbt" else 1
                if settings.sweep.scheduler == "pbt":
                    own.append("checkpoint.keep_last=null")  # any step that was compared may be gone on from
                words = [*record.words, *absolute_paths(trial), *own]
                runs = TrialRuns(sweep.verb, words, folder, names, every)
                with reported(folder, record), count_trials(record) as show:
                    asked_for = Search(runs, sweep.space, settings.sweep, trial.cluster, trial.steps, folder / "tune")
                    stopped = search(asked_for, watch)
                    if stopped:
                        raise KeyboardInterrupt(stopped)
    print(record.table())
    print(f"sweep {record.name} is {record.status}: {folder / 'report.html'}")
    for best in record.best():
        print(f"best: trial {best.trial}; run it again with\n  {record.command_of(best)}")
    if record.status == "failed":
        sys.exit(1)


if __name__ == "__main__":
    run_sweep(sys.argv[1:], main)
