"""What the loop writes of its steps, with some gone wrong: lines, events, what ends it, and all that resumed."""

import json
import logging
import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_run import lines_of, train_here, words_run

from omniloom.errors import DataError
from omniloom.model.config import ModelConfig
from omniloom.plan.flops import train_flops
from omniloom.settings import TrainSettings
from omniloom.train.config import TrainingRun
from omniloom.train.groups import GuardConfig, HealthConfig, TrainConfig

FAULTS = {4: math.nan, 7: 1e6, 8: math.nan}  # by step: what the loss is multiplied by
TIMED = {  # differ from run to run
    "tokens_per_s", "tokens_per_s_per_rank", "step_s", "data_wait_s", "forward_s", "backward_s", "optimizer_s",
    "communication_s", "checkpoint_s", "memory_peak_bytes", "memory_added_bytes", "eta_s", "mfu",
}  # fmt: skip
PEAK = 1e12


def measure(folder: Path) -> None:
    """In a process of its own; writes how each run ended."""
    import torch.distributed as dist
    from deepspeed.utils import logger

    import omniloom.train.engine as engines
    from omniloom.train import loop, step

    os.environ["LOCAL_RANK"] = "0"
    torch.set_num_threads(1)
    logger.setLevel(logging.ERROR)
    now, faults, dies_at = [0], dict(FAULTS), [10**9]
    backward, share = engines.Engine.backward, loop.rate_share

    def goes_wrong(self: Any, loss: torch.Tensor) -> None:
        if now[0] == dies_at[0]:
            raise RuntimeError("killed")
        backward(self, loss * faults.get(now[0], 1.0))

    def told_the_step(step: int, *others: Any) -> float:
        now[0] = step
        return share(step, *others)

    engines.Engine.backward = goes_wrong  # type: ignore[method-assign]
    loop.rate_share = told_the_step  # type: ignore[assignment]
    loop.shut_down = lambda: None  # DeepSpeed does not forget its groups: all runs have them in common
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    endings: dict[str, str | None] = {}

    def run(name: str, change: Callable[[TrainingRun], TrainingRun] = lambda run: run) -> None:
        train = TrainConfig(steps=12, global_batch_size=2, micro_batch_size=1, val_every=6, save_every=3)
        small = words_run(folder, name, train)
        small.guard, small.health = GuardConfig(20.0, window=3), HealthConfig(collapse_share=0.0, alarm_steps=3)
        try:
            train_here(change(small))
            ending = None
        except (DataError, RuntimeError) as error:
            ending = f"{type(error).__name__}: {error}"
        endings[f"{name} {len(endings)}"] = ending

    run("whole", with_peak)
    for dies_at[0] in (5, 9, 11):
        run("cut")
    dies_at[0] = 10**9
    run("cut")
    faults.update(dict.fromkeys(range(9, 99), math.inf))
    run("stopped", lambda run: replace(run, guard=replace(run.guard, max_skipped=3)))
    faults.clear()
    step._move_biases = lambda *_: None  # type: ignore[assignment]
    run("still")
    (folder / "endings.json").write_text(json.dumps(endings))


def with_peak(run: TrainingRun) -> TrainSettings:
    settings = TrainSettings(**{field.name: getattr(run, field.name) for field in fields(run)})
    settings.cluster.device.peak_flops_per_s = {"fp32": PEAK}
    return settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("record")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(measure, folder).result()
    return folder


@pytest.fixture
def endings(folder: Path) -> dict[str, str | None]:
    return json.loads((folder / "endings.json").read_text())


def steps_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return lines_of(TrainingRun(name, str(folder)), "metrics.jsonl")


def events_of(folder: Path, name: str, kind: str) -> list[dict[str, Any]]:
    events = lines_of(TrainingRun(name, str(folder)), "events.jsonl")
    return [{key: value for key, value in event.items() if key != "time"} for event in events if event["event"] == kind]


pytestmark = pytest.mark.timeout(300)


def test_steps_gone_wrong_are_counted_and_told_with_their_reason(folder: Path) -> None:
    lines = steps_of(folder, "whole")
    assert [line["skipped_steps"] for line in lines] == [sum(step <= line["step"] for step in FAULTS) for line in lines]
    skipped = events_of(folder, "whole", "skipped_step")
    assert [(event["step"], event["reason"]) for event in skipped] == [
        (4, "not finite"),
        (7, "spike"),
        (8, "not finite"),
    ]
    assert skipped[1]["limit"] < skipped[1]["norm"] == lines[6]["grad_norm"] < math.inf
    losses = [line["loss/next_token"] for line in lines]
    assert all(math.isfinite(loss) for loss in losses[8:])
    assert losses[-1] < losses[0]
    for before, line in pairwise(lines):
        moved = line["router/1/bias_max"] != before["router/1/bias_max"]
        assert moved or line["step"] in FAULTS or line["router/1/load_max_over_mean"] == 1


def test_tokens_of_each_modality_add_up_to_all_of_them(folder: Path) -> None:
    for line in steps_of(folder, "whole"):
        assert line["tokens"] == line["tokens/text"] > 0
        assert line["tokens/image"] == line["tokens/audio"] == line["tokens/video"] == 0


def test_a_step_says_where_its_time_went_and_its_mfu(folder: Path) -> None:
    lines = steps_of(folder, "whole")
    config = yaml.safe_load((folder / "whole" / "config.yaml").read_text())
    sizes, row_tokens = ModelConfig(**config["model"]), config["data"]["seq_len"]
    for before, line in zip([{"tokens": 0}, *lines], lines, strict=False):
        parts = [line[f"{part}_s"] for part in ("data_wait", "forward", "backward", "optimizer", "communication")]
        assert all(seconds >= 0 for seconds in parts)
        assert 0 < sum(parts) <= line["step_s"]
        tokens = line["tokens"] - before["tokens"]
        assert line["tokens_per_s"] == pytest.approx(tokens / line["step_s"])
        assert line["mfu"] == pytest.approx(train_flops(sizes, row_tokens, tokens) / line["step_s"] / PEAK)
    assert "mfu" not in steps_of(folder, "cut")[0], "where no peak is known"


def test_a_run_that_was_cut_off_and_resumed_leaves_the_same_steps_and_alarms(
    folder: Path, endings: dict[str, str | None]
) -> None:
    assert [endings[f"cut {i}"] for i in range(1, 5)] == ["RuntimeError: killed"] * 3 + [None]
    whole, cut = steps_of(folder, "whole"), steps_of(folder, "cut")
    assert [line["step"] for line in cut] == list(range(1, 13))
    for mine, theirs in zip(cut, whole, strict=True):
        assert json.dumps({key: value for key, value in mine.items() if key not in TIMED}) == json.dumps(
            {key: value for key, value in theirs.items() if key not in TIMED}
        )
    for kind in ("router_alarm", "skipped_step"):
        told, again = events_of(folder, "whole", kind), events_of(folder, "cut", kind)
        assert {json.dumps(event) for event in again} == {json.dumps(event) for event in told}


def test_an_alarm_is_an_event_when_it_begins_and_when_it_ends(folder: Path) -> None:
    alarms = [event for event in events_of(folder, "whole", "router_alarm") if event["layer"] == 1]
    over = [line["router/1/load_max_over_mean"] > 1 for line in steps_of(folder, "whole")]
    begins = [step for step in range(3, 13) if all(over[step - 3 : step]) and not (step > 3 and over[step - 4])]
    assert [event["step"] for event in alarms if event["state"] == "begins"] == begins
    assert begins
    assert alarms[0]["alarm"] == "collapse"


def test_a_run_whose_steps_all_go_wrong_stops_and_says_so(folder: Path, endings: dict[str, str | None]) -> None:
    (said,) = [ending for name, ending in endings.items() if name.startswith("stopped")]
    assert said is not None
    assert said.startswith("DataError: the last 3 steps up to 9 were left out (guard.max_skipped=3)")
    lines = steps_of(folder, "stopped")
    assert (lines[-1]["step"], lines[-1]["skipped_steps"]) == (9, 4), "the step that stopped it is written down"


def test_a_bias_that_never_moves_stops_the_run(folder: Path, endings: dict[str, str | None]) -> None:
    (said,) = [ending for name, ending in endings.items() if name.startswith("still")]
    assert said is not None
    assert "DataError: the router's bias of layer " in said
    assert "has not moved in 10 steps of uneven load" in said
    assert len(steps_of(folder, "still")) >= 10
