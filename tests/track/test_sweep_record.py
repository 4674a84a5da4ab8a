"""A sweep's file, its best trials, its page."""

import json
import math
import re
from pathlib import Path

import pytest

from omniloom.errors import ConfigError
from omniloom.track.report.sweep import reported, write_sweep_report
from omniloom.track.run_directory import RunRecord, write_record
from omniloom.track.sweep import SweepRecord, Trial, TrialRuns, open_sweep, read_sweep, write_sweep

SPACE = {
    "optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True, "whole": False},
    "model.num_experts_per_tok": {"values": ["1", "2", "4"]},
}


def sweep(*objectives: list[float] | None, modes: tuple[str, ...] = ("min",), status: str = "finished") -> SweepRecord:
    names = ["val/loss", "tokens_per_s"]
    trials = [
        Trial(
            f"{i:03d}",
            f"{i:03d}",
            {"optimizer.lr": 1e-4 * (i + 1), "model.num_experts_per_tok": "124"[i % 3]},
            status if values else "failed",
            20,
            values,
            None if values else "rank 0 failed: <b>out of memory</b>",
        )
        for i, values in enumerate(objectives)
    ]
    wanted = list(zip(names, modes, strict=False))
    return SweepRecord("lr", "train", ["experiment=smoke"], SPACE, {"search": "random"}, wanted, trials=trials)


def test_the_best_is_the_lowest_or_the_highest() -> None:
    assert [trial.trial for trial in sweep([3.0], [1.0], None, [2.0]).best()] == ["001"]
    assert [trial.trial for trial in sweep([3.0], [1.0], None, [2.0], modes=("max",)).best()] == ["000"]
    assert sweep(None).best() == []


def test_a_pruned_trial_is_best_only_where_none_finished() -> None:
    made = sweep([3.0], [1.0], [2.0])
    made.trials[1].status = "pruned"
    assert [trial.trial for trial in made.best()] == ["002"]
    for trial in made.trials:
        trial.status = "pruned"
    assert [trial.trial for trial in made.best()] == ["001"]


def test_of_two_objectives_the_front_is_what_nothing_beats_in_both() -> None:
    made = sweep([1.0, 10.0], [2.0, 30.0], [2.0, 20.0], [3.0, 30.0], [0.5, 5.0], modes=("min", "max"))
    assert [trial.trial for trial in made.best()] == ["000", "001", "004"]


def test_the_command_of_a_trial_is_one_to_paste() -> None:
    made = sweep([3.0], [1.0])
    assert made.command_of(made.best()[0]) == (
        "omniloom train experiment=smoke optimizer.lr=0.0002 model.num_experts_per_tok=2 run=lr-001"
    )


def test_the_table_has_the_best_first_and_every_cause() -> None:
    lines = sweep([3.0], [1.0], None).table().splitlines()
    assert lines[0].split() == ["trial", "status", "step", "val/loss", "optimizer.lr", "model.num_experts_per_tok"]
    assert [line.split()[0] for line in lines[1:4]] == ["001", "000", "002"]
    assert lines[4] == "002 failed: rank 0 failed: <b>out of memory</b>"


def test_a_sweep_is_taken_up_again_and_refused_where_it_searches_something_else(tmp_path: Path) -> None:
    folder = tmp_path / "lr"
    open_sweep(folder, sweep())
    write_sweep(folder, sweep([1.0]))
    assert [trial.trial for trial in open_sweep(folder, sweep()).trials] == ["000"]
    moved = sweep()
    moved.words = ["experiment=smoke", "cluster.address=there:1"]
    assert open_sweep(folder, moved).words == moved.words
    other = sweep()
    other.words = ["experiment=demo"]
    with pytest.raises(ConfigError, match=r"another words:\n  was .'experiment=smoke'.\n  now .'experiment=d"):
        open_sweep(folder, other)
    (folder / "sweep.json").write_text('{"name": "lr"')
    with pytest.raises(ConfigError, match=r"sweep.json is damaged .*: name another run="):
        open_sweep(folder, sweep())
    (tmp_path / "run").mkdir()
    write_record(tmp_path / "run", RunRecord("1", "run", "finished"))
    with pytest.raises(ConfigError, match="is a run, not a sweep"):
        open_sweep(tmp_path / "run", sweep())


def test_how_it_ended_is_written_down_with_its_page(tmp_path: Path) -> None:
    for error, status in (
        (None, "finished"),
        (KeyboardInterrupt("SIGTERM"), "interrupted"),
        (ValueError("x"), "failed"),
    ):
        made = open_sweep(tmp_path / status, sweep([1.0]))

        def end(error: BaseException | None = error) -> None:
            if error is not None:
                raise error

        try:
            with reported(tmp_path / status, made):
                end()
        except (KeyboardInterrupt, ValueError):
            pass
        assert read_sweep(tmp_path / status).status == status
        assert (tmp_path / status / "report.html").is_file()


@pytest.mark.parametrize("modes", [("min",), ("min", "max")])
def test_the_page_has_its_charts_and_escapes_what_it_shows(tmp_path: Path, modes: tuple[str, ...]) -> None:
    values = [[3.0 - 0.2 * i, 10.0 + i][: len(modes)] for i in range(6)]
    made = sweep(*values, None, modes=modes)
    write_sweep(tmp_path, made)
    for trial in made.trials:
        (tmp_path / trial.run).mkdir()
        lines = [{"step": s, "val/loss": 4.0 - s / 20, "tokens_per_s": 5.0} for s in (10, 20)]
        (tmp_path / trial.run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_sweep_report(tmp_path).read_text()
    drawn = set(re.findall(r'data-chart="([a-z0-9-]+)"', page))
    wanted = {"curves", "parallel-0", "importance-0"} | ({"front", "parallel-1"} if len(modes) > 1 else set())
    assert wanted <= drawn
    assert "&lt;b&gt;out of memory" in page
    assert "<b>out of memory" not in page
    assert "default-src 'none'" in page  # what the page's browser test proves of every page


def test_a_sweep_without_trials_has_a_page(tmp_path: Path) -> None:
    write_sweep(tmp_path, sweep())
    assert "No trial has begun yet" in write_sweep_report(tmp_path).read_text()


def test_what_a_trials_run_measured_is_read_on_from_where_one_was(tmp_path: Path) -> None:
    runs = TrialRuns("train", ["experiment=smoke"], tmp_path, ["val/loss"])
    path = runs.output("003").with_name("metrics.jsonl")
    assert runs.measured("003", 0) == ([], 0)
    path.write_text('{"step": 1}\n{"step": 2, "val/loss": 3.5}\n')
    measured, offset = runs.measured("003", 0)
    assert measured == [(2, [3.5])]
    with path.open("a") as stream:
        stream.write('{"step": 3, "val/loss": 3}\n')
    assert runs.measured("003", offset)[0] == [(3, [3.0])]
    words = runs.command("003", {"optimizer.lr": 0.001}, "001@2")
    assert words == ["train", "experiment=smoke", "optimizer.lr=0.001", "run=003", "fork=001@2"]
    assert TrialRuns("train", [], tmp_path, ["val/loss"], every=2).measured("003", 0)[0] == [(2, [3.5])]


def test_what_is_not_finite_is_never_best(tmp_path: Path) -> None:
    assert [trial.trial for trial in sweep([math.nan], [3.0], [-math.inf], [1.0]).best()] == ["003"]
    made = sweep([math.nan, 9.0], [3.0, 10.0], modes=("min", "max"))
    assert [trial.trial for trial in made.best()] == ["001"]
    write_sweep(tmp_path, sweep([math.nan], [3.0]))
    assert math.isnan((read_sweep(tmp_path).trials[0].objectives or [0.0])[0])
    write_sweep_report(tmp_path)


def test_a_trials_failure_has_its_cause(tmp_path: Path) -> None:
    runs = TrialRuns("train", [], tmp_path, ["val/loss"])
    assert runs.cause("000") == "it ended without a word"
    runs.output("000").write_text("one\nerror: no corpus\n")
    assert runs.cause("000") == "error: no corpus"
    write_record(tmp_path / "000", RunRecord("1", "000", "failed", "DataError: torn"))
    assert runs.cause("000") == "DataError: torn"
    write_record(tmp_path / "000", RunRecord("1", "000", "finished"))
    (tmp_path / "000" / "metrics.jsonl").write_text('{"step": 1, "loss/next_token": 2}\n')
    assert runs.cause("000") == "its run never measured val/loss; it has loss/next_token, step"
