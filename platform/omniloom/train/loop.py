"""The training loop of one rank, from the corpus to the last checkpoint."""

import os
import platform
import resource
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import torch

from omniloom.data.schedule import appended, open_corpora
from omniloom.errors import DataError
from omniloom.model.decoder import Decoder
from omniloom.track.run_directory import save_asked, stop_asked, take_up_save
from omniloom.track.tracker import Tracker
from omniloom.train import checkpoint, watch
from omniloom.train.config import TrainingRun
from omniloom.train.debugging import Recording
from omniloom.train.engine import Engine, shut_down
from omniloom.train.forgetting import forgetting
from omniloom.train.initial import begin_with
from omniloom.train.record import Recorder
from omniloom.train.saver import Saver
from omniloom.train.schedule import rate_share
from omniloom.train.step import training_step
from omniloom.train.stream import Stream


def train(run: TrainingRun) -> None:
    """One rank's whole life: every rank of the run calls this once."""
    corpora = open_corpora(Path(run.corpus or ""), run.data)
    torch.manual_seed(run.seed)
    footprint = _footprint_bytes()
    model = Decoder(run.model)
    begin_with(model, run)
    model.activation_checkpointing = run.train.activation_checkpointing
    engine = Engine(model, run)
    watch.reached("model")
    with ExitStack() as stack:
        stack.callback(shut_down)
        state = checkpoint.resume(engine, corpora, run.folder)
        watch.reached("checkpoint")
        tracker = None
        where = engine.gather({"host": platform.node(), "pid": os.getpid()})
        if engine.rank == 0:
            tracker = stack.enter_context(Tracker(run.folder, run.track, asdict(run), resumed_at=state.step))
            tracker.event("start", step=state.step, corpora=[corpus.sha256 for corpus in corpora], ranks=where)
        recording = stack.enter_context(Recording(run.debug, run.folder, engine.rank))
        saver = stack.enter_context(Saver(engine, model.config, corpora[0], run, tracker))
        stream = Stream(run, corpora, engine)
        _refuse_another_stream(stream, state)
        joined = appended(corpora, run.data)
        joins = {join.from_sample // run.train.global_batch_size for join in joined}
        if tracker is not None:
            tracker.event("plan", **asdict(stream.plan.record))
        if tracker is not None and engine.float8:
            tracker.event("float8", modules=engine.float8)
        record = Recorder(run, model, engine, tracker)
        began, first = time.monotonic(), state.step
        for batches, waited_s in stream.steps(state.step):
            engine.clock.start()
            step = state.step + 1
            torch.manual_seed(hash((run.seed, step, engine.rank)))  # dropout: a function of the step, so no state
            share = rate_share(step, run.steps, run.schedule)
            with recording.step(step):
                result = training_step(
                    engine, model, batches, stream.loss_weight_S, run.train, share, record.norm_limit, run.align
                )
            state = replace(
                state,
                step=step,
                samples=step * run.train.global_batch_size,
                tokens=state.tokens + result.tokens,
                batch_hash=stream.hash_of(batches),
            )
            peak = peak_memory_bytes()
            asked = [float(stop_asked(run.folder)), float(save_asked(run.folder))]
            memory, added, stop, save = engine.max_over_ranks([peak, peak - footprint, *asked])
            watch.alive()
            line = record.line(state, result, run.optimizer.lr * share, waited_s)
            line |= {"memory_peak_bytes": int(memory), "memory_added_bytes": int(added)}
            line["batch_hash"] = state.batch_hash
            line["eta_s"] = (time.monotonic() - began) / (step - first) * (run.steps - step)
            if step % run.train.val_every == 0 or step == run.steps or step in joins:
                line |= stream.validate()
                watch.alive()
                if tracker is not None:
                    line |= forgetting(run.folder, line, joined, run.train.global_batch_size)
            saves = step % run.train.save_every == 0 or step == run.steps or stop or save
            if saves:
                take_up_save(run.folder)
                line["checkpoint_s"] = saver.copy(state)
            if tracker is not None:
                tracker.metrics(line)
            record.refuse_unsound(step, result)
            if saves:
                saver.write()
                watch.alive()
            saver.check()
            if stop:
                break


def _refuse_another_stream(stream: Stream, state: checkpoint.State) -> None:
    """Raise DataError where the batch of the last step, read anew, is not the one that was trained on."""
    if state.step and (found := stream.hash_at(state.step)) != state.batch_hash:
        raise DataError(
            f"the stream is not the one trained on: the batch of step {state.step} was {state.batch_hash[:12]} and is "
            f"{found[:12]}: what data.phases declare up to sample {state.samples:,} must stay as it was"
        )


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
