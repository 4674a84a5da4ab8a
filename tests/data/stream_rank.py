"""One rank that reads its part of a stream and writes down what it read: `stream_rank.py corpus rank ranks …`.

A line a step: its number and its rows' digests, then what ends the line; a kill may tear the last one.
"""

import json
import sys
from pathlib import Path

from omniloom.data.config import DataConfig
from omniloom.data.corpus import Corpus, Documents
from omniloom.data.loader import Rows, Share, rank_batches
from omniloom.data.plan import Schedule, open_plan
from omniloom.data.schedule import read_schedule


def open_rows(corpus: Path, data: DataConfig, rows: int) -> Rows:
    """As a rank of a run opens them."""
    corpora = [Corpus(corpus)]
    documents = Documents(corpora, "train")
    schedule: Schedule = read_schedule(corpora, data, seed=3)
    return Rows(documents, open_plan(documents, schedule, rows, corpus / "plans"), schedule)


def main(asked: dict) -> None:
    from omniloom.data.config import PhaseConfig

    phases = [PhaseConfig(**phase) for phase in asked["phases"]]
    data = DataConfig(seq_len=asked["seq_len"], phases=phases)
    rows = open_rows(Path(asked["corpus"]), data, asked["rows"])
    share = Share(asked["batch"], asked["micro"], asked["rank"], asked["ranks"], asked["first"], asked["steps"])
    with Path(asked["log"]).open("w") as log:
        for step, batches in enumerate(rank_batches(rows, share, asked["workers"]), asked["first"]):
            digests = "".join(digest.hex() for batch in batches for digest in batch.digests)
            log.write(f"{step} {digests} .\n")
            log.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
