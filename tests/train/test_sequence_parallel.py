"""Ranks that share each row's tokens learn what one rank learns of whole rows."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sharing import SOAK, Answer, all_of, assert_gradients_agree, assert_runs_agree
from test_train_config import sound_run

from conftest import train_smoke
from omniloom.data.config import PhaseConfig
from omniloom.errors import ConfigError

LONG = (0, 1, 2, 3) if SOAK else (1, 3)
DEGREES = [(2, 1), (4, 1), (2, 4)]  # ranks that share rows, and experts, of four
FOUR = [(*degrees, stage) for degrees in DEGREES for stage in (1, 3)] if SOAK else [(2, 4, 1)]
PATTERNS = [f"{pattern} {heads}" for pattern in ("full", "sparse", "linear") for heads in (4, 2, 1)]


def each(do: str, stages: tuple[int, ...], sequence: int, **more: int) -> list[dict[str, Any]]:
    return [{"do": do, "zero_stage": stage, "sequence": sequence, **more} for stage in stages]


@pytest.fixture(scope="module")
def two() -> dict[str, Answer]:
    return all_of(2, [{"do": "attention", "sequence": 2}, *each("descend", (0, 3), 2)])


@pytest.fixture(scope="module")
def two_for_long() -> dict[str, Answer]:
    return all_of(2, each("train", LONG, 2))


@pytest.fixture(scope="module")
def four_for_long() -> dict[str, Answer]:
    cases = [each(do, (stage,), rows, expert=experts) for rows, experts, stage in FOUR for do in ("descend", "train")]
    return all_of(4, [{"do": "attention", "sequence": 4}, *(case for some in cases for case in some)])


@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_have_the_gradients_of_one(stage: int, two: dict[str, Answer]) -> None:
    assert_gradients_agree(two[f"descend {stage} 2"])


def test_attention_of_shared_rows_is_that_of_whole_ones(two: dict[str, Answer]) -> None:
    """The ranks compared outputs and gradients, over documents' ends and pictures that lie on two ranks."""
    assert list(two["attention 2"]) == PATTERNS


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stage", LONG)
def test_two_ranks_learn_what_one_learns(stage: int, two_for_long: dict[str, Answer]) -> None:
    assert_runs_agree(two_for_long[f"train {stage} 2"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("sequence", "expert", "stage"), FOUR)
def test_four_ranks_learn_what_one_learns(
    sequence: int,
    expert: int,
    stage: int,
    four_for_long: dict[str, Answer],
) -> None:
    assert_gradients_agree(four_for_long[f"descend {stage} {sequence} {expert}"])
    assert_runs_agree(four_for_long[f"train {stage} {sequence} {expert}"], expert)
    assert list(four_for_long["attention 4"]) == PATTERNS


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_with_shared_rows_sees_the_batches_of_one_rank(ray_cluster: None, workspace: Path) -> None:
    lines = []
    for name, more in (("whole_rows", []), ("shared_rows", ["cluster.workers=2", "parallel.sequence=2"])):
        short = ["train.steps=4", "schedule.warmup_steps=1", "train.val_rows=4"]
        folder = train_smoke(workspace, name, *short, *more)
        lines.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
    for one, shared in zip(*lines, strict=True):
        assert (one["batch_hash"], one["tokens"]) == (shared["batch_hash"], shared["tokens"])
    keys = ("loss/next_token", "loss/mtp", "loss/balance", "grad_norm")
    values = [[[line[key] for key in keys] for line in run] for run in lines]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-4)
    assert lines[0][-1]["val/loss"] == pytest.approx(lines[1][-1]["val/loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 6}, ["parallel.sequence=4", "model.num_attention_heads=6"]),
        ({"sequence": 3}, ["parallel.sequence=3", "cluster.workers=4"]),
        ({"seq_len": 1022}, ["parallel.sequence=4", "data.seq_len=1022"]),
        ({"phases": [PhaseConfig(24, {}, seq_len=510)]}, ["parallel.sequence=4", "data.seq_len=510"]),
        (
            {"sequence": 2, "global_batch_size": 9},
            ["train.global_batch_size=9", "cluster.workers=4 / parallel.sequence=2 = 6"],
        ),
    ],
)
def test_rows_that_cannot_be_shared_are_refused(changes: dict[str, Any], said: list[str]) -> None:
    run = sound_run()
    run.parallel = replace(run.parallel, sequence=4)
    for key, value in changes.items():
        section = next(part for part in (run.parallel, run.train, run.data, run.model) if hasattr(part, key))
        setattr(section, key, value)
    with pytest.raises(ConfigError) as caught:
        run.check_run(ranks=4)
    for part in said:
        assert part in str(caught.value)


def test_ranks_that_share_rows_are_one_of_those_that_the_batch_is_cut_for() -> None:
    run = sound_run()
    run.parallel = replace(run.parallel, sequence=4)
    run.check_run(ranks=8)
    assert "8 ranks / 4 that share rows × gradient_accumulation_steps 4" in run.batch_terms(8)
