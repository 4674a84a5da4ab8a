"""Global sample index → row → batch. Every rank's batches are cut from one stream that knows nothing of ranks.

G global batch size, W ranks, m micro batch size: rank r of step s takes the samples s·G + r·G/W … , m at a time.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from threading import Thread

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from omniloom.data.corpus import Documents
from omniloom.data.pack import Piece
from omniloom.data.plan import Plan, Schedule
from omniloom.modality.batch import MODEL_INPUTS, stack_rows
from omniloom.modality.sequence import Row, lay_row

DIGEST_BYTES = 16


class Rows(Dataset[Row]):
    """The rows of a stream by global sample index: `plan` says what lies in each, `seq_len` how long each is."""

    def __init__(self, documents: Documents, plan: Plan | Sequence[list[Piece]], schedule: Schedule) -> None:
        self._documents, self._plan, self._schedule = documents, plan, schedule

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> Row:
        documents = self._documents
        pieces = [
            (documents.document(piece.document).window(piece.start, piece.stop), documents.source(piece.document))
            for piece in self._plan[index]
        ]
        seq_len = self._schedule.seq_len(index)
        return lay_row(pieces, seq_len, documents.tokenizer.eos_id, documents.modality.widths)


def row_digest(row: Row) -> bytes:
    """A 16-byte hash of every field's name, dtype, shape and bytes."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name, array in row.fields().items():
        digest.update(f"{name}{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()


def batch_hash(digests: list[bytes]) -> str:
    """The hash of a global batch: its rows' digests in global sample order."""
    return hashlib.blake2b(b"".join(digests), digest_size=DIGEST_BYTES).hexdigest()


class Batch:
    """One micro batch: the contract's fields stacked to (B, T), media joined in order of appearance."""

    def __init__(self, rows: list[Row]) -> None:
        self.fields = stack_rows(rows)
        self.digests = [row_digest(row) for row in rows]

    def to(self, device: torch.device) -> "Batch":
        """Move the fields to `device`."""
        self.fields = {name: field.to(device, non_blocking=True) for name, field in self.fields.items()}
        return self

    def model_inputs(self) -> dict[str, Tensor]:
        """What the decoder's forward pass takes."""
        return {name: self.fields[name] for name in MODEL_INPUTS}


@dataclass(frozen=True)
class Share(Sampler[list[int]]):
    """One rank's part of the stream: the global sample indices of its micro batches, step by step."""

    global_batch_size: int
    micro_batch_size: int
    rank: int
    ranks: int
    first_step: int
    steps: int  # the step to end before

    @property
    def micro_batches(self) -> int:
        """Of one step."""
        return self.global_batch_size // self.ranks // self.micro_batch_size

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.steps):
            first = step * self.global_batch_size + self.rank * (self.global_batch_size // self.ranks)
            for number in range(self.micro_batches):
                begin = first + number * self.micro_batch_size
                yield list(range(begin, begin + self.micro_batch_size))


def _end_with_the_rank(_worker: int) -> None:
    """Have a worker end when its rank is killed: torch watches its parent alone, and that is the fork server, which
    lives as long as its workers do."""
    rank = parent_process()
    assert rank is not None

    def watch() -> None:
        rank.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def rank_batches(rows: Rows, share: Share, workers: int) -> Iterator[list[Batch]]:
    """One list of micro batches a step; `workers` processes read ahead, or none."""
    # Not fork: a rank has threads, of Ray and of gloo, that may hold a lock just then.
    context = get_context("forkserver") if workers else None
    if context is not None:
        context.set_forkserver_preload([__name__])  # imported once, not by each worker
    loader = DataLoader(
        rows,
        batch_sampler=share,
        collate_fn=Batch,
        num_workers=workers,
        multiprocessing_context=context,
        worker_init_fn=_end_with_the_rank,
    )
    batches = iter(loader)
    for _ in range(share.first_step, share.steps):
        yield [next(batches) for _ in range(share.micro_batches)]
