"""A rank's bytes against sums by hand, and what sharing does to them; real ranks are in tests/train."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_params import preset

from omniloom.plan.config import Workload
from omniloom.plan.memory import GPU_FRAGMENTATION, by_stage, count_memory
from omniloom.plan.params import count_parameters
from omniloom.plan.sharding import shard

LLAMA = preset("llama_8b")
N = 8_030_261_248


def workload(**changes: object) -> Workload:
    base = Workload(LLAMA, 4_096, 64, 1, ranks=8, precision="bf16", zero_stage=3)
    return replace(base, **changes)


def test_zero_shares_what_its_stage_shares() -> None:
    held = {stage: count_memory(workload(zero_stage=stage)).parts for stage in range(4)}
    for stage in (0, 1, 2):
        assert held[stage]["weights"] == 2 * N
    assert held[3]["weights"] == pytest.approx(2 * N / 8)
    assert held[0]["optimizer"] == 12 * N  # masters and two moments, all in float32
    for stage in (1, 2, 3):
        assert held[stage]["optimizer"] == pytest.approx(12 * N / 8)
    assert held[3]["gathered weights"] == 2 * 1_000_000_000


def test_muon_keeps_one_moment_of_the_layers_matrices() -> None:
    adamw, muon = (
        count_memory(workload(zero_stage=0, optimizer=kind)).parts["optimizer"] for kind in ("adamw", "muon")
    )
    counted = count_parameters(LLAMA)
    matrices = N - counted.embedding - counted.head - counted.norms
    assert adamw - muon == pytest.approx(4 * matrices)


def test_float32_at_zero_0_needs_no_masters() -> None:
    assert count_memory(workload(zero_stage=0, precision="fp32")).parts["optimizer"] == 8 * N
    assert count_memory(workload(zero_stage=1, precision="fp32")).parts["optimizer"] == pytest.approx(12 * N / 8)


def test_autocast_keeps_its_casts_of_the_weights() -> None:
    assert count_memory(workload(precision="bf16_autocast")).parts["weights as bf16"] == 2 * N


def test_activations_of_a_llama_layer_by_hand() -> None:
    memory = count_memory(workload(micro_batch_size=8))
    assert memory.moment == "backward"
    width, inner, heads, key_heads, head = 4_096, 14_336, 32, 8, 128
    norms = 2 * (2 * width + 4)
    attention = 2 * width + 2 * (heads * head + 2 * key_heads * head) + 2 * heads * head + 4 * heads + 2 * heads * head
    feed_forward = 2 * width + 4 * 2 * inner
    layer = norms + attention + feed_forward
    ends = 5 + 4 * head + 2 * width + 4
    rows = 8 * 4_096
    assert memory.parts["activations (text)"] == pytest.approx(rows * (33 * layer + ends))
    assert memory.parts["logits"] == pytest.approx(rows * (2 * width + 4 * 128_256 + 4 * 128_256 + 2 * 128_256))


def test_checkpointing_keeps_each_layers_input_and_runs_one_layer_again() -> None:
    whole, inputs = (count_memory(workload(micro_batch_size=8, activation_checkpointing=on)) for on in (False, True))
    layers = (whole.parts["activations (text)"] - inputs.parts["activations (text)"]) / (8 * 4_096)
    a_layer = layers + 32 * 2 * 4_096
    assert inputs.total < whole.total
    assert a_layer / 31 == pytest.approx(  # 33 layers' worth against two
        (whole.parts["activations (text)"] / (8 * 4_096) - (5 + 4 * 128 + 2 * 4_096 + 4)) / 33, rel=0.01
    )


def test_a_gpus_allocator_has_an_allowance() -> None:
    parts = dict(count_memory(workload()).parts)
    allowance = parts.pop("fragmentation")
    assert allowance == pytest.approx(GPU_FRAGMENTATION * sum(parts.values()))


def test_activations_are_split_by_modality_with_their_encoders() -> None:
    omni = preset("omni_small")
    base = Workload(omni, 2_048, 32, 32, precision="bf16", share_by_modality={"text": 0.5, "image": 0.5})
    parts = count_memory(base).parts
    assert parts["activations (image)"] - parts["activations (text)"] == pytest.approx(
        0.5 * 32 * 2_048 * (2 * 3 * 14**2 + 2 * omni.hidden_size + 4)
    )


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["llama_8b", "mixtral_8x7b", "deepseek_v3", "omni_small"]),
    st.integers(0, 3),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 8]),
)
def test_more_ranks_never_hold_more(
    name: str, stage: int, tensor: int, pipeline: int, sequence: int, expert: int
) -> None:
    ranks = 64
    alone = Workload(preset(name), 2_048, 1_024, 2, ranks=ranks, zero_stage=stage, precision="bf16")
    shared = replace(alone, tensor=tensor, sequence=sequence, expert=expert)
    assert shard(shared).whole <= shard(alone).whole
    assert count_memory(shared).total <= count_memory(alone).total * 1.0001
    staged = replace(shared, pipeline=pipeline)
    assert shard(staged).whole <= shard(shared).whole * 1.0001


def test_shards_hold_every_parameter_once() -> None:
    deepseek = preset("deepseek_v3")
    counted = count_parameters(deepseek)
    everything = counted.params_total + counted.params_mtp
    assert shard(Workload(deepseek, 4_096, 64, 1, ranks=64)).whole == everything
    split = shard(Workload(deepseek, 4_096, 64, 1, ranks=64, expert=64))
    assert split.routed * 64 + split.common == pytest.approx(everything)
    assert split.routed_replicas == 1
    assert split.common_replicas == 64


def test_every_stage_is_there_with_and_without_checkpointing() -> None:
    stages = by_stage(workload())
    assert list(stages) == [(stage, on) for stage in range(4) for on in (False, True)]
    assert stages[3, False].total == count_memory(workload()).total
