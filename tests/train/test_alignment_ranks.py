"""Alignment on two real ranks with unequal pairs: nobody waits for ever, and both learn what one rank alone learns."""

import faulthandler
import json
import os
import socket
import sys
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_rows import SEQ_LEN, TINY, WIDTHS, segment, text

from omniloom.modality.sequence import Row, lay_row, weave
from omniloom.train.config import TrainingRun
from omniloom.train.groups import AlignConfig, OptimizerConfig, TrainConfig

PATIENCE_S = 150
MODEL = replace(TINY, dropout=0.0)
# The media of each of a step's four rows, two of each rank: pairs on both, on one alone, none; and kinds apart.
STEPS = [
    (("image", "audio"), ("image",), ("image",), ("audio",)),
    (("image", "image"), ("audio",), (), ()),
    ((), (), (), ("image", "video")),
    ((), (), (), ()),
    (("image",), (), (), ("audio",)),
    (("video",), ("image",), ("image", "image"), ("audio", "audio")),
]


def rows_of(step: int) -> list[Row]:
    """The rows of a step: each medium with a text of its own, in a document of its own."""
    rng, rows = np.random.default_rng(step), []
    for kinds in STEPS[step]:
        pairs = [(segment(kind, rng), text(rng, 3, True)) for kind in kinds]
        documents = [weave(list(parts), 1, 0, (0, 2, 3, 4), WIDTHS) for parts in [(text(rng, 4, True),), *pairs]]
        rows.append(lay_row([(document, 0) for document in documents], SEQ_LEN, 0, WIDTHS))
    return rows


def train_on_pairs(rank: int, ranks: int, port: int, stage: int, precision: str, folder: str) -> None:
    """Runs in every process: the steps, then held-out retrieval over all of them; rank 0 writes what came of it."""
    faulthandler.dump_traceback_later(PATIENCE_S, exit=True, file=sys.__stderr__)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    import omniloom.train.engine as engines
    from omniloom.data.loader import Batch
    from omniloom.model.decoder import Decoder
    from omniloom.train.alignment import heldout_retrieval
    from omniloom.train.step import training_step

    ours = engines.deepspeed_config

    def partitioned(*arguments: Any) -> dict[str, Any]:
        answer = ours(*arguments)
        answer["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # of a tiny model, all otherwise
        return answer

    engines.deepspeed_config = partitioned
    train = TrainConfig(steps=len(STEPS), global_batch_size=4, micro_batch_size=1, precision=precision)
    run = TrainingRun(model=MODEL, train=train, optimizer=OptimizerConfig(lr=1e-2, eps=1e-4))
    run.parallel.zero_stage = stage
    align = AlignConfig(weight=0.5, temperature=0.2)
    torch.manual_seed(0)
    model = Decoder(MODEL)
    engine = engines.Engine(model, run)
    share = 4 // ranks
    cut = slice(rank * share, (rank + 1) * share)
    told = []
    for step in range(len(STEPS)):
        mine = [Batch([row]) for row in rows_of(step)[cut]]
        result = training_step(engine, model, mine, torch.ones(1), train, 1.0, align=align)
        told.append({"next_token": result.next_token, "grad_norm": result.grad_norm} | result.alignment)
    heldout = [[Batch([row])] for step in range(len(STEPS)) for row in rows_of(step)[cut]]
    retrieved = heldout_retrieval(engine, heldout, align)
    weights = {name: tensor.float().tolist() for name, tensor in engine.weights().items()}
    if rank == 0:
        Path(folder, "told.json").write_text(json.dumps({"steps": told, "heldout": retrieved, "weights": weights}))
    engines.shut_down()
    faulthandler.cancel_dump_traceback_later()


def on_ranks(ranks: int, stage: int, folder: Path, precision: str = "fp32") -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("spawn")
    arguments = [(rank, ranks, port, stage, precision, str(folder)) for rank in range(ranks)]
    processes = [context.Process(target=train_on_pairs, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * ranks
    return json.loads((folder / "told.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one rank learns from all rows without any sharding."""
    return on_ranks(1, 0, tmp_path_factory.mktemp("alone"))


def test_the_steps_have_unequal_pairs(alone: dict[str, Any]) -> None:
    counts = [[sum(map(len, step[:2])), sum(map(len, step[2:]))] for step in STEPS]
    unequal = {(left > 0, right > 0) for left, right in counts}
    assert len(unequal) == 4, "both, one of them, the other, none"
    for step, told in zip(STEPS, alone["steps"], strict=True):
        assert sum(value for key, value in told.items() if key.startswith("align/")) == sum(map(len, step))
    assert alone["steps"][0]["loss/contrastive"] > 0.5
    assert alone["heldout"]["val/retrieval_pairs/image_text"] == 10


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", [3, *(pytest.param(stage, marks=pytest.mark.soak) for stage in (0, 1, 2))])
def test_two_ranks_learn_what_one_rank_learns(stage: int, alone: dict[str, Any], tmp_path: Path) -> None:
    together = on_ranks(2, stage, tmp_path)
    for step, (one, two) in enumerate(zip(alone["steps"], together["steps"], strict=True)):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6), step
    assert together["heldout"] == pytest.approx(alone["heldout"])
    for name, weights in alone["weights"].items():
        np.testing.assert_allclose(weights, together["weights"][name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.soak
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_rank_learns_alike_at_every_stage(stage: int, alone: dict[str, Any], tmp_path: Path) -> None:
    sharded = on_ranks(1, stage, tmp_path)
    for one, other in zip(alone["steps"], sharded["steps"], strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)


@pytest.mark.soak
@pytest.mark.parametrize("precision", ["bf16", "bf16_autocast"])
def test_in_bf16_the_losses_are_near_those_of_fp32(precision: str, alone: dict[str, Any], tmp_path: Path) -> None:
    rounded = on_ranks(1, 1, tmp_path, precision)
    for one, other in zip(alone["steps"], rounded["steps"], strict=True):
        assert other.keys() == one.keys()
        assert other.get("loss/contrastive", 0.0) == pytest.approx(one.get("loss/contrastive", 0.0), rel=0.1, abs=0.05)
