"""How long training stands still for a checkpoint, over one copy of the same state in memory; target 1.1.

usage: checkpoint.py [--stage N] [--rounds N]

One rank, AdamW, a model whose state is some hundreds of MB. Sides take turns: a copy of every tensor of the state into
memory that is there already, then a save. A save's stall ends when its copy is made; its write is waited for before the
next round, so that no side is timed against it.
"""

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder, text_fields
from omniloom.train.checkpoint import State
from omniloom.train.config import TrainingRun
from omniloom.train.engine import Engine, deepspeed, shut_down
from omniloom.train.groups import ParallelConfig, TrainConfig
from omniloom.train.saver import Saver
from omniloom.train.step import training_step

SIZES = ModelConfig(
    vocab_size=16_384,
    hidden_size=512,
    num_hidden_layers=8,
    n_routed_experts=8,
    image_patch_pixels=None,
    video_patch_pixels=None,
    audio_mels=None,
)
CORPUS: Any = SimpleNamespace(write_reading_rules=lambda folder: None)
TARGET = 1.1


class Text:
    """A row of random text: what training_step asks of a batch."""

    def __init__(self) -> None:
        ids = torch.randint(0, SIZES.vocab_size, (1, 64), dtype=torch.int32)
        self.fields = text_fields(ids, SIZES) | {"loss_mask": torch.ones_like(ids), "source": torch.zeros_like(ids)}

    def model_inputs(self) -> dict[str, torch.Tensor]:
        from omniloom.modality.batch import MODEL_INPUTS

        return {name: self.fields[name] for name in MODEL_INPUTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with tempfile.TemporaryDirectory() as folder:
        meet = f"file://{folder}/meet"
        deepspeed.init_distributed(dist_backend="gloo", init_method=meet, rank=0, world_size=1, verbose=False)
        train = TrainConfig(steps=2, global_batch_size=1, micro_batch_size=1)
        run = TrainingRun(runs_dir=folder, model=SIZES, train=train, parallel=ParallelConfig(zero_stage=asked.stage))
        run.checkpoint.keep_last = 1
        run.parallel.bucket_numbers = 5_000_000
        model = Decoder(SIZES)
        engine = Engine(model, run)
        training_step(engine, model, [Text()], torch.ones(1), train, 1.0)  # type: ignore[list-item]
        measure(engine, run, asked.rounds)
        shut_down()


def measure(engine: Engine, run: TrainingRun, rounds: int) -> None:
    state = [fragment.values for fragment in engine.fragments()]
    size = sum(values.nbytes for values in state)
    here = psutil.Process()
    before = here.memory_info().rss
    copies, stalls, writes = [], [], []
    events: list[dict[str, Any]] = []
    tracker: Any = SimpleNamespace(event=lambda kind, **facts: events.append(facts), checkpoint=lambda folder: None)
    held = [torch.empty_like(values) for values in state]
    with Saver(engine, SIZES, CORPUS, run, tracker) as saver, HighestMemory(here) as highest:
        for step in range(1, rounds + 2):  # the first touches all memory for the first time, and is not counted
            began = time.perf_counter()
            for copy, values in zip(held, state, strict=True):
                copy.copy_(values)
            copies.append(time.perf_counter() - began)
            began = time.perf_counter()
            saver.copy(State(step, step, step, 1, engine.zero_stage, [], ""))
            stalls.append(time.perf_counter() - began)
            saver.write()
            saver.wait()
            writes.append(events[-1]["write_s"] if "write_s" in events[-1] else events[-2]["write_s"])
    folder = Path(run.folder) / "checkpoints" / f"step_{rounds + 1:08d}"
    on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    ratios = [stall / copy for stall, copy in zip(stalls[1:], copies[1:], strict=True)]
    print(f"state {size / 1e6:,.0f} MB, on disk {on_disk / 1e6:,.0f} MB with the model; ZeRO {engine.zero_stage}")
    print(f"copy in memory   {median(copies[1:]) * 1e3:8.0f} ms   (the first {copies[0] * 1e3:,.0f} ms)")
    print(f"training stands  {median(stalls[1:]) * 1e3:8.0f} ms   (the first {stalls[0] * 1e3:,.0f} ms)")
    print(f"written after    {median(writes[1:]) * 1e3:8.0f} ms")
    more = (highest.bytes - before) / 1e6
    print(f"memory           {more:8,.0f} MB more, {size / 1e6:,.0f} of them the copy that is timed beside it")
    told = "within" if median(ratios) <= TARGET else "OVER"
    print(f"stall / copy     {median(ratios):8.2f}      ({', '.join(f'{r:.2f}' for r in ratios)}): {told} {TARGET}")


class HighestMemory:
    """The most that this process holds, looked at ten times a second."""

    def __init__(self, process: psutil.Process) -> None:
        self._process, self._end, self.bytes = process, threading.Event(), 0
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._end.wait(0.1):
            self.bytes = max(self.bytes, self._process.memory_info().rss)

    def __enter__(self) -> "HighestMemory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()


main()
