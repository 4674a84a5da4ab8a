"""Predicted against measured peak memory of real ranks within 10%, of one case within 20%."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from planned_memory_shapes import FITTED, run_of
from ray._private.services import JEMALLOC_SO

from omniloom.cluster.local import WORKER_ENVIRONMENT
from omniloom.plan.memory import count_memory

WITHIN, WITHIN_LOOSE, LEAST_BYTES = 0.10, 0.20, 1e9


def case(shape: str, zero_stage: int, ranks: int, **more: Any) -> dict[str, Any]:
    return {"shape": shape, "zero_stage": zero_stage, "ranks": ranks} | more


# What ZeRO 2 keeps of earlier micro batches leaves holes that are not counted: 0.86 of what was measured.
LOOSE = case("gpt", 2, 1, accumulation=2)
ALL = [case(shape, stage, ranks) for shape in FITTED for stage in range(4) for ranks in (1, 2)]
# Several micro batches a step, and buckets that fill before the backward pass has ended.
ALL += [
    case("llama", 0, 1, accumulation=2),
    case("experts", 1, 2, accumulation=2, bucket=20_000_000),
    LOOSE,
    case("llama", 2, 2, accumulation=2, bucket=12_000_000),
    case("experts", 3, 1, accumulation=2, bucket=20_000_000),
    case("experts", 1, 1, bucket=20_000_000),
    # Shapes that no constant was fitted to.
    case("tall", 1, 1),
    case("tall", 2, 2, accumulation=2),
    case("mixtral", 0, 1),
    case("mixtral", 1, 2),
    case("mixtral", 3, 2),
    # Experts that ranks share.
    case("experts", 1, 2, expert=2),
    case("experts", 3, 2, expert=2),
    # Another optimizer.
    case("gpt", 0, 1, optimizer="sgd"),
    case("experts", 1, 1, optimizer="sgd"),
]
# Each shape, each stage and each number of ranks in few runs; `make soak` has them all.
FEW = [ALL[i] for i in (10, 13, 23, 31)]


def measured_bytes(asked: dict[str, Any]) -> float:
    """The most that any rank held above its footprint before the model, by the operating system."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = str(Path(__file__).with_name("planned_memory_rank.py"))
    shared = {"WORLD_SIZE": str(asked["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", "LD_PRELOAD": JEMALLOC_SO, **WORKER_ENVIRONMENT}  # as in a run
    ranks = [
        subprocess.Popen(
            [sys.executable, script, json.dumps(asked)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(asked["ranks"])
    ]
    try:
        answers = [rank.communicate(timeout=600) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), answers[0][1][-2000:]
    return json.loads(answers[0][0].splitlines()[-1])["added_bytes"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "asked", ALL if os.environ.get("OMNILOOM_SOAK") else FEW, ids=lambda asked: "-".join(map(str, asked.values()))
)
def test_a_ranks_memory_is_what_was_predicted(asked: dict[str, Any]) -> None:
    memory = count_memory(run_of(asked, asked["ranks"]).workload(asked["ranks"]), on_cpu=True)
    measured = measured_bytes(asked)
    ratio = f"{memory.total / measured:.2f}"
    print(f"\n{asked}: predicted {memory.total / 1e6:,.0f} MB, measured {measured / 1e6:,.0f} MB, {ratio} of it")
    assert measured > LEAST_BYTES
    assert memory.total == pytest.approx(measured, rel=WITHIN_LOOSE if asked == LOOSE else WITHIN), memory
