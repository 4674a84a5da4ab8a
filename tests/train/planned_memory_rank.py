"""One rank of test_planned_memory.py: real engine, real steps; the operating system says what they held.

usage: planned_memory_rank.py JSON, where JSON is a case, as `run_of` reads it; the environment names rank and ranks, as
torch.distributed reads them
"""

import json
import os
import sys

import psutil
import torch
from planned_memory_shapes import MICRO_BATCH, run_of

from omniloom.modality.batch import MODEL_INPUTS
from omniloom.model.decoder import Decoder, text_fields
from omniloom.train.config import TrainingRun
from omniloom.train.engine import Engine, deepspeed, shut_down
from omniloom.train.loop import peak_memory_bytes
from omniloom.train.step import training_step

STEPS = 6  # the optimizer's state is there from the second on; what a heap cannot use again grows a little after it


class RandomBatch:
    """Rows of random text: what training_step asks of a batch."""

    def __init__(self, run: TrainingRun) -> None:
        config = run.model
        ids = torch.randint(0, config.vocab_size, (MICRO_BATCH, run.data.seq_len), dtype=torch.int32)
        extra = {"loss_mask": torch.ones_like(ids), "source": torch.zeros_like(ids)}
        self.fields = text_fields(ids, config) | extra

    def model_inputs(self) -> dict[str, torch.Tensor]:
        return {name: self.fields[name] for name in MODEL_INPUTS}


def main() -> None:
    run = run_of(json.loads(sys.argv[1]), int(os.environ["WORLD_SIZE"]))
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    torch.manual_seed(0)
    footprint = psutil.Process().memory_info().rss
    model = Decoder(run.model)
    model.activation_checkpointing = run.train.activation_checkpointing
    engine = Engine(model, run)
    for _ in range(STEPS):
        batches = [RandomBatch(run) for _ in range(engine.accumulation)]
        training_step(engine, model, batches, torch.ones(1), run.train, 1.0)
    (added,) = engine.max_over_ranks([peak_memory_bytes() - footprint])
    shut_down()
    if os.environ["RANK"] == "0":
        print(json.dumps({"added_bytes": added}))


main()
