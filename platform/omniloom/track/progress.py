"""A progress bar over a run that happens in other processes: it reads the run's own metrics file."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from omniloom.track import jsonl

POLL_S, POLL_LOG_S = 0.5, 10.0  # on a terminal; in a log file


@contextmanager
def follow(folder: Path, steps: int) -> Iterator[None]:
    """Show the run's steps, loss and speed while the body runs."""
    stop = threading.Event()
    thread = threading.Thread(target=_show, args=(folder / "metrics.jsonl", steps, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _show(path: Path, steps: int, stop: threading.Event) -> None:
    poll_s = POLL_S if sys.stderr.isatty() else POLL_LOG_S
    shown: dict[str, str] = {}
    with tqdm(total=steps, desc="train", unit="step") as bar:
        offset, ended = 0, False
        while not ended:
            ended = stop.wait(poll_s)
            lines, offset = jsonl.read_from(path, offset)
            for line in lines:
                shown |= {"loss": f"{line['loss/next_token']:.3f}", "tokens/s": f"{line['tokens_per_s']:,.0f}"}
                if "val/loss" in line:
                    shown["val"] = f"{line['val/loss']:.3f}"
            if lines:
                bar.set_postfix(shown, refresh=False)
                bar.n = lines[-1]["step"]
                bar.refresh()
