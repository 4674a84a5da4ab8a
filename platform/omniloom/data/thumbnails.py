"""Pixels and sound as characters: two pixels a character in colour, shades of grey where a terminal has none."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.segment import Segment as Printed
from rich.style import Style

GREYS = " .:-=+*#%@"  # from black to white, for light characters on a dark ground
LEVELS = "▁▂▃▄▅▆▇█"


def is_coloured(console: Console) -> bool:
    """Whether colours reach the reader: not in a pipe, nor where NO_COLOR is set."""
    return console.color_system is not None and not console.no_color


@dataclass
class Thumbnail:
    """A picture, pixels uint8 (H, W, 3), at most so many characters wide and lines high; never larger than it is."""

    pixels: np.ndarray
    most_columns: int
    most_lines: int

    @property
    def size(self) -> tuple[int, int]:
        """Characters across, lines down: a line is two pixels high."""
        height, width = self.pixels.shape[:2]
        scale = min(1.0, self.most_columns / width, 2 * self.most_lines / height)
        return max(1, round(width * scale)), max(1, round(height * scale / 2))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(self.size[0], self.size[0])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        across, down = self.size
        if is_coloured(console):
            rows = self._resized(across, 2 * down)
            for upper, lower in zip(rows[::2], rows[1::2], strict=True):
                for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
                    yield Printed("▀", Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below)))
                yield Printed.line()
            return
        light = self._resized(across, down).mean(axis=2) / 255
        for line in np.rint(light * (len(GREYS) - 1)).astype(int).tolist():
            yield Printed("".join(GREYS[level] for level in line))
            yield Printed.line()

    def _resized(self, width: int, height: int) -> np.ndarray:
        picture = Image.fromarray(self.pixels).resize((width, height), Image.Resampling.BOX)
        return np.asarray(picture)


def loudness(frames_FM: np.ndarray, most_columns: int) -> str:
    """Log-mel frames (F, M) as a line of bars: the mean over the bands, from the quietest to the loudest stretch."""
    level = frames_FM.astype(np.float32).mean(axis=1)
    means = np.array([part.mean() for part in np.array_split(level, min(most_columns, len(level)))])
    return bars((means - means.min()) / max(float(np.ptp(means)), 1e-6))


def bars(shares: Iterable[float]) -> str:
    """Each share between 0 and 1 as a bar of one character."""
    return "".join(LEVELS[round(share * (len(LEVELS) - 1))] for share in shares)
