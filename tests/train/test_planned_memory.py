"""Predicted against measured peak memory of real ranks, ZeRO 0 to 3, one rank and two, within 10%."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from planned_memory_shapes import SHAPES, run_of

from omniloom.cluster.local import WORKER_ENVIRONMENT
from omniloom.plan.memory import count_memory

WITHIN, LEAST_BYTES = 0.10, 1e9
ALL = [
    {"shape": shape, "zero_stage": stage, "ranks": ranks} for shape in SHAPES for stage in range(4) for ranks in (1, 2)
]
# Each shape, each stage and each number of ranks in few runs; `make soak` has them all.
FEW = [case for i, case in enumerate(ALL) if i in (1, 2, 10, 13, 16, 22, 23)]


def measured_bytes(case: dict[str, Any]) -> float:
    """The most that any rank held above its footprint before the model, by the operating system."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = str(Path(__file__).with_name("planned_memory_rank.py"))
    shared = {"WORLD_SIZE": str(case["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", **WORKER_ENVIRONMENT}  # as in a run
    ranks = [
        subprocess.Popen(
            [sys.executable, script, json.dumps(case)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(case["ranks"])
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
    "case", ALL if os.environ.get("OMNILOOM_SOAK") else FEW, ids=lambda case: "-".join(map(str, case.values()))
)
def test_a_ranks_memory_is_what_was_predicted(case: dict[str, Any]) -> None:
    memory = count_memory(run_of(case, case["ranks"]).workload(case["ranks"]), on_cpu=True)
    measured = measured_bytes(case)
    print(f"\n{case}: predicted {memory.total / 1e6:,.0f} MB, measured {measured / 1e6:,.0f} MB")
    assert measured > LEAST_BYTES
    assert memory.total == pytest.approx(measured, rel=WITHIN), memory
