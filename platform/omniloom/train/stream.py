"""One rank's view of the data: training batches, the held-out rows, the sources' loss weights."""

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from omniloom.data.corpus import Corpus, Documents
from omniloom.data.loader import Batch, Rows, Share, batch_hash, rank_batches
from omniloom.data.plan import Phase, Plan, Schedule, heldout_rows, open_plan
from omniloom.data.schedule import loss_weights, read_schedule
from omniloom.train.alignment import heldout_retrieval
from omniloom.train.config import TrainingRun
from omniloom.train.engine import Engine
from omniloom.train.step import validation_loss


def training_rows(run: TrainingRun, corpora: list[Corpus]) -> tuple[Rows, Plan]:
    """The run's rows and the plan they follow; built where nobody has yet: by the driver, before there are ranks."""
    folder = Path(run.data.plans) if run.data.plans else corpora[0].folder / "plans"
    documents, schedule = Documents(corpora, "train"), read_schedule(corpora, run.data, run.seed)
    plan = open_plan(documents, schedule, run.steps * run.train.global_batch_size, folder)
    return Rows(documents, plan, schedule), plan


class Stream:
    """The batches of one rank, cut from the stream that all ranks share."""

    def __init__(self, run: TrainingRun, corpora: list[Corpus], engine: Engine) -> None:
        self._run, self._engine = run, engine
        self._train, self.plan = training_rows(run, corpora)
        losses = loss_weights(corpora, run.data)
        self.loss_weight_S = torch.tensor(losses, dtype=torch.float32, device=engine.device)
        heldout = Documents(corpora, "heldout")
        self.names = heldout.names
        plan = heldout_rows(heldout, run.data.seq_len, run.train.val_rows, run.data.long_documents)
        # Empty rows fill up the last batch: ranks that run unequal numbers of forwards would wait for ever.
        self._val_width = engine.replicas * run.train.micro_batch_size
        plan += [[]] * (-len(plan) % self._val_width)
        self._heldout = Rows(heldout, plan, Schedule((Phase(0, (), run.data.seq_len),), 0, run.data.long_documents))

    def steps(self, first: int) -> Iterator[tuple[list[Batch], float]]:
        """This rank's micro batches of each step, on the device, with the seconds waited for them."""
        asked = time.monotonic()
        for batches in self._batches(self._train, self._run.train.global_batch_size, first, self._run.steps):
            ready = [batch.to(self._engine.device) for batch in batches]
            yield ready, time.monotonic() - asked
            asked = time.monotonic()

    def hash_at(self, step: int) -> str:
        """The hash of the global batch that `step` trained on, read anew."""
        (batches,) = self._batches(self._train, self._run.train.global_batch_size, step - 1, step, workers=0)
        return self.hash_of(batches)

    def hash_of(self, batches: list[Batch]) -> str:
        """The global batch's hash, the same for any number of ranks."""
        digests = b"".join(digest for batch in batches for digest in batch.digests)
        everyone, each = self._engine.gather_bytes(digests), len(digests)
        once = self._engine.rows.parts * each  # ranks that share rows hash the same ones
        return batch_hash([everyone[start : start + each] for start in range(0, len(everyone), once)])

    def validate(self) -> dict[str, float]:
        """The held-out losses, or nothing where the corpus holds nothing out."""
        engine, steps = self._engine, len(self._heldout) // self._val_width
        if not steps:
            return {}
        batches = self._batches(self._heldout, self._val_width, 0, steps, workers=0)
        losses = validation_loss(engine, batches, self.loss_weight_S, self.names, engine.rows)
        if self._run.align.weight:
            batches = self._batches(self._heldout, self._val_width, 0, steps, workers=0)
            losses |= heldout_retrieval(self._engine, batches, self._run.align)
        return losses

    def _batches(
        self, rows: Rows, batch_size: int, first: int, steps: int, workers: int | None = None
    ) -> Iterator[list[Batch]]:
        run, engine = self._run, self._engine
        share = Share(batch_size, run.train.micro_batch_size, engine.replica, engine.replicas, first, steps)
        return rank_batches(rows, share, run.data.loader_workers if workers is None else workers)
