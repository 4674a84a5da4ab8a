"""The packing plan: which pieces lie in which row, in files that every rank maps into its memory.

The training plan is a function of (corpora, seed, schedule) and is built once, by whoever comes first. Its folder holds
`pieces` and `rows`, where each row's pieces begin, and `plan.json`, written last.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from pydantic import TypeAdapter
from tqdm import tqdm

from omniloom.data.corpus import Documents
from omniloom.data.mixture import DocumentOrder
from omniloom.data.pack import PIECE, Packer, Piece, cut, pack, windows
from omniloom.data.shuffle import shuffled
from omniloom.errors import DataError

SHUFFLED_ROWS = 256  # rows are shuffled in blocks of this size: a long document fills many in a row
VERSION = 1  # of this file, mixture.py, shuffle.py and pack.py: counted up with every change of what they give


@dataclass(frozen=True)
class Phase:
    """From a row on: the sources' weights, shares of tokens, and the rows' length."""

    first_row: int
    weights: tuple[float, ...]
    seq_len: int


@dataclass(frozen=True)
class Schedule:
    """Everything beside the documents that decides the training stream."""

    phases: tuple[Phase, ...]
    seed: int
    long_documents: str

    def seq_len(self, row: int) -> int:
        """The length of that row."""
        return next(phase.seq_len for phase in reversed(self.phases) if phase.first_row <= row)


@dataclass
class PlanRecord:
    """What came of a plan; `key` names the corpora and the schedule."""

    key: str
    rows: int
    pieces: int
    tokens: int
    positions: int  # rows × their length
    skipped: int  # documents that no row could hold, each time they came
    epochs: dict[str, float]  # how often each source was gone through

    def describe(self) -> str:
        """One line for the start of a run."""
        epochs = ", ".join(f"{name} {count:.3g}" for name, count in self.epochs.items() if count)
        skipped = f"; {self.skipped} times a document came that no row can hold" if self.skipped else ""
        return (
            f"rows: {self.rows:,}, {self.tokens / self.positions:.2%} of {self.positions:,} positions filled; "
            f"epochs: {epochs}{skipped}"
        )


class Plan:
    """The rows of a finished plan, each a list of pieces, read where they lie."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = TypeAdapter(PlanRecord).validate_json((folder / "plan.json").read_bytes())
        self._begin = np.memmap(folder / "rows", "<i8", "r", shape=(self.record.rows + 1,))
        self._pieces = np.memmap(folder / "pieces", PIECE, "r", shape=(self.record.pieces,))

    def __reduce__(self) -> tuple[type["Plan"], tuple[Path]]:
        return Plan, (self.folder,)

    def __len__(self) -> int:
        return self.record.rows

    def __getitem__(self, row: int) -> list[Piece]:
        return [Piece(*piece) for piece in self._pieces[self._begin[row] : self._begin[row + 1]].tolist()]


def open_plan(documents: Documents, schedule: Schedule, rows: int, folder: Path) -> Plan:
    """The plan of at least the first `rows` rows, in `folder`; built there where nobody has yet.

    Raises DataError where nothing can be written there.
    """
    key = plan_key(documents, schedule)
    if (finished := _finished(folder, key, rows)) is not None:
        return finished
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{key}.lock").touch()
    except OSError as error:
        raise DataError(
            f"no packing plan can be written to {folder} ({error.strerror}): set data.plans=<folder>"
        ) from error
    with FileLock(folder / f"{key}.lock"):
        finished = _finished(folder, key, rows)  # by whoever held the lock
        return finished or _build(documents, schedule, rows, folder / f"{key}-{rows}")


def _finished(folder: Path, key: str, rows: int) -> Plan | None:
    """A plan of that key that is long enough, or None; one that is cut short counts as not built."""
    for record in sorted(folder.glob(f"{key}-*/plan.json")):
        try:
            plan = Plan(record.parent)
        except (OSError, ValueError):  # of pydantic's, and of a file shorter than the record says
            continue
        if len(plan) >= rows:
            return plan
    return None


def plan_key(documents: Documents, schedule: Schedule) -> str:
    """A hash of all that the training stream is a function of."""
    said = [VERSION, documents.split, [corpus.sha256 for corpus in documents.corpora], asdict(schedule)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def _build(documents: Documents, schedule: Schedule, rows: int, folder: Path) -> Plan:
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted build left
    folder.mkdir()
    stream = Stream(documents, schedule)
    with (folder / "pieces").open("wb") as pieces, (folder / "rows").open("wb") as begins:
        begins.write(np.zeros(1, "<i8").tobytes())
        with tqdm(total=rows, desc="plan the rows", unit="row", delay=2) as bar:
            for block in stream.blocks(rows):
                flat = np.array([piece for row in block for piece in row], PIECE)
                ends = stream.record.pieces - len(flat) + np.cumsum([len(row) for row in block])
                pieces.write(flat.tobytes())
                begins.write(ends.astype("<i8").tobytes())
                bar.update(len(block))
    (folder / "plan.json").write_bytes(TypeAdapter(PlanRecord).dump_json(stream.record, indent=1))
    return Plan(folder)


class Stream:
    """The endless training stream, row by row.

    Rows are packed in blocks of SHUFFLED_ROWS, counted from a phase's first row, and each block is permuted by (seed,
    its first row). A phase begins at exactly its first row: whatever was drawn for rows that are not shown yet is put
    back, and comes first when its source is drawn again. Prefix-stable: nothing that comes after a row changes it, not
    more rows and no later phase; so a phase may be declared for a run that has ended.
    """

    def __init__(self, documents: Documents, schedule: Schedule) -> None:
        self._documents, self._schedule = documents, schedule
        self._order = DocumentOrder(documents, schedule.seed)
        self._packer = Packer(schedule.phases[0].seq_len)
        self._drawn: list[Piece] = []  # documents, the next one last
        self._cut: list[Piece] = []  # of the last of them, the next one last
        self._unshown: list[list[Piece]] = []  # rows of a block that a phase cut short
        self._in_vain = 0  # documents one after the other of which no piece fits
        self.record = PlanRecord(plan_key(documents, schedule), 0, 0, 0, 0, 0, {})  # of the blocks so far

    @property
    def epochs_S(self) -> np.ndarray:
        """How often each source was gone through."""
        return self._order.epochs_S

    def blocks(self, rows: int) -> Iterator[list[list[Piece]]]:
        """The first `rows` rows, a block at a time."""
        phases = self._schedule.phases
        ends = [*(min(phase.first_row, rows) for phase in phases[1:]), rows]
        for phase, end in zip(phases, ends, strict=True):
            if phase.first_row >= end:
                break
            self._order.weigh(np.array(phase.weights))
            self._packer = Packer(phase.seq_len)
            for first in range(phase.first_row, end, SHUFFLED_ROWS):
                block = [self._next_row() for _ in range(SHUFFLED_ROWS)]
                order = shuffled(np.arange(SHUFFLED_ROWS), SHUFFLED_ROWS, self._schedule.seed, first)
                shown = [block[i] for i in order.tolist()]
                self._count(shown[: end - first])
                yield shown[: end - first]
                self._unshown = shown[end - first :]
            self._put_back()
        self.record.epochs = dict(zip(self._documents.names, self.epochs_S.tolist(), strict=True))

    def _count(self, block: list[list[Piece]]) -> None:
        record = self.record
        record.rows += len(block)
        record.pieces += sum(map(len, block))
        record.tokens += sum(stop - start for row in block for _, start, stop in row)
        record.positions += len(block) * self._packer.seq_len

    def _put_back(self) -> None:
        rows = [*self._unshown, *self._packer.flush()]
        pieces = [*(piece for row in rows for piece in row), *self._cut[::-1], *self._drawn[::-1]]
        self._order.put_back(np.array(pieces, PIECE))
        self._unshown, self._cut, self._drawn = [], [], []

    def _next_row(self) -> list[Piece]:
        while True:
            while self._cut:
                if (row := self._packer.add(self._cut.pop())) is not None:
                    return row
            while not self._drawn:
                self._drawn = [Piece(*piece) for piece in self._order.take().tolist()][::-1]
            self._cut = self._pieces(self._drawn.pop())[::-1]

    def _pieces(self, whole: Piece) -> list[Piece]:
        """A document, or what is left of one, as pieces that fit a row; none where an item of it is longer."""
        seq_len = self._packer.seq_len
        pieces = cut_document(self._documents, whole, seq_len, self._schedule.long_documents)
        self.record.skipped += not pieces
        self._in_vain = 0 if pieces else self._in_vain + 1
        if self._in_vain > len(self._documents):
            raise DataError(
                f"no document fits a row of data.seq_len={seq_len}: each has a picture, a frame or a clip that is "
                f"longer, the last {whole.tokens:,} tokens in all"
            )
        return pieces


def cut_document(documents: Documents, whole: Piece, seq_len: int, policy: str) -> list[Piece]:
    """A document, or a part of one, as pieces that fit a row."""
    if whole.tokens <= seq_len:
        return [whole]
    if documents.lengths(np.array([whole.document]))["plain"][0]:
        return windows(whole, seq_len)
    return cut(whole, documents.document(whole.document), seq_len, policy)


def heldout_rows(documents: Documents, seq_len: int, rows: int, policy: str) -> list[list[Piece]]:
    """About `rows` rows of held-out documents of each corpus, an equal share of the tokens to every source of it.

    Each document comes at most once, and a corpus has the same rows whichever others stand beside it.
    """
    made: list[list[Piece]] = []
    usable_S = (np.diff(documents.first_S) > 0) & documents.is_streamed_S
    for corpus in np.unique(documents.corpus_S):
        made += _heldout_of(documents, np.flatnonzero(usable_S & (documents.corpus_S == corpus)), seq_len, rows, policy)
    return made


def _heldout_of(documents: Documents, sources: np.ndarray, seq_len: int, rows: int, policy: str) -> list[list[Piece]]:
    chosen: list[Piece] = []
    for source in sources:
        left = rows * seq_len / len(sources)
        for document in range(documents.first_S[source], documents.first_S[source + 1]):
            if left <= 0:
                break
            whole = Piece(document, 0, int(documents.lengths(np.array([document]))["tokens"][0]))
            for piece in cut_document(documents, whole, seq_len, policy):
                if left > 0:
                    chosen.append(piece)
                    left -= piece.tokens
    return list(pack(chosen, seq_len))
