"""Ranks that share the experts of one model learn what one rank learns alone."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train_config import sound_run

from omniloom.errors import ConfigError

STAGES = (0, 1, 2, 3)
Answer = dict[str, Any]


def on_ranks(ranks: int, cases: list[dict[str, Any]], folder: Path) -> list[Answer]:
    """What rank 0 found in each case; without Ray, all cases in one start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(Path(__file__).with_name("expert_ranks.py")), str(folder), json.dumps(cases)]
    there = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    there |= {"OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            command, env=there | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    said = [one.communicate()[1] for one in started]
    for one, errors in zip(started, said, strict=True):
        assert one.returncode == 0, errors
    return torch.load(folder / f"{ranks}.pt", weights_only=True)


def named(case: dict[str, Any]) -> str:
    return " ".join(str(value) for value in case.values())


def all_of(ranks: int, cases: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    answers = on_ranks(ranks, cases, tmp_path_factory.mktemp("ranks"))
    return dict(zip(map(named, cases), answers, strict=True))


def each(do: str, stages: tuple[int, ...], expert: int) -> list[dict[str, Any]]:
    return [{"do": do, "zero_stage": stage, "expert": expert} for stage in stages]


HALF = {"do": "train", "zero_stage": 1, "precision": "bf16", "steps": 20}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    return all_of(1, each("descend", (0,), 1), tmp_path_factory)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    return all_of(2, [{"do": "dispatch", "expert": 2}, *each("descend", STAGES, 2)], tmp_path_factory)


@pytest.fixture(scope="module")
def alone_for_long(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    return all_of(1, [*each("train", (0,), 1), HALF | {"expert": 1}], tmp_path_factory)


@pytest.fixture(scope="module")
def two_for_long(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    return all_of(2, [*each("train", STAGES, 2), HALF | {"expert": 2}], tmp_path_factory)


@pytest.fixture(scope="module")
def four_for_long(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    cases = [each(do, STAGES, expert) for expert in (2, 4) for do in ("descend", "train")]
    dispatched = [{"do": "dispatch", "expert": expert} for expert in (2, 4)]
    return all_of(4, [*dispatched, *(case for some in cases for case in some)], tmp_path_factory)


def assert_gradients_agree(alone: dict[str, Answer], together: Answer) -> None:
    """After one step of gradient descent every weight has moved by its gradient."""
    expected = alone["descend 0 1"]
    assert together["weights"].keys() == expected["weights"].keys()
    for name, weights in expected["weights"].items():
        torch.testing.assert_close(together["weights"][name], weights, rtol=1e-5, atol=1e-6, msg=name)
    np.testing.assert_allclose(together["told"], expected["told"], rtol=1e-5)


def assert_runs_agree(alone: dict[str, Answer], together: Answer, expert: int) -> None:
    expected = alone["train 0 1"]
    losses = np.array(expected["told"])
    assert len(losses) == 50
    assert losses[-5:, 0].mean() < 0.7 * losses[:5, 0].mean(), "the loss must fall for the comparison to mean anything"
    found = np.array(together["told"])
    np.testing.assert_allclose(found[:, [0, 1, 3]], losses[:, [0, 1, 3]], rtol=1e-4)
    np.testing.assert_allclose(found[:, 2], losses[:, 2], rtol=1e-3)  # balance counts a choice, near a tie or not
    torch.testing.assert_close(together["counts"], expected["counts"], rtol=1e-3, atol=2)
    assert together["held"] * expert == expected["held"] or not together["held"]
    biases = [name for name in expected["weights"] if name.endswith("bias_E")]
    assert len(biases) == 2
    for name in biases:
        assert expected["weights"][name].abs().max() > 0.005, "the router's bias must have moved"
        torch.testing.assert_close(together["weights"][name], expected["weights"][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_have_the_gradients_of_one(stage: int, alone: dict[str, Answer], two: dict[str, Answer]) -> None:
    assert_gradients_agree(alone, two[f"descend {stage} 2"])


def test_rows_find_their_experts_and_their_way_back(two: dict[str, Answer]) -> None:
    """The ranks compared each dispatch, uneven, onto one rank alone, and empty, with all experts in one place."""
    assert two["dispatch 2"].keys() == {"even", "uneven", "one", "none"}
    assert not any(gradient.any() for gradient in two["dispatch 2"]["none"])
    assert not two["dispatch 2"]["one"][0][1:].any(), "rows must reach the first expert alone"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_learn_what_one_learns(
    stage: int, alone_for_long: dict[str, Answer], two_for_long: dict[str, Answer]
) -> None:
    assert_runs_agree(alone_for_long, two_for_long[f"train {stage} 2"], 2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_in_bf16_two_ranks_learn_nearly_what_one_learns(
    alone_for_long: dict[str, Answer], two_for_long: dict[str, Answer]
) -> None:
    ours, theirs = (
        np.array(answers[f"train 1 bf16 20 {ranks}"]["told"])[:, 0]
        for ranks, answers in ((1, alone_for_long), (2, two_for_long))
    )
    np.testing.assert_allclose(theirs, ours, rtol=3e-2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("expert", [2, 4])
def test_four_ranks_learn_what_one_learns(
    expert: int,
    stage: int,
    alone: dict[str, Answer],
    alone_for_long: dict[str, Answer],
    four_for_long: dict[str, Answer],
) -> None:
    assert_gradients_agree(alone, four_for_long[f"descend {stage} {expert}"])
    assert_runs_agree(alone_for_long, four_for_long[f"train {stage} {expert}"], expert)
    assert four_for_long[f"dispatch {expert}"].keys() == {"even", "uneven", "one", "none"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expert": 3}, ["parallel.expert=3", "model.n_routed_experts=8", "cluster.workers=4"]),
        ({"expert": 8}, ["parallel.expert=8", "cluster.workers=4"]),
        ({"zero_stage": 0, "precision": "bf16"}, ["train.precision=bf16", "parallel.zero_stage=1, 2 or 3"]),
        ({"kind": "muon", "gradient_clipping": 0.0}, ["optimizer.kind=adamw"]),
        ({"n_routed_experts": 0}, ["parallel.expert=2", "model.n_routed_experts=0"]),
        ({"tensor": 2}, ["parallel.tensor=2"]),
    ],
)
def test_what_shared_experts_cannot_do_is_refused(changes: dict[str, Any], said: list[str]) -> None:
    run = sound_run()
    run.parallel = replace(run.parallel, expert=2)
    for key, value in changes.items():
        section = next(part for part in (run.parallel, run.train, run.optimizer, run.model) if hasattr(part, key))
        setattr(section, key, value)
    with pytest.raises(ConfigError) as caught:
        run.check_run(ranks=4)
    for part in said:
        assert part in str(caught.value)


@pytest.mark.parametrize("stage", STAGES)
def test_a_sound_run_may_share_its_experts(stage: int) -> None:
    run = sound_run()
    run.parallel = replace(run.parallel, expert=4, zero_stage=stage)
    run.check_run(ranks=4)
    run.check_run(ranks=8)
