"""Runs: new, resumed, finished, refused; how they end; and what init= finds."""

import copy
import json
import os
import platform
import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
import yaml

from omniloom.errors import ConfigError
from omniloom.track import jsonl
from omniloom.track.run_directory import (
    Place,
    ask_to_save,
    ask_to_stop,
    claim,
    locate,
    open_run,
    read_record,
    running,
    save_asked,
    steps_done,
    stop_asked,
    take_up_save,
    take_up_stop,
    why_stopped,
    write_record,
)

CONFIG = {
    "run": "first",
    "runs_dir": "runs",
    "corpus": "corpora/a",
    "seed": 0,
    "model": {"hidden_size": 64, "q_lora_rank": None},
    "data": {"seq_len": 32, "loader_workers": 0, "weights": {}},
    "train": {"steps": 100, "tokens": None, "micro_batch_size": 2, "global_batch_size": 8},
    "optimizer": {"lr": 3e-4, "eps": 1e-8},
    "parallel": {"zero_stage": 1},
    "cluster": {"workers": 1},
    "track": {"wandb": "offline"},
}


def config_with(**changes):
    """CONFIG with section__key=value."""
    config = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (config[section] if section else config)[name] = value
    return config


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "first"


def finish(folder) -> None:
    with running(folder):
        pass


def test_a_new_run_is_written_down(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no git checkout
    record = open_run(folder, CONFIG)
    assert (record.name, record.status, record.exit_reason) == ("first", "running", None)
    assert record.id
    assert record.wandb_id == record.id
    assert record.git_revision is None
    assert read_record(folder) == record
    assert yaml.safe_load((folder / "config.yaml").read_text()) == CONFIG


def test_two_runs_have_two_ids(tmp_path):
    assert open_run(tmp_path / "a", CONFIG).id != open_run(tmp_path / "b", CONFIG).id


def test_the_same_command_again_resumes_the_same_run(folder):
    first = open_run(folder, CONFIG)
    with pytest.raises(RuntimeError), running(folder):
        raise RuntimeError("worker died")
    again = open_run(folder, CONFIG)
    assert again.id == first.id
    assert (again.status, again.exit_reason) == ("running", None)
    assert read_record(folder) == again


def test_a_run_whose_process_was_killed_is_resumed(folder):
    first = open_run(folder, CONFIG)  # status stays "running"
    assert open_run(folder, CONFIG) == first


def test_a_folder_that_was_killed_before_run_json_starts_afresh(folder):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 7\n")
    assert open_run(folder, CONFIG).status == "running"
    assert yaml.safe_load((folder / "config.yaml").read_text()) == CONFIG


def test_a_finished_run_stays_finished(folder):
    open_run(folder, CONFIG)
    finish(folder)
    assert open_run(folder, CONFIG).status == "finished"
    assert open_run(folder, config_with(train__steps=50)).status == "finished"
    assert read_record(folder).status == "finished"
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] == 100


def test_more_steps_open_a_finished_run_again(folder):
    first = open_run(folder, CONFIG)
    finish(folder)
    longer = open_run(folder, config_with(train__steps=200))
    assert (longer.id, longer.status) == (first.id, "running")
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] == 200


def test_more_tokens_open_a_finished_run_again(folder):
    first = open_run(folder, config_with(train__steps=None, train__tokens=10_000))
    finish(folder)
    assert open_run(folder, config_with(train__steps=None, train__tokens=10_000)).status == "finished"
    longer = open_run(folder, config_with(train__steps=None, train__tokens=20_000))
    assert (longer.id, longer.status) == (first.id, "running")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__hidden_size": 128}, ["model.hidden_size", "64", "128"]),
        ({"model__q_lora_rank": 16}, ["model.q_lora_rank", "None", "16"]),
        ({"optimizer__lr": 1e-3}, ["optimizer.lr", "0.0003", "0.001"]),
        ({"data__weights": {"topics": 2.0}}, ["data.weights.topics", "None", "2.0"]),
        ({"seed": 1}, ["seed", "0", "1"]),
        ({"train__global_batch_size": 16}, ["train.global_batch_size", "8", "16"]),
    ],
)
def test_a_changed_key_is_refused_with_both_values(folder, changes, said):
    open_run(folder, CONFIG)
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(ConfigError) as caught:
        open_run(folder, config_with(**changes))
    for part in [*said, "run first", "name another run=", "train.steps"]:
        assert part in str(caught.value)
    assert (folder / "config.yaml").read_bytes() == before


def test_a_refusal_names_every_changed_key_and_no_other(folder):
    open_run(folder, CONFIG)
    with pytest.raises(ConfigError) as caught:
        open_run(folder, config_with(seed=1, optimizer__lr=1e-3, train__steps=5))
    changed = [line for line in str(caught.value).splitlines() if "→" in line]
    assert [line.split(":")[0].strip() for line in changed] == ["optimizer.lr", "seed"]


@pytest.mark.parametrize(
    "changes",
    [
        {"train__steps": 300},
        {"train__steps": None, "train__tokens": 10_000},
        {"train__micro_batch_size": 4},
        {"cluster__workers": 4},
        {"track__wandb": "online"},
        {"parallel__zero_stage": 3},
        {"data__loader_workers": 2},
        {"runs_dir": "/elsewhere"},
        {"corpus": "/mnt/corpora/a"},
    ],
)
def test_what_does_not_alter_the_learning_may_change(folder, changes):
    first = open_run(folder, CONFIG)
    assert open_run(folder, config_with(**changes)).id == first.id
    assert yaml.safe_load((folder / "config.yaml").read_text()) == config_with(**changes)


def test_a_configuration_survives_the_file_unchanged(folder):
    config = config_with(optimizer__eps=1e-20, train__tokens=10**13, corpus="no: yes", run="007")
    first = open_run(folder, config)
    assert open_run(folder, config).id == first.id  # refused, were one value read back as another


def test_a_damaged_or_missing_run_json_is_named(folder):
    with pytest.raises(ConfigError, match=r"no run\.json"):
        read_record(folder)
    open_run(folder, CONFIG)
    (folder / "run.json").write_text('{"id": "abc"')
    with pytest.raises(ConfigError, match=r"run\.json is damaged"):
        open_run(folder, CONFIG)


def test_an_emptied_config_yaml_is_an_error_of_ours(folder):
    open_run(folder, CONFIG)
    (folder / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        open_run(folder, CONFIG)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (None, "finished", None),
        (ValueError("loss is nan"), "failed", "ValueError: loss is nan"),
        (KeyboardInterrupt(), "interrupted", "Ctrl-C"),
        (SystemExit(3), "failed", "SystemExit: 3"),
    ],
)
def test_how_a_run_ended_is_written_down(folder, error, status, reason):
    opened = open_run(folder, CONFIG)
    with nullcontext() if error is None else pytest.raises(type(error)), running(folder):
        if error is not None:
            raise error
    record = read_record(folder)
    assert (record.id, record.status, record.exit_reason) == (opened.id, status, reason)
    (event,) = jsonl.read(folder / "events.jsonl")
    assert (event["event"], event["reason"]) == (status, reason)


def test_run_json_is_whole_whenever_it_is_read(folder):
    record = open_run(folder, CONFIG)
    record.exit_reason = "x" * 1_000_000
    write_record(folder, record)
    stop = threading.Event()

    def write_again_and_again() -> None:
        while not stop.is_set():
            write_record(folder, record)

    writer = threading.Thread(target=write_again_and_again)
    writer.start()
    try:
        for _ in range(100):
            assert len(json.loads((folder / "run.json").read_text())["exit_reason"]) == 1_000_000
    finally:
        stop.set()
        writer.join()
    assert [path.name for path in folder.iterdir() if "run.json" in path.name] == ["run.json"]


@pytest.fixture
def runs_dir(tmp_path):
    folder = tmp_path / "runs" / "digits_large"
    open_run(folder, CONFIG)
    for step in (5, 100):
        (folder / "checkpoints" / f"step_{step:08d}" / "model").mkdir(parents=True)
        (folder / "checkpoints" / f"step_{step:08d}" / "COMPLETE").write_text("{}")
    (folder / "checkpoints" / "step_00000200" / "model").mkdir(parents=True)  # interrupted
    return folder.parent


@pytest.mark.parametrize("at", ["", "@latest"])
def test_init_finds_a_run(runs_dir, at):
    folder = runs_dir / "digits_large"
    assert locate(f"digits_large{at}", str(runs_dir)) == Place(folder, folder)


def test_init_finds_a_step_of_a_run(runs_dir):
    folder = runs_dir / "digits_large"
    place = locate("digits_large@5", str(runs_dir))
    assert place == Place(folder / "checkpoints" / "step_00000005", folder)


@pytest.mark.parametrize("at", ["200", "7", "newest", "-5"])
def test_init_refuses_a_step_that_is_not_complete_and_says_which_are(runs_dir, at):
    with pytest.raises(ConfigError) as caught:
        locate(f"digits_large@{at}", str(runs_dir))
    assert f"checkpoint {at}" in str(caught.value)
    assert "[5, 100]" in str(caught.value)


def test_init_finds_the_best_checkpoint_by_the_runs_own_rule(runs_dir):
    folder = runs_dir / "digits_large"
    config = CONFIG | {"checkpoint": {"keep_best": "val/loss", "keep_best_mode": "min"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=r"no checkpoint has a value of checkpoint\.keep_best=val/loss"):
        locate("digits_large@best", str(runs_dir))
    values = {5: 2.0, 80: 1.0, 100: 3.0, 200: 0.5}  # that of step 80 was followed by a worse one, 200 is not complete
    lines = ({"step": step, "val/loss": value} for step, value in values.items())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert locate("digits_large@best", str(runs_dir)).path.name == "step_00000005"
    config["checkpoint"]["keep_best_mode"] = "max"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert locate("digits_large@best", str(runs_dir)).path.name == "step_00000100"
    config["checkpoint"]["keep_best"] = None
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=r"keep_best=null: name a step"):
        locate("digits_large@best", str(runs_dir))


def test_a_checkpoint_that_is_named_is_marked_to_be_kept(runs_dir):
    locate("digits_large", str(runs_dir))
    locate("digits_large@5", str(runs_dir))
    assert [path.parent.name for path in runs_dir.rglob("KEEP")] == ["step_00000005"]


def test_init_refuses_an_unknown_name_with_the_nearest(runs_dir):
    with pytest.raises(ConfigError, match="did you mean 'digits_large'"):
        locate("digit_large", str(runs_dir))
    with pytest.raises(ConfigError, match="there is none"):
        locate("first", str(runs_dir / "empty"))


def test_init_finds_a_folder_and_the_run_it_belongs_to(runs_dir, tmp_path):
    checkpoint = runs_dir / "digits_large" / "checkpoints" / "step_00000100"
    assert locate(str(checkpoint), "nowhere") == Place(checkpoint, runs_dir / "digits_large")
    assert locate(str(checkpoint / "model"), "nowhere") == Place(checkpoint / "model", runs_dir / "digits_large")
    (tmp_path / "downloaded").mkdir()
    assert locate(str(tmp_path / "downloaded"), str(runs_dir)) == Place(tmp_path / "downloaded", None)


def test_the_step_of_a_model_folder():
    assert Place.step_of("/runs/a/checkpoints/step_00000100/model") == 100
    assert Place.step_of("/models/tiny") is None


def test_one_command_at_a_time_runs_a_run(folder):
    """The second is told where the first is; once that has died, however, the run is free."""
    hold = (
        "import sys, time; from pathlib import Path; from omniloom.track.run_directory import *\n"
        "folder = Path(sys.argv[1])\n"
        "with claim(folder):\n"
        "    open_run(folder, {'train': {'steps': 1}}, 'train-first-1')\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        whereabouts = f"host {platform.node()}, pid {other.pid}, job train-first-1"
        with pytest.raises(ConfigError, match=f"run first is being run by another command \\({whereabouts}\\)"):
            claim(folder).__enter__()
        other.kill()
        other.wait()
    with claim(folder):
        record = open_run(folder, {"train": {"steps": 1}})
    assert (record.status, record.pid, record.ray_job_id) == ("running", os.getpid(), None)
    events = jsonl.read(folder / "events.jsonl")
    assert [(event["event"], event["pid"], event["ray_job_id"]) for event in events] == [
        ("command_lost", other.pid, "train-first-1")
    ]


def test_a_request_to_stop_is_for_the_ranks_of_this_start(folder):
    open_run(folder, CONFIG)
    assert not stop_asked(folder)
    ask_to_stop(folder, "SIGTERM")
    ask_to_stop(folder)
    assert (stop_asked(folder), why_stopped(folder)) == (True, "SIGTERM")  # who asks first gives the reason
    assert not take_up_stop(folder, "room")
    ask_to_save(folder)
    open_run(folder, CONFIG)
    assert not stop_asked(folder)
    assert not save_asked(folder)


def test_ranks_of_a_lost_command_stop_no_other(folder):
    open_run(folder, CONFIG)
    ask_to_stop(folder, "SIGTERM to rank 1", command=os.getpid() + 1)
    assert not stop_asked(folder)
    ask_to_stop(folder, "SIGTERM to rank 1", command=os.getpid())
    assert stop_asked(folder)


def test_what_was_asked_and_done_is_asked_no_more(folder):
    open_run(folder, CONFIG)
    ask_to_save(folder)
    assert save_asked(folder)
    take_up_save(folder)
    take_up_save(folder)  # every rank does
    assert not save_asked(folder)
    ask_to_stop(folder, "room for two")
    assert take_up_stop(folder, "room")
    assert not stop_asked(folder)


def test_the_steps_done_are_the_last_whole_lines(folder):
    open_run(folder, CONFIG)
    assert steps_done(folder) == 0
    for step in (1, 2):
        jsonl.append(folder / "metrics.jsonl", {"step": step, "note": "x" * 100_000})  # over what is read at once
        assert steps_done(folder) == step
    with (folder / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 3')
    assert steps_done(folder) == 2
