"""What `omniloom doctor measure=true` found a machine to reach, kept in runs_dir and read back by the planner."""

import math
from dataclasses import asdict
from pathlib import Path

from omniloom.errors import ConfigError
from omniloom.plan.config import Curve, Measurements


def read_curve(curve: Curve, size: float) -> float:
    """The rate at a size: between two measured sizes by a line in both logarithms, beyond them the outermost's."""
    before = [point for point in curve if point[0] <= size]
    after = [point for point in curve if point[0] > size]
    if not before or not after:
        return (before or after)[-1 if before else 0][1]
    (low, at_low), (high, at_high) = before[-1], after[0]
    share = math.log(size / low) / math.log(high / low)
    return at_low * (at_high / at_low) ** share


def attention_s_per_flop(curves: dict[int, Curve], width: int, tokens: float) -> float:
    """Seconds of a FLOP of attention with heads of a width d: a key costs a + b·d, its softmax and its products.

    Between two measured widths by a line, beyond them along the outermost two's; a narrower head costs no less a FLOP
    than the narrowest.
    """
    widths = sorted(curves)
    a_key = [measured / read_curve(curves[measured], tokens) for measured in widths]
    if len(widths) == 1:
        return a_key[0] / widths[0]
    above = max(1, next((i for i, measured in enumerate(widths) if measured >= width), len(widths) - 1))
    slope = (a_key[above] - a_key[above - 1]) / (widths[above] - widths[above - 1])
    took = (a_key[above] + slope * (width - widths[above])) / width
    return max(took, a_key[0] / widths[0]) if width < widths[0] else took


def measurements_path(runs_dir: Path, cluster: str) -> Path:
    """Where those of a cluster of this name are kept."""
    return runs_dir / "machines" / f"{cluster}.json"


def write_measurements(measured: Measurements, runs_dir: Path, cluster: str) -> Path:
    """Keep them; what an earlier measurement left is replaced."""
    from pydantic import TypeAdapter

    path = measurements_path(runs_dir, cluster)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(TypeAdapter(dict).dump_json(asdict(measured), indent=1))
    partial.replace(path)
    return path


def read_measurements(runs_dir: Path, cluster: str) -> Measurements | None:
    """Those of a cluster of this name, or None where nothing was measured; raises ConfigError where they cannot be
    read."""
    from pydantic import TypeAdapter, ValidationError

    path = measurements_path(runs_dir, cluster)
    if not path.is_file():
        return None
    try:
        return TypeAdapter(Measurements).validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(
            f"{path} does not hold this version's measurements ({error.error_count()} errors, the first: "
            f"{error.errors()[0]['msg']}): measure again with `omniloom doctor measure=true`, or remove it"
        ) from error


def describe(measured: Measurements) -> dict[str, str]:
    """For reading: a line for each number of ranks and kind of work."""
    software = f"torch {measured.torch}, {measured.threads} threads a rank"
    lines = {"measured on": f"{measured.host}, {measured.accelerator}, {software}"}
    for rates in measured.rates:
        who = "1 rank" if rates.ranks == 1 else f"{rates.ranks} ranks"

        def by_precision(flops: dict[str, float]) -> str:
            return ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in flops.items())

        def by_size(curves: dict[str, Curve], unit: str) -> str:
            of_each = [
                f"{name} {' / '.join(f'{rate / 1e9:,.0f}' for _, rate in curve)}" for name, curve in curves.items()
            ]
            sizes = " / ".join(f"{size:,.0f}" for size, _ in next(iter(curves.values())))
            return f"{', '.join(of_each)} at {sizes} {unit}"

        def by_width(curves: dict[str, dict[int, Curve]]) -> str:
            widths = next(iter(curves.values()))
            return "; ".join(
                f"heads of {width} {by_size({name: each[width] for name, each in curves.items()}, 'tokens')}"
                for width in widths
            )

        moved = " / ".join(f"{rate / 1e9:,.1f}" for _, rate in rates.elementwise_bytes_per_s)
        stepped = " / ".join(f"{rate / 1e9:,.1f}" for _, rate in rates.in_place_bytes_per_s)
        sizes = " / ".join(f"{size / 2**20:,.3g}" for size, _ in rates.elementwise_bytes_per_s)
        lines |= {
            f"{who}: products": f"GFLOP/s each: {by_size(rates.matmul_flops_per_s, 'rows')}",
            f"{who}: attention": f"GFLOP/s each: {by_width(rates.attention_forward_flops_per_s)}; "
            f"masked blocks {by_precision(rates.block_attention_flops_per_s)}",
            f"{who}: attention backward": f"GFLOP/s each: {by_width(rates.attention_backward_flops_per_s)}",
            f"{who}: elementwise": f"GB/s each: {moved} in tensors of {sizes} MiB; "
            f"{1e6 * rates.operation_s:.1f} µs the smallest operation",
            f"{who}: in place": f"GB/s each: {stepped} in the same",
        }
        if rates.collectives:
            lines[f"{who}: exchange"] = ", ".join(
                f"{kind.replace('_', '-')} {exchange.bytes_per_s / 1e9:,.2f} GB/s "
                f"after {1e6 * exchange.latency_s:,.0f} µs"
                for kind, exchange in rates.collectives.items()
            )
    return lines
