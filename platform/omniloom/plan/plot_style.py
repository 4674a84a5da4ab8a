"""How the planner's pictures look."""

from typing import Any

INK, GRID, ACCENT = "#1f2933", "#d9dee4", "#c2410c"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.edgecolor": "#8a94a0",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "xtick.color": INK,
    "ytick.color": INK,
}
