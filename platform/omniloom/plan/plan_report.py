"""A plan as it is told in a terminal: bars against their limit, the stages side by side, totals, the verdict."""

import io
from collections.abc import Callable, Mapping, Sequence

from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from omniloom.plan.accuracy import Band
from omniloom.plan.compare import Architecture
from omniloom.plan.config import HardwareConfig, is_cpu
from omniloom.plan.params import short
from omniloom.plan.planner import Plan

GB = 1e9
WIDTH, BAR_WIDTH = 118, 40
QUANTITIES = {"memory_bytes": "memory", "step_s": "step time", "tokens_per_s": "tokens a second"}


def told(plan: Plan, bands: Mapping[str, Band]) -> str:
    """The whole plan, for reading."""
    blocks = [plan.parameters.as_table(), plan.costs.as_table(), _memory(plan), _stages(plan), _time(plan)]
    blocks += [_totals(plan)]
    if bands:
        known = "\n".join(f"  {QUANTITIES[name]}: {band}" for name, band in bands.items())
        blocks += [f"measured on cluster {plan.hardware.name} so far:\n{known}"]
    return "\n\n".join([*blocks, _verdict(plan)])


def _rendered(table: Table) -> str:
    console = Console(file=io.StringIO(), width=WIDTH, highlight=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _memory(plan: Plan) -> str:
    limit, total = plan.hardware.device.memory_bytes, plan.memory.total
    height = "the backward pass" if plan.memory.moment == "backward" else "the optimizer's step"
    of = "" if limit is None else f" of {limit / GB:,.4g}"
    title = f"memory of a rank, at its height in {height}: {total / GB:,.3g}{of} GB"
    return f"{title}\n{_bars(plan.memory.parts, max(total, limit or 0), lambda size: f'{size / GB:,.3f} GB')}"


def _bars(parts: Mapping[str, float], whole: float, say: Callable[[float], str]) -> str:
    """One bar a part, each beginning where the one before ends."""
    table = Table.grid(padding=(0, 2))
    begin = 0.0
    for name, size in parts.items():
        table.add_row(f"  {name}", Bar(whole, begin, begin + size, width=BAR_WIDTH), Text(say(size), justify="right"))
        begin += size
    return _rendered(table)


def _stages(plan: Plan) -> str:
    table = Table.grid(padding=(0, 2))
    limit = plan.hardware.device.memory_bytes
    table.add_row("  ZeRO stage", *(str(stage) for stage in range(4)))
    for checkpointing, name in ((False, "  GB a rank"), (True, "  with activation checkpointing")):
        cells = []
        for stage in range(4):
            size = plan.stages[stage, checkpointing].total
            over = " !" if limit is not None and size > limit else ""
            cells.append(Text(f"{size / GB:,.3g}{over}", justify="right"))
        table.add_row(name, *cells)
    return _rendered(table)


def _time(plan: Plan) -> str:
    step = plan.step
    bars = _bars(step.seconds, sum(step.seconds.values()), _seconds) if step.seconds else ""
    if step.total_s is None or step.tokens_per_s is None:
        lines = ["time of a step: not known without"]
        lines += [f"  {key}: {', '.join(parts)}{_has(plan.hardware, key)}" for key, parts in step.missing.items()]
        if is_cpu(plan.hardware):
            lines += ["`omniloom doctor measure=true` measures this machine"]
        return "\n".join(lines + ([f"the rest:\n{bars}"] if bars else []))
    title = f"one step of {plan.workload.tokens_per_step:,} tokens: {_seconds(step.total_s)}, "
    title += f"{step.tokens_per_s:,.0f} tokens a second ({step.tokens_per_s / plan.workload.ranks:,.0f} a rank)"
    title += "" if step.mfu is None else f", MFU {step.mfu:.1%}"
    ahead = (
        ""
        if plan.hardware.storage_bytes_per_s
        else "\n  data loading: rows are read ahead; counted with cluster.storage_bytes_per_s"
    )
    return f"{title}\n{bars}{ahead}"


def _has(hardware: HardwareConfig, key: str) -> str:
    """Which precisions the device's peaks are known of, where the one asked for is none of them."""
    peaks = hardware.device.peak_flops_per_s
    return f"; {hardware.device.name} has {', '.join(peaks)}" if "peak_flops_per_s" in key and peaks else ""


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.3g} ms"


def _amount(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:,.3g}"


def _size(count: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= size:
            return f"{count / size:,.3g} {unit}"
    return f"{count:,.0f} bytes"


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:,.3g} {unit}"
    return _seconds(seconds)


def _totals(plan: Plan) -> str:
    cost, workload = plan.cost, plan.workload
    if workload.steps is None:
        return "the whole run: set train.steps or train.tokens to know its time, cost and disk"
    known = [_counted(workload.steps, "step")]
    if cost.days is not None and cost.gpu_hours is not None:
        known += [_duration(cost.days * 86_400)]
        unit = "rank-hours" if is_cpu(plan.hardware) else "GPU-hours"
        known += [f"{_amount(cost.gpu_hours)} {unit}"]
    if cost.cost_usd is not None:
        known += [f"${_amount(cost.cost_usd)} at ${plan.hardware.usd_per_device_hour:g}"]
    if cost.energy_kwh is not None:
        known += [f"{_amount(cost.energy_kwh)} kWh"]
    disk = f"disk: {_size(cost.disk_bytes or 0)}, {_counted(cost.checkpoints or 0, 'checkpoint')} "
    lines = [f"the whole run: {', '.join(known)}", f"{disk}of {_size(cost.checkpoint_bytes)}"]
    if cost.days is None:
        lines.append(f"no time, hours, cost and energy without {', '.join(plan.step.missing)}")
    absent = {"cluster.usd_per_device_hour": "cost", "cluster.device.watts": "energy"}
    return "\n".join(lines + [f"no {what}: set {key}" for key, what in absent.items() if key in plan.missing])


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _verdict(plan: Plan) -> str:
    word = {True: "go", False: "no-go", None: "open"}[plan.fits]
    lines = [f"{word}: {plan.constraint}"]
    if plan.fits is False:
        lines += ["nearest that fit, the fastest first:" if plan.alternatives else _nothing_near(plan)]
    for one in plan.alternatives:
        time = f", a step {_seconds(one.step_s)}" if one.step_s is not None else ""
        unknown = f", its time not known without {', '.join(one.missing)}" if one.missing else ""
        lines.append(f"  {' '.join(one.overrides)}    # {_size(one.memory_bytes)} a rank{time}{unknown}")
    return "\n".join(lines)


def _nothing_near(plan: Plan) -> str:
    """Why nothing was found: a batch of so many rows keeps no more than as many replicas busy."""
    workload = plan.workload
    tried = "no ZeRO stage, micro batch or checkpointing fits"
    if plan.hardware.devices_per_node is None:
        return f"{tried} on this machine: a smaller model, shorter rows, or a cluster"
    most = workload.global_batch_size * (workload.ranks // workload.data_parallel)
    return (
        f"{tried}, on up to {most:,} devices: train.global_batch_size={workload.global_batch_size} keeps no more busy; "
        "raise it, or take a smaller model or shorter rows"
    )


def compared(architectures: Sequence[Architecture], hardware: HardwareConfig, precision: str) -> str:
    """The comparison, one architecture a column, and by what its hours are reckoned."""
    table = Table(box=None, padding=(0, 2))
    table.add_column("")
    for one in architectures:
        table.add_column(one.name, justify="right")

    def row(name: str, say: Callable[[Architecture], str]) -> None:
        table.add_row(name, *(say(one) for one in architectures))

    row("parameters", lambda one: short(one.params_total))
    row("active, a text token", lambda one: f"{short(one.params_active)} ({one.active_share:.1%})")
    row("context", lambda one: f"{one.context_tokens:,}")
    row("documents of", lambda one: f"{one.document_tokens:,}")
    row("attention, GFLOP a token", lambda one: f"{one.attention_flops_per_token / 1e9:,.3g}")
    row("feed-forward, GFLOP a token", lambda one: f"{one.feed_forward_flops_per_token / 1e9:,.3g}")
    row("forward, GFLOP a token", lambda one: f"{one.forward_flops_per_token / 1e9:,.3g}")
    row("cache, bytes a token", lambda one: f"{one.kv_cache_bytes_per_token:,}")
    if architectures and architectures[0].train_tokens is not None:
        row("training tokens", lambda one: f"{one.train_tokens:.3g}")
        row("training FLOP", lambda one: f"{one.train_flops:.3g}")
        row("6·N·D", lambda one: f"{one.train_flops_6nd:.3g}")
        row("GPU-hours", lambda one: "not known" if one.gpu_hours is None else f"{one.gpu_hours:,.3g}")
        row("cost", lambda one: "not known" if one.cost_usd is None else f"${one.cost_usd:,.3g}")
    lines = [_rendered(table), f"hours by the roofline of one {hardware.device.name} in {precision}, networks aside"]
    missing = sorted({key for one in architectures for key in one.missing})
    if missing:
        lines.append(f"not known without {', '.join(missing)}")
    return "\n\n".join(["\n".join(lines[:1]), "\n".join(lines[1:])])
