"""Steps that are left out: in a real engine at each ZeRO stage, on one rank and two, and over a whole run."""

import json
import logging
import math
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_rows import MEDIA, TINY, row
from torch import Tensor

from omniloom.data.loader import Batch
from omniloom.errors import ConfigError, DataError
from omniloom.model.decoder import Decoder
from omniloom.model.moe import Router
from omniloom.train.config import TrainingRun
from omniloom.train.groups import GuardConfig, OptimizerConfig, TrainConfig
from omniloom.train.guard import NOT_FINITE, OVERFLOW, SPIKE, Guard

# fp32 parameters at stage 0 have torch's own optimizer; other precisions, and each other stage, one of DeepSpeed's
QUICK = [
    *[(stage, "fp32", "adamw") for stage in range(4)],
    (0, "bf16", "adamw"),
    (1, "fp16", "adamw"),
    *[(stage, "fp32", "muon") for stage in (0, 1)],
]
REST = [
    *[(stage, "bf16_autocast", "adamw") for stage in range(4)],
    *[(stage, "bf16", "adamw") for stage in (1, 2, 3)],
    *[(stage, "fp16", "adamw") for stage in (2, 3)],
    *[(stage, "fp32", "muon") for stage in (2, 3)],
]
FACTORS = {"spike": 1e4, "nan": math.nan, "inf": math.inf}  # of the loss of one rank
LIMIT = 1e3


def key(stage: int, precision: str, optimizer: str) -> str:
    return f"{stage}/{precision}/{optimizer}"


def run_of(stage: int, precision: str, optimizer: str) -> TrainingRun:
    train = TrainConfig(steps=4, global_batch_size=2, micro_batch_size=1, precision=precision, expert_bias_rate=0.01)
    train.gradient_clipping = 0.0 if optimizer == "muon" and stage else 1.0
    run = TrainingRun(model=TINY, train=train, optimizer=OptimizerConfig(kind=optimizer, lr=1e-2))
    run.parallel.zero_stage = stage
    return run


def measure(rank: int, ranks: int, folder: Path, cases: list[tuple[int, str, str]]) -> None:
    """One rank, in a process of its own: what each case did, and where the time of its steps went."""
    import torch.distributed as dist
    from deepspeed.utils import logger

    import omniloom.train.engine as engines

    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    logger.setLevel(logging.ERROR)
    accelerator: Any = type(engines.get_accelerator())
    accelerator.is_fp16_supported = lambda _: True
    ours = engines.deepspeed_config

    def partitioned(run: TrainingRun, ranks: int, parameters: int) -> dict[str, Any]:
        answer = ours(run, ranks, parameters)
        if run.parallel.zero_stage == 3:  # by default parameters as small as these stay whole
            answer["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        answer["fp16"]["initial_scale_power"] = 1  # so low that a spike is no overflow
        return answer

    engines.deepspeed_config = partitioned
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{ranks}", rank=rank, world_size=ranks)
    answer = {}
    for stage, precision, optimizer in cases:
        run = run_of(stage, precision, optimizer)
        faults = list(FACTORS)
        if optimizer == "muon" and stage:
            faults.remove("spike")  # refused
        if precision == "fp16":
            faults.remove("inf")  # at the second overflow DeepSpeed halves the scale: then the rest is another run
        (expected, _), (found, told) = learn(engines, run, []), learn(engines, run, faults)
        told["equal"] = sorted(name for name in expected if torch.equal(found[name], expected[name]))
        told["differ"] = sorted(expected.keys() ^ found.keys() | expected.keys() - set(told["equal"]))
        answer[key(stage, precision, optimizer)] = told
    (folder / f"{ranks}-{rank}.json").write_text(json.dumps(answer))
    dist.destroy_process_group()


def learn(engines: Any, run: TrainingRun, faults: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What three steps leave, and others before the last that go wrong."""
    from omniloom.train.step import training_step

    torch.manual_seed(0)
    model = Decoder(run.model)
    engine = engines.Engine(model, run)
    backward = engine.backward

    def take(seed: int) -> Any:
        rows = [row(MEDIA, 2 * seed + i) for i in range(2)]
        share = len(rows) // engine.ranks
        mine = [Batch([row]) for row in rows[engine.rank * share : (engine.rank + 1) * share]]
        engine.clock.start()
        return training_step(engine, model, mine, torch.tensor([1.0, 0.5]), run.train, 1.0, LIMIT)

    results, bad = [take(0), take(1)], {}
    times, scales = engine.clock.seconds(), [engine.loss_scale]
    for fault in faults:
        factor = FACTORS[fault] if engine.rank == engine.ranks - 1 else 1.0
        engine.backward = lambda loss, factor=factor: backward(loss * factor)
        wrong = take(2)
        bad[fault] = wrong.grad_norm, wrong.skipped
        scales.append(engine.loss_scale)
    engine.backward = backward
    results.append(take(3))
    told = {"bad": bad, "times": times, "scales": scales, "skipped": [result.skipped for result in results]}
    return {**state_of(engine, model), "loss": torch.tensor([result.next_token for result in results])}, told


def state_of(engine: Any, model: Decoder) -> dict[str, Tensor]:
    """All that a step moves: whole weights, on rank 0, and this rank's parts of them, masters, moments, biases."""
    optimizer = engine._engine.optimizer
    held = {f"weight/{name}": tensor.clone() for name, tensor in engine.weights().items()}
    parts = {name: getattr(parameter, "ds_tensor", parameter) for name, parameter in model.named_parameters()}
    held |= {f"part/{name}": part.detach().clone() for name, part in parts.items()}
    states = engine._engine.basic_optimizer.state.values()
    held |= {f"moment/{i}/{name}": torch.as_tensor(v).clone() for i, s in enumerate(states) for name, v in s.items()}
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        held |= {f"master/{i}": tensor.detach().clone() for i, tensor in enumerate(getattr(optimizer, name, []))}
    routers = [part for part in model.modules() if isinstance(part, Router)]
    return held | {f"bias/{i}": router.bias_E.clone() for i, router in enumerate(routers)}


def on_ranks(ranks: int, folder: Path, cases: list[tuple[int, str, str]]) -> list[dict[str, Any]]:
    """What each rank saw."""
    with ProcessPoolExecutor(ranks, multiprocessing.get_context("spawn")) as processes:
        for done in [processes.submit(measure, rank, ranks, folder, cases) for rank in range(ranks)]:
            done.result()
    return [json.loads((folder / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module", params=[1, 2])
def quick(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(request.param, tmp_path_factory.mktemp("guard"), QUICK)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("stage", "precision", "optimizer"), QUICK)
def test_a_step_gone_wrong_leaves_a_run_as_if_it_had_never_been(
    stage: int, precision: str, optimizer: str, quick: list[dict[str, Any]]
) -> None:
    """Weights, masters, moments and router biases, bit for bit, and every loss after it, on every rank."""
    check(stage, precision, optimizer, quick)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_so_it_is_at_every_precision_and_stage(ranks: int, tmp_path: Path) -> None:
    told = on_ranks(ranks, tmp_path, REST)
    for case in REST:
        check(*case, told)


def check(stage: int, precision: str, optimizer: str, ranks: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(ranks):
        told = rank[key(stage, precision, optimizer)]
        assert told["differ"] == []
        kinds = {name.partition("/")[0] for name in told["equal"]}
        assert kinds >= {"part", "moment", "bias", "loss"} | (set() if number else {"weight"})
        assert told["skipped"] == [False] * 3
        assert len(told["bad"]) >= 2
        for fault, (norm, skipped) in told["bad"].items():
            assert skipped, fault
            assert LIMIT < norm < math.inf if fault == "spike" else not math.isfinite(norm)
        assert set(told["scales"]) == {2.0 if precision == "fp16" else None}
    assert len({str(rank[key(stage, precision, optimizer)]["bad"]) for rank in ranks}) == 1


def test_the_parts_of_a_step_add_up_to_no_more_than_it(quick: list[dict[str, Any]]) -> None:
    for rank in quick:
        for name, told in rank.items():
            parts = dict(told["times"])
            step_s = parts.pop("step")
            assert parts.keys() == {"forward", "backward", "optimizer", "communication"}
            assert all(seconds >= 0 for seconds in parts.values()), (name, parts)
            assert sum(parts.values()) <= step_s, (name, parts)
            assert parts["communication"] > 0


def literal_guard(config: GuardConfig, norms: list[float]) -> list[str | None]:
    """Each norm beside the ones before it."""
    reasons: list[str | None] = []
    for i, norm in enumerate(norms):
        before = [other for other in norms[:i] if math.isfinite(other)][-config.window :]
        is_spike = len(before) == config.window and norm > config.spike_factor * statistics.median(before)
        reasons.append(NOT_FINITE if not math.isfinite(norm) else SPIKE if is_spike else None)
    return reasons


NORMS = st.lists(st.sampled_from([0.5, 1.0, 1.5, 4.0, 40.0, math.inf, math.nan]) | st.floats(0.1, 100), max_size=60)


@given(norms=NORMS, window=st.integers(1, 8), factor=st.floats(1.5, 20), cut=st.integers(0, 60))
def test_a_guard_is_the_literal_rule_and_a_resumed_one_goes_on_alike(
    norms: list[float], window: int, factor: float, cut: int
) -> None:
    config = GuardConfig(factor, window, max_skipped=10_000)
    guard, resumed = Guard(config, False), Guard(config, False)
    found = [guard.observe(norm) for norm in norms]
    assert found == literal_guard(config, norms)
    assert guard.skipped_steps == sum(reason is not None for reason in found)
    for norm in norms[:cut]:
        resumed.observe(norm)
    assert [resumed.observe(norm) for norm in norms[cut:]] == found[cut:]
    assert (resumed.skipped_steps, resumed.limit) == (guard.skipped_steps, guard.limit)


def test_without_a_factor_only_what_is_not_finite_is_left_out() -> None:
    guard = Guard(GuardConfig(window=2), False)
    norms = [1.0, 1.0, 1e30, math.inf, math.nan]
    assert [guard.observe(norm) for norm in norms] == [None, None, None, NOT_FINITE, NOT_FINITE]


def test_norms_of_zero_make_no_spike_of_everything_after() -> None:
    guard = Guard(GuardConfig(10.0, window=3), False)
    assert [guard.observe(norm) for norm in (0.0, 0.0, 0.0, 1.0, 1.0, 2.0, 11.0)] == [None] * 6 + [SPIKE]


def test_a_run_stops_after_so_many_in_a_row_and_says_so() -> None:
    guard = Guard(GuardConfig(10.0, window=2, max_skipped=3), False)
    for norm in (1.0, 1.0, math.nan, math.nan, 1.0, math.nan, 90.0):
        guard.observe(norm)
        guard.refuse_too_many(7)
    guard.observe(math.nan)
    with pytest.raises(DataError) as caught:
        guard.refuse_too_many(8)
    for word in ("the last 3 steps up to 8", "guard.max_skipped=3", "guard.spike_factor=10.0", "is 90", "fork="):
        assert word in str(caught.value)


def test_overflows_of_a_loss_scale_are_counted_and_are_no_spikes() -> None:
    guard = Guard(GuardConfig(max_skipped=2), scales_loss=True)
    for _ in range(5):
        assert guard.observe(math.inf) == OVERFLOW
        guard.refuse_too_many(1)
    assert guard.skipped_steps == 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spike_factor": 1.0}, "guard.spike_factor=1.0 must be a number above 1"),
        ({"spike_factor": math.nan}, "guard.spike_factor=nan"),
        ({"window": 0}, "guard.window=0 must be at least 1"),
        ({"max_skipped": 0}, "guard.max_skipped=0 must be at least 1"),
    ],
)
def test_a_guard_that_cannot_hold_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        replace(GuardConfig(), **changes).check()


def test_spikes_of_muon_are_refused_where_deepspeed_tells_its_updates_norm_alone() -> None:
    run = run_of(1, "fp32", "muon")
    run.guard.spike_factor, run.schedule.warmup_steps, run.data.seq_len = 10.0, 1, 16
    with pytest.raises(ConfigError, match=r"guard\.spike_factor=null \(it is 10\.0\), or parallel\.zero_stage=0"):
        run.check_run(1)
    run.parallel.zero_stage = 0
    run.check_run(1)
