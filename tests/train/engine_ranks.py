"""Ranks of a real engine, each a process of its own in one gloo group: many engines in one start."""

import json
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from omniloom.data.loader import Batch
from omniloom.model.decoder import Decoder
from omniloom.train.config import TrainingRun

WAIT = timedelta(seconds=120)


def on_ranks(ranks: int, work: Callable[..., Any], folder: Path, *arguments: Any) -> Any:
    """What `work(*arguments)` answers on rank 0 of so many; all ranks call it."""
    return start_ranks(ranks, work, folder, *arguments)()


def start_ranks(ranks: int, work: Callable[..., Any], folder: Path, *arguments: Any) -> Callable[[], Any]:
    """The same, to be waited for by a call."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = (ranks, port, work, str(folder), arguments)
    processes = multiprocessing.start_processes(_rank, told, nprocs=ranks, join=False, start_method="spawn")

    def answer() -> Any:
        while not processes.join():
            pass
        return json.loads((folder / f"{ranks}.json").read_text())

    return answer


def _rank(rank: int, ranks: int, port: int, work: Callable[..., Any], folder: str, arguments: tuple[Any, ...]) -> None:
    import logging

    import torch.distributed as dist

    from omniloom.train.engine import deepspeed

    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks, timeout=WAIT)
    answer = work(*arguments)
    if rank == 0:
        Path(folder, f"{ranks}.json").write_text(json.dumps(answer))
    dist.destroy_process_group()


def engine_of(run: TrainingRun) -> tuple[Any, Decoder]:
    """A real engine and its model, drawn from seed 0; ZeRO 3 shards even tensors as small as a test's."""
    import omniloom.train.engine as engines
    from omniloom.train import deepspeed_json

    def partitioned(run: TrainingRun, ranks: int, parameters: int) -> dict[str, Any]:
        answer = deepspeed_json.deepspeed_config(run, ranks, parameters)
        if run.parallel.zero_stage == 3:
            answer["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return answer

    engines.deepspeed_config = partitioned
    torch.manual_seed(0)
    model = Decoder(run.model)
    return engines.Engine(model, run), model


def take_step(engine: Any, model: Decoder, run: TrainingRun, rows: list[Any], rate_share: float = 1.0) -> Any:
    """One training step on a global batch of rows, of which each rank takes its part."""
    from omniloom.train.step import training_step

    micro = run.train.micro_batch_size
    share = len(rows) // engine.ranks
    mine = rows[engine.rank * share : (engine.rank + 1) * share]
    batches = [Batch(mine[start : start + micro]) for start in range(0, share, micro)]
    return training_step(engine, model, batches, torch.tensor([1.0, 0.5]), run.train, rate_share)
