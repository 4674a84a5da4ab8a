"""Ranks that share the experts of one model learn what one rank learns alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sharing import SOAK, Answer, all_of, alone, assert_gradients_agree, assert_runs_agree
from test_train_config import sound_run

from omniloom.errors import ConfigError

STAGES = (0, 1, 2, 3)
LONG = STAGES if SOAK else (1, 3)
FOUR = [(expert, stage) for expert in (2, 4) for stage in STAGES] if SOAK else [(4, 3)]
HALF = {"do": "train", "zero_stage": 1, "precision": "bf16", "steps": 20}


def each(do: str, stages: tuple[int, ...], expert: int) -> list[dict[str, Any]]:
    return [{"do": do, "zero_stage": stage, "expert": expert} for stage in stages]


@pytest.fixture(scope="module")
def two() -> dict[str, Answer]:
    return all_of(2, [{"do": "dispatch", "expert": 2}, *each("descend", STAGES, 2)])


@pytest.fixture(scope="module")
def two_for_long() -> dict[str, Answer]:
    return all_of(2, [*each("train", LONG, 2), HALF | {"expert": 2}])


@pytest.fixture(scope="module")
def four_for_long() -> dict[str, Answer]:
    cases = [each(do, (stage,), expert) for expert, stage in FOUR for do in ("descend", "train")]
    dispatched = [{"do": "dispatch", "expert": expert} for expert in (2, 4)]
    return all_of(4, [*dispatched, *(case for some in cases for case in some)])


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_have_the_gradients_of_one(stage: int, two: dict[str, Answer]) -> None:
    assert_gradients_agree(two[f"descend {stage} 2"])


def test_rows_find_their_experts_and_their_way_back(two: dict[str, Answer]) -> None:
    """The ranks compared each dispatch, uneven, onto one rank alone, and empty, with all experts in one place."""
    assert two["dispatch 2"].keys() == {"even", "uneven", "one", "none"}
    assert not any(gradient.any() for gradient in two["dispatch 2"]["none"])
    assert not two["dispatch 2"]["one"][0][1:].any(), "rows must reach the first expert alone"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stage", LONG)
def test_two_ranks_learn_what_one_learns(stage: int, two_for_long: dict[str, Answer]) -> None:
    assert_runs_agree(two_for_long[f"train {stage} 2"], 2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_in_bf16_two_ranks_learn_nearly_what_one_learns(two_for_long: dict[str, Answer]) -> None:
    answers = alone(**HALF), two_for_long["train 1 bf16 20 2"]
    ours, theirs = (np.array(answer["told"])[:, 0] for answer in answers)
    np.testing.assert_allclose(theirs, ours, rtol=3e-2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("expert", "stage"), FOUR)
def test_four_ranks_learn_what_one_learns(
    expert: int,
    stage: int,
    four_for_long: dict[str, Answer],
) -> None:
    assert_gradients_agree(four_for_long[f"descend {stage} {expert}"])
    assert_runs_agree(four_for_long[f"train {stage} {expert}"], expert)
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
