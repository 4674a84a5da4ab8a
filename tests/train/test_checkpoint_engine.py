"""A real engine saved at one ZeRO stage and number of ranks and resumed at another: the same state, the same losses."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_engines import SIZES, Trained, on_ranks, write

from omniloom.model.load import load_model

STAGES = range(4)
# Largest share by which a loss may differ after the stage or the ranks have changed; with bf16 weights they round
# elsewhere. At the same stage and ranks none may differ at all.
TOLERANCE = {"fp32": 1e-4, "bf16_autocast": 2e-3, "bf16": 3e-3, "fp16": 3e-3, "fp8": 3e-2}


def change_stage(folder: str, precision: str, optimizer: str, pairs: list[tuple[int, int]]) -> None:
    """On each rank: what training goes on to learn, and what it learns where it is resumed."""
    answer: list[dict[str, Any]] = []
    for before in sorted({before for before, _ in pairs}):
        place = Path(folder) / f"{precision}-{optimizer}-{before}"
        trained = Trained(place, before, precision, optimizer)
        trained.take(2)
        trained.save()
        held = trained.held()
        unbroken = trained.take(2)
        for after in sorted(after for first, after in pairs if first == before):
            resumed = Trained(place, after, precision, optimizer)
            resumed.resume()
            again = resumed.held()
            same = before == after and held.keys() == again.keys()
            answer.append(
                {
                    "pair": [before, after],
                    "unbroken": unbroken,
                    "resumed": resumed.take(2),
                    "same_state": same and all(torch.equal(held[key], again[key]) for key in held),
                    "counters": resumed.engine.counts()[1]["global_steps"],
                }
            )
    if trained.engine.rank == 0:
        write(Path(folder) / "answer.json", answer)


def check_pairs(folder: Path, ranks: int, precision: str, optimizer: str, pairs: list[tuple[int, int]]) -> None:
    on_ranks(ranks, change_stage, str(folder), precision, optimizer, pairs)
    found = json.loads((folder / "answer.json").read_text())
    assert [tuple(each["pair"]) for each in found] == sorted(pairs)
    for each in found:
        before, after = each["pair"]
        assert each["counters"] == 4
        if before == after:
            assert each["same_state"], each["pair"]
            assert each["resumed"] == each["unbroken"], each["pair"]
        told = 3 if optimizer == "adamw" else 2  # with shards Muon's norm is that of its updates
        for mine, theirs in zip(each["resumed"], each["unbroken"], strict=True):
            assert mine[:told] == pytest.approx(theirs[:told], rel=TOLERANCE[precision]), each["pair"]
            assert mine[0] > 0


@pytest.mark.timeout(900)
def test_what_one_stage_saves_any_other_resumes(tmp_path: Path) -> None:
    check_pairs(tmp_path, 1, "fp32", "adamw", [(0, 0), (0, 1), (1, 2), (2, 3), (3, 3), (3, 0)])


def possible(precision: str, optimizer: str) -> list[tuple[int, int]]:
    """The pairs of stages that train: fp16 is refused at ZeRO 0, and there DeepSpeed's Muon has no bf16."""
    stages = [stage for stage in STAGES if stage or precision in ("fp32", "bf16_autocast") or optimizer == "adamw"]
    return [pair for pair in product(stages, stages) if precision != "fp16" or 0 not in pair]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("precision", "optimizer"), [("bf16", "adamw"), ("fp32", "muon")])
def test_two_ranks_go_from_stage_to_stage(precision: str, optimizer: str, tmp_path: Path) -> None:
    pairs = [pair for pair in ((0, 1), (1, 3), (3, 3), (3, 2), (2, 0)) if pair in possible(precision, optimizer)]
    check_pairs(tmp_path, 2, precision, optimizer, pairs)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [*product(("fp32", "bf16_autocast", "bf16"), ("adamw", "muon")), ("fp16", "adamw"), ("fp8", "adamw")],
)
def test_each_precision_and_optimizer_between_all_stages(
    precision: str, optimizer: str, ranks: int, tmp_path: Path
) -> None:
    check_pairs(tmp_path, ranks, precision, optimizer, possible(precision, optimizer))


def go_on(folder: str, stage: int, optimizer: str, steps: int) -> None:
    trained = Trained(Path(folder), stage, optimizer=optimizer)
    trained.resume()
    begun = trained.step
    losses = trained.take(steps)
    trained.save()
    if trained.engine.rank == 0:
        write(Path(folder) / f"from{begun}.json", losses)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.soak)])
def test_two_ranks_then_one_then_four_learn_what_one_learns(optimizer: str, tmp_path: Path) -> None:
    for name, way in {"unbroken": [(1, 1, 6)], "moved": [(2, 1, 2), (1, 3, 2), (4, 2, 2)]}.items():
        (tmp_path / name).mkdir()
        for ranks, stage, steps in way:
            on_ranks(ranks, go_on, str(tmp_path / name), stage, optimizer, steps)
    unbroken = json.loads((tmp_path / "unbroken" / "from0.json").read_text())
    moved = [line for start in (0, 2, 4) for line in json.loads((tmp_path / "moved" / f"from{start}.json").read_text())]
    assert len(moved) == len(unbroken) == 6
    for mine, theirs in zip(moved, unbroken, strict=True):
        assert mine[:2] == pytest.approx(theirs[:2], rel=1e-4)
    one, four = (load_model(tmp_path / name / "run").decoder.state_dict() for name in ("unbroken", "moved"))
    for name, weight in one.items():
        torch.testing.assert_close(weight, four[name], rtol=1e-3, atol=1e-5)


def look(folder: str) -> None:
    """What the engine says of a parameter of which this rank has a slice alone, at each stage."""
    for stage in STAGES:
        trained = Trained(Path(folder), stage)
        plain = {(f.state, f.offset, f.values.numel()) for f in trained.engine.fragments() if f.name == "norm.weight"}
        weight: Any = trained.model.norm.weight
        weight.global_shape, weight.global_offset = (3 * SIZES.hidden_size,), SIZES.hidden_size
        moved = {(f.state, f.offset, f.values.numel()) for f in trained.engine.fragments() if f.name == "norm.weight"}
        assert moved == {(state, offset + SIZES.hidden_size, count) for state, offset, count in plain}, stage
        assert plain
        assert trained.engine.wholes()["norm.weight"].shape == (3 * SIZES.hidden_size,)


def test_a_slice_of_a_parameter_has_its_place_in_the_whole(tmp_path: Path) -> None:
    on_ranks(1, look, str(tmp_path))
