"""A corpus and one of its rows, or a run, in the terminal: `omniloom show corpora/mine row=5`."""

import json
from pathlib import Path

from rich.console import Console

from omniloom.compose import run_job
from omniloom.data.config import SPLITS
from omniloom.errors import ConfigError, did_you_mean
from omniloom.settings import ShowSettings

WIDTH = 118


def terminal() -> Console:
    """Where it is drawn: a terminal as wide as it is within a reader's limits, else a page of WIDTH characters."""
    console = Console(highlight=False)
    return Console(highlight=False, width=min(console.width, WIDTH) if console.is_terminal else WIDTH)


def show_run(folder: Path, settings: ShowSettings) -> None:
    from omniloom.track.summary import print_summary, summarize

    summary = summarize(folder)
    print(json.dumps(summary)) if settings.json else print_summary(terminal(), summary)


def show_corpus(folder: Path, settings: ShowSettings) -> None:
    from omniloom.data.corpus import Documents
    from omniloom.data.facts import corpus_facts, dissect, heldout_row, rejects_by_reason, stream_row, whole_document
    from omniloom.data.schedule import open_corpora, read_schedule
    from omniloom.data.show import print_corpus, print_row

    corpora, data, row = open_corpora(folder, settings.data), settings.data, settings.row
    split = next(split for split in SPLITS if split == settings.split)
    documents = Documents(corpora, split)
    if not documents.streamed:
        if settings.json:
            print(json.dumps(corpus_facts(corpora[0]) | {"plan": None, "row": None}))
        else:
            print_corpus(terminal(), corpora[0], rejects_by_reason(corpora[0]))
        return
    schedule, plan, seq_len = read_schedule(corpora, data, settings.seed), None, data.seq_len
    if settings.document is not None:
        pieces = [whole_document(documents, split, settings.document)]
        seq_len, title = pieces[0].tokens, f"document {settings.document:,} of split={split}"
    elif split == "train":
        pieces, plan = stream_row(documents, schedule, row)
        seq_len = schedule.seq_len(row)
        title = f"row {row:,} of the training stream: seed={settings.seed} data.seq_len={seq_len}"
    else:
        pieces = heldout_row(documents, seq_len, settings.val_rows, data.long_documents, row)
        title = f"row {row:,} of the held-out rows: data.seq_len={seq_len} val_rows={settings.val_rows}"
    facts = dissect(documents, pieces, seq_len)
    if settings.json:
        asked = {"split": split, "row": row if settings.document is None else None}
        told = corpus_facts(corpora[0]) | {"plan": vars(plan) if plan else None, "row": asked | facts.as_dict()}
        print(json.dumps(told))
        return
    console = terminal()
    if settings.document is None:
        print_corpus(console, corpora[0], rejects_by_reason(corpora[0]))
    print_row(console, facts, title, whole=settings.document is not None)
    if plan:
        console.print(f"\nthe stream's first {plan.describe()}")


def main(settings: ShowSettings) -> None:
    settings.check()
    named = settings.what or ""
    runs = Path(settings.runs_dir)
    for folder in (Path(named), runs / named):
        if (folder / "run.json").is_file():
            show_run(folder, settings)
            return
    if (Path(named) / "shards").is_dir():  # finished or not
        show_corpus(Path(named), settings)
        return
    known = [*settings.corpora(), *(path.parent.name for path in runs.glob("*/run.json"))]
    raise ConfigError(
        f"{named} is neither a corpus (a folder with index.json) nor a run in runs_dir={runs}; "
        f"{did_you_mean(named, known)}"
    )


if __name__ == "__main__":
    run_job("show", ShowSettings, main)
