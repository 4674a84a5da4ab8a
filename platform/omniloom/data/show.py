"""A corpus and a row of it, drawn in a terminal. What stands in files is told without its control characters."""

from collections.abc import Iterator
from itertools import islice, pairwise

import numpy as np
from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from omniloom.data.config import SPLITS, Split
from omniloom.data.corpus import Corpus
from omniloom.data.facts import BEGIN, Part, RejectGroup, RowFacts, Stretch
from omniloom.data.index import SplitRecord
from omniloom.data.thumbnails import Thumbnail, bars, is_coloured, loudness
from omniloom.modality.image import join_patches
from omniloom.modality.sequence import MODALITIES, PADDING

COLOURS = {"text": "cyan", "image": "red", "audio": "yellow", "video": "magenta"}
MARK_COLOUR, TARGET_COLOUR, SHADES = "bright_black", "green", ("grey30", "grey50")
BAR_WIDTH, SPARKS = 40, 60
REASONS, DOCUMENTS, LISTED, STRETCHES, CHARACTERS, RUNS = 12, 6, 30, 14, 320, 8  # the most that is told of each
PICTURE, FRAME = (36, 14), (22, 9)  # characters across, lines down


def print_corpus(console: Console, corpus: Corpus, rejects: list[RejectGroup]) -> None:
    """Counts by split, source and medium; how long the documents are; what was skipped, by reason."""
    vocabulary = f"{corpus.index.vocab_size:,} ids, hash {corpus.sha256[:12]}"
    console.print(Text.assemble((f"corpus {clean(str(corpus.folder))}", "bold"), f" · {vocabulary}"))
    console.print(_counts(corpus))
    for split in SPLITS:
        histogram = np.sum([source.split(split).lengths for source in corpus.index.sources], axis=0)
        if histogram.any():
            console.print(_histogram(split, histogram))
    if rejects:
        console.print(_rejects(rejects))


def _counts(corpus: Corpus) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("split", "source", "format"):
        table.add_column(name)
    for name in ("weight", "documents", "tokens", *MODALITIES, "shards", "bytes", "skipped"):
        table.add_column(name, justify="right", header_style=f"bold {COLOURS.get(name, '')}", no_wrap=True)
    for split in SPLITS:
        records = [source.split(split) for source in corpus.index.sources]
        for source, record in zip(corpus.index.sources, records, strict=True):
            if record.shards:
                table.add_row(split, source.name, source.format, f"{source.weight:g}", *_figures(record))
        if sum(record.shards > 0 for record in records) > 1:
            table.add_row(split, "all", "", "", *_figures(_total(records)), style="bold")
    return table


def _figures(record: SplitRecord) -> list[str]:
    text = record.tokens - sum(record.media_tokens.values())
    media = [f"{count:,}" if count else "–" for count in (text, *record.media_tokens.values())]
    skipped = f"{record.rejects:,}" if record.rejects else "–"
    return [f"{record.documents:,}", f"{record.tokens:,}", *media, f"{record.shards:,}", size(record.bytes), skipped]


def _total(records: list[SplitRecord]) -> SplitRecord:
    total = SplitRecord()
    for record in records:
        total.add(record)
    return total


def size(count: float) -> str:
    """Bytes as a reader writes them."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:,.3g} {unit}"
    return f"{count:,.0f} B"


def _histogram(split: Split, histogram: np.ndarray) -> Group:
    table = Table.grid(padding=(0, 2))
    powers = np.flatnonzero(histogram)
    for power in range(powers[0], powers[-1] + 1):
        count = int(histogram[power])
        between = f"{1 << power:,} – {(2 << power) - 1:,}"
        bar = Bar(float(histogram.max()), 0, count, width=BAR_WIDTH, color="cyan")
        share = f"{count / histogram.sum():.1%}"
        table.add_row(Text(f"  {between}", justify="right"), bar, Text(f"{count:,}", justify="right"), share)
    return Group("", Text(f"lengths of the {split} documents, in tokens", "bold"), table)


def _rejects(rejects: list[RejectGroup]) -> Group:
    total, share = sum(group.count for group in rejects), sum(group.share for group in rejects)
    table = Table.grid(padding=(0, 2))
    for group in rejects[:REASONS]:
        example = Text(clean(f"{group.example.name}: {group.example.reason}"), "dim")
        table.add_row(
            Text(f"  {group.count:,}", justify="right"),
            f"{group.share:.2%}",
            Group(Text(clean(group.reason)), example),
        )
    title = Text(f"skipped: {total:,} documents, {share:.2%} of all, by reason, with an example of each", "bold")
    more = [f"  … and {len(rejects) - REASONS} more reasons, all with --json"] if len(rejects) > REASONS else []
    return Group("", title, table, *more)


def print_row(console: Console, row: RowFacts, title: str, whole: bool = False) -> None:
    """A row: as one line of blocks, then document by document; `whole`: nothing of it is left out."""
    told = [f"{count:,} of {kind}" for kind, count in row.tokens.items() if count]
    targets = int(row.loss_mask.sum())
    filled = row.seq_len - row.padding
    console.print()
    console.print(Text(title, "bold"))
    console.print(f"  {filled:,} tokens ({', '.join(told) or 'none'}), {row.padding:,} of padding; {targets:,} targets")
    console.print(_map(console, row))
    console.print(Text(f"  loss_mask is 1 at {_mask(row, whole)}"))
    shown = row.parts if whole else row.parts[:DOCUMENTS]
    for number, part in enumerate(shown):
        console.print(_part(number, part, whole))
    rest = row.parts[len(shown) :]
    if rest:
        console.print(_listed(len(shown), rest))
    if row.padding:
        console.print(Text(f"\n{filled:,}:{row.seq_len:,} is padding: document −1, eos, no target", MARK_COLOUR))


def _map(console: Console, row: RowFacts) -> Group:
    """Three lines over the row's positions: the commonest modality and document of each column, its share of targets.

    Not more columns than positions.
    """
    columns = max(1, min(console.width - 12, row.seq_len))
    edges = np.linspace(0, row.seq_len, columns + 1).astype(int)
    media, numbers, targets = Text("  medium    "), Text("  document  "), Text("  targets   ")
    coloured = is_coloured(console)
    for begin, end in pairwise(edges.tolist()):
        number = _commonest(row.document[begin:end])
        kind = MODALITIES[_commonest(row.modality[begin:end])]
        share = float(row.loss_mask[begin:end].mean())
        if number == PADDING:
            media.append("·", MARK_COLOUR), numbers.append("·", MARK_COLOUR)
        else:
            media.append(" " if coloured else kind[0], f"on {COLOURS[kind]}")
            numbers.append(str(number % 10), f"white on {SHADES[number % 2]}")
        targets.append(bars([share]) if share else " ", TARGET_COLOUR)
    legend = Text("            ")
    for kind in MODALITIES:
        legend.append("█ " if coloured else f"{kind[0]} ", COLOURS[kind]).append(f"{kind}  ", "dim")
    legend.append(f"· padding  1 column is {row.seq_len / columns:.3g} tokens", "dim")
    return Group(media, numbers, targets, legend)


def _commonest(values: np.ndarray) -> int:
    found, counts = np.unique(values, return_counts=True)
    return int(found[counts.argmax()])


def _mask(row: RowFacts, whole: bool) -> str:
    runs = [f"{begin}:{end}" for begin, end, value in row.mask_runs if value]
    if whole or len(runs) <= RUNS:
        return ", ".join(runs) or "no token"
    return f"{', '.join(runs[:RUNS])}, … ({len(runs)} runs)"


def _part(number: int, part: Part, whole: bool) -> Group:
    title = Text.assemble(
        f"\ndocument {number} · ",
        (part.source, "bold"),
        f" {part.document:,} · {_extent(part)} · ",
        (clean(part.name), "dim"),
    )
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right")
    for stretch in part.stretches if whole else islice(part.stretches, STRETCHES):
        colour = COLOURS.get(stretch.kind, MARK_COLOUR)
        place = Text(f"  {stretch.begin:,}:{stretch.end:,}", "dim")
        table.add_row(place, Text(stretch.kind, colour), Group(*_content(stretch, whole)))
    left = len(part.stretches) - STRETCHES
    more = [] if whole or left <= 0 else [Text(f"  … and {left:,} more segments: document={part.document}", "dim")]
    return Group(title, table, *more)


def _extent(part: Part) -> str:
    if part.stop - part.start == part.tokens:
        return f"all {part.tokens:,} tokens"
    return f"tokens {part.start:,}:{part.stop:,} of {part.tokens:,}"


def _content(stretch: Stretch, whole: bool) -> Iterator[RenderableType]:
    if stretch.text is not None:
        style = TARGET_COLOUR if stretch.is_target else ""
        yield Text.assemble("▶ " if stretch.is_target else "  ", _shortened(clean(stretch.text), whole), style=style)
    elif stretch.content is None:
        said = "the document begins" if stretch.kind == BEGIN else "it ends"
        yield Text.assemble(("▶ " if stretch.is_target else "  ", TARGET_COLOUR), (said, "dim"))
    elif stretch.kind == "audio":
        yield Text(f"  {_media(stretch)}", "dim")
        yield Text(f"  {loudness(stretch.content, SPARKS)}", COLOURS["audio"])
    else:
        yield Text(f"  {_media(stretch)}", "dim")
        yield _pictures(stretch)


def _media(stretch: Stretch) -> str:
    assert stretch.position is not None
    tokens = stretch.end - stretch.begin
    time, row, column = (stretch.position[axis] for axis in ("time", "row", "column"))
    grid = f"{row[1] - row[0] + 1} × {column[1] - column[0] + 1} patches"
    if stretch.kind == "image":
        return f"{grid} = {tokens:,} tokens · row {_range(row)}, column {_range(column)}"
    if stretch.kind == "audio":
        clips = "1 clip" if stretch.clips == 1 else f"{stretch.clips} clips"
        return f"{clips}, {stretch.seconds:g} s, {stretch.frames:,} frames = {tokens:,} tokens · time {_range(time)}"
    axes = f"time {_range(time)}, row {_range(row)}, column {_range(column)}"
    return f"{stretch.frames:,} frames, {stretch.seconds:g} s, of {grid} = {tokens:,} tokens · {axes}"


def _range(between: list[int]) -> str:
    return f"{between[0]}…{between[1]}" if between[0] != between[1] else f"{between[0]}"


def _pictures(stretch: Stretch) -> RenderableType:
    """A picture's thumbnail, or those of a video's first, middle and last frame, side by side."""
    assert stretch.content is not None
    assert stretch.position is not None
    grid = np.indices((1, *(stretch.position[axis][1] + 1 for axis in ("row", "column")))).reshape(3, -1).T
    frames = stretch.content.reshape(-1, len(grid), stretch.content.shape[1])
    chosen = sorted({0, len(frames) // 2, len(frames) - 1})
    columns, lines = PICTURE if stretch.kind == "image" else FRAME
    table = Table.grid(padding=(0, 1))
    table.add_row("", *(Thumbnail(join_patches(frames[i], grid), columns, lines) for i in chosen))
    return table


def _listed(first: int, parts: list[Part]) -> Group:
    """A line a document."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for number, part in enumerate(parts[:LISTED], first):
        kinds = list(dict.fromkeys(stretch.kind for stretch in part.stretches if stretch.kind in MODALITIES))
        end = part.begin + part.stop - part.start
        table.add_row(
            Text(f"document {number}"),
            Text(f"{part.begin:,}:{end:,}", "dim", justify="right"),
            Text.assemble((part.source, "bold"), f" {part.document:,}"),
            _extent(part),
            ", ".join(kinds),
        )
    left = len(parts) - LISTED
    more = [Text(f"… and {left:,} more documents, all with --json", "dim")] if left > 0 else []
    return Group("", table, *more)


def _shortened(text: str, whole: bool) -> str:
    """A long text loses its middle."""
    if whole or len(text) <= CHARACTERS:
        return text
    half = CHARACTERS // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"


def clean(text: str) -> str:
    """What a file says, in one line and without what would steer a terminal: newlines as ⏎, the rest escaped."""
    shown = {"\n": "⏎ ", "\t": "⇥ "}
    return "".join(
        shown[c] if c in shown else c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )
