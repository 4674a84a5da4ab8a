"""Checkpoints written beside the training: it waits for a copy in this rank's memory, a thread does the rest.

copy    on the training's thread: what this rank writes, into one buffer that is laid out as its file
write   in the background: each rank its file, then a note with its size and hash. Rank 0 waits for all notes, writes
        the index, the model and, last, COMPLETE, and removes what the rule keeps no longer. No collective runs there.
"""

import json
import tempfile
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from omniloom.data.corpus import Corpus
from omniloom.errors import CheckpointError
from omniloom.model.config import ModelConfig
from omniloom.track.checkpoints import COMPLETE, KEEP, Checkpoints, Folder, removable
from omniloom.track.tracker import Tracker
from omniloom.train import watch
from omniloom.train.checkpoint import State
from omniloom.train.config import TrainingRun
from omniloom.train.engine import Engine
from omniloom.train.engine_state import FOLDER, INDEX, lay_out, make_index, part_of, rank_file, write_index
from omniloom.train.fragments import Fragment, Whole
from omniloom.train.groups import CheckpointConfig
from omniloom.train.model_files import write_model
from omniloom.train.ranges import Part, share_out
from omniloom.train.tensor_file import Abandoned, Writing, bytes_of, dtype_of, hashed, header

POLL_S = 0.05
WATCH_S = 1.0  # between two looks at whether a write gets on
WAIT_S = 3600.0  # for the other ranks' files
LAST_WORD_S = 10.0  # for a write under way, when the run fails of something else


@dataclass
class Saved:
    """A checkpoint that is complete."""

    step: int
    bytes: int
    stall_s: float  # that the training stood still for
    write_s: float
    removed: list[int]  # steps whose checkpoints the rule kept no longer


@dataclass
class _Job:
    """What the thread needs to know of a copy."""

    state: State
    steps: dict[str, int]
    counters: dict[str, float]
    stall_s: float


class HostCopy:
    """This rank's parts in its own memory, laid out as the file that they become; the buffer is used again."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._places: list[Tensor] = []
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.header = b""

    def take(self, parts: Sequence[Part], fragments: Sequence[Fragment]) -> None:
        """Copy `parts`, each of which lies in one of the fragments."""
        ordered, entries = lay_out(parts)
        if ordered != self._parts:
            self._parts, (self.header, begins) = ordered, header(entries)
            size, first = sum(entry.bytes for entry in entries), len(self.header)
            self._places = []
            self.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
            for entry, begin in zip(entries, begins, strict=True):
                held = self.buffer[begin - first : begin - first + entry.bytes]
                self._places.append(held.view(dtype_of(entry.dtype)))
        held_by: dict[tuple[str, str], list[Fragment]] = {}
        for fragment in fragments:
            held_by.setdefault((fragment.name, fragment.state), []).append(fragment)
        for part, place in zip(self._parts, self._places, strict=True):
            place.copy_(_values(part, held_by[part.name, part.state]), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def _values(part: Part, fragments: Sequence[Fragment]) -> Tensor:
    for fragment in fragments:
        start = part.start - fragment.offset
        if start >= 0 and start + part.stop - part.start <= fragment.values.numel():
            return fragment.values.narrow(0, start, part.stop - part.start)
    raise CheckpointError(f"no fragment holds all of {part}")


class Saver:
    """Saves one run's checkpoints; every rank has one and calls its methods at the same steps."""

    def __init__(
        self, engine: Engine, config: ModelConfig, corpus: Corpus, run: TrainingRun, tracker: Tracker | None
    ) -> None:
        self._engine, self._config, self._corpus, self._tracker = engine, config, corpus, tracker
        self._rule: CheckpointConfig = run.checkpoint
        self._checkpoints = Checkpoints(run.folder)
        self._attempt = engine.gather(uuid.uuid4().hex)[0]  # a note of an interrupted save is none of ours
        self._held: list[Part] = []
        self._shares: list[list[Part]] = []
        self._wholes: dict[str, Whole] = {}
        self._copy = HostCopy()
        self._job: _Job | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future[Saved | None] | None = None
        self._writing = Writing()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what is being written; where the run fails of something else, not for long."""
        try:
            if error is None:
                self.wait()
            elif self._under_way is not None:
                self._under_way.exception(LAST_WORD_S)
        except TimeoutError:
            pass
        finally:
            self._writing.abandoned.set()
            self._thread.shutdown()

    def copy(self, state: State) -> float:
        """Copy this rank's part into its memory, once the last checkpoint is written; returns the seconds it took."""
        began = time.monotonic()
        if self._under_way is not None and not self._under_way.done():
            self.wait()
            if self._tracker is not None:
                self._tracker.event("checkpoint_waited", step=state.step, seconds=time.monotonic() - began)
        self.check()
        fragments = self._engine.fragments()
        held = [part_of(fragment) for fragment in fragments]
        (changed,) = self._engine.max_over_ranks([float(held != self._held)])
        if changed:  # at the first save
            self._held, self._wholes = held, self._engine.wholes()
            self._shares = share_out(self._engine.gather(held))
        self._copy.take(self._shares[self._engine.rank], fragments)
        steps, counters = self._engine.counts()
        self._job = _Job(state, steps, counters, time.monotonic() - began)
        return self._job.stall_s

    def write(self) -> None:
        """Begin to write what was copied: the step it belongs to is in the metrics by now."""
        assert self._job is not None
        self._under_way = self._thread.submit(self._write, self._job)

    def check(self) -> None:
        """Tell of a checkpoint that has become complete; raises what kept one from it."""
        if self._under_way is None or not self._under_way.done():
            return
        done, self._under_way = self._under_way, None
        saved = done.result()
        if saved is not None and self._tracker is not None:
            self._tracker.checkpoint(self._checkpoints.at(saved.step))
            told = asdict(saved)
            removed = told.pop("removed")
            self._tracker.event("checkpoint", **told)
            if removed:
                self._tracker.event("checkpoints_removed", steps=removed)

    def wait(self) -> None:
        """Until this rank has written, and on rank 0 all have; raises what kept it from that."""
        seen = self._writing.done
        while self._under_way is not None and wait([self._under_way], WATCH_S).not_done:
            if self._writing.done > seen:  # slow is no hang
                seen = self._writing.done
                watch.busy()
        self.check()

    def _write(self, job: _Job) -> Saved | None:
        began, rank = time.monotonic(), self._engine.rank
        folder, note = self._checkpoints.at(job.state.step), f"{FOLDER}/rank_{rank:05d}.json"
        try:
            files = {}
            if self._shares[rank]:
                with hashed(folder, rank_file(rank), self._writing) as stream:
                    stream.write(self._copy.header)
                    stream.write(bytes_of(self._copy.buffer))
                files[rank_file(rank)] = stream.entry
            told = {"attempt": self._attempt, "files": files, "steps": job.steps}
            folder.write(note, json.dumps(told).encode())
            return self._commit(job, folder, began) if rank == 0 else None
        except Abandoned:
            return None
        except Exception as error:
            cause = CheckpointError(f"{folder} could not be written: {type(error).__name__}: {error}")
            self._leave(folder, note, str(cause))
            raise cause from error

    def _leave(self, folder: Folder, note: str, cause: str) -> None:
        """Tell rank 0, which waits, as far as what keeps this rank from writing lets it."""
        try:
            folder.write(note, json.dumps({"attempt": self._attempt, "error": cause}).encode())
        except OSError:
            return

    def _commit(self, job: _Job, folder: Folder, began: float) -> Saved:
        notes = self._wait_for_ranks(folder)
        files: dict[str, dict[str, Any]] = {}
        steps: dict[str, int] = {}
        for note in notes:
            files |= note["files"]
            steps |= note["steps"]
        index = make_index(self._engine.optimizer, job.counters, self._wholes, self._shares, steps)
        files[INDEX] = folder.write(INDEX, write_index(index))
        files |= write_model(folder, index, self._writing)
        with tempfile.TemporaryDirectory() as scratch:
            rules = Path(scratch)
            self._corpus.write_reading_rules(rules)
            (rules / "config.json").write_text(json.dumps(asdict(self._config), indent=1))
            for path in sorted(rules.iterdir()):
                files[f"model/{path.name}"] = folder.write(f"model/{path.name}", path.read_bytes())
        files["state.json"] = folder.write("state.json", json.dumps(asdict(job.state), indent=1).encode())
        for left in folder.sizes().keys() - files.keys() - {KEEP}:  # the notes, and what an interrupted save left
            folder.remove(left)
        folder.write(COMPLETE, json.dumps(files, indent=1).encode())
        removed = retire(self._checkpoints, self._rule)
        total = sum(file["bytes"] for file in files.values())
        return Saved(job.state.step, total, job.stall_s, time.monotonic() - began, removed)

    def _wait_for_ranks(self, folder: Folder) -> list[dict[str, Any]]:
        """Every rank's note; raises CheckpointError with the cause of one that failed, or naming those that wait."""
        notes: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + WAIT_S
        while True:
            for rank in range(self._engine.ranks):
                if rank not in notes and (note := self._note_of(folder, rank)) is not None:
                    notes[rank] = note
                    self._writing.get_on()
                    if "error" in note:
                        raise CheckpointError(f"rank {rank}: {note['error']}")
            if len(notes) == self._engine.ranks:
                return [notes[rank] for rank in sorted(notes)]
            if self._writing.abandoned.wait(POLL_S):
                raise Abandoned
            if time.monotonic() > deadline:
                late = sorted(set(range(self._engine.ranks)) - notes.keys())
                raise CheckpointError(f"{len(late)} ranks have not written in {WAIT_S:,.0f} s: {late[:8]}")

    def _note_of(self, folder: Folder, rank: int) -> dict[str, Any] | None:
        try:
            note = json.loads(folder.read(f"{FOLDER}/rank_{rank:05d}.json"))
        except (OSError, ValueError):
            return None  # not there, or half of it
        return note if note["attempt"] == self._attempt else None


def retire(checkpoints: Checkpoints, rule: CheckpointConfig) -> list[int]:
    """Remove the checkpoints that the rule keeps no longer, COMPLETE first; returns their steps."""
    steps, complete = checkpoints.steps(), checkpoints.complete()
    kept = [step for step in steps if checkpoints.at(step).exists(KEEP)]
    best = checkpoints.best(rule.keep_best, rule.keep_best_mode) if rule.keep_best else None
    gone = list(removable(steps, complete, [*kept, best] if best else kept, rule.keep_last, rule.keep_every))
    for step in gone:
        checkpoints.at(step).remove(COMPLETE)
        checkpoints.at(step).remove()
    return gone
