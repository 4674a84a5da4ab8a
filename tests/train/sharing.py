"""Runs of ranks that share a model, without Ray, and what they must agree in; sharing_rank.py is one rank."""

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

Answer = dict[str, Any]

SOAK = "OMNILOOM_SOAK" in os.environ


def on_ranks(ranks: int, cases: list[dict[str, Any]], folder: Path) -> list[Answer]:
    """What rank 0 found in each case; without Ray, all cases in one start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(Path(__file__).with_name("sharing_rank.py")), str(folder), json.dumps(cases)]
    there = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    there |= {"OMP_NUM_THREADS": "1"}
    said = [folder / f"said_{rank}" for rank in range(ranks)]  # a pipe that nobody reads fills up
    started = []
    for rank, path in enumerate(said):
        mine = there | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with path.open("w") as file:
            started.append(subprocess.Popen(command, env=mine, stderr=file))
    try:
        for one, path in zip(started, said, strict=True):
            assert one.wait() == 0, path.read_text()[-10_000:]
    finally:
        for one in started:
            one.kill()
    return torch.load(folder / f"{ranks}.pt", weights_only=True)


def named(case: dict[str, Any]) -> str:
    return " ".join(str(value) for value in case.values())


def all_of(ranks: int, cases: list[dict[str, Any]]) -> dict[str, Answer]:
    with tempfile.TemporaryDirectory() as folder:
        return dict(zip(map(named, cases), on_ranks(ranks, cases, Path(folder)), strict=True))


@functools.cache
def alone(**case: Any) -> Answer:
    """What one rank learns."""
    (answer,) = all_of(1, [case]).values()
    return answer


def assert_gradients_agree(together: Answer) -> None:
    """After one step of gradient descent every weight has moved by its gradient."""
    expected = alone(do="descend", zero_stage=0)
    assert together["weights"].keys() == expected["weights"].keys()
    for name, weights in expected["weights"].items():
        torch.testing.assert_close(together["weights"][name], weights, rtol=1e-5, atol=1e-6, msg=name)
    np.testing.assert_allclose(together["told"], expected["told"], rtol=1e-5)


def assert_runs_agree(together: Answer, expert: int = 1) -> None:
    """Of fifty steps in which the loss falls, the losses and the routers' biases; `expert` ranks share experts."""
    expected = alone(do="train", zero_stage=0)
    losses = np.array(expected["told"])
    assert len(losses) == 50
    assert losses[-5:, 0].mean() < 0.7 * losses[:5, 0].mean(), "the loss must fall for the comparison to mean anything"
    found = np.array(together["told"])
    np.testing.assert_allclose(found[:, :2], losses[:, :2], rtol=1e-4)
    # Balance counts a choice that is near a tie or does not; norms differ as weights do by then.
    np.testing.assert_allclose(found[:, 2:], losses[:, 2:], rtol=1e-3)
    torch.testing.assert_close(together["counts"], expected["counts"], rtol=1e-3, atol=2)
    assert together["held"] * expert == expected["held"] or not together["held"]
    biases = [name for name in expected["weights"] if name.endswith("bias_E")]
    assert len(biases) == 2
    for name in biases:
        assert expected["weights"][name].abs().max() > 0.005, "the router's bias must have moved"
        torch.testing.assert_close(together["weights"][name], expected["weights"][name], rtol=0, atol=1e-6)
