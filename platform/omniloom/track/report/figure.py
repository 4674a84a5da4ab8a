"""One figure of a run's page, as Plotly draws it, in plain dictionaries.

A colour is written `var(--name)`: the page's style sheet has its value for light and for dark, and the page's script
looks it up. Text that came from a file is escaped where it becomes a label, since Plotly reads tags in its labels.
"""

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class Chart:
    """One figure, what is said above and below it, and how much room it takes."""

    id: str
    title: str
    figure: dict[str, Any]
    latest: str = ""
    note: str = ""
    wide: bool = False
    tall: bool = False  # beside two others
    height_pixels: int = 230


def layout_of(**changes: Any) -> dict[str, Any]:
    """What all figures share, and these changes to it."""
    axis = {"gridcolor": "var(--grid)", "linecolor": "var(--line)", "zeroline": False, "automargin": True, "ticks": ""}
    layout: dict[str, Any] = {
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "var(--muted)"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "hovermode": "x unified",
        "hoverlabel": {"bgcolor": "var(--card)", "bordercolor": "var(--line)", "font": {"color": "var(--text)"}},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "showlegend": False,
    }
    x = {"tickformat": "~s", "hoverformat": ",d", "showline": True} | changes.pop("xaxis", {})
    y = {"exponentformat": "e"} | changes.pop("yaxis", {})
    return layout | {"xaxis": axis | x, "yaxis": axis | y} | changes


def rounded(value: float) -> float | None:
    """Five digits: a page need not carry sixteen; None, a gap in the line, for what is not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None
