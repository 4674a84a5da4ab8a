"""Checkpoints written in the background: what is in them, what becomes of one that fails or is killed."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_engine import FakeEngine, FakeRanks, Told, expected, run_in, saver, state
from safetensors import safe_open
from safetensors.torch import load_file

from omniloom.errors import CheckpointError
from omniloom.model.weights import Weights
from omniloom.track import jsonl
from omniloom.track.checkpoints import COMPLETE, Checkpoints, Folder, find_damage
from omniloom.track.run_directory import Place
from omniloom.train import saver as saver_file
from omniloom.train import watch
from omniloom.train.checkpoint import fork, newest_state, resume
from omniloom.train.config import TrainingRun
from omniloom.train.engine_state import make_index, part_of, read_index
from omniloom.train.model_files import write_model
from omniloom.train.ranges import share_out
from omniloom.train.saver import Saver
from omniloom.train.tensor_file import Entry, Writing, write_tensors


def save_at(run: TrainingRun, ranks: int, steps: list[int], told: Any = None) -> list[BaseException]:
    def work(engine: FakeEngine) -> None:
        with saver(engine, run, told if engine.rank == 0 else None) as saves:
            for step in steps:
                engine.train(step)
                saves.copy(state(engine))
                saves.write()
                saves.check()

    return FakeRanks(ranks).run(work)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("readers", [1, 4, 5])
def test_any_number_of_ranks_reads_what_any_other_wrote(ranks: int, readers: int, tmp_path: Path) -> None:
    run = run_in(tmp_path)
    assert save_at(run, ranks, [7]) == []
    found: list[FakeEngine] = []

    def work(engine: FakeEngine) -> None:
        assert resume(engine, [], run.folder).step == 7  # type: ignore[arg-type]
        found.append(engine)

    assert FakeRanks(readers).run(work) == []
    for factor, name in enumerate(("master", "exp_avg"), start=1):
        read = torch.cat([engine.state[name] for engine in sorted(found, key=lambda engine: engine.rank)])
        assert torch.equal(read, expected(7, factor))
    for engine in found:
        assert torch.equal(engine.bias, torch.arange(5) - 7.0)
        assert engine.step == 7


def test_the_library_reads_every_file_and_the_model_is_whole(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    assert save_at(run, 2, [7]) == []
    folder = Path(Checkpoints(run.folder).at(7).path)
    index = read_index(Folder.of(folder))
    for name, tensor in index.tensors.items():
        for which, saved in tensor.states.items():
            for part in saved.ranges:
                with safe_open(folder / part.file, framework="pt") as file:
                    values = file.get_tensor(f"{which}/{name}[{part.start}:{part.stop}]")
                assert len(values) == part.stop - part.start
                if name == "weight":
                    factor = ["master", "exp_avg"].index(which) + 1
                    assert torch.equal(values, expected(7, factor)[part.start : part.stop])
    model = load_file(folder / "model" / "model.safetensors")
    assert torch.equal(model["weight"], expected(7, 1).view(6, 4).bfloat16())
    assert torch.equal(model["bias"], torch.arange(5) - 7.0)
    said = json.loads((folder / COMPLETE).read_text())
    lying = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {COMPLETE}
    assert said.keys() == lying, "no note is left"
    assert {"model/config.json", "model/tokenizer.json", "state.json", "engine/index.json"} < lying
    assert find_damage(Folder.of(folder)) is None
    biases = list(index.tensors["bias"].states.values())
    assert [len(saved.ranges) for saved in biases] == [1], "what both hold is written once"


def test_a_large_model_is_written_in_shards(tmp_path: Path) -> None:
    engine = FakeRanks(1).engine(0)
    engine.train(3)
    run = run_in(tmp_path)
    assert save_at(run, 1, [3]) == []
    folder = Checkpoints(run.folder).at(3)
    (Path(folder.path) / "model" / "model.safetensors").unlink()
    files = write_model(folder, read_index(folder), Writing(), max_shard_bytes=50)
    assert {name.rpartition("/")[2] for name in files} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    weights = Weights(Path(folder.path) / "model")
    assert torch.equal(weights.read("weight"), expected(3, 1).view(6, 4).bfloat16())
    for name, said in files.items():
        assert folder.sha256(name) == (said["bytes"], said["sha256"])


def test_training_waits_for_the_copy_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is the state at the copy, though training goes on meanwhile; the next save waits, and says so."""
    opened, told, run = threading.Event(), Told(), run_in(tmp_path)
    real = Saver._write
    monkeypatch.setattr(Saver, "_write", lambda self, job: opened.wait(30) and real(self, job))
    engine = FakeRanks(1).engine(0)
    with saver(engine, run, told) as saves:
        engine.train(1)
        saves.copy(state(engine))
        saves.write()
        engine.train(2)
        saves.check()
        assert told.events == []
        assert newest_state(run.folder) is None
        threading.Timer(0.2, opened.set).start()
        saves.copy(state(engine))
        (waited,) = told.of("checkpoint_waited")
        assert waited["step"] == 2
        assert waited["seconds"] > 0.1
        saves.write()
    first, second = told.of("checkpoint")
    assert (first["step"], second["step"]) == (1, 2)
    assert first["bytes"] > 0
    assert second["stall_s"] >= waited["seconds"]
    assert second["write_s"] > 0
    assert [facts["folder"] for facts in told.of("known")] == ["step_00000001", "step_00000002"]
    saved = load_file(Path(Checkpoints(run.folder).at(1).path) / "engine" / "rank_00000.safetensors")
    assert torch.equal(saved["master/weight[0:24]"], expected(1, 1))


def test_the_buffer_is_used_again(tmp_path: Path) -> None:
    run, engine = run_in(tmp_path), FakeRanks(1).engine(0)
    with saver(engine, run) as saves:
        places = []
        for step in (1, 2):
            engine.train(step)
            saves.copy(state(engine))
            saves.write()
            places.append(saves._copy.buffer.data_ptr())
    assert places[0] == places[1]
    assert find_damage(Checkpoints(run.folder).at(2)) is None


def test_a_full_disk_fails_the_run_with_its_cause_and_completes_nothing(tmp_path: Path) -> None:
    script = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_checkpoint_saver import *
run = run_in(Path({str(tmp_path)!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # the disk takes 100 bytes of a file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
print(save_at(run, 2, [1, 2]))
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "step_00000001 could not be written: OSError: [Errno 27] File too large" in answer.stdout, answer.stderr
    assert not list(tmp_path.rglob(COMPLETE))


def test_rank_0_fails_with_the_cause_of_another_and_does_not_wait(tmp_path: Path, monkeypatch) -> None:
    real = saver_file.hashed

    def fails(folder: Folder, name: str, writing: Writing) -> Any:
        if "rank_00001" in name:
            raise OSError("no space left")
        return real(folder, name, writing)

    monkeypatch.setattr(saver_file, "hashed", fails)
    began = time.monotonic()
    raised = save_at(run_in(tmp_path), 2, [1])
    assert time.monotonic() - began < 20
    assert len(raised) == 2
    for error in raised:
        assert isinstance(error, CheckpointError)
        assert "OSError: no space left" in str(error)
    assert any("rank 1" in str(error) for error in raised)


def test_a_run_that_fails_gives_a_write_under_way_a_moment_and_no_more(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(saver_file, "LAST_WORD_S", 0.3)
    run, ranks = run_in(tmp_path), FakeRanks(2)

    def work(engine: FakeEngine) -> None:
        saves = saver(engine, run)
        with saves:
            engine.train(1)
            saves.copy(state(engine))
            if engine.rank == 1:
                raise ValueError("this rank is gone")
            saves.write()
            raise ValueError("and so is this one")

    began = time.monotonic()
    assert [str(error) for error in ranks.run(work)] != []
    assert time.monotonic() - began < 10
    assert newest_state(run.folder) is None


@pytest.mark.parametrize("gets_on", [True, False])
def test_a_write_that_is_slow_is_no_hang_and_one_that_is_stuck_is(gets_on: bool, tmp_path: Path, monkeypatch) -> None:
    """Whoever watches over the rank hears of a write that is waited for, as long as it gets on."""
    heard: list[str] = []

    class Watcher:
        def busy(self) -> None:
            heard.append("busy")

    def takes_long(self: Saver, job: Any) -> Any:
        for _ in range(10):
            time.sleep(0.05)
            if gets_on:
                self._writing.get_on()
        return real(self, job)

    real = Saver._write
    monkeypatch.setattr(Saver, "_write", takes_long)
    monkeypatch.setattr(saver_file, "WATCH_S", 0.1)
    monkeypatch.setattr(watch, "_watchers", [Watcher()])
    assert save_at(run_in(tmp_path), 1, [1]) == []
    assert (len(heard) > 2) == gets_on


def test_notes_of_an_interrupted_save_complete_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed save has left every rank's note: rank 0 waits for those of its own start, and clears away the rest."""
    run, real = run_in(tmp_path), Saver._write
    monkeypatch.setattr(Saver, "_write", lambda self, job: time.sleep(0.5 * self._engine.rank) or real(self, job))
    folder = Checkpoints(run.folder).at(5)
    for rank in range(3):
        note = {"attempt": "another", "files": {"engine/old": {"bytes": 1, "sha256": ""}}, "steps": {}}
        folder.write(f"engine/rank_{rank:05d}.json", json.dumps(note).encode())
    folder.write("engine/rank_00002.safetensors", b"old")
    assert save_at(run, 2, [5]) == []
    assert find_damage(folder) is None
    assert "engine/rank_00002.safetensors" not in folder.sizes()


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        ({"keep_last": 2, "keep_best": None}, [50, 60]),
        ({"keep_last": 1, "keep_best": None, "keep_every": 20}, [20, 40, 60]),
        ({"keep_last": 1}, [30, 60]),
        ({"keep_last": 1, "keep_best_mode": "max"}, [10, 60]),
        ({"keep_last": None}, [10, 20, 30, 40, 50, 60]),
    ],
)
def test_the_rule_says_which_stay(rule: dict[str, Any], left: list[int], tmp_path: Path) -> None:
    run, told = run_in(tmp_path, **rule), Told()
    values = {10: 9.0, 30: 1.0, 50: 2.0}
    lines = [{"step": step, "val/loss": value} for step, value in values.items()]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Checkpoints(run.folder).at(15).write("engine/partial", b"left by a kill")
    assert save_at(run, 1, [10, 20, 30, 40, 50, 60], told) == []
    checkpoints = Checkpoints(run.folder)
    assert checkpoints.steps() == checkpoints.complete() == left
    removed = [step for facts in told.of("checkpoints_removed") for step in facts["steps"]]
    assert sorted(removed) == sorted({10, 15, 20, 30, 40, 50, 60} - set(left))


def test_a_checkpoint_that_somebody_named_stays(tmp_path: Path) -> None:
    run = run_in(tmp_path, keep_last=1, keep_best=None)
    assert save_at(run, 1, [1]) == []
    Checkpoints(run.folder).keep(1)
    assert save_at(run, 1, [2, 3]) == []
    assert Checkpoints(run.folder).complete() == [1, 3]


def damaged(path: Path, how: str) -> None:
    if how == "cut":
        os.truncate(path, path.stat().st_size - 1)
    elif how == "lost":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)


FILES = ("engine/rank_00001.safetensors", "state.json", "model/model.safetensors")


@pytest.mark.parametrize(
    ("file", "how"),
    [*((file, how) for file in FILES for how in ("cut", "lost", "flipped")), (COMPLETE, "cut"), (COMPLETE, "flipped")],
)
def test_the_newest_whole_checkpoint_is_used_and_an_event_says_what_the_newer_lack(
    file: str, how: str, tmp_path: Path
) -> None:
    run = run_in(tmp_path)
    assert save_at(run, 2, [10, 20, 30]) == []
    damaged(Path((Checkpoints(run.folder).at(30) / file).path), how)
    Checkpoints(run.folder).at(40).write("engine/rank_00000.safetensors", b"half")

    def work(engine: FakeEngine) -> None:
        assert resume(engine, [], run.folder).step == 20  # type: ignore[arg-type]
        assert engine.step == 20

    assert FakeRanks(3).run(work) == []
    events = jsonl.read(run.folder / "events.jsonl")
    assert [(event["event"], event["step"]) for event in events] == [
        ("partial_checkpoint", 40),
        ("corrupt_checkpoint", 30),
    ]
    said = events[1]
    assert said["file"] == file
    if file != COMPLETE:
        assert (said["bytes"], said["sha256"]) != (said["expected_bytes"], said["expected_sha256"])
    newest = newest_state(run.folder)
    assert newest is not None
    assert newest.step == 20
    assert save_at(run, 2, [30]) == [], "its step is saved again"
    assert find_damage(Checkpoints(run.folder).at(30)) is None


def test_the_driver_passes_over_what_is_too_short(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    assert save_at(run, 1, [10, 20]) == []
    damaged(Path((Checkpoints(run.folder).at(20) / "engine/rank_00000.safetensors").path), "cut")
    newest = newest_state(run.folder)
    assert newest is not None
    assert newest.step == 10


def test_a_store_takes_the_place_of_the_run_directory(tmp_path: Path) -> None:
    run = run_in(tmp_path, keep_last=1, keep_best=None)
    url = f"memory://{os.urandom(4).hex()}"
    Checkpoints.create(run.folder, url)
    assert save_at(run, 2, [1, 2, 3]) == []
    assert not list(tmp_path.rglob("*.safetensors"))
    assert Checkpoints(run.folder).complete() == [3]

    def work(engine: FakeEngine) -> None:
        assert resume(engine, [], run.folder).step == 3  # type: ignore[arg-type]

    assert FakeRanks(1).run(work) == []
    (run.folder / "metrics.jsonl").write_text('{"step": 3}\n{"step": 4}\n')
    fork(Place(run.folder, run.folder), tmp_path / "child", None)
    child = Checkpoints(tmp_path / "child")
    assert child.folder.is_local
    assert find_damage(child.at(3)) is None
    assert jsonl.read(tmp_path / "child" / "metrics.jsonl") == [{"step": 3}]
    fork(Place(tmp_path / "child" / "checkpoints" / "step_00000003", tmp_path / "child"), tmp_path / "third", url)
    assert find_damage(Checkpoints(tmp_path / "third").at(3)) is None


def test_a_damaged_checkpoint_is_not_forked(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    assert save_at(run, 1, [10]) == []
    damaged(Path((Checkpoints(run.folder).at(10) / "engine/rank_00000.safetensors").path), "flipped")
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors has the hash \w+ and COMPLETE says"):
        fork(Place(run.folder, run.folder), tmp_path / "child", None)
    with pytest.raises(CheckpointError, match="is torn or missing"):
        fork(Place(tmp_path / "nothing", None), tmp_path / "child", None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": "muon"}, "was saved by optimizer.kind=adamw, whose state muon cannot use"),
        ({"shape": (4, 6)}, r"weight is \(6, 4\) there and \(4, 6\) here"),
        ({"name": "weigth"}, "this model has no weight; did you mean 'weigth'"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    run = run_in(tmp_path)
    assert save_at(run, 1, [1]) == []
    engine: Any = FakeRanks(1).engine(0)
    engine.optimizer = changes.get("optimizer", "adamw")
    weight = engine.wholes()["weight"]
    if "shape" in changes:
        weight = type(weight)(changes["shape"], weight.dtype)
    engine.wholes = lambda: {changes.get("name", "weight"): weight, "bias": FakeEngine.wholes(engine)["bias"]}
    with pytest.raises(CheckpointError, match=said):
        resume(engine, [], run.folder)


def test_a_part_that_nobody_holds_is_found_before_it_is_lost() -> None:
    whole = FakeRanks(2)
    engines = [whole.engine(0), whole.engine(1)]
    held = [[part_of(fragment) for fragment in engine.fragments()] for engine in engines]
    make_index("adamw", {}, engines[0].wholes(), share_out(held), {})
    held[1] = [part for part in held[1] if part.state != "exp_avg"]
    with pytest.raises(CheckpointError, match="exp_avg of weight: elements 12 of 24 on are held by no rank"):
        make_index("adamw", {}, engines[0].wholes(), share_out(held), {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_file_written_by_pieces_is_one_of_the_library(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).reshape(2, 3).to(dtype), "b": torch.tensor(1).to(dtype), "c": torch.zeros(0, 4)}
    entries = [Entry(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()]
    said = write_tensors(Folder.of(tmp_path), "file", entries, tensors.values(), Writing())
    assert Folder.of(tmp_path).sha256("file") == (said["bytes"], said["sha256"])
    read = load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def save_for_ever(folder: str) -> None:
    """For a process that is killed: goes on from where the last one was, and saves after every step."""
    run = run_in(Path(folder), keep_last=2)
    engine: Any = FakeRanks(1).engine(0)
    step = resume(engine, [], run.folder).step
    if step:
        assert torch.equal(engine.state["master"], expected(step, 1))
    print(f"at {step}", flush=True)
    with saver(engine, run) as saves:
        while True:
            step += 1
            engine.train(step)
            saves.copy(state(engine))
            saves.write()


@pytest.mark.timeout(280)
def test_a_kill_in_the_middle_of_a_save_loses_no_complete_checkpoint(tmp_path: Path) -> None:
    generator, kills = random.Random(0), 25 if "OMNILOOM_SOAK" in os.environ else 3
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_checkpoint_saver import save_for_ever
save_for_ever({str(tmp_path)!r})
"""
    run, before = run_in(tmp_path), 0
    for _ in range(kills):
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            said = process.stdout.readline()
            begun = int(said.removeprefix("at "))
            assert begun >= before, "a complete checkpoint was lost"
            time.sleep(0.1 + generator.random() / 2)
            process.send_signal(signal.SIGKILL)
        checkpoints = Checkpoints(run.folder)
        assert checkpoints.complete(), "something was saved before the kill"
        for step in checkpoints.complete():
            assert find_damage(checkpoints.at(step)) is None
        before = checkpoints.complete()[-1]
        assert before > begun
