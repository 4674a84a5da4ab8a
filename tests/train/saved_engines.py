"""Engines that are saved and resumed without a corpus: on ranks of their own, started by `on_ranks`."""

import json
import logging
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tiny_rows import MEDIA, TINY, row
from torch import Tensor
from torch.nn import functional as F

from omniloom.data.loader import Batch
from omniloom.model.decoder import Decoder
from omniloom.train.config import TrainingRun
from omniloom.train.groups import OptimizerConfig, TrainConfig

# Sides in sixteens but for the 24 that keys and values are compressed to.
SIZES = replace(
    TINY, hidden_size=32, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16, n_shared_experts=1
)
CORPUS: Any = SimpleNamespace(write_reading_rules=lambda folder: None)
PATIENCE_S = 550  # of ranks on a machine that does other things too
ROWS = 4  # of a global batch: as many ranks may share it


def exact_product(x: Tensor, weight: Tensor, offs: Tensor, pad_token_groups_for_grouped_mm: bool) -> Tensor:
    """For torchao's kernels, which no CPU runs."""
    return F.grouped_mm(x, weight, offs=offs)


def save_engine(engine: Any, folder: Path) -> None:
    """Write a checkpoint of an engine and wait for it."""
    from omniloom.train.checkpoint import State
    from omniloom.train.saver import Saver

    with Saver(engine, SIZES, CORPUS, TrainingRun(runs_dir=str(folder)), None) as saver:
        saver.copy(State(1, 1, 1, engine.ranks, engine.zero_stage, [], ""))
        saver.write()


def resume_engine(engine: Any, folder: Path) -> None:
    """Have another engine take it over."""
    from omniloom.train.checkpoint import resume

    assert resume(engine, [], TrainingRun(runs_dir=str(folder)).folder).step == 1


def on_ranks(ranks: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(*arguments)` on ranks that share a process group; raises where one fails."""
    context, folder = multiprocessing.get_context("spawn"), arguments[0]
    meet = Path(folder) / f"meet-{os.urandom(4).hex()}"
    processes = [
        context.Process(target=_rank, args=(rank, ranks, str(meet), function, arguments)) for rank in range(ranks)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(PATIENCE_S)
    finally:
        for process in processes:
            process.kill()
    assert [process.exitcode for process in processes] == [0] * ranks


def _rank(rank: int, ranks: int, meet: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import torch.distributed as dist
    from deepspeed.utils import logger

    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    logger.setLevel(logging.ERROR)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=ranks)
    able_machine()
    function(*arguments)
    dist.barrier()
    dist.destroy_process_group()


def able_machine() -> None:
    """Have this machine be one that can do fp16 and fp8, and ZeRO 3 cut parameters as small as these."""
    import omniloom.train.engine as engines

    def convert(module: Any) -> list[str]:
        from omniloom.train import float8

        float8._to_fp8_rowwise_then_scaled_grouped_mm = exact_product
        return float8.convert(module, emulate=True)

    accelerator: Any = type(engines.get_accelerator())
    accelerator.is_fp16_supported = lambda _: True
    engines.convert_to_float8 = convert
    allowed, ours = engines.refuse_unless_possible, engines.deepspeed_config
    engines.refuse_unless_possible = lambda precision, *known: allowed(precision.replace("fp8", "bf16"), *known)

    def config(run: TrainingRun, ranks: int, parameters: int) -> dict[str, Any]:
        answer = ours(run, ranks, parameters)
        answer["zero_optimization"]["stage3_param_persistence_threshold"] = 100
        return answer

    engines.deepspeed_config = config


class Trained:
    """An engine that trains on rows which are a function of the step."""

    def __init__(self, folder: Path, stage: int, precision: str = "fp32", optimizer: str = "adamw") -> None:
        from omniloom.train.engine import Engine
        from omniloom.train.saver import Saver

        train = TrainConfig(steps=8, global_batch_size=ROWS, micro_batch_size=1, precision=precision)
        if optimizer == "muon":
            train.gradient_clipping = 0
        self.run = TrainingRun(runs_dir=str(folder), run="run", model=SIZES, train=train)
        self.run.optimizer = OptimizerConfig(kind=optimizer, lr=1e-2, eps=1e-4)
        self.run.parallel.zero_stage = stage
        torch.manual_seed(stage)  # what is resumed does not hang on what was drawn
        self.model = Decoder(SIZES)
        self.engine = Engine(self.model, self.run)
        self.events: list[tuple[str, dict[str, Any]]] = []
        told: Any = SimpleNamespace(
            event=lambda kind, **facts: self.events.append((kind, facts)), checkpoint=lambda folder: None
        )
        self.saver = Saver(self.engine, SIZES, CORPUS, self.run, told if self.engine.rank == 0 else None)
        self.step = 0

    def take(self, steps: int) -> list[list[float]]:
        from omniloom.train.step import training_step

        results = []
        share = ROWS // self.engine.ranks
        for _ in range(steps):
            self.step += 1
            mine = range(self.engine.rank * share, (self.engine.rank + 1) * share)
            batches = [Batch([row(MEDIA, 10 * self.step + index)]) for index in mine]
            result = training_step(self.engine, self.model, batches, torch.tensor([1.0, 0.5]), self.run.train, 1.0)
            results.append([result.next_token, result.mtp or 0.0, result.grad_norm])
        return results

    def save(self) -> None:
        self.saver.copy(self.state())
        self.saver.write()
        self.saver.wait()
        self.engine.barrier()

    def state(self) -> Any:
        from omniloom.train.checkpoint import State

        return State(self.step, self.step * ROWS, 0, self.engine.ranks, self.engine.zero_stage, [], "")

    def resume(self) -> None:
        from omniloom.train.checkpoint import resume

        self.step = resume(self.engine, [], self.run.folder).step

    def held(self) -> dict[tuple[str, str, int], Tensor]:
        """This rank's state, copied."""
        return {(f.name, f.state, f.offset): f.values.clone() for f in self.engine.fragments()}


def write(path: Path, answer: Any) -> None:
    path.write_text(json.dumps(answer))
