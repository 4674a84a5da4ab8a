"""What a run measured, from the step on at which its plan was made."""

import json
from pathlib import Path
from typing import Any

import pytest

from omniloom.track.planned import finished_plans, write_measured, write_plan


def a_plan(memory_bytes: float) -> dict[str, Any]:
    predicted = {"memory_bytes": memory_bytes, "step_s": 1.0, "tokens_per_s": 10.0}
    return {"cluster": "local", "device": "cpu", "predicted": predicted}


def steps(folder: Path, first: int, last: int, memory_bytes: float, step_s: float) -> None:
    with (folder / "metrics.jsonl").open("a") as lines:
        for step in range(first, last + 1):
            line = {"step": step, "memory_added_bytes": memory_bytes, "step_s": step_s, "tokens_per_s": 8 / step_s}
            lines.write(json.dumps(line) + "\n")


def measured(runs_dir: Path) -> dict[str, float]:
    write_measured(runs_dir / "first")
    (plan,) = finished_plans(runs_dir).plans
    assert plan["run"] == "first"
    return plan["measured"]


def test_a_run_that_goes_on_otherwise_is_measured_from_there(tmp_path: Path) -> None:
    folder = tmp_path / "first"
    write_plan(folder, a_plan(6e9), 0)
    steps(folder, 1, 100, 6e9, 4.0)
    write_plan(folder, a_plan(2e9), 100)
    steps(folder, 101, 160, 2e9, 1.0)
    assert measured(tmp_path) == {"memory_bytes": 2e9, "step_s": 1.0, "tokens_per_s": 8.0}


def test_a_run_that_goes_on_as_before_is_measured_whole(tmp_path: Path) -> None:
    folder = tmp_path / "first"
    write_plan(folder, a_plan(6e9), 0)
    steps(folder, 1, 100, 6e9, 4.0)
    write_plan(folder, a_plan(6e9), 100)
    steps(folder, 101, 103, 5e9, 1.0)
    assert measured(tmp_path) == {"memory_bytes": 6e9, "step_s": 4.0, "tokens_per_s": 2.0}


@pytest.mark.parametrize("before", ["", "{", "[]", '{"predicted": 1}'])
def test_a_damaged_plan_is_replaced(before: str, tmp_path: Path) -> None:
    folder = tmp_path / "first"
    folder.mkdir()
    (folder / "plan.json").write_text(before)
    write_plan(folder, a_plan(1e9), 7)
    assert json.loads((folder / "plan.json").read_text())["after_step"] == 7
