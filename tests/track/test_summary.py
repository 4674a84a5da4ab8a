"""A run's summary, whatever the run's state."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_report import add_result, build_run, metric, write_lines

from omniloom.track.run_directory import write_event
from omniloom.track.summary import print_summary, summarize

OMNILOOM = str(Path(sys.executable).parent / "omniloom")
PLAN = {"rows": 960, "pieces": 3_000, "tokens": 60_000, "positions": 61_440, "skipped": 0}


def told(summary: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=118, highlight=False)
    print_summary(console, summary)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(" ".join(line.split()) for line in console.file.getvalue().splitlines())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with a plan, a checkpoint and scores."""
    folder = build_run(tmp_path / "runs" / "first")
    write_event(folder, "plan", **PLAN, key="ab", epochs={"words": 0.5, "sounds": 2.25, "unused": 0.0})
    add_result(folder, "digits", 120, {"acc": metric(0.91, chance=0.5)})
    (folder / "checkpoints" / "step_00000120").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000120" / "COMPLETE").touch()
    (folder / "checkpoints" / "step_00000140").mkdir()  # never completed
    return folder


def test_a_summary_is_what_the_runs_files_say(run: Path) -> None:
    summary = summarize(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/next_token"] for line in lines]
    assert summary["losses"]["loss/next_token"]["last"] == losses[-1]
    assert summary["losses"]["loss/next_token"]["best"] == min(losses)
    assert summary["losses"]["loss/next_token"]["best_step"] == 1 + losses.index(min(losses))
    assert summary["losses"].keys() == {
        "loss/next_token", "loss/balance", "loss/mtp", "loss/contrastive", "val/loss", "val/loss/words",
        "val/loss/sounds", "val/forgetting/words",
    }  # fmt: skip
    assert summary["retrieval"] == {"image_text": 0.5, "text_image": 0.25}
    assert (summary["step"], summary["tokens"], summary["checkpoints"]) == (120, 512 * 120, [120])
    assert summary["data"]["epochs"] == {"words": 0.5, "sounds": 2.25, "unused": 0.0}
    assert summary["starts"] == 2
    json.dumps(summary)
    page = told(summary)
    assert f"run first · finished · {run}" in page
    assert "plan 960 rows, 97.66% filled" in page
    assert "epochs words 0.5, sounds 2.25\n" in page
    assert "started 2 times" in page
    assert "pairs found image_text 50.0%, text_image 25.0%" in page
    assert "checkpoints 1, the last at step 120" in page
    assert "digits: 91.0% ± 2.0% right (above chance 50.0%)" in page


def test_a_summary_says_where_time_went_and_how_the_experts_fare(run: Path) -> None:
    for layer, alarm, state in ((1, "collapse", "begins"), (2, "collapse", "begins"), (1, "collapse", "ends")):
        write_event(run, "router_alarm", step=50 + layer, layer=layer, alarm=alarm, state=state)
    write_event(run, "skipped_step", step=70, reason="spike", norm=90.0, limit=9.0)
    summary = summarize(run)
    assert summary["time"] == pytest.approx(
        {"waiting for data": 0.04, "forward": 0.2, "backward": 0.42, "optimizer": 0.1, "communication": 0.06}
    )
    assert summary["mfu"] == pytest.approx(0.41)
    assert summary["tokens_by_modality"] == {"text": 48_000, "image": 13_440}
    assert summary["router"]["load_entropy"] == 0.98
    assert summary["router"]["bias_range"] == pytest.approx(0.24)
    assert [alarm["layer"] for alarm in summary["alarms"]] == [2]
    page = told(summary)
    assert "a step waiting for data 4.0%, forward 20.0%, backward 42.0%, optimizer 10.0%, communication 6.0%" in page
    assert "MFU 41.0%" in page
    assert "load_entropy 0.98, dead_experts " in page
    assert "alarm collapse in layer 2 since step 52\n" in page
    assert "skipped_step 1" in page


@pytest.mark.parametrize("status", ["running", "failed", "interrupted", "finished"])
def test_a_run_that_has_just_begun_is_summed_up(status: str, tmp_path: Path) -> None:
    """Nothing but run.json, damaged lines beside it."""
    (tmp_path / "bare").mkdir()
    record = {"id": "a", "name": "bare", "status": status, "exit_reason": "\x1b[31m[red]ValueError\x1b[0m: no"}
    (tmp_path / "bare" / "run.json").write_text(json.dumps(record))
    (tmp_path / "bare" / "events.jsonl").write_text('{"no": "event"}\nbroken\n{"torn')
    page = told(summarize(tmp_path / "bare"))
    assert f"run bare · {status}" in page
    assert "reason [red]ValueError: no" in page
    assert "\x1b" not in page
    assert "checkpoints none" in page


def test_a_loss_that_is_not_finite_is_told(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", [*lines, {"step": 121, "loss/next_token": float("nan")}])
    summary = summarize(run)
    assert summary["losses"]["loss/next_token"]["not_finite"] == [121]
    assert "not finite from step 121" in told(summary)


def test_the_verb_sums_up_a_run_by_name_or_folder(run: Path) -> None:
    def omniloom(*words: str) -> subprocess.CompletedProcess[str]:
        words = (OMNILOOM, "show", *words)
        return subprocess.run(
            words, cwd=run.parents[1], capture_output=True, text=True, timeout=120, env=dict(os.environ)
        )

    by_name, by_folder = omniloom("first"), omniloom("runs/first", "--json")
    assert by_name.returncode == 0, by_name.stderr
    assert "run first · finished" in by_name.stdout
    assert json.loads(by_folder.stdout)["record"]["name"] == "first"
    wrong = omniloom("frist")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "frist is neither a corpus" in wrong.stderr
    assert "did you mean 'first'?" in wrong.stderr
