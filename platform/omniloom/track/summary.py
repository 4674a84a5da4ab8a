"""A run in a screenful of a terminal: how it stands, its losses, its data, its newest scores. Whatever its state."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from omniloom.errors import ConfigError
from omniloom.track.checkpoints import Checkpoints
from omniloom.track.report import elapsed_s, planned_steps, text
from omniloom.track.report.metrics import (
    DEAD_EXPERTS,
    LOWEST_ENTROPY,
    WIDEST_BIAS,
    WORST_LOAD,
    Curve,
    read_metrics,
    time_shares,
    whole_lines,
)
from omniloom.track.report.scores import newest, read_history
from omniloom.track.run_directory import read_config, read_record
from omniloom.track.verdict import verdict

COLOURS = {"finished": "green", "running": "cyan", "failed": "red", "interrupted": "yellow"}
LOSSES, RETRIEVAL = ("loss/", "val/loss", "val/forgetting/"), "val/retrieval_at_1/"
COUNTED = ("failure", "command_lost", "skipped_step")  # events of a run that did not go straight through

ROUTER = {  # of the last step, over all layers
    "load_max_over_mean": WORST_LOAD,
    "load_entropy": LOWEST_ENTROPY,
    "dead_experts": DEAD_EXPERTS,
    "bias_range": WIDEST_BIAS,
}


def summarize(folder: Path) -> dict[str, Any]:
    """What there is to say of a run, for a machine; raises ConfigError where the folder is no run."""
    record = read_record(folder)
    try:
        config = read_config(folder)
    except ConfigError:
        config = None
    metrics, events = read_metrics(folder / "metrics.jsonl"), list(whole_lines(folder / "events.jsonl"))
    results = [result.as_dict() for result in newest(read_history(folder)[0])]
    plans = [event for event in events if event.get("event") == "plan"]
    losses = {name: curve for name, curve in sorted(metrics.curves.items()) if name.startswith(LOSSES)}
    speed = metrics.curves.get("tokens_per_s")
    return {
        "run": str(folder),
        "record": asdict(record),
        "step": metrics.step,
        "steps": planned_steps(config),
        "tokens": metrics.last.get("tokens"),
        "elapsed_s": elapsed_s(record, events, folder),
        "eta_s": metrics.last.get("eta_s") if record.status == "running" else None,
        "tokens_per_s": speed.mean if speed else None,
        "time": time_shares(metrics.curves),
        "mfu": metrics.curves["mfu"].mean if "mfu" in metrics.curves else None,
        "tokens_by_modality": {
            key.removeprefix("tokens/"): count for key, count in metrics.last.items() if key.startswith("tokens/")
        },
        "router": {name: metrics.curves[key].last for name, key in ROUTER.items() if key in metrics.curves},
        "alarms": _open_alarms(events),
        "losses": {name: _loss(curve) for name, curve in losses.items()},
        "retrieval": {
            key.removeprefix(RETRIEVAL): curve.last
            for key, curve in sorted(metrics.curves.items())
            if key.startswith(RETRIEVAL)
        },
        "checkpoints": Checkpoints(folder).complete(),
        "starts": sum(event.get("event") == "start" for event in events),
        "events": {kind: sum(event.get("event") == kind for event in events) for kind in COUNTED},
        "corpus": config["corpus"] if config and "corpus" in config else None,
        "data": {key: plans[-1][key] for key in ("rows", "tokens", "positions", "skipped", "epochs")}
        if plans
        else None,
        "evaluations": results,
        "verdicts": verdict(results),
    }


def _open_alarms(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of routers that have begun and not ended."""
    alarms: dict[tuple[Any, Any], dict[str, Any]] = {}
    for event in events:
        if event.get("event") == "router_alarm":
            alarms[event.get("layer"), event.get("alarm")] = event
    return [alarm for alarm in alarms.values() if alarm.get("state") == "begins"]


def _loss(curve: Curve) -> dict[str, Any]:
    best = curve.best()
    return {
        "last": curve.last,
        "best": best[1] if best else None,
        "best_step": best[0] if best else None,
        "not_finite": curve.not_finite,  # the first and the last such step
    }


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """The same, for reading."""
    record = summary["record"]
    title = Text.assemble((f"run {record['name']}", "bold"), " · ", (record["status"], COLOURS[record["status"]]))
    console.print(title.append(f" · {summary['run']}", "dim"))
    table = Table.grid(padding=(0, 2))
    for name, told in _lines(summary):
        table.add_row(Text(f"  {name}", "dim"), Text.from_ansi(told))  # a rank's error has colours of its own
    console.print(table)
    if summary["losses"]:
        console.print(_losses(summary["losses"]))
    for sentence in summary["verdicts"]:
        console.print(Text(f"  {sentence}"))


def _lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    record, data = summary["record"], summary["data"]
    steps = f"{summary['step']:,}" + (f" of {summary['steps']:,}" if summary["steps"] else "")
    restarts = [f"started {summary['starts']} times"] if summary["starts"] > 1 else []
    troubles = [f"{kind} {count}" for kind, count in summary["events"].items() if count]
    remaining = [f"{text.duration(summary['eta_s'])} to go"] if summary["eta_s"] else []
    kept = summary["checkpoints"]
    lines = [
        ("step", ", ".join([steps, *remaining, *restarts, *troubles])),
        ("tokens", f"{text.count(summary['tokens'])}, {text.count(summary['tokens_per_s'])} a second"),
        ("time", f"{text.duration(summary['elapsed_s'])}, begun {record['started'] or '–'} on {record['host'] or '–'}"),
        ("checkpoints", f"{len(kept)}, the last at step {kept[-1]:,}" if kept else "none"),
    ]
    if summary["time"]:
        shares = ", ".join(f"{part} {text.share(share)}" for part, share in summary["time"].items())
        lines.append(("a step", shares + (f", MFU {text.share(summary['mfu'])}" if summary["mfu"] else "")))
    if summary["router"]:
        told = (f"{name} {text.figure(value)}" for name, value in summary["router"].items())
        lines.append(("router", f"{', '.join(told)}, the worst layer's"))
    if summary["retrieval"]:
        found = (f"{pair} {text.share(share)}" for pair, share in summary["retrieval"].items())
        lines.append(("pairs found", ", ".join(found)))
    for alarm in summary["alarms"]:
        lines.append(("alarm", f"{alarm.get('alarm')} in layer {alarm.get('layer')} since step {alarm.get('step')}"))
    if record["exit_reason"]:
        lines.insert(0, ("reason", text.middle_cut(record["exit_reason"])))
    if summary["corpus"]:
        lines.append(("corpus", summary["corpus"]))
    if data:
        epochs = ", ".join(f"{name} {count:.3g}" for name, count in data["epochs"].items() if count)
        lines.append(("plan", f"{data['rows']:,} rows, {data['tokens'] / data['positions']:.2%} filled"))
        lines.append(("epochs", epochs))
    lines += [(key, record[key]) for key in ("parent_run", "git_revision", "wandb_url") if record[key]]
    return lines


def _losses(losses: dict[str, dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("")
    for name in ("last", "lowest", "at step"):
        table.add_column(name, justify="right")
    table.add_column("")
    for name, loss in losses.items():
        step = "–" if loss["best_step"] is None else f"{loss['best_step']:,}"
        remark = f"not finite from step {loss['not_finite'][0]:,}" if loss["not_finite"] else ""
        table.add_row(Text(name), text.figure(loss["last"]), text.figure(loss["best"]), step, Text(remark, "red"))
    return table
