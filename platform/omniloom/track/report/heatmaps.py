"""The heatmaps of a run's page: the experts' load over time, a needle task's recall by length and depth."""

import html
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omniloom.track.report.figure import Chart, layout_of, rounded
from omniloom.track.report.metrics import Load
from omniloom.track.report.scores import Grid
from omniloom.track.report.text import share

MOST_LOAD_ROWS = 512  # of the experts' heatmap: experts, all layers together
LABELLED_LOAD_ROWS = 40


def load_heatmap(load: Load) -> Chart | None:
    """Each expert's tokens over its layer's mean, over the steps; None where no step has them."""
    ratios = load.over_mean()
    if not ratios:
        return None
    shown = _most_uneven(ratios)
    labels: list[str] = []
    rows: list[list[float | None]] = []
    ticks: dict[str, str] = {}
    few = sum(len(ratio) for ratio in shown.values()) <= LABELLED_LOAD_ROWS
    for layer, ratio_EB in shown.items():
        name = html.escape(layer)
        if rows:  # an empty row parts the layers
            labels.append(f"layer {name}")
            rows.append([None] * len(load.bins))
        for expert, ratio_B in enumerate(ratio_EB):
            labels.append(f"layer {name}, expert {expert}")
            rows.append([None if math.isnan(ratio) else round(float(ratio), 2) for ratio in ratio_B])
            if few:
                ticks[labels[-1]] = str(expert) if expert else f"layer {name} · 0"
            elif expert == len(ratio_EB) // 2:
                ticks[labels[-1]] = f"layer {name}"
    trace = {
        "type": "heatmap",
        "x": [load.bins[0].first_step - 0.5, *(bin_.last_step + 0.5 for bin_ in load.bins)],
        "y": labels,
        "z": rows,
        "zmin": 0,
        "zmid": 1,
        "zmax": 2,
        "colorscale": [[i / 4, f"var(--diverge-{i})"] for i in range(5)],
        "colorbar": _colorbar(tickvals=[0, 0.5, 1, 1.5, 2], ticktext=["0", "½", "even", "1½", "≥ 2"]),
        "hovertemplate": "%{y}, step %{x:.0f}<br><b>%{z:.2f}</b> × the mean expert<extra></extra>",
        "hoverongaps": False,
    }
    layout = layout_of(
        xaxis={"showgrid": False},
        yaxis={
            "type": "category", "autorange": "reversed", "showgrid": False,
            "tickmode": "array", "tickvals": list(ticks), "ticktext": list(ticks.values()),
        },
        hovermode="closest",
    )  # fmt: skip
    note = "Each expert's tokens over its layer's mean: 1 is an even load."
    if len(shown) < len(ratios):
        note += f" Of {len(ratios)} layers the {len(shown)} most uneven at the end are shown."
    height = min(900, max(220, 70 + (15 if few else 2) * len(rows)))
    return Chart(
        "load", "Load of each expert", {"data": [trace], "layout": layout}, note=note, wide=True, height_pixels=height
    )


def grid_chart(task: str, index: int, grid: Grid) -> Chart:
    """A needle task's recall, by the haystack's length and the needle's depth in it."""
    cells = [[grid.cells.get((length, depth)) for depth in grid.depths] for length in grid.lengths]
    errors = [[(cell.stderr if cell else None) for cell in row] for row in cells]
    trace = {
        "type": "heatmap",
        "x": [f"{depth:.4g}%" for depth in (d * 100 for d in grid.depths)],
        "y": [f"{length:,}" for length in grid.lengths],
        "z": [[rounded(cell.value) if cell else None for cell in row] for row in cells],
        "text": [[f"{cell.value:.0%}" if cell else "" for cell in row] for row in cells],
        "customdata": [["" if error is None else f" ± {error:.1%}" for error in row] for row in errors],
        "texttemplate": "%{text}",
        "hovertemplate": "%{y} tokens, depth %{x}<br><b>%{z:.1%}</b>%{customdata}<extra></extra>",
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[i / 4, f"var(--ramp-{i})"] for i in range(5)],
        "colorbar": _colorbar(tickformat=".0%", tickvals=[0, 0.25, 0.5, 0.75, 1]),
        "xgap": 2,
        "ygap": 2,
    }
    layout = layout_of(
        xaxis={"title": {"text": "depth of the needle", "standoff": 6}, "type": "category", "showgrid": False},
        yaxis={"title": {"text": "length, tokens", "standoff": 10}, "type": "category", "showgrid": False},
        hovermode="closest",
    )
    (length, depth), worst = grid.worst
    note = f"Mean {share(grid.mean)}; worst cell {share(worst.value)}, at {length:,} tokens and depth {depth:.0%}."
    height = min(560, 110 + 44 * len(grid.lengths))
    return Chart(
        f"needle-{index}", task, {"data": [trace], "layout": layout}, latest=share(grid.mean), note=note,
        wide=len(grid.depths) > 6, height_pixels=height,
    )  # fmt: skip


def _most_uneven(ratios: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """All layers where they fit into the heatmap, else those with the most uneven last bin."""
    if sum(len(ratio) for ratio in ratios.values()) <= MOST_LOAD_ROWS:
        return ratios
    uneven = sorted(ratios, key=lambda layer: -float(np.nan_to_num(ratios[layer][:, -1]).max()))
    rows = 0
    kept: set[str] = set()
    for layer in uneven:
        rows += len(ratios[layer])
        if rows > MOST_LOAD_ROWS and kept:
            break
        kept.add(layer)
    return {layer: ratio[:MOST_LOAD_ROWS] for layer, ratio in ratios.items() if layer in kept}


def _colorbar(**ticks: Any) -> dict[str, Any]:
    return {"thickness": 8, "outlinewidth": 0, "len": 1, "x": 1.01, "tickfont": {"size": 11}} | ticks
