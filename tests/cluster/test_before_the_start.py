"""What is refused before anything starts: sweeps that cannot be, busy ports, what a dead cluster left."""

import json
import os
import socket
from pathlib import Path

import pytest

from omniloom.cli import run_verb
from omniloom.cluster.config import Choice, ClusterConfig, Interval, LocalClusterConfig, SweepConfig
from omniloom.cluster.local import find_address, start_local
from omniloom.errors import ClusterError, ConfigError
from omniloom.overrides import split_sweeps
from omniloom.settings import TrainSettings
from omniloom.train.groups import TrainConfig


def test_one_value_is_fixed_and_several_are_swept() -> None:
    fixed, space = split_sweeps(
        [
            "experiment=smoke",
            "--debug",
            "train.steps=20",
            "tasks=[a,b]",
            "model=choice(tiny,smoke)",
            "model.num_experts_per_tok=1,2,4",
            "train.global_batch_size=range(8,25,8)",
            "optimizer.lr=interval(1e-4,1e-2)",
            "optimizer.muon_lr=tag(log,interval(1e-4,1e-2))",
            "schedule.warmup_steps=int(interval(2,8))",
            "data.weights.a=choice(1,2)",
        ]
    )
    assert fixed == ["experiment=smoke", "--debug", "train.steps=20", "tasks=[a,b]"]
    assert space == {
        "model": Choice(("tiny", "smoke")),
        "model.num_experts_per_tok": Choice(("1", "2", "4")),
        "train.global_batch_size": Choice(("8", "16", "24")),
        "optimizer.lr": Interval(1e-4, 1e-2),
        "optimizer.muon_lr": Interval(1e-4, 1e-2, log=True),
        "schedule.warmup_steps": Interval(2, 8, whole=True),
        "data.weights.a": Choice(("1", "2")),
    }


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seed=range(5,5)", "seed=range(5,5) is an empty range"),
        ("optimizer.lr=interval(1,1)", "is an empty range: 1.0 is not under 1.0"),
        ("optimizer.lr=tag(log,interval(0,1))", "a range by ratio begins above 0, not at 0.0"),
        ("seed=choice()", "empty choice is not legal"),
        ("model=glob(*)", "glob() is not for sweeps: name the options with choice(…)"),
        ("seed=choice(1,2", "seed=choice(1,2 is no override"),
    ],
)
def test_what_cannot_be_swept_is_named(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        split_sweeps([word])
    assert message in str(refused.value)


SPACE = {"optimizer.lr": Interval(1e-4, 1e-2)}


@pytest.mark.parametrize(
    ("config", "space", "message"),
    [
        (SweepConfig(search="gird"), SPACE, "did you mean 'grid'?"),
        (SweepConfig(scheduler="hyperband"), SPACE, "sweep.scheduler=hyperband is none of asha, pbt"),
        (SweepConfig(), {}, "nothing is swept: give a key several values"),
        (SweepConfig(search="grid"), SPACE, "a grid has no end over optimizer.lr=interval(0.0001,0.01)"),
        (SweepConfig(trials=0), SPACE, "sweep.trials=0 must be at least 1"),
        (SweepConfig(reduction_factor=1), SPACE, "sweep.reduction_factor=1 must be at least 2"),
        (SweepConfig(minimize=[]), SPACE, "nothing to look for"),
        (SweepConfig(scheduler="asha", maximize=["x"]), SPACE, "compares trials by one metric, and here are 2"),
        (SweepConfig(scheduler="pbt", search="tpe"), SPACE, "set sweep.search=random (it is tpe)"),
        (SweepConfig(scheduler="pbt"), {"model": Choice(("a", "b"))}, "in the middle of a run, and model cannot"),
    ],
)
def test_a_contradiction_is_refused(config: SweepConfig, space: dict, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config.check_sweep(space)
    assert message in str(refused.value)


def test_the_defaults_hold() -> None:
    SweepConfig().check_sweep(SPACE)
    assert SweepConfig(maximize=["tokens_per_s"]).objectives == [("val/loss", "min"), ("tokens_per_s", "max")]


def test_a_busy_port_is_named_with_its_owner() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=rf"port={port} is taken by pid {os.getpid()} .*: name another, or 0"):
            start_local(LocalClusterConfig(port=port))


def test_what_a_dead_head_left_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match=r"no cluster: set cluster\.address or RAY_ADDRESS, or start one"):
        find_address(ClusterConfig(address="up"))
    left = {"address": "127.0.0.1:1", "dashboard": "http://127.0.0.1:2", "token_path": "t", "scratch": "s", "nodes": 1}
    (tmp_path / "omniloom").mkdir()
    state = tmp_path / "omniloom" / "cluster.json"
    state.write_text(json.dumps(left | {"pid": os.getpid(), "created": 1.0}))  # the pid is somebody else's by now
    with pytest.raises(ClusterError, match="the cluster that was started here has died: "):
        find_address(ClusterConfig(address="up"))
    state.write_text("{}")
    with pytest.raises(ClusterError, match=r"cluster.json is damaged .*: remove it"):
        find_address(ClusterConfig(address="up"))


NO_GO = ["model=llama_8b", "cluster=h100_1x8", "train.steps=200", "train.global_batch_size=64", "corpus=corpora/none"]
NOBODY = "cluster.address=http://127.0.0.1:9"


def test_a_plan_that_does_not_fit_is_not_submitted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_verb("submit", ["train", *NO_GO, NOBODY])
    said = capsys.readouterr().err
    assert "no-go: memory " in said
    assert "is over cluster.device.memory_bytes=80 GB" in said
    assert "force=true submits it all the same; nearest that fit, the fastest first:\n  " in said


def test_a_forced_one_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_verb("submit", ["train", *NO_GO, NOBODY, "force=true"])
    said = capsys.readouterr()
    assert "plan: no-go, memory " in said.out
    assert "127.0.0.1:9" in said.err  # planned, and on its way


def elastic(least: int | None, workers: int, global_batch_size: int, micro_batch_size: int = 1) -> TrainSettings:
    settings = TrainSettings(corpus="corpora/mine")
    settings.train = TrainConfig(
        steps=200, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, val_rows=8
    )
    settings.cluster.workers, settings.cluster.min_workers = workers, least
    return settings


@pytest.mark.parametrize(
    ("least", "workers", "global_batch_size", "numbers"),
    [(1, 8, 24, [1, 2, 3, 4, 6, 8]), (2, 6, 12, [2, 3, 4, 6]), (None, 4, 8, [4]), (4, 4, 8, [4])],
)
def test_ranks_are_as_many_as_share_the_batch(
    least: int | None, workers: int, global_batch_size: int, numbers: list[int]
) -> None:
    settings = elastic(least, workers, global_batch_size)
    settings.check()
    assert settings.numbers_of_ranks == numbers


@pytest.mark.parametrize(
    ("least", "message"),
    [
        (
            5,
            "cluster.min_workers=5: so many ranks cannot share train.global_batch_size=24 by train.micro_batch_size=1; "
            "up to cluster.workers=8 those that can are 6, 8",
        ),
        (9, "cluster.min_workers=9 must lie between 1 and cluster.workers=8"),
        (0, "cluster.min_workers=0 must lie between 1 and cluster.workers=8"),
    ],
)
def test_a_least_number_of_ranks_that_cannot_be_is_refused(least: int, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        elastic(least, 8, 24).check()
    assert str(refused.value) == message
