"""The routers' figures against literal loops; alarms that begin and end once; a bias that stands still ends the run."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_step import WEIGHTS, OneRank, batches, decoder
from tiny_rows import MEDIA, row

from omniloom.data.loader import Batch
from omniloom.errors import ConfigError, DataError
from omniloom.model.moe import RouterOutput
from omniloom.train.groups import HealthConfig, TrainConfig
from omniloom.train.health import STEPS_AT_REST, Health, Routing, add_up, entropy
from omniloom.train.step import training_step

CONFIG = HealthConfig(dead_share=0.25, collapse_share=0.5, alarm_steps=3)
EVEN = [6, 6, 6, 6]


def routing(*choices: list[int]) -> Routing:
    counts_LE = torch.tensor(choices, dtype=torch.float64)
    return Routing(counts_LE, counts_LE / 7)


def health(config: HealthConfig = CONFIG, train: TrainConfig | None = None) -> Health:
    return Health(config, train or TrainConfig(), decoder(1))


@given(st.lists(st.integers(0, 50), min_size=2, max_size=9))
def test_entropy_is_the_literal_sum(counts: list[int]) -> None:
    shares = [count / max(1, sum(counts)) for count in counts]
    literal = -sum(share * math.log(share) for share in shares if share) / math.log(len(counts))
    (found,) = entropy(torch.tensor([counts], dtype=torch.float64)).tolist()
    assert found == pytest.approx(literal, abs=1e-12)
    assert -1e-12 <= found <= 1 + 1e-12


def test_entropy_of_an_even_load_is_one_and_of_one_expert_nothing() -> None:
    assert entropy(torch.tensor([[3.0, 3.0, 3.0], [9.0, 0.0, 0.0], [0.0, 0.0, 0.0]])).tolist() == [
        pytest.approx(1.0),
        0.0,
        0.0,
    ]


def test_routing_is_added_up_token_by_token_without_the_padding() -> None:
    torch.manual_seed(0)
    document_BT = torch.tensor([[0, 0, 1, -1, -1], [0, 1, 1, 1, -1]])
    layers = tuple(RouterOutput(torch.rand(2, 5, 3), torch.randint(0, 9, (3,))) for _ in range(2))
    found = Routing(*add_up(layers, document_BT))
    for layer, router in enumerate(layers):
        shares = [0.0] * 3
        for b in range(2):
            for t in range(5):
                scores = router.scores_BTE[b, t].tolist()
                for e in range(3):
                    shares[e] += scores[e] / sum(scores) if document_BT[b, t] >= 0 else 0.0
        assert found.shares_LE[layer].tolist() == pytest.approx(shares)
        assert found.choices_LE[layer].tolist() == router.tokens_per_expert_E.tolist()


@pytest.mark.parametrize("micro", [1, 4])
def test_a_steps_figures_are_those_of_its_whole_batch(micro: int) -> None:
    model = decoder(1)
    watch = Health(CONFIG, TrainConfig(), model)
    result = training_step(OneRank(model), model, batches(micro), WEIGHTS, TrainConfig(expert_bias_rate=0.5), 1.0)
    figures = watch.figures(result.routing)
    assert {key.rpartition("/")[0] for key in figures} == {"router/1", "router/2"}
    for layer in (1, 2):
        told = {key.rpartition("/")[2]: value for key, value in figures.items() if key.startswith(f"router/{layer}/")}
        counts = told["tokens_per_expert"]
        assert all(isinstance(count, int) for count in counts)
        assert sum(counts) == 2 * result.tokens
        assert told["load_max_over_mean"] == pytest.approx(max(counts) / (sum(counts) / 4))
        assert told["dead_experts"] == counts.count(0)
        shares = [count / sum(counts) for count in counts]
        assert told["load_entropy"] == pytest.approx(-sum(s * math.log(s) for s in shares if s) / math.log(4))
        assert 0.9 < told["score_entropy"] <= 1
        moved = 0.5 * torch.sign(torch.tensor(counts).float().mean() - torch.tensor(counts))
        assert (told["bias_min"], told["bias_max"]) == (moved.min().item(), moved.max().item())
    sums = result.routing.shares_LE.sum(-1)
    assert sums.tolist() == pytest.approx([result.tokens] * 2, rel=1e-5), "the shares of each token add up to one"


def test_a_model_without_experts_has_no_figures_and_no_alarms() -> None:
    dense = decoder(0)
    dense.layers[1].mlp = dense.layers[0].mlp
    watch = Health(CONFIG, TrainConfig(), dense)
    result = training_step(OneRank(dense), dense, [Batch([row(MEDIA, 0)])], WEIGHTS, TrainConfig(), 1.0)
    assert watch.figures(result.routing) == {}
    assert watch.alarms({"step": 1}) == []
    watch.refuse_bias_at_rest(1, result.routing)


def told_by(watch: Health, first_layer: list[list[int]], start: int = 1) -> list[dict[str, Any]]:
    """The alarms of the steps in which the first layer had these loads."""
    told = []
    for step, choices in enumerate(first_layer, start):
        told += watch.alarms({"step": step, **watch.figures(routing(choices, EVEN))})
    return told


DEAD, FEW = [0, 0, 11, 13], [8, 8, 0, 8]  # over a quarter of four experts, and no more than that
COLLAPSED = [19, 2, 2, 1]  # every token would be 2 × the mean, half way is 1.5


def test_an_alarm_begins_once_when_it_has_lasted_and_ends_once() -> None:
    told = told_by(health(), [EVEN, DEAD, DEAD, EVEN, DEAD, DEAD, DEAD, DEAD, DEAD, FEW, EVEN, DEAD])
    dead = [alarm for alarm in told if alarm["alarm"] == "dead_experts"]
    assert [(alarm["step"], alarm["state"], alarm["lasted_steps"]) for alarm in dead] == [
        (7, "begins", 3),
        (10, "ends", 5),
    ]
    assert dead[0] == {
        "step": 7, "layer": 1, "alarm": "dead_experts", "state": "begins", "value": 0.5, "limit": 0.25,
        "lasted_steps": 3,
    }  # fmt: skip
    assert told_by(health(), [FEW] * 9) == [], "not over the limit"


def test_a_busiest_expert_beyond_its_share_of_the_way_to_all_is_an_alarm() -> None:
    (told,) = told_by(health(), [COLLAPSED] * 4)
    assert (told["alarm"], told["step"], told["limit"], told["layer"]) == ("collapse", 3, 1.5, 1)
    assert told["value"] == pytest.approx(19 / 6)
    assert told_by(health(), [[9, 5, 5, 5]] * 9) == [], "half way, not over it"


@pytest.mark.parametrize("cut", range(10))
def test_alarms_are_the_same_when_a_run_is_resumed(cut: int) -> None:
    """The lines before are read again; what they told is not told twice."""
    loads = [EVEN, DEAD, DEAD, DEAD, DEAD, EVEN, COLLAPSED, COLLAPSED, COLLAPSED, EVEN]
    whole, resumed = told_by(health(), loads), health()
    recent = loads[max(0, cut - CONFIG.alarm_steps) : cut]
    told_by(resumed, recent)
    again = told_by(resumed, loads[cut:], cut + 1)
    told = [alarm | {"lasted_steps": None} for alarm in whole if alarm["step"] > cut]
    assert [alarm | {"lasted_steps": None} for alarm in again] == told


UNEVEN = routing([9, 5, 5, 5], EVEN)


def test_a_bias_that_stands_still_under_uneven_load_ends_the_run() -> None:
    watch = health()
    for step in range(1, STEPS_AT_REST):
        watch.refuse_bias_at_rest(step, UNEVEN)
    with pytest.raises(DataError) as caught:
        watch.refuse_bias_at_rest(STEPS_AT_REST, UNEVEN)
    for word in ("bias of layer 1", f"in {STEPS_AT_REST} steps", "1.5 times the mean", "a fault of omniloom"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("train", "uneven"),
    [
        (TrainConfig(), routing(EVEN, EVEN)),
        (TrainConfig(expert_bias_tolerance=0.5), UNEVEN),
        (TrainConfig(expert_bias_rate=0.0), UNEVEN),
    ],
)
def test_a_bias_that_need_not_move_may_rest(train: TrainConfig, uneven: Routing) -> None:
    watch = health(train=train)
    for step in range(3 * STEPS_AT_REST):
        watch.refuse_bias_at_rest(step, uneven)


def test_a_bias_that_moves_is_never_at_rest() -> None:
    model = decoder(1)
    watch = Health(CONFIG, TrainConfig(), model)
    for step in range(3 * STEPS_AT_REST):
        if step % (STEPS_AT_REST - 1) == 0:
            for moe in (model.layers[1].mlp, model.mtp[0].layer.mlp):
                moe.router.bias_E += 1e-3
        watch.refuse_bias_at_rest(step, UNEVEN)


@pytest.mark.parametrize("changes", [{"dead_share": -0.1}, {"collapse_share": 1.5}, {"alarm_steps": 0}])
def test_limits_that_cannot_hold_are_refused(changes: dict[str, Any]) -> None:
    ((key, value),) = changes.items()
    with pytest.raises(ConfigError, match=rf"health\.{key}={value}"):
        HealthConfig(**changes).check()
