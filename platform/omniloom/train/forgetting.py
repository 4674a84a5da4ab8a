"""What a corpus that joins a run costs the ones before it."""

from pathlib import Path
from typing import Any

from omniloom.data.schedule import Appended
from omniloom.track import jsonl

METRICS = "metrics.jsonl"


def forgetting(
    run_folder: Path, line: dict[str, Any], joined: list[Appended], global_batch_size: int
) -> dict[str, float]:
    """`val/forgetting/<source>` = held-out loss now − when a corpus last joined, of each source from before it.

    Read off the run's own metrics, so that it goes on over restarts; nothing before the first corpus has joined.
    """
    past = [join for join in joined if join.from_sample < line["step"] * global_batch_size]
    if not past:
        return {}
    before = None
    for earlier in jsonl.read(run_folder / METRICS):
        if earlier["step"] * global_batch_size <= past[-1].from_sample and "val/loss" in earlier:
            before = earlier
    if before is None:
        return {}
    keys = {f"val/forgetting/{name}": f"val/loss/{name}" for name in past[-1].before}
    return {name: line[key] - before[key] for name, key in keys.items() if key in line and key in before}
