"""Checkpoints that are whole or nothing: `COMPLETE`, with every file's size and hash, is written last.

step_00000100/engine/       DeepSpeed's shards, one set a rank
              model/        safetensors, config.json, tokenizer.json, modality.json, target_counts.json
              state.json    where the stream stands
              COMPLETE      the commit
"""

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from omniloom.data.corpus import Corpus
from omniloom.data.index import file_sha256
from omniloom.errors import CheckpointError, DataError
from omniloom.model.decoder import Decoder
from omniloom.model.load import save_model
from omniloom.track import jsonl
from omniloom.track.run_directory import Place
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


def step_folder(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return run_folder / "checkpoints" / f"step_{step:08d}"


def save(engine: Engine, model: Decoder, corpus: Corpus, run_folder: Path, state: State) -> Path:
    """Write a checkpoint and return its folder; every rank calls it, and it counts once COMPLETE stands."""
    folder = step_folder(run_folder, state.step)
    if engine.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted save left
        folder.mkdir(parents=True)
    engine.barrier()
    engine.save(folder / "engine")
    weights = engine.weights()
    if engine.rank == 0:
        save_model(folder / "model", model.config, weights)
        corpus.write_reading_rules(folder / "model")
        (folder / "state.json").write_text(json.dumps(asdict(state), indent=1))
    engine.barrier()  # every rank's shards are on disk
    if engine.rank == 0:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        inventory = {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files
        }
        (folder / "COMPLETE").write_text(json.dumps(inventory, indent=1))
    engine.barrier()
    return folder


def fork(source: Place, run_folder: Path) -> None:
    """Begin a run at another one's checkpoint: that checkpoint and the metrics up to it become its own.

    A run, without a step, stands for its newest complete one. Raises CheckpointError where there is none.
    """
    complete = complete_checkpoints(source.path)
    checkpoint = complete[-1] if complete else source.path
    verify(checkpoint)
    step = _read_state(checkpoint).step
    folder = step_folder(run_folder, step)
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint, partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    if source.run_folder is not None:
        shutil.copyfile(source.run_folder / "metrics.jsonl", run_folder / "metrics.jsonl")
        jsonl.cut_back(run_folder / "metrics.jsonl", step)


def complete_checkpoints(run_folder: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    return sorted(path.parent for path in run_folder.glob("checkpoints/step_*/COMPLETE"))


def verify(folder: Path) -> None:
    """Raise CheckpointError unless every file of a checkpoint is what COMPLETE says."""
    try:
        inventory = json.loads((folder / "COMPLETE").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not complete: {error}") from error
    for name, said in inventory.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else 0
        if found != said["bytes"] or file_sha256(path) != said["sha256"]:
            raise CheckpointError(
                f"{path} is not what COMPLETE says ({found:,} bytes, {said['bytes']:,} expected, or another hash): "
                f"remove {folder} to resume from the one before"
            )


def newest_state(run_folder: Path) -> State | None:
    """The state of the newest complete checkpoint, or None where there is none."""
    complete = complete_checkpoints(run_folder)
    return _read_state(complete[-1]) if complete else None


def _read_state(folder: Path) -> State:
    try:
        return TypeAdapter(State).validate_json((folder / "state.json").read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"{folder / 'state.json'} is none of this version ({'.'.join(map(str, first['loc']))}: {first['msg']}): "
            "start another run="
        ) from error


def resume(engine: Engine, corpora: list[Corpus], run_folder: Path) -> State:
    """Load the newest complete checkpoint into the engine; a run without one starts at step 0."""
    fresh = State(0, 0, 0, engine.ranks, engine.zero_stage, [corpus.sha256 for corpus in corpora], "")
    state = newest_state(run_folder)
    if state is None:
        return fresh
    folder = step_folder(run_folder, state.step)
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
    state = replace(state, corpora=fresh.corpora)
    if (state.ranks, state.zero_stage) != (engine.ranks, engine.zero_stage):
        raise CheckpointError(
            f"{folder} was saved by {state.ranks} ranks at ZeRO {state.zero_stage}; this start has {engine.ranks} at "
            f"ZeRO {engine.zero_stage}: set cluster.workers={state.ranks} parallel.zero_stage={state.zero_stage}"
        )
    verify(folder)  # before anything of it is unpickled
    engine.load(folder / "engine")
    return state
