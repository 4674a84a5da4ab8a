"""The page of one run: `report.html`, one file with its charts and media inside, that asks the network for nothing.

The story, in call order: `find_run` finds the run; `write_report` reads its files (`metrics`, `scores`,
`samples`), draws the charts (`charts`, `heatmaps`), and fills in `page.html.j2` (`page`). A run may be at any state:
what it does not have yet, or no longer has, is said in the page.
"""

import platform
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path
from typing import Any

from omniloom.errors import ConfigError, did_you_mean
from omniloom.track.report import text
from omniloom.track.report.charts import history_charts, router_charts, training_charts
from omniloom.track.report.figure import Chart
from omniloom.track.report.heatmaps import grid_chart
from omniloom.track.report.metrics import Metrics, read_metrics, whole_lines
from omniloom.track.report.page import clock, write_or_say, write_page
from omniloom.track.report.samples import PAGE_LIMIT_BYTES, Budget, read_samples
from omniloom.track.report.scores import grid_of, newest, read_history, table_rows
from omniloom.track.run_directory import RunRecord, read_config, read_record
from omniloom.track.samples import LIMIT_BYTES
from omniloom.track.sweep import FILE
from omniloom.track.verdict import verdict

LAST_EVENTS = 25
ENDINGS = ("finished", "failed", "interrupted")
PACKAGES = ("omniloom", "torch", "deepspeed", "ray", "transformers", "lm-eval", "wandb")


@dataclass
class Tile:
    """One figure at the top of the page."""

    label: str
    value: str
    detail: str = ""
    filled: float | None = None  # share of a bar


def find_run(run: str, runs_dir: str) -> Path:
    """The folder of a run or sweep named under `runs_dir`, or given as a path; raises ConfigError, with the nearest."""
    for folder in (Path(runs_dir) / run, Path(run)):
        if any((folder / name).is_file() for name in ("run.json", FILE)):
            return folder.absolute()
    runs = [path.parent.name for name in ("run.json", FILE) for path in Path(runs_dir).glob(f"*/{name}")]
    raise ConfigError(f"{run} is neither a run in runs_dir={runs_dir} nor a run's folder; {did_you_mean(run, runs)}")


@contextmanager
def reported(run_folder: Path) -> Iterator[None]:
    """Write the page when the body ends, however it ends; a page that cannot be written hides no other error."""
    try:
        yield
    finally:
        if page := write_or_say(write_report, run_folder):
            print(f"report: {page}")


def write_report(run_folder: Path) -> Path:
    """Write a run's page, whole or not at all, and return its path; raises ConfigError where the folder is no run."""
    folder = run_folder.absolute()
    record = read_record(folder)
    contents, charts = _contents(folder, record)
    return write_page(folder, "page.html.j2", contents, charts)


def _contents(folder: Path, record: RunRecord) -> tuple[dict[str, Any], list[Chart]]:
    """Everything that the template names, and its charts."""
    events = list(whole_lines(folder / "events.jsonl"))
    restarts = sorted({e["step"] for e in events if e.get("event") == "start" and isinstance(e.get("step"), int)} - {0})
    metrics = read_metrics(folder / "metrics.jsonl")
    history, damaged = read_history(folder)
    results = newest(history)
    grids = [(result, grid) for result in results if (grid := grid_of(result))]
    config = _config(folder)
    budget = Budget()
    samples = [
        read_samples(result.task, result.file.with_name(f"{result.task}.samples.jsonl"), budget) for result in results
    ]
    sections: dict[str, list[Chart]] = {
        "training": training_charts(metrics, restarts),
        "experts": router_charts(metrics, restarts),
        "needle": [grid_chart(result.task, i, grid) for i, (result, grid) in enumerate(grids)],
        "history": history_charts(history),
    }
    contents = {
        "name": record.name,
        "status": record.status,
        "run": record,
        "tiles": _tiles(record, config, metrics, events, folder),
        "ranks": _ranks(events),
        "restarts": restarts,
        "verdicts": verdict([result.as_dict() for result in results]),
        "charts": sections,
        "scores": table_rows(results),
        "damaged": damaged,
        "samples": [of_task for of_task in samples if of_task is not None],
        "media_limits": (LIMIT_BYTES, PAGE_LIMIT_BYTES),
        "config": text.flat_redacted(config) if config else [],
        "environment": _environment(record),
        "event_counts": _event_counts(events),
        "last_events": _last_events(events),
        "events_left_out": max(0, len(events) - LAST_EVENTS),
    }
    return contents, [chart for charts in sections.values() for chart in charts]


def _config(folder: Path) -> dict[str, Any] | None:
    try:
        return read_config(folder)
    except ConfigError:
        return None


def _tiles(
    record: RunRecord, config: dict[str, Any] | None, metrics: Metrics, events: list[dict[str, Any]], folder: Path
) -> list[Tile]:
    steps, curves = planned_steps(config), metrics.curves
    tiles = [
        Tile(
            "Step",
            f"{metrics.step:,}",
            ", ".join(filter(None, [f"of {steps:,}" if steps else "", _remaining(record, metrics)])),
            min(1.0, metrics.step / steps) if steps else None,
        ),
        Tile("Tokens", text.count(metrics.last.get("tokens")), _tokens_a_step(metrics)),
    ]
    elapsed = elapsed_s(record, events, folder)
    step_s = curves.get("step_s")
    detail = f"steps alone {text.duration(step_s.total)}" if step_s else ""
    tiles.append(Tile("Wall time", text.duration(elapsed), detail))
    for key, label in (("loss/next_token", "Training loss"), ("val/loss", "Validation loss")):
        curve = curves.get(key)
        if curve is None or curve.last is None:
            continue
        smoothed, best = curve.smoothed()[1], curve.best()
        detail = f"smoothed {text.figure(smoothed[-1])}" if key == "loss/next_token" else ""
        if key == "val/loss" and best:
            detail = f"lowest {text.figure(best[1])} at {best[0]:,}"
        tiles.append(Tile(label, text.figure(curve.last), detail))
    speed = curves.get("tokens_per_s")
    if speed is not None and speed.mean is not None:
        mfu = curves.get("mfu")
        told = [f"{text.duration(step_s.mean)} a step" if step_s else "", f"MFU {text.share(mfu.mean)}" if mfu else ""]
        tiles.append(Tile("Tokens a second", text.count(speed.mean), ", ".join(filter(None, told))))
    if skipped := metrics.last.get("skipped_steps"):
        tiles.append(Tile("Skipped steps", f"{skipped:,}", "gradients not finite, or a spike"))
    memory = curves.get("memory_peak_bytes")
    if memory is not None:
        tiles.append(Tile("Peak memory", text.size(memory.last), "of one rank"))
    return tiles


def _ranks(events: list[dict[str, Any]]) -> int:
    """How many ranks the last start had."""
    starts = [event.get("ranks") for event in events if event.get("event") == "start"]
    return len(starts[-1]) if starts and isinstance(starts[-1], list) else 0


def planned_steps(config: dict[str, Any] | None) -> int | None:
    """How long the configuration makes the run; None where it does not say."""
    try:
        train = (config or {})["train"]
        if train["steps"] is not None:
            return int(train["steps"])
        return ceil(train["tokens"] / (train["global_batch_size"] * (config or {})["data"]["seq_len"]))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None  # a configuration of another kind of run, or a damaged one


def _remaining(record: RunRecord, metrics: Metrics) -> str:
    eta_s = metrics.last.get("eta_s")
    if record.status != "running" or not isinstance(eta_s, int | float) or not eta_s:
        return ""
    return f"{text.duration(eta_s)} to go"


def _tokens_a_step(metrics: Metrics) -> str:
    tokens = metrics.last.get("tokens")
    if not isinstance(tokens, int | float) or not metrics.step:
        return ""
    return f"{text.count(tokens / metrics.step)} a step"


def elapsed_s(record: RunRecord, events: list[dict[str, Any]], folder: Path) -> float | None:
    """From the first start to the end, pauses between restarts included; to the last step where no end is known."""
    times = [event["time"] for event in events if isinstance(event.get("time"), int | float)]
    if not times:
        return None
    ends = [event["time"] for event in events if event.get("event") in ENDINGS and event.get("time") in times]
    if record.status != "running" and ends:
        return float(ends[-1] - times[0])
    metrics = folder / "metrics.jsonl"
    last = max(times[-1], metrics.stat().st_mtime if metrics.is_file() else 0.0)
    return float(last - times[0])


def _environment(record: RunRecord) -> list[tuple[str, str]]:
    """`run.json`, and the packages that wrote this page."""
    rows = text.flat_redacted(asdict(record))
    for package in PACKAGES:
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return [*rows, ("python", platform.python_version()), ("platform", platform.platform())]


def _event_counts(events: list[dict[str, Any]]) -> list[tuple[str, str, int, int | None]]:
    """Event, reason, how often, and the sum of its counts where it has some: skipped input has a line a reason."""
    often: Counter[tuple[str, str]] = Counter()
    counted: Counter[tuple[str, str]] = Counter()
    for event in events:
        key = (str(event.get("event")), str(event.get("reason") or ""))
        often[key] += 1
        if isinstance(event.get("count"), int):
            counted[key] += event["count"]
    return [(name, reason, n, counted.get((name, reason))) for (name, reason), n in often.most_common(LAST_EVENTS)]


def _last_events(events: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The newest first: when, what, its facts."""
    rows = []
    for event in reversed(events[-LAST_EVENTS:]):
        facts = {key: value for key, value in event.items() if key not in ("time", "event") and value is not None}
        told = text.middle_cut(", ".join(f"{key} {value}" for key, value in text.flat_redacted(facts)))
        rows.append((clock(event.get("time")), str(event.get("event")), told))
    return rows
