"""`plan.json` in a run directory: what was predicted of the run before it began, and what it measured at its end."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from omniloom.track import jsonl

FILE = "plan.json"
WARM_UP_STEPS = 2  # the first ones allocate


@dataclass(frozen=True)
class Measured:
    """A run's highest memory of one rank above its footprint, its median step and its tokens a second."""

    memory_bytes: float | None
    step_s: float | None
    tokens_per_s: float | None


def write_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Keep a run's plan; one that stands there, of an earlier start, is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    jsonl.replace_text(folder / FILE, json.dumps(plan, indent=1) + "\n")


def write_measured(folder: Path) -> None:
    """Put what the finished run measured beside what was predicted."""
    plan = json.loads((folder / FILE).read_text())
    write_plan(folder, plan | {"measured": asdict(measure(folder))})


def measure(folder: Path) -> Measured:
    """Read a run's measurements off its metrics; None where it was too short to have any."""
    lines = list(jsonl.read(folder / "metrics.jsonl"))
    steps = [line for line in lines if line["step"] > WARM_UP_STEPS]
    return Measured(
        memory_bytes=max((line["memory_added_bytes"] for line in lines if "memory_added_bytes" in line), default=None),
        step_s=median(line["step_s"] for line in steps) if steps else None,
        tokens_per_s=median(line["tokens_per_s"] for line in steps) if steps else None,
    )


def finished_plans(runs_dir: Path) -> Iterator[dict[str, Any]]:
    """The plans of all runs, trials of sweeps too, that have been measured."""
    for path in sorted(runs_dir.glob(f"**/{FILE}")):
        plan = json.loads(path.read_text())
        if "measured" in plan:
            yield plan | {"run": str(path.parent.relative_to(runs_dir))}
