"""A picture of a plan: a rank's memory against the limit at every ZeRO stage, and where a step's time goes."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure

from omniloom.errors import ConfigError
from omniloom.plan.planner import Plan
from omniloom.plan.plot_style import ACCENT, INK, STYLE

GB = 1e9
COLOURS = ("#1d4ed8", "#0e7490", "#15803d", "#ca8a04", "#9333ea", "#be185d", "#64748b", "#334155", "#0ea5e9", "#84cc16")


def write_plot(plan: Plan, path: Path) -> None:
    """Two panels as one png; raises ConfigError where the file cannot be written."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 4.8), dpi=130, layout="constrained")
        memory, time = figure.subplots(1, 2, width_ratios=(1.5, 1))
        _draw_memory(memory, plan)
        _draw_time(time, plan)
        figure.suptitle(f"{_verdict(plan)}: {plan.constraint}", x=0.01, ha="left", color=INK, fontsize=10)
        try:
            figure.savefig(path, format="png")
        except OSError as error:
            raise ConfigError(f"plot={path} cannot be written: {error.strerror}") from error


def _verdict(plan: Plan) -> str:
    return {True: "go", False: "no-go", None: "open"}[plan.fits]


def _draw_memory(axes: Any, plan: Plan) -> None:
    stages = plan.stages
    names = list(dict.fromkeys(name for memory in stages.values() for name in memory.parts))
    rows = list(stages)[::-1]
    labels = []
    for row, (stage, checkpointing) in enumerate(rows):
        left = 0.0
        asked = (stage, checkpointing) == (plan.workload.zero_stage, plan.workload.activation_checkpointing)
        for colour, name in zip(COLOURS * 2, names, strict=False):
            size = stages[stage, checkpointing].parts.get(name, 0.0) / GB
            axes.barh(row, size, left=left, color=colour, height=0.72, alpha=1.0 if asked else 0.55)
            left += size
        axes.text(left, row, f" {left:,.3g}", va="center", fontsize=9, fontweight="bold" if asked else "normal")
        labels.append(f"ZeRO {stage}{', checkpointing' if checkpointing else ''}{'  ◂' if asked else ''}")
    limit = plan.hardware.device.memory_bytes
    if limit is not None:
        axes.axvline(limit / GB, color=ACCENT, linewidth=1.6)
        axes.text(
            limit / GB, len(rows) - 0.4, f"{plan.hardware.device.name}: {limit / GB:,.4g} GB", color=ACCENT, fontsize=9
        )
    axes.set_yticks(range(len(rows)), labels)
    axes.set_xlabel("GB of one rank at its height; ◂ as asked for")
    axes.set_title("memory")
    axes.margins(x=0.08)
    handles = [matplotlib.patches.Patch(color=c, label=n) for c, n in zip(COLOURS * 2, names, strict=False)]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4)


def _draw_time(axes: Any, plan: Plan) -> None:
    seconds = {name: value for name, value in plan.step.seconds.items() if value}
    axes.set_title("time of a step")
    if plan.step.total_s is None or not seconds:
        axes.text(
            0.5, 0.5, f"not known without\n{chr(10).join(plan.step.missing)}", ha="center", transform=axes.transAxes
        )
        axes.set_axis_off()
        return
    unit, scale = ("s", 1.0) if plan.step.total_s >= 1 else ("ms", 1e3)
    names = list(reversed(seconds))
    for row, name in enumerate(names):
        axes.barh(row, seconds[name] * scale, color=COLOURS[0], height=0.72)
        axes.text(seconds[name] * scale, row, f" {seconds[name] / plan.step.total_s:.1%}", va="center", fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.margins(x=0.12)
    mfu = "" if plan.step.mfu is None else f", MFU {plan.step.mfu:.1%}"
    speed = f"{plan.step.tokens_per_s or 0:,.0f} tokens a second{mfu}"
    axes.set_xlabel(f"{unit}; together {plan.step.total_s * scale:,.3g} {unit}, {speed}")
