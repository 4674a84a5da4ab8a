"""ZeRO 0, 1, 2 and 3, on one rank and on two, learn the same: 50 steps in fp32."""

from pathlib import Path
from typing import Any

import pytest
from engine_ranks import engine_of, start_ranks, take_step
from tiny_rows import MEDIA, TINY, row

from omniloom.train.config import TrainingRun
from omniloom.train.groups import OptimizerConfig, TrainConfig
from omniloom.train.schedule import ScheduleConfig, rate_share

STEPS, BATCH, TOLERANCE = 50, 2, 1e-4
SCHEDULE = ScheduleConfig(warmup_steps=5)


def run_at(zero_stage: int) -> TrainingRun:
    train = TrainConfig(steps=STEPS, global_batch_size=BATCH, micro_batch_size=1)
    # A larger eps than usual: Adam divides by what rounding left of a gradient that is 0.
    run = TrainingRun(model=TINY, train=train, optimizer=OptimizerConfig(lr=1e-2, eps=1e-4))
    run.parallel.zero_stage = zero_stage
    return run


def learn() -> dict[str, Any]:
    """Every stage in turn, on rows that hold all media, none, or some."""
    kinds = [MEDIA, (), ("image",), ("audio", "video")]
    rows = [row(held, seed) for seed, held in enumerate(kinds)]
    answer = {}
    for stage in range(4):
        run = run_at(stage)
        engine, model = engine_of(run)
        losses = []
        for step in range(1, STEPS + 1):
            begin = BATCH * step % len(rows)
            result = take_step(engine, model, run, rows[begin : begin + BATCH], rate_share(step, STEPS, SCHEDULE))
            losses.append([result.next_token, result.mtp, result.balance, result.grad_norm])
        sharded = [p for p in model.parameters() if hasattr(p, "ds_tensor") and p.ds_tensor.numel() < p.ds_numel]
        answer[stage] = {"losses": losses, "sharded": len(sharded)}
    return answer


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Any]:
    """By ranks and stage."""
    folder: Path = tmp_path_factory.mktemp("zero")
    waiting = {ranks: start_ranks(ranks, learn, folder) for ranks in (1, 2)}
    found = {ranks: answer() for ranks, answer in waiting.items()}
    return {(ranks, stage): found[ranks][str(stage)] for ranks in (1, 2) for stage in range(4)}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", range(4))
def test_each_stage_on_each_number_of_ranks_learns_the_same(
    stage: int, ranks: int, learned: dict[tuple[int, int], Any]
) -> None:
    found, alone = learned[ranks, stage]["losses"], learned[1, 0]["losses"]
    assert len(found) == STEPS
    worst = max(
        abs(f / a - 1)
        for ours, theirs in zip(found, alone, strict=True)
        for f, a in zip(ours[:3], theirs[:3], strict=True)
    )
    print(f"ZeRO {stage} on {ranks}: loss {found[0][0]:.4f} to {found[-1][0]:.4f}, off by at most {worst:.1e}")
    assert worst <= TOLERANCE
    assert found[-1][0] <= 0.7 * found[0][0]
    if (stage, ranks) == (3, 2):
        assert learned[ranks, stage]["sharded"] > 20, "nothing was sharded: the test shows nothing"
