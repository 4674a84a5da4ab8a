"""Bytes that DeepSpeed's engine moves for each weight, against what torch's dispatcher sees of a real step."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from omniloom.plan.traffic import weight_traffic

# Autocast first: what an engine before it leaves in the process makes DeepSpeed cast weights once more.
CASES = [("bf16_autocast", 1), ("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 0), ("bf16", 2)]
MICROS = 2


def bytes_a_weight(precision: str, zero_stage: int) -> dict[str, float]:
    """Of the third step of one rank, by phase: each micro batch's forward and backward pass, and the step."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "plan"))
    import torch
    from test_traffic import TEXT, Moved

    from omniloom.model.decoder import Decoder, text_fields
    from omniloom.train.config import TrainingRun
    from omniloom.train.engine import Engine
    from omniloom.train.groups import ParallelConfig, TrainConfig

    train = TrainConfig(steps=10, global_batch_size=MICROS, micro_batch_size=1, precision=precision)
    config = vars(TEXT) | {"hidden_size": 512, "vocab_size": 64, "tie_word_embeddings": False}
    model = Decoder(type(TEXT)(**config))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine = Engine(model, TrainingRun(model=model.config, train=train, parallel=ParallelConfig(zero_stage=zero_stage)))
    fields = text_fields(torch.zeros(1, 2, dtype=torch.long), model.config)  # so few tokens move next to nothing
    phases: Counter[str] = Counter()
    for _ in range(3):
        with Moved() as mode:
            for micro in range(MICROS):
                mode.phase = f"micro {micro}"
                output: Any = engine.forward(**fields, predict_at=torch.tensor([[True, False]]))
                engine.backward(output.logits.float().logsumexp(-1).sum())
            mode.phase = "step"
            engine.step(0.5)
        phases = mode.bytes
    return {phase: moved / parameters for phase, moved in phases.items()}


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, float]]:
    """All cases, in a process of its own: the engine wants a process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, __file__]
    answer = subprocess.run(command, env=os.environ | alone, capture_output=True, text=True, timeout=280)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


@pytest.mark.parametrize(("precision", "stage"), CASES)
def test_each_weight_moves_as_many_bytes_as_were_counted(
    precision: str, stage: int, counted: dict[str, dict[str, float]]
) -> None:
    told, found = weight_traffic(precision, stage), counted[f"{precision} {stage}"]
    # The dispatcher sees the collective, too: it reads and writes a whole buffer, a reduce-scatter a buffer and a half.
    gradient = 2 if precision == "bf16" else 4
    collective = (3 if stage == 3 else 2) * gradient
    each = told.casts.bytes
    exchanged = told.exchange.bytes + collective
    first = each + (exchanged if told.is_each_exchanged else 0)
    assert found["micro 0"] == pytest.approx(first, rel=0.1, abs=1)
    assert found["micro 1"] == pytest.approx(each + exchanged + told.sums.bytes, rel=0.1, abs=1)
    assert found["step"] == pytest.approx(told.step.bytes, rel=0.03)


if __name__ == "__main__":
    print(json.dumps({f"{precision} {stage}": bytes_a_weight(precision, stage) for precision, stage in CASES}))
