"""train.compile learns what is learned without it, and compiles nothing anew for another packing."""

from pathlib import Path
from typing import Any

import pytest
from engine_ranks import engine_of, on_ranks, take_step
from tiny_rows import MEDIA, TINY, row

from omniloom.train.config import TrainingRun
from omniloom.train.groups import OptimizerConfig, TrainConfig

STEPS = 12
KINDS = [MEDIA, (), ("image",), ("audio",), ("video",), ("image", "audio")]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def learn(zero_stage: int) -> dict[str, Any]:
    """Losses without and with, and how many graphs there are after half of the steps and after all."""
    from torch._dynamo.utils import counters

    answer: dict[str, Any] = {"graphs": []}
    for compiled in (False, True):
        train = TrainConfig(steps=STEPS, global_batch_size=2, micro_batch_size=1, compile=compiled)
        run = TrainingRun(model=TINY, train=train, optimizer=OptimizerConfig(lr=1e-2, eps=1e-4))
        run.parallel.zero_stage = zero_stage
        engine, model = engine_of(run)
        answer[str(compiled)] = []
        for step in range(STEPS):
            rows = [row(KINDS[step % 6], step), row(KINDS[(step + 3) % 6], 100 + step)]
            result = take_step(engine, model, run, rows)
            answer[str(compiled)].append([result.next_token, result.mtp, result.balance, result.grad_norm])
            if step in (STEPS // 2 - 1, STEPS - 1):
                answer["graphs"].append(counters["stats"]["unique_graphs"])
    answer["breaks"] = sorted(counters["graph_break"])
    return answer


@pytest.mark.parametrize("zero_stage", [pytest.param(1, marks=pytest.mark.soak), 3])
def test_compiled_layers_learn_the_same_and_once(zero_stage: int, tmp_path: Path) -> None:
    found = on_ranks(1, learn, tmp_path, zero_stage)
    assert found["True"] != found["False"], "nothing was compiled"
    for ours, theirs in zip(found["True"], found["False"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    eager, _, half, whole = found["graphs"]
    print(f"ZeRO {zero_stage}: {whole} graphs, {half} of them in the first half; breaks at {found['breaks']}")
    assert eager == 0
    assert 0 < half == whole
