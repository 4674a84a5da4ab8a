"""One W&B run per run across restarts: opened again and again in another process, offline, with a home of its own."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from omniloom.track import jsonl

OPENED_AGAIN = """
import json, os, sys
from pathlib import Path
from omniloom.track.config import TrackConfig
from omniloom.track.run_directory import open_run
from omniloom.track.tracker import Tracker
from PIL import Image

def train(folder, resumed_at, last):
    open_run(folder, {"train": {"steps": 9}})
    settings = {"train": {"steps": 9}}
    with Tracker(folder, TrackConfig(tags=["test"]), settings, resumed_at=resumed_at) as tracker:
        tracker.event("start", step=resumed_at)
        for step in range(resumed_at + 1, last + 1):
            tracker.metrics({"step": step, "loss/next_token": 1.0 / step, "lr": 0.1})

def evaluate(folder, step, tasks):
    for task in tasks:
        path = folder / "evals" / f"step_{step:08d}" / f"{task}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"task": task, "step": step, "n": 1, "metrics": {"acc": {"value": step / 10}}}))
        Image.new("RGB", (8, 8), "red").save(path.with_name("red.png"))
        prompt = [{"image": "red.png"}, {"text": "Which colour?"}, {"image": "gone.png"}]
        sample = {"doc_id": 0, "prompt": prompt, "answer": "red", "given": "blue", "right": False}
        path.with_suffix(".samples.jsonl").write_text(json.dumps(sample) + "\\n")

def save(folder, step):
    checkpoint = folder / "checkpoints" / f"step_{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE").write_text("{}")

runs = Path(sys.argv[1])
train(runs / "plain", 0, 3)
train(runs / "plain", 2, 5)  # resumed at a checkpoint before the last step
train(runs / "plain", 5, 7)
train(runs / "evaluated", 0, 3)
evaluate(runs / "evaluated", 3, ["one", "two", "three"])
save(runs / "evaluated", 3)
train(runs / "evaluated", 3, 6)
os.chdir(runs.parent / "checkout")
train(Path("runs/one").absolute(), 0, 1)
os.environ["WANDB_MODE"] = "disabled"
train(runs / "disabled", 0, 3)
train(runs / "disabled", 2, 5)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("tracked")
    (place / "home").mkdir()
    checkout = place / "checkout"
    checkout.mkdir()
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    (checkout / "file").write_text("old\n")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    (checkout / "file").write_text("new\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "XDG_"))}
    subprocess.run(
        [sys.executable, "-c", OPENED_AGAIN, str(place / "runs")],
        # The service of a process that has ended, as a child inherits it.
        env=kept | {"WANDB_MODE": "offline", "HOME": str(place / "home"), "WANDB_SERVICE": "3-1-unix-/gone"},
        cwd=place,
        check=True,
        capture_output=True,
        timeout=120,
    )
    return place


def records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: blocks of 32 KiB, each record crc, length, type (full, first, middle, last)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, joined = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32_768 - at % 32_768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        joined += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(joined)
            joined = b""
            yield record


def offline_file(run: Path) -> Path:
    (folder,) = (run / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    return file


def history(run: Path) -> list[dict[str, Any]]:
    """The logged rows, by key."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(offline_file(run))
        if record.WhichOneof("record_type") == "history"
    ]


def steps(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(row["step"], row["loss/next_token"]) for row in rows if "loss/next_token" in row]


def test_three_starts_leave_one_offline_run_of_the_runs_own_id(place):
    run = place / "runs" / "plain"
    said = json.loads((run / "run.json").read_text())["wandb_id"]
    file = offline_file(run)
    assert said in file.parent.name
    (opened,) = [r.run for r in records(file) if r.WhichOneof("record_type") == "run"]
    assert opened.run_id == said
    assert opened.display_name == "plain"
    assert list(opened.tags) == ["test"]


def test_every_step_is_on_wandb_once_with_its_value(place):
    rows = history(place / "runs" / "plain")
    assert steps(rows) == [(step, pytest.approx(1.0 / step)) for step in range(1, 8)]
    assert all(row["lr"] == 0.1 for row in rows)


def test_metrics_jsonl_holds_every_step_once_and_events_every_start(place):
    run = place / "runs" / "plain"
    assert [line["step"] for line in jsonl.read(run / "metrics.jsonl")] == list(range(1, 8))
    events = jsonl.read(run / "events.jsonl")
    assert [event["step"] for event in events if event["event"] == "start"] == [0, 2, 5]
    assert [event["event"] for event in events].count("command_lost") == 2  # nobody said how these starts ended


def test_evaluations_are_on_their_own_axis(place):
    rows = history(place / "runs" / "evaluated")
    for task in ("one", "two", "three"):
        assert [(row["eval/step"], row[f"eval/{task}/acc"]) for row in rows if f"eval/{task}/acc" in row] == [(3, 0.3)]


def test_an_evaluation_has_a_table_of_samples_with_their_media(place):
    run = place / "runs" / "evaluated"
    (row,) = [row for row in history(run) if "eval/one/samples/path" in row]
    assert row["eval/one/samples/_type"] == "table-file"
    table = json.loads((offline_file(run).parent / "files" / row["eval/one/samples/path"]).read_text())
    assert table["columns"] == ["doc_id", "right", "answer", "given", "prompt", "image"]
    assert table["data"] == [[0, False, "red", "blue", "Which colour?", "Image"]]
    tables = [r.artifact for r in records(offline_file(run)) if r.WhichOneof("record_type") == "artifact"]
    (made,) = [artifact for artifact in tables if "evalonesamples" in artifact.name]
    (image,) = [entry for entry in made.manifest.contents if entry.path.startswith("media/images/")]
    assert Path(image.local_path).read_bytes() == (run / "evals" / "step_00000003" / "red.png").read_bytes()


def test_a_checkpoint_is_an_artifact_by_where_it_lies(place):
    run = place / "runs" / "evaluated"
    made = [r.artifact for r in records(offline_file(run)) if r.WhichOneof("record_type") == "artifact"]
    (checkpoint,) = [artifact for artifact in made if artifact.type == "model"]
    assert set(checkpoint.aliases) == {"latest", "step_00000003"}
    (entry,) = checkpoint.manifest.contents
    assert entry.ref == (run / "checkpoints" / "step_00000003" / "COMPLETE").as_uri()


def test_wandbs_own_reader_finds_one_run_with_the_last_values(place):
    run = place / "runs" / "plain"
    words = [sys.executable, "-m", "wandb", "leet", "inspect", str(offline_file(run)), "--summary", "--json"]
    answer = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | {"HOME": str(run)})
    said = json.loads(answer.stdout)
    assert said["run_id"] == json.loads((run / "run.json").read_text())["wandb_id"]
    assert (said["state"], said["summary"]["step"]) == ("finished", 7)
    assert said["summary"]["loss/next_token"] == pytest.approx(1 / 7)


def test_the_checkouts_changes_travel_with_the_run(place):
    changed = place / "checkout"
    assert (changed / "runs" / "one" / "git.diff").read_text().endswith("-old\n+new\n")
    said = offline_file(changed / "runs" / "one").parent / "files" / "git.diff"
    assert said.read_text() == (changed / "runs" / "one" / "git.diff").read_text()


def test_steps_after_evaluations_are_on_wandb_too(place):
    assert [step for step, _ in steps(history(place / "runs" / "evaluated"))] == [1, 2, 3, 4, 5, 6]


def test_wandb_mode_disabled_keeps_metrics_jsonl_alone(place):
    run = place / "runs" / "disabled"
    assert [line["step"] for line in jsonl.read(run / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert list(run.rglob("*.wandb")) == []


def test_nothing_is_left_in_the_home_or_the_working_directory(place):
    assert list((place / "home").rglob("*")) == []
    assert {path.name for path in place.iterdir()} == {"home", "runs", "checkout"}
    assert {path.name for path in (place / "runs" / "plain").iterdir()} == {
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "events.jsonl",
        "wandb",
        ".writer.lock",
    }
