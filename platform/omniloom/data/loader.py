"""Global sample index → row → batch. Every rank's batches are cut from one stream that knows nothing of ranks.

G global batch size, W ranks, m micro batch size: rank r of step s takes the samples s·G + r·G/W … , m at a time.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from omniloom.data.pack import Piece
from omniloom.data.shards import CorpusSplit
from omniloom.modality.batch import MODEL_INPUTS, stack_rows
from omniloom.modality.sequence import Row, lay_row

DIGEST_BYTES = 16


class Rows(Dataset[Row]):
    """The rows of a packing plan by global sample index."""

    def __init__(self, split: CorpusSplit, plan: list[list[Piece]], seq_len: int) -> None:
        self._split, self._plan, self._seq_len = split, plan, seq_len

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> Row:
        pieces = [
            (
                self._split.document(piece.document).window(piece.start, piece.stop),
                int(self._split.source[piece.document]),
            )
            for piece in self._plan[index]
        ]
        return lay_row(pieces, self._seq_len, self._split.tokenizer.eos_id, self._split.widths)


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


def rank_samples(step: int, global_batch_size: int, micro_batch_size: int, rank: int, ranks: int) -> list[list[int]]:
    """The global sample indices of one rank's micro batches at one step."""
    share = global_batch_size // ranks
    first = step * global_batch_size + rank * share
    return [list(range(i, i + micro_batch_size)) for i in range(first, first + share, micro_batch_size)]


def rank_batches(
    rows: Rows,
    first_step: int,
    steps: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    ranks: int,
    workers: int,
) -> Iterator[list[Batch]]:
    """One list of micro batches a step, for `rank` of `ranks`, from `first_step` up to `steps`."""
    per_step = [
        rank_samples(step, global_batch_size, micro_batch_size, rank, ranks) for step in range(first_step, steps)
    ]
    loader = DataLoader(
        rows,
        batch_sampler=[samples for micro_batches in per_step for samples in micro_batches],
        collate_fn=Batch,
        num_workers=workers,
    )
    batches = iter(loader)
    for micro_batches in per_step:
        yield [next(batches) for _ in micro_batches]
