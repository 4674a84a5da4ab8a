"""Checkpoints that are whole or nothing: `COMPLETE`, with every file's size and hash, is written last.

step_00000100/engine/       what each rank wrote of the weights and the optimizer's state, and the index of it
              model/        safetensors, config.json, tokenizer.json, modality.json, target_counts.json
              state.json    where the stream stands
              COMPLETE      the commit

No part of it depends on how many ranks wrote it, or at which ZeRO stage. train/saver.py writes them.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shutil import copyfile, copyfileobj

from pydantic import TypeAdapter, ValidationError

from omniloom.data.corpus import Corpus
from omniloom.errors import CheckpointError, DataError
from omniloom.track import jsonl
from omniloom.track.checkpoints import (
    COMPLETE,
    READ_BYTES,
    Checkpoints,
    Folder,
    find_damage,
    find_wrong_size,
    inventory,
    step_of,
    synchronize,
)
from omniloom.track.run_directory import Place, write_event
from omniloom.train import engine_state
from omniloom.train.engine import Engine


@dataclass
class State:
    """Where a checkpoint stands; `samples` is the whole state of the data stream, `batch_hash` its last batch."""

    step: int
    samples: int
    tokens: int
    ranks: int
    zero_stage: int
    corpora: list[str]  # SHA-256 of each, in the order in which they joined
    batch_hash: str


def fork(source: Place, run_folder: Path, url: str | None) -> None:
    """Begin a run at another one's checkpoint: that checkpoint and the metrics up to it become its own.

    A run, without a step, stands for its newest complete one. Raises CheckpointError where there is none.
    """
    theirs = _checkpoint_at(source)
    if damage := find_damage(theirs):
        raise CheckpointError(f"{theirs} is damaged: {damage}: name another step")
    step = _read_state(theirs).step
    mine = Checkpoints.create(run_folder, url).at(step)
    mine.remove(COMPLETE)
    for name in inventory(theirs):
        _copy(theirs, mine, name)
    mine.write(COMPLETE, theirs.read(COMPLETE))
    if source.run_folder is not None:
        copyfile(source.run_folder / "metrics.jsonl", run_folder / "metrics.jsonl")
        jsonl.cut_back(run_folder / "metrics.jsonl", step)


def _checkpoint_at(place: Place) -> Folder:
    """The checkpoint that a place names: itself, or its newest complete one."""
    step = step_of(place.path.name)
    checkpoints = Checkpoints(place.path if place.run_folder is None else place.run_folder)
    if place.run_folder is not None and step is not None:
        return checkpoints.at(step)
    complete = checkpoints.complete()
    return checkpoints.at(complete[-1]) if complete else Folder.of(place.path)


def _copy(source: Folder, target: Folder, name: str) -> None:
    with source.fs.open((source / name).path, "rb") as read, target.fs.open((target / name).path, "wb") as write:
        copyfileobj(read, write, READ_BYTES)
        synchronize(write)


def newest_state(run_folder: Path) -> State | None:
    """The state of the newest complete checkpoint whose files have their sizes, or None where there is none."""
    checkpoints = Checkpoints(run_folder)
    for step in reversed(checkpoints.complete()):
        if find_wrong_size(checkpoints.at(step)) is None:
            return _read_state(checkpoints.at(step))
    return None


def _read_state(folder: Folder) -> State:
    try:
        return TypeAdapter(State).validate_json(folder.read("state.json"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no checkpoint: it has no state.json") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"{folder / 'state.json'} is none of this version ({'.'.join(map(str, first['loc']))}: {first['msg']}): "
            "start another run="
        ) from error


def resume(engine: Engine, corpora: list[Corpus], run_folder: Path) -> State:
    """Load the newest complete checkpoint whose files are whole; a run without one starts at step 0.

    All ranks call it. What is passed over is in the run's events, and a damaged one counts no longer.
    """
    fresh = State(0, 0, 0, engine.ranks, engine.zero_stage, [corpus.sha256 for corpus in corpora], "")
    step = _choose(engine, run_folder)
    if step is None:
        return fresh
    folder = Checkpoints(run_folder).at(step)
    state = _read_state(folder)
    for trained, corpus in zip(state.corpora, corpora, strict=False):  # more may join later
        if trained != corpus.sha256:
            raise DataError(
                f"{folder} was trained on the corpus {trained[:12]}, {corpus.folder} is {corpus.sha256[:12]}: "
                "set corpus= back, or start another run="
            )
    if len(state.corpora) > len(corpora):
        raise DataError(
            f"{folder} was trained on {len(state.corpora)} corpora and {len(corpora)} are named: keep what data.phases "
            "appends"
        )
    engine_state.restore(engine, folder)
    return replace(state, corpora=fresh.corpora, ranks=engine.ranks, zero_stage=engine.zero_stage)


def _choose(engine: Engine, run_folder: Path) -> int | None:
    """The step to go on from: each rank reads its share of the newest checkpoint, until all files of one are whole."""
    checkpoints = Checkpoints(run_folder)
    steps, complete = engine.gather((checkpoints.steps(), checkpoints.complete()))[0]
    for step in reversed(steps):
        if step not in complete:
            if engine.rank == 0:
                write_event(run_folder, "partial_checkpoint", step=step)
            continue
        told = engine.gather(find_damage(checkpoints.at(step), engine.rank, engine.ranks))
        damages = [damage for damage in told if damage is not None]
        if not damages:
            return int(step)
        if engine.rank == 0:
            write_event(run_folder, "corrupt_checkpoint", step=step, **asdict(damages[0]))
            checkpoints.at(step).remove(COMPLETE)
    return None
