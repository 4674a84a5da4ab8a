"""A rank's bytes against sums by hand, and what sharing does to them; real ranks are in tests/train."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_params import preset

from omniloom.plan.config import Workload
from omniloom.plan.memory import GPU_FRAGMENTATION, by_stage, count_memory
from omniloom.plan.params import count_parameters
from omniloom.plan.sharding import Shards, shard, stages

LLAMA = preset("llama_8b")
N = 8_030_261_248


def fullest(of: Workload) -> Shards:
    return max((shard(of, stage) for stage in stages(of)), key=lambda shards: shards.whole)


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


def test_sgd_keeps_one_moment() -> None:
    assert count_memory(workload(zero_stage=0, optimizer="sgd")).parts["optimizer"] == 8 * N  # and masters


def test_what_is_offloaded_is_not_on_the_gpu() -> None:
    at = {
        where: count_memory(
            workload(zero_stage=3, offload_optimizer="optimizer" in where, offload_parameters="parameters" in where)
        ).parts
        for where in ("", "optimizer", "optimizer, parameters")
    }
    assert at[""]["optimizer"] == pytest.approx(12 * N / 8)
    assert at["optimizer"].keys() & {"optimizer", "gradients"} == set()
    assert at["optimizer"]["weights"] == pytest.approx(2 * N / 8)
    assert at["optimizer, parameters"].keys() & {"optimizer", "gradients", "weights"} == set()
    assert at["optimizer, parameters"]["gathered weights"] == 2 * 1_000_000_000
    on_cpu = [count_memory(workload(zero_stage=2, offload_optimizer=off), on_cpu=True).total for off in (False, True)]
    assert on_cpu[0] == on_cpu[1], "there it is all one memory"


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


def held_after(workload: Workload, *names: str) -> float:
    """What the parts of these names sum to."""
    parts = count_memory(workload).parts
    return sum(parts.get(name, 0.0) for name in names)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_several_micro_batches_keep_gradients_beside_the_activations(stage: int) -> None:
    """All of them, at ZeRO 2 the shard's; and ZeRO 1 its bucket."""
    once = workload(zero_stage=stage, micro_batch_size=4, global_batch_size=32)
    twice = replace(once, global_batch_size=64)
    assert (once.accumulation, twice.accumulation) == (1, 2)
    assert count_memory(once).moment == "backward"
    more = held_after(twice, "gradients", "buffers") - held_after(once, "gradients", "buffers")
    kept, bucket = (2 * N / 8, 0) if stage == 2 else (2 * N, 2 * 500_000_000 if stage == 1 else 0)
    assert more == pytest.approx(kept + bucket)


def test_zero_1_holds_every_gradient_before_it_reduces_a_bucket() -> None:
    few = workload(zero_stage=1, micro_batch_size=1, global_batch_size=8, activation_checkpointing=True)
    parts = count_memory(replace(few, seq_len=128)).parts
    assert parts["gradients"] == pytest.approx(2 * N)
    assert parts["buffers"] == pytest.approx(2 * 500_000_000)


def test_zero_3_steps_a_billion_numbers_at_a_time() -> None:
    gpt = Workload(
        preset("gpt3_175b"), 128, 8, 1, ranks=8, zero_stage=3, precision="bf16", activation_checkpointing=True
    )
    memory = count_memory(gpt)
    assert memory.moment == "step"
    assert memory.parts["buffers"] == pytest.approx((2 + 4 + 4) * 1e9 + 2 * 500_000_000)
    assert memory.parts["gradients"] == pytest.approx(2 * 174_604_259_328 / 8)
    assert "gathered weights" not in memory.parts


def test_a_pipelines_later_stages_hold_the_experts() -> None:
    """Six dense layers and two sparse ones, on four stages: the last has both of these."""
    sizes = replace(preset("deepseek_v3"), num_hidden_layers=8, first_k_dense_replace=6, num_nextn_predict_layers=0)
    found = stages(Workload(sizes, 4_096, 64, 1, ranks=4, pipeline=4))
    assert [list(stage.layers) for stage in found] == [[0, 1], [2, 3], [6, 7]]
    assert [stage.under_way for stage in found] == [4, 3, 1]
    routed = [shard(Workload(sizes, 4_096, 64, 1, ranks=4, pipeline=4), stage).routed for stage in found]
    assert routed == [0, 0, 2 * 256 * 3 * 7_168 * 2_048]


def test_prediction_modules_wait_for_one_micro_batch_alone() -> None:
    """They stand in the last stage, where 1F1B has one under way; the first has as many as there are stages."""
    deepseek = replace(preset("deepseek_v3"), num_nextn_predict_layers=0)
    asked = Workload(deepseek, 4_096, 2_048, 1, ranks=1_024, pipeline=16, expert=64, precision="bf16")
    ahead = replace(asked, sizes=preset("deepseek_v3"))
    assert "activations (text)" in count_memory(asked).parts
    assert count_memory(ahead).parts == count_memory(asked).parts  # of the second stage, the fullest


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
    assert fullest(shared).whole <= fullest(alone).whole
    assert count_memory(shared).total <= count_memory(alone).total * 1.0001
    staged = replace(shared, pipeline=pipeline)
    assert fullest(staged).whole <= fullest(shared).whole * 1.0001


def test_shards_hold_every_parameter_once() -> None:
    deepseek = preset("deepseek_v3")
    counted = count_parameters(deepseek)
    everything = counted.params_total + counted.params_mtp
    assert fullest(Workload(deepseek, 4_096, 64, 1, ranks=64)).whole == everything
    split = fullest(Workload(deepseek, 4_096, 64, 1, ranks=64, expert=64))
    assert split.routed * 64 + split.common == pytest.approx(everything)
    assert split.routed_replicas == 1
    assert split.common_replicas == 64


def test_every_stage_is_there_with_and_without_checkpointing() -> None:
    found = by_stage(workload())
    assert list(found) == [(stage, on) for stage in range(4) for on in (False, True)]
    assert found[3, False].total == count_memory(workload()).total
