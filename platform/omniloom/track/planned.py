"""`plan.json` in a run directory: what was predicted of the run before it began, and what it measured at its end."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from omniloom.track import jsonl

FILE = "plan.json"
WARM_UP_STEPS = 2  # the first ones allocate
KEYS = {"cluster", "device", "predicted", "after_step"}  # of every plan


@dataclass(frozen=True)
class Measured:
    """A run's highest memory of one rank above its footprint, its median step and its tokens a second."""

    memory_bytes: float | None
    step_s: float | None
    tokens_per_s: float | None


def write_plan(folder: Path, plan: dict[str, Any], done: int) -> None:
    """Keep a run's plan, and how many steps were done before it; one that stands there is replaced, its steps kept
    where it said the same."""
    folder.mkdir(parents=True, exist_ok=True)
    before = _read(folder / FILE) or {}
    if before.get("predicted") == plan["predicted"]:
        done = before.get("after_step", done)
    _write(folder, plan | {"after_step": done})


def write_measured(folder: Path) -> None:
    """Put what the finished run measured beside what was predicted."""
    plan = json.loads((folder / FILE).read_text())
    _write(folder, plan | {"measured": asdict(measure(folder, plan["after_step"]))})


def _write(folder: Path, plan: dict[str, Any]) -> None:
    jsonl.replace_text(folder / FILE, json.dumps(plan, indent=1) + "\n")


def measure(folder: Path, after_step: int) -> Measured:
    """Read a run's measurements off its metrics after a step; None where it was too short to have any."""
    lines = [line for line in jsonl.read(folder / "metrics.jsonl") if line["step"] > after_step]
    steps = [line for line in lines if line["step"] > after_step + WARM_UP_STEPS]
    return Measured(
        memory_bytes=max((line["memory_added_bytes"] for line in lines if "memory_added_bytes" in line), default=None),
        step_s=median(line["step_s"] for line in steps) if steps else None,
        tokens_per_s=median(line["tokens_per_s"] for line in steps) if steps else None,
    )


@dataclass
class Finished:
    """The plans of runs that have been measured, and the files that hold none."""

    plans: list[dict[str, Any]] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)


def finished_plans(runs_dir: Path) -> Finished:
    """Those of all runs, trials of sweeps too."""
    found = Finished()
    for path in sorted([*runs_dir.glob(f"*/{FILE}"), *runs_dir.glob(f"*/*/{FILE}")]):
        plan = _read(path)
        if plan is None or not plan.keys() >= KEYS:
            found.damaged.append(path)
        elif "measured" in plan:
            found.plans.append(plan | {"run": str(path.parent.relative_to(runs_dir))})
    return found


def _read(path: Path) -> dict[str, Any] | None:
    """None where there is nothing that can be read."""
    try:
        plan = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return plan if isinstance(plan, dict) else None
