"""Go and no-go, what near it fits, and degrees that cannot be."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_params import preset

from omniloom.errors import ConfigError
from omniloom.plan.alternatives import KEYS
from omniloom.plan.config import DeviceConfig, HardwareConfig, Workload
from omniloom.plan.memory import count_memory
from omniloom.plan.planner import make_plan

FIELDS = {key: name for name, key in KEYS.items()}
H100 = DeviceConfig("h100", 80_000_000_000, {"bf16": 989e12}, memory_bytes_per_s=3.35e12, watts=700)
NODE = HardwareConfig("h100_1x8", H100, 1, 8, 450e9, 50e9, 2.0)
LLAMA = Workload(preset("llama_8b"), 8_192, 64, 8, ranks=8, zero_stage=0, precision="bf16", steps=1_000)


def applied(workload: Workload, overrides: tuple[str, ...]) -> Workload:
    changes = dict(word.split("=") for word in overrides if not word.startswith("cluster.nodes="))
    kinds = {"true": True, "false": False}
    return replace(
        workload, **{FIELDS[key]: kinds.get(value) if value in kinds else int(value) for key, value in changes.items()}
    )


def test_a_run_that_fits_is_a_go_without_alternatives() -> None:
    plan = make_plan(replace(LLAMA, zero_stage=3, micro_batch_size=1, activation_checkpointing=True), NODE)
    assert plan.fits is True
    assert plan.alternatives == ()
    assert "of cluster.device.memory_bytes=80 GB" in plan.constraint


def test_a_no_go_names_what_binds_and_three_that_fit_the_fastest_first() -> None:
    plan = make_plan(LLAMA, NODE)
    assert plan.fits is False
    assert "is over cluster.device.memory_bytes=80 GB, most of it " in plan.constraint
    assert len(plan.alternatives) == 3
    times = [one.step_s for one in plan.alternatives]
    assert all(time is not None for time in times)
    assert times == sorted(times)
    for one in plan.alternatives:
        found = make_plan(applied(LLAMA, one.overrides), NODE)
        assert found.fits is True
        assert found.memory.total == one.memory_bytes
        assert found.step.total_s == one.step_s


def test_no_configuration_that_fits_is_nearer() -> None:
    """Against all of them: the fewest keys changed and the fewest halvings."""

    def distance(one: Workload) -> int:
        return (
            (one.zero_stage != LLAMA.zero_stage)
            + one.activation_checkpointing
            + int(math.log2(LLAMA.micro_batch_size // one.micro_batch_size))
        )

    every = [
        replace(LLAMA, zero_stage=stage, activation_checkpointing=on, micro_batch_size=micro)
        for stage in range(4)
        for on in (False, True)
        for micro in (1, 2, 4, 8)
    ]
    fitting = sorted(distance(one) for one in every if count_memory(one).total <= 80e9)
    chosen = [distance(applied(LLAMA, one.overrides)) for one in make_plan(LLAMA, NODE).alternatives]
    assert sorted(chosen) == fitting[:3]


def test_where_nothing_on_the_cluster_fits_it_grows() -> None:
    deepseek = Workload(preset("deepseek_v3"), 4_096, 4_096, 1, ranks=8, zero_stage=3, precision="bf16")
    plan = make_plan(deepseek, NODE)
    assert plan.fits is False
    assert plan.alternatives
    for one in plan.alternatives:
        words = dict(word.split("=") for word in one.overrides)
        assert int(words["cluster.workers"]) == 8 * int(words["cluster.nodes"]) > 8


def test_ranks_of_one_machine_do_not_grow() -> None:
    here = HardwareConfig(device=DeviceConfig("cpu", 24_000_000_000))
    plan = make_plan(replace(LLAMA, precision="fp32", ranks=1), here)
    assert plan.fits is False
    assert plan.alternatives == ()


def test_memory_that_is_not_known_leaves_the_verdict_open() -> None:
    plan = make_plan(LLAMA, replace(NODE, device=replace(H100, memory_bytes=None)))
    assert plan.fits is None
    assert "set cluster.device.memory_bytes" in plan.constraint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ranks": 6, "tensor": 4}, "cluster.workers=6 must be a multiple of parallel.tensor=4"),
        ({"tensor": 8, "ranks": 8, "sequence": 2}, "= 16"),
        ({"sizes": preset("mixtral_8x7b"), "expert": 3}, "= 8 is no multiple"),
        ({"sizes": preset("mixtral_8x7b"), "ranks": 16, "expert": 16}, "model.n_routed_experts=8 must be a multiple"),
        ({"expert": 8}, "parallel.expert=8 shares experts, and the model has none"),
        ({"tensor": 16, "ranks": 16}, "model.num_key_value_heads=8 must be a multiple of parallel.tensor=16"),
        ({"tensor": 8, "sequence": 8, "ranks": 64}, "heads=32 must be a multiple of parallel.tensor=8 × parallel.seq"),
        ({"sizes": replace(preset("llama_8b"), hidden_size=10**10)}, "look at its sizes"),
        ({"steps": 10**14}, "tokens, over 1e+18"),
        ({"sizes": replace(preset("llama_8b"), num_attention_heads=12, hidden_size=4_128), "tensor": 8}, "heads=12"),
        ({"seq_len": 4_097, "sequence": 2}, "data.seq_len=4097 must be a multiple of parallel.sequence=2"),
        ({"pipeline": 64, "ranks": 64}, "parallel.pipeline=64 is over model.num_hidden_layers=32"),
        ({"global_batch_size": 20}, "train.global_batch_size=20 must be a multiple"),
    ],
)
def test_degrees_that_do_not_divide_are_refused_with_both_numbers(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make_plan(replace(LLAMA, **changes), replace(NODE, nodes=16))
    assert said in str(refused.value)


def test_more_ranks_than_devices_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"cluster.workers=16 are over cluster.nodes=1 × cluster.devices_per_node=8 = 8"
    ):
        make_plan(replace(LLAMA, ranks=16, micro_batch_size=1), NODE)


def test_what_training_refuses_is_no_alternative() -> None:
    plan = make_plan(LLAMA, NODE, is_allowed=lambda one: one.zero_stage in (0, 3))
    assert plan.alternatives
    assert {applied(LLAMA, one.overrides).zero_stage for one in plan.alternatives} <= {0, 3}


def test_a_pipeline_keeps_whole_gradients() -> None:
    asked = replace(LLAMA, sizes=preset("gpt3_175b"), seq_len=2_048, ranks=128, pipeline=16, global_batch_size=1_024)
    plan = make_plan(asked, replace(NODE, nodes=16))
    assert plan.fits is False
    assert plan.alternatives
    assert all(applied(asked, one.overrides).zero_stage < 2 for one in plan.alternatives)


def test_a_growth_whose_time_is_not_known_names_the_key() -> None:
    asked = Workload(preset("mixtral_8x7b"), 4_096, 512, 8, ranks=8, zero_stage=3, precision="bf16")
    alternatives = make_plan(asked, replace(NODE, network_bytes_per_s=None)).alternatives
    grown = [one for one in alternatives if any("cluster.nodes" in word for word in one.overrides)]
    assert grown
    assert all(one.step_s is None and "cluster.network_bytes_per_s" in one.missing for one in grown)


def test_every_missing_key_has_the_figures_that_hang_on_it() -> None:
    bare = replace(NODE, usd_per_device_hour=None, device=replace(H100, watts=None, memory_bytes_per_s=None))
    missing = make_plan(LLAMA, bare).missing
    assert missing.keys() == {
        "cluster.device.memory_bytes_per_s",
        "cluster.usd_per_device_hour",
        "cluster.device.watts",
    }
    assert {"step_s", "days", "gpu_hours", "elementwise"} <= set(missing["cluster.device.memory_bytes_per_s"])
    assert missing["cluster.usd_per_device_hour"] == ["cost_usd"]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["llama_8b", "mixtral_8x7b", "omni_medium"]), st.integers(0, 3), st.sampled_from([1, 4, 16]))
def test_an_alternative_always_fits(name: str, stage: int, micro: int) -> None:
    asked = Workload(preset(name), 4_096, 128, micro, ranks=8, zero_stage=stage, precision="bf16")
    plan = make_plan(asked, NODE)
    assert plan.fits is (count_memory(asked).total <= 80e9)
    for one in plan.alternatives:
        assert one.memory_bytes <= 80e9
        assert asked.global_batch_size % applied(asked, one.overrides).micro_batch_size == 0
