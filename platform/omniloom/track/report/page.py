"""A page: its template filled in, one file that asks the network for nothing, in its place whole or not at all."""

import secrets
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from omniloom.track import jsonl
from omniloom.track.report import text
from omniloom.track.report.figure import Chart


def write_page(folder: Path, template: str, contents: dict[str, Any], charts: Iterable[Chart]) -> Path:
    """Fill in a template that extends `base.html.j2` and write it as the folder's report.html; returns its path."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["size"] = text.size
    figures = {chart.id: chart.figure for chart in charts}
    shared = {
        "folder": str(folder),
        "written": clock(datetime.now().timestamp()),
        "nonce": secrets.token_urlsafe(16),
        "figures": figures,
        # Markup: the library's own source, the only text in the page that is not escaped.
        "plotly": Markup(get_plotlyjs()) if figures else "",
    }
    page = environment.get_template(template).render(contents | shared)
    # What no file may hold, such as half a surrogate pair from a prompt, becomes a question mark.
    jsonl.replace_text(folder / "report.html", page.encode("utf-8", "replace").decode())
    return folder / "report.html"


def write_or_say(write: Callable[[Path], Path], folder: Path) -> Path | None:
    """Write a folder's page; one that cannot be written is said, and hides no other error."""
    try:
        return write(folder)
    except Exception as error:
        print(f"the report of {folder} could not be written: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def clock(seconds: Any) -> str:
    """A moment, in seconds since 1970, by this machine's clock."""
    try:
        return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    except (TypeError, ValueError, OverflowError, OSError):
        return "–"
