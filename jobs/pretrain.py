"""Shards to a trained model: `omniloom train corpus=corpora/mine run=first model=tiny train.steps=500`."""

import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from omniloom.cluster.session import job_id, ray_session
from omniloom.compose import run_job
from omniloom.errors import Interrupted
from omniloom.settings import TrainSettings

if TYPE_CHECKING:
    from omniloom.cluster.rank import Hooks


def main(settings: TrainSettings) -> None:
    settings.check()
    # Before the session: torch, loaded while Ray's threads start, now and then dies in its MKL.
    from omniloom.cluster.launch import run_on_ranks
    from omniloom.data.build import describe, open_or_build
    from omniloom.data.schedule import open_corpora
    from omniloom.planning import plan_of, record_of, told_in_a_line
    from omniloom.track.checkpoints import Checkpoints
    from omniloom.track.planned import write_measured, write_plan
    from omniloom.track.progress import follow
    from omniloom.track.report import reported
    from omniloom.track.run_directory import claim, locate, open_run, running, why_stopped
    from omniloom.train.checkpoint import fork, newest_state
    from omniloom.train.initial import initial_folder
    from omniloom.train.loop import train
    from omniloom.train.stream import training_rows

    run = settings.folder
    with ray_session(settings.cluster):
        corpus = open_or_build(settings)
        settings.check_index(corpus.index)
        corpora = open_corpora(corpus.folder, settings.data)
        for other in corpora[1:]:
            other.verify()
            settings.check_index(other.index)
        with claim(run):
            if settings.fork and not (run / "run.json").is_file():
                fork(locate(settings.fork, settings.runs_dir, "fork"), run, settings.checkpoint.url)
            job = settings
            if settings.init and newest_state(run) is None:  # a run's newest checkpoint moves on
                job = replace(settings, init=str(initial_folder(settings, corpus)))
            record = open_run(run, asdict(settings), job_id(), settings.fork or settings.init or settings.like)
            if record.status == "finished":
                print(f"run {settings.run} is finished: {run}; train.steps=… makes it longer")
                return
            Checkpoints.create(run, settings.checkpoint.url)
            print(describe(corpus))
            print(settings.batch_terms(settings.cluster.workers))
            print(training_rows(settings, corpora)[1].record.describe())
            plan = plan_of(settings)
            print(told_in_a_line(plan))
            begun = newest_state(run)
            write_plan(run, record_of(plan), begun.step if begun else 0)
            with reported(run), running(run), follow(run, settings.steps):
                environment = settings.debug.environment(run)
                run_on_ranks(train, job, settings.cluster, hooks_of(run), settings.numbers_of_ranks, environment)
                state = newest_state(run)
                if state is None or state.step < settings.steps:
                    why = why_stopped(run)
                    kind = KeyboardInterrupt if why == "SIGINT" else Interrupted
                    raise kind(f"{why}, saved at step {state.step if state else 0}")
            write_measured(run)
            print(f"run {settings.run} is finished: {run}")


def hooks_of(run: Path) -> "Hooks":
    """What the ranks of a run, and those who watch over them, tell it and ask of it."""
    from omniloom.cluster.elastic import ROOM
    from omniloom.cluster.rank import Hooks
    from omniloom.track.run_directory import ask_to_save, ask_to_stop, steps_done, take_up_stop, write_event
    from omniloom.train import watch

    return Hooks(
        folder=run,
        tell=partial(write_event, run),
        steps_done=partial(steps_done, run),
        ask_to_stop=partial(ask_to_stop, run, command=os.getpid()),
        ask_to_save=partial(ask_to_save, run),
        go_on=partial(take_up_stop, run, ROOM),
        hear=watch.hear,
    )


if __name__ == "__main__":
    run_job("pretrain", TrainSettings, main)
