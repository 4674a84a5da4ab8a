"""Shards to a trained model: `omniloom train corpus=corpora/mine run=first model=tiny train.steps=500`."""

from dataclasses import asdict
from pathlib import Path

from omniloom.cluster.session import job_id, ray_session
from omniloom.settings import TrainSettings, run_job


def main(settings: TrainSettings) -> None:
    settings.check()
    with ray_session(settings.cluster):
        from omniloom.cluster.launch import run_on_ranks
        from omniloom.data.corpus import build_corpus, describe
        from omniloom.data.shards import Corpus
        from omniloom.track.progress import follow
        from omniloom.track.report import reported
        from omniloom.track.run_directory import open_run, running

        folder = Path(settings.corpus or "")
        if (settings.manifest or settings.samples) and not (folder / "index.json").is_file():
            build_corpus(settings)
        corpus = Corpus(folder)
        settings.check_index(corpus.index)
        record = open_run(settings.folder, asdict(settings), job_id())
        if record.status == "finished":
            print(f"run {settings.run} is finished: {settings.folder}; train.steps=… makes it longer")
            return
        print(describe(corpus))
        print(settings.batch_terms(settings.cluster.workers))
        from omniloom.train.loop import train

        with reported(settings.folder), running(settings.folder), follow(settings.folder, settings.steps):
            run_on_ranks(train, settings, settings.cluster)
        print(f"run {settings.run} is finished: {settings.folder}")


if __name__ == "__main__":
    run_job("pretrain", TrainSettings, main)
