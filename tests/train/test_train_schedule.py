"""The learning rate at steps worked out by hand, and which parameters decay."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from omniloom.errors import ConfigError
from omniloom.train.config import TrainingRun
from omniloom.train.deepspeed_json import deepspeed_config
from omniloom.train.groups import OptimizerConfig, TrainConfig
from omniloom.train.optimizer import parameter_groups
from omniloom.train.schedule import ScheduleConfig, rate_share

KINDS = ["cosine", "polynomial", "warmup_stable_decay"]


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_rises_in_equal_steps_to_one(kind):
    config = ScheduleConfig(kind=kind, warmup_steps=10)
    assert [rate_share(step, 100, config) for step in (1, 2, 5, 10)] == pytest.approx([0.1, 0.2, 0.5, 1.0])


def test_cosine_by_hand():
    config = ScheduleConfig(kind="cosine", warmup_steps=10, floor=0.1)
    # progress 0, 1/3, 1/2, 2/3, 1 of the 90 steps after warm-up
    shares = [rate_share(step, 100, config) for step in (10, 40, 55, 70, 100)]
    assert shares == pytest.approx([1.0, 0.1 + 0.9 * 0.75, 0.55, 0.1 + 0.9 * 0.25, 0.1])


def test_warmup_stable_decay_by_hand():
    config = ScheduleConfig(kind="warmup_stable_decay", warmup_steps=10, decay_share=0.2, floor=0.1)
    shares = [rate_share(step, 100, config) for step in (10, 11, 50, 80, 81, 90, 100)]
    assert shares == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.1 + 0.9 * 0.95, 0.55, 0.1])


@pytest.mark.parametrize("kind", KINDS)
def test_without_warm_up_the_first_step_is_near_the_peak_and_the_last_on_the_floor(kind):
    config = ScheduleConfig(kind=kind, warmup_steps=0, floor=0.0)
    assert rate_share(1, 1000, config) >= 0.999
    assert rate_share(1000, 1000, config) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_share_stays_between_floor_and_one_and_never_rises_after_warm_up(kind):
    config = ScheduleConfig(kind=kind, warmup_steps=7)
    shares = [rate_share(step, 50, config) for step in range(7, 51)]
    assert all(config.floor - 1e-9 <= share <= 1 for share in shares)
    assert all(after <= before + 1e-12 for before, after in pairwise(shares))


def literal_restarts(step: int, warmup: int, lengths: list[int], floor: float) -> float:
    """Cycle after cycle, one step after another."""
    at = warmup
    for length in lengths:
        for done in range(1, length + 1):
            at += 1
            if at == step:
                return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done / length))
    raise AssertionError


@pytest.mark.parametrize(
    ("cycles", "multiplier", "lengths"),
    [(1, 2.0, [90]), (3, 1.0, [30, 30, 30]), (2, 2.0, [30, 60]), (3, 0.5, [51, 26, 13]), (4, 1.0, [22, 23, 23, 22])],
)
def test_cosine_with_restarts_is_the_literal_walk(cycles: int, multiplier: float, lengths: list[int]) -> None:
    config = ScheduleConfig(warmup_steps=10, cycles=cycles, cycle_length_multiplier=multiplier, floor=0.2)
    config.check(100)
    expected = [literal_restarts(step, 10, lengths, 0.2) for step in range(11, 101)]
    assert [rate_share(step, 100, config) for step in range(11, 101)] == pytest.approx(expected)
    assert sum(share == pytest.approx(0.2) for share in expected) == cycles


@given(
    steps=st.integers(2, 400),
    warmup=st.integers(0, 399),
    cycles=st.integers(1, 12),
    multiplier=st.floats(0.2, 4),
)
def test_every_schedule_of_cycles_that_is_accepted_has_whole_cycles(
    steps: int, warmup: int, cycles: int, multiplier: float
) -> None:
    config = ScheduleConfig(warmup_steps=warmup, cycles=cycles, cycle_length_multiplier=multiplier, floor=0.0)
    try:
        config.check(steps)
    except ConfigError:
        return
    shares = [rate_share(step, steps, config) for step in range(1, steps + 1)]
    ends = config.cycle_ends(steps)
    assert (ends[0], ends[-1], len(ends)) == (warmup, steps, cycles + 1)
    assert all(shares[end - 1] == pytest.approx(0.0, abs=1e-12) for end in ends[1:])
    assert all(0 <= share <= 1 for share in shares)
    rises = [step for step in range(max(1, warmup), steps) if shares[step] > shares[step - 1] + 1e-12]
    assert set(rises) <= set(ends[1:])


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.7])
def test_polynomial_is_the_formula(power: float) -> None:
    config = ScheduleConfig(kind="polynomial", warmup_steps=10, power=power, floor=0.1)
    for step in range(11, 101):
        expected = 0.1 + 0.9 * ((100 - step) / 90) ** power
        assert rate_share(step, 100, config) == pytest.approx(expected), step


def test_decay_all_spares_nothing() -> None:
    groups = parameter_groups(Small(), OptimizerConfig(weight_decay=0.0, l2=0.3, decay_all=True))
    assert [group["weight_decay"] for group in groups] == [0.3, 0.3]


def test_deepspeed_gets_torchs_adam_where_decay_is_in_the_loss() -> None:
    section = section_of(OptimizerConfig(weight_decay=0.0, l2=0.1))
    assert (section["type"], section["params"]["adam_w_mode"], section["params"]["torch_adam"]) == ("Adam", False, True)


def test_deepspeed_gets_torchs_sgd_at_the_rate_that_makes_it_ours() -> None:
    section = section_of(OptimizerConfig(kind="sgd", lr=0.5, momentum=0.9, weight_decay=0.0))
    assert section == {"type": "SGD", "params": {"lr": pytest.approx(0.05), "momentum": 0.9}}


@given(momentum=st.floats(0, 0.99), l2=st.floats(0, 0.5), seed=st.integers(0, 99))
def test_torchs_sgd_at_that_rate_is_the_literal_loop(momentum: float, l2: float, seed: int) -> None:
    config = OptimizerConfig(kind="sgd", lr=0.5, momentum=momentum, weight_decay=0.0, l2=l2)
    draw = torch.Generator().manual_seed(seed)
    gradients = torch.randn(5, 3, generator=draw, dtype=torch.float64)
    weight = nn.Parameter(torch.randn(3, generator=draw, dtype=torch.float64))
    literal, velocity = weight.detach().clone(), torch.zeros(3, dtype=torch.float64)
    optimizer = torch.optim.SGD([{"params": [weight], "weight_decay": l2}], **section_of(config)["params"])
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        velocity = momentum * velocity + (1 - momentum) * (gradient + l2 * literal)
        literal = literal - 0.5 * velocity
        torch.testing.assert_close(weight.detach(), literal)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(4, 2)
        self.linear = nn.Linear(2, 3)
        self.norm = nn.RMSNorm(3)
        self.experts_EDF = nn.Parameter(torch.zeros(2, 3, 4))
        self.head = nn.Linear(2, 4, bias=False)
        self.head.weight = self.tokens.weight


def test_matrices_decay_and_norms_biases_and_tied_embeddings_do_not():
    model = Small()
    decay, spared = parameter_groups(model, OptimizerConfig(weight_decay=0.3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decay["weight_decay"] == 0.3
    assert spared["weight_decay"] == 0.0
    assert {names[id(p)] for p in decay["params"]} == {"linear.weight", "experts_EDF"}
    assert {names[id(p)] for p in spared["params"]} == {"tokens.weight", "linear.bias", "norm.weight"}


def section_of(optimizer: OptimizerConfig) -> dict[str, Any]:
    return deepspeed_config(TrainingRun(train=TrainConfig(steps=1), optimizer=optimizer), 1, 100)["optimizer"]


def test_deepspeed_gets_torchs_adamw_with_our_figures():
    section = section_of(OptimizerConfig(lr=1e-3, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.2))
    assert section["type"] == "AdamW"
    assert section["params"]["torch_adam"] is True
    assert (section["params"]["lr"], section["params"]["eps"], section["params"]["weight_decay"]) == (1e-3, 1e-6, 0.2)
    assert list(section["params"]["betas"]) == [0.8, 0.9]


def test_deepspeed_gets_muon_with_both_rates():
    section = section_of(OptimizerConfig(kind="muon", lr=1e-3, muon_lr=0.03, muon_momentum=0.9, weight_decay=0.2))
    assert section["type"] == "Muon"
    params = section["params"]
    assert (params["lr"], params["muon_lr"], params["momentum"], params["weight_decay"]) == (1e-3, 0.03, 0.9, 0.2)
    assert params["torch_adam"] is True
