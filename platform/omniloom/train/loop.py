"""The training loop of one rank, from the corpus to the last checkpoint."""

import os
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from omniloom.data.loader import Batch, Rows, batch_hash, rank_batches
from omniloom.data.mixture import source_weights
from omniloom.data.pack import count_unusable, heldout_rows, training_rows
from omniloom.data.shards import Corpus
from omniloom.model.decoder import Decoder
from omniloom.track.run_directory import stop_asked
from omniloom.track.tracker import Tracker
from omniloom.train import checkpoint
from omniloom.train.config import TrainingRun
from omniloom.train.engine import Engine, shut_down
from omniloom.train.schedule import rate_share
from omniloom.train.step import StepResult, sparse_layers, training_step, validation_loss


def train(run: TrainingRun) -> None:
    """One rank's whole life: every rank of the run calls this once."""
    corpus = Corpus(Path(run.corpus or ""))
    torch.manual_seed(run.seed)
    footprint = _footprint_bytes()
    model = Decoder(run.model)
    model.activation_checkpointing = run.train.activation_checkpointing
    engine = Engine(model, run)
    with ExitStack() as stack:
        stack.callback(shut_down)
        state = checkpoint.resume(engine, corpus, run.folder)
        tracker = None
        where = engine.gather({"host": platform.node(), "pid": os.getpid()})
        if engine.rank == 0:
            tracker = stack.enter_context(Tracker(run.folder, run.track, asdict(run), resumed_at=state.step))
            tracker.event("start", step=state.step, corpus=corpus.sha256, ranks=where)
        stream = _Stream(run, corpus, engine)
        if tracker is not None and stream.skipped:
            tracker.event("skipped_documents", count=stream.skipped, reason=f"media and over {run.data.seq_len} tokens")
        if tracker is not None and engine.float8:
            tracker.event("float8", modules=engine.float8)
        began, first = time.monotonic(), state.step
        for batches, waited_s in stream.steps(state.step):
            started = time.monotonic()
            step = state.step + 1
            torch.manual_seed(hash((run.seed, step, engine.rank)))  # dropout: a function of the step, so no state
            share = rate_share(step, run.steps, run.schedule)
            result = training_step(engine, model, batches, stream.loss_weight_S, run.train, share)
            state = replace(
                state, step=step, samples=step * run.train.global_batch_size, tokens=state.tokens + result.tokens
            )
            peak = peak_memory_bytes()
            memory, added, stop = engine.max_over_ranks([peak, peak - footprint, float(stop_asked(run.folder))])
            line = _line(run, state, result, model, run.optimizer.lr * share) | _times(
                engine, result, time.monotonic() - started + waited_s, waited_s
            )
            line |= {"memory_peak_bytes": int(memory), "memory_added_bytes": int(added)}
            line["batch_hash"] = stream.hash_of(batches)
            line["eta_s"] = (time.monotonic() - began) / (step - first) * (run.steps - step)
            if step % run.train.val_every == 0 or step == run.steps:
                line |= stream.validate()
            if tracker is not None:
                if engine.skipped:
                    tracker.event("skipped_step", step=step, loss_scale=engine.loss_scale)
                tracker.metrics(line | _scaling(engine))
            if step % run.train.save_every == 0 or step == run.steps or stop:
                folder = checkpoint.save(engine, model, corpus, run.folder, state)
                if tracker is not None:
                    tracker.checkpoint(folder)
            if stop:
                break


class _Stream:
    """One rank's view of the data: training batches, the held-out rows, the sources' loss weights."""

    def __init__(self, run: TrainingRun, corpus: Corpus, engine: Engine) -> None:
        self._run, self._engine = run, engine
        sources = corpus.index.sources
        self._names = [source.name for source in sources]
        weights = source_weights(self._names, [s.weight for s in sources], run.data.weights, "weights")
        losses = source_weights(self._names, [s.loss_weight for s in sources], run.data.loss_weights, "loss_weights")
        self.loss_weight_S = torch.tensor(losses, dtype=torch.float32, device=engine.device)
        seq_len, train = run.data.seq_len, corpus.split("train")
        self.skipped = count_unusable(train, seq_len)
        rows = run.steps * run.train.global_batch_size
        phases = [(0, weights)]
        for phase in run.data.phases:
            weights = source_weights(
                self._names, weights.tolist(), phase.weights, f"phases.{phase.from_sample}.weights"
            )
            phases.append((phase.from_sample, weights))
        self._train = Rows(train, training_rows(train, phases, run.seed, seq_len, rows), seq_len)
        heldout = corpus.split("heldout")
        plan = heldout_rows(heldout, seq_len, run.train.val_rows) if len(heldout) else []
        # Empty rows fill up the last batch: ranks that run unequal numbers of forwards would wait for ever.
        width = engine.ranks * run.train.micro_batch_size
        plan += [[]] * (-len(plan) % width)
        self._heldout, self._heldout_batches = Rows(heldout, plan, seq_len), len(plan) // width

    def steps(self, first: int) -> Iterator[tuple[list[Batch], float]]:
        """This rank's micro batches of each step, on the device, with the seconds waited for them."""
        asked = time.monotonic()
        for batches in self._batches(self._train, first, self._run.steps, self._run.train.global_batch_size):
            ready = [batch.to(self._engine.device) for batch in batches]
            yield ready, time.monotonic() - asked
            asked = time.monotonic()

    def _batches(self, rows: Rows, first: int, steps: int, batch_size: int) -> Iterator[list[Batch]]:
        engine, run = self._engine, self._run
        return rank_batches(
            rows,
            first,
            steps,
            batch_size,
            run.train.micro_batch_size,
            engine.rank,
            engine.ranks,
            run.data.loader_workers,
        )

    def hash_of(self, batches: list[Batch]) -> str:
        """The global batch's hash, the same for any number of ranks."""
        digests = b"".join(digest for batch in batches for digest in batch.digests)
        return batch_hash([self._engine.gather_bytes(digests)])

    def validate(self) -> dict[str, float]:
        """The held-out losses, or nothing where the corpus holds nothing out."""
        if not self._heldout_batches:
            return {}
        width = self._engine.ranks * self._run.train.micro_batch_size
        batches = self._batches(self._heldout, 0, self._heldout_batches, width)
        return validation_loss(self._engine, batches, self.loss_weight_S, self._names)


def _line(run: TrainingRun, state: checkpoint.State, result: StepResult, model: Decoder, lr: float) -> dict[str, Any]:
    """The metrics of one step, by the contract's keys."""
    line: dict[str, Any] = {
        "step": state.step,
        "loss/next_token": result.next_token,
        "loss/balance": result.balance,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "tokens": state.tokens,
    }
    if result.mtp is not None:
        line["loss/mtp"] = result.mtp
    for (index, _), counts_E in zip(sparse_layers(model), result.tokens_per_expert_LE.tolist(), strict=True):
        mean = sum(counts_E) / len(counts_E)
        line[f"router/{index}/load_max_over_mean"] = max(counts_E) / mean if mean else 0.0
        line[f"router/{index}/dead_experts"] = counts_E.count(0)
        line[f"router/{index}/tokens_per_expert"] = counts_E
    return line


def _times(engine: Engine, result: StepResult, step_s: float, waited_s: float) -> dict[str, float]:
    return {
        "tokens_per_s": result.tokens / step_s,
        "tokens_per_s_per_rank": result.tokens / step_s / engine.ranks,
        "step_s": step_s,
        "data_wait_s": waited_s,
    }


def _scaling(engine: Engine) -> dict[str, float]:
    """fp16's loss scale after the step, and how many steps it has cost so far."""
    if engine.loss_scale is None:
        return {}
    return {"loss_scale": engine.loss_scale, "skipped_steps": engine.skipped_steps}


def _footprint_bytes() -> int:
    """What this rank holds before there is a model."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def peak_memory_bytes() -> int:
    """The most that this rank has held so far: of its GPU, or of the machine's memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage's maximum may be that of the process that started this one
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
