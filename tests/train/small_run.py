"""A run of the whole loop that takes seconds: a tiny model on a corpus of three words."""

import json
import sys
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

from tiny_rows import TINY

from omniloom.data.config import DataConfig
from omniloom.data.corpus import Corpus
from omniloom.model.config import ModelConfig
from omniloom.train.config import TrainingRun
from omniloom.train.groups import TrainConfig
from omniloom.train.schedule import ScheduleConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))


@cache
def words(folder: Path) -> Corpus:
    """Made once."""
    from handmade import build

    (folder / "files").mkdir()
    (folder / "files" / "a.txt").write_text("red green blue " * 400)
    source = {"words": {"format": "text", "train": ["files/*.txt"]}}
    (folder / "manifest.yaml").write_text(json.dumps({"sources": source}))
    return build(folder / "manifest.yaml", folder / "corpus")


def words_run(folder: Path, name: str, train: TrainConfig, sizes: ModelConfig = TINY) -> TrainingRun:
    """A run in `folder`, its corpus beside it; several share one."""
    corpus = words(folder)
    media = corpus.index.modality
    model = replace(
        sizes,
        vocab_size=corpus.index.vocab_size,
        image_patch_pixels=media.image.patch_pixels,
        video_patch_pixels=media.video.patch_pixels,
        audio_mels=media.audio.mels,
        audio_frames_per_token=media.audio.frames_per_token,
    )
    run = TrainingRun(name, str(folder), str(corpus.folder), model=model, train=train, data=DataConfig(seq_len=16))
    run.schedule = ScheduleConfig(warmup_steps=2)
    return run


def train_here(run: TrainingRun) -> None:
    """Train it in this process, which is its one rank."""
    from omniloom.track.run_directory import open_run
    from omniloom.train.loop import train

    run.check_run(1)
    open_run(run.folder, asdict(run), None, None)
    train(run)


def lines_of(run: TrainingRun, name: str) -> list[dict]:
    """A file of one JSON object a line in the run's folder."""
    path = run.folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
