"""Progress bars: over a run that happens in other processes, read from its own metrics file; over a sweep's trials."""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from omniloom.track import jsonl
from omniloom.track.sweep import SweepRecord

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


@contextmanager
def count_trials(sweep: SweepRecord) -> Iterator[Callable[[], None]]:
    """Show how many of a sweep's trials have ended and the best so far; what it yields brings the bar up to date."""
    with tqdm(desc="sweep", unit="trial") as bar:

        def show() -> None:
            how_many = Counter(trial.status for trial in sweep.trials)
            ended = ("finished", "pruned", "failed")
            bar.total, bar.n = len(sweep.trials), sum(how_many[status] for status in ended)
            shown = {status: str(how_many[status]) for status in ("running", *ended) if how_many[status]}
            for best in sweep.best()[:1]:
                told = zip(sweep.objectives, best.objectives or [], strict=True)
                shown |= {f"best {metric}": f"{value:.4g}" for (metric, _), value in told}
            bar.set_postfix(shown)

        yield show
