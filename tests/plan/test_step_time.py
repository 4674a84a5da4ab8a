"""Step time by hand: each part of a small configuration against a literal sum; what more of anything does."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.errors import ConfigError
from omniloom.model.config import ModelConfig
from omniloom.plan.collectives import Group, Links
from omniloom.plan.config import Curve, DeviceConfig, Exchange, HardwareConfig, Measurements, Rates, Workload
from omniloom.plan.flops import train_flops
from omniloom.plan.measured import (
    attention_s_per_flop,
    describe,
    measurements_path,
    read_curve,
    read_measurements,
    write_measurements,
)
from omniloom.plan.params import count_parameters
from omniloom.plan.step_time import predict_step

SMALL = ModelConfig(
    vocab_size=100, hidden_size=16, num_hidden_layers=2, max_position_embeddings=32, attention="grouped",
    num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, n_routed_experts=0,
    image_patch_pixels=None, video_patch_pixels=None, audio_mels=None,
)  # fmt: skip
EXPERTS = replace(
    SMALL, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=24,
    first_k_dense_replace=0,
)  # fmt: skip
LAYER = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 48  # queries, keys and values of 2 heads of 4, output, SwiGLU
FAST = 1e30  # what is that fast takes no time
DEVICE = DeviceConfig(
    name="gpu",
    peak_flops_per_s={"fp32": 1e9, "bf16": 4e9},
    attention_flops_per_s={"fp32": 1e8},
    memory_bytes_per_s=FAST,
)
MACHINE = HardwareConfig(device=DEVICE, node_bytes_per_s=1e8, network_bytes_per_s=1e7)
ONE = Workload(SMALL, seq_len=32, global_batch_size=8, micro_batch_size=2, zero_stage=0)


def seconds(workload: Workload, hardware: HardwareConfig = MACHINE, **device: Any) -> dict[str, float]:
    """By part, 0 for those that take no time."""
    step = predict_step(workload, replace(hardware, device=replace(hardware.device, **device)))
    assert step.total_s == pytest.approx(sum(step.seconds.values()))
    return step.seconds


def test_products_and_attention_by_hand() -> None:
    took = seconds(ONE)
    tokens = 8 * 32
    assert took["projections"] == pytest.approx(3 * 2 * tokens * 2 * LAYER / 1e9)
    assert took["head"] == pytest.approx(3 * 2 * tokens * 100 * 16 / 1e9)
    causal = 2 * 2 * 16 * 33 / 2  # two products of 4 heads of 4 with the keys before it, a token
    assert took["attention"] == pytest.approx((1 + 2.5) * tokens * 2 * causal / 1e8)
    half = seconds(replace(ONE, target_share=0.5, precision="bf16"))
    assert half["head"] == pytest.approx(took["head"] / 2 / 4)
    assert half["attention"] == pytest.approx((1 + 2.5) * tokens * 2 * causal / 4e9)  # of bf16 only products are known


def test_checkpointing_runs_the_layers_once_more() -> None:
    took, again = seconds(ONE), seconds(replace(ONE, activation_checkpointing=True))
    assert again["projections"] == pytest.approx(took["projections"] * 4 / 3)
    assert again["attention"] == pytest.approx(took["attention"] * 4.5 / 3.5)
    assert again["head"] == took["head"]


def test_experts_by_hand() -> None:
    took = seconds(replace(ONE, sizes=EXPERTS))
    attention = 16 * 16 + 2 * 16 * 8 + 16 * 16
    always = attention + 16 * 8 + 3 * 16 * 24  # router, shared expert
    assert took["projections"] == pytest.approx(3 * 2 * 256 * 2 * always / 1e9)
    assert took["experts"] == pytest.approx(3 * 2 * 256 * 2 * 2 * 3 * 16 * 24 / 1e9)
    # The router scores in float32 whatever the rest does.
    half = seconds(replace(ONE, sizes=EXPERTS, precision="bf16"))
    assert half["projections"] == pytest.approx(3 * 2 * 256 * 2 * ((always - 128) / 4e9 + 128 / 1e9))


def test_sparse_attention_runs_its_blocks_twice_and_linear_attention_its_states() -> None:
    sparse = replace(SMALL, attention_pattern="sparse", window_tokens=8, global_stride=4, max_global_tokens=6)
    seen = 2 * 8 + 6 / 2  # a block's two windows, and half of the globals there are at most, in the mean
    assert seconds(replace(ONE, sizes=sparse))["attention"] == pytest.approx(
        (1 + 1 + 2.5) * 256 * 2 * (2 * 2 * 16 * seen) / 1e8
    )
    within = replace(sparse, window_tokens=32)  # rows no longer than the window
    assert seconds(replace(ONE, sizes=within))["attention"] == pytest.approx(seconds(ONE)["attention"])
    linear = replace(SMALL, attention_pattern="linear")
    states, chunk = 4 * 4 * 4 * 4, 4 * 64 * 2 * (4 + 4)  # 4 heads of 4: one state each; 64 tokens of a chunk
    assert seconds(replace(ONE, sizes=linear))["attention"] == pytest.approx(3 * 256 * 2 * (states + chunk) / 1e9)


def test_encoders_read_their_share_of_the_positions() -> None:
    media = replace(SMALL, image_patch_pixels=2, audio_mels=5, audio_frames_per_token=4)
    took = seconds(replace(ONE, sizes=media, share_by_modality={"text": 0.5, "image": 0.25, "audio": 0.25}))
    patch, sound = 3 * 4 * 16, 2 * 3 * 5 * 16 + 3 * 16 * 16  # a token of sound is four frames, then two, then one
    assert took["encoders"] == pytest.approx(3 * 2 * 64 * (patch + sound) / 1e9)
    assert "encoders" not in seconds(replace(ONE, sizes=media))


def test_modules_ahead_are_a_layer_a_junction_and_a_head_more() -> None:
    took, ahead = seconds(ONE), seconds(replace(ONE, sizes=replace(SMALL, num_nextn_predict_layers=1)))
    assert ahead["projections"] == pytest.approx(3 * 2 * 256 * (3 * LAYER + 2 * 16 * 16) / 1e9)
    assert ahead["head"] == pytest.approx(2 * took["head"])
    assert ahead["attention"] == pytest.approx(1.5 * took["attention"])


def test_muon_multiplies_its_matrices() -> None:
    took = seconds(replace(ONE, optimizer="muon"))
    sides = [(16, 16), (8, 16), (8, 16), (16, 16), (16, 48), (16, 48), (16, 48)]
    flops = 2 * 5 * sum(4 * n * n * k + 2 * n**3 for n, k in sides)
    assert took["optimizer"] == pytest.approx(flops / 1e9)


def test_a_product_is_no_faster_than_memory_brings_it_its_numbers() -> None:
    took = seconds(ONE, peak_flops_per_s={"fp32": FAST}, attention_flops_per_s={"fp32": FAST}, memory_bytes_per_s=1e6)
    rows, micros = 2 * 32, 4
    matrices = [(16, 16), (16, 8), (16, 8), (16, 16), (16, 48), (16, 48), (48, 16)]
    moved = sum(rows * (i + o) + i * o for i, o in matrices)
    assert took["projections"] == pytest.approx(micros * 3 * 2 * 4 * moved / 1e6)


@pytest.mark.parametrize(
    ("precision", "stage", "each", "exchange", "first"),
    [
        ("fp32", 0, 92, 16, 0), ("bf16", 0, 118, 8, 0), ("fp32", 1, 128, 32, 0), ("bf16", 2, 128, 16, 3),
        ("bf16_autocast", 3, 128, 40 + 12, 3),
    ],
)  # fmt: skip
def test_the_optimizer_by_hand(precision: str, stage: int, each: int, exchange: int, first: int) -> None:
    workload = replace(ONE, precision=precision, zero_stage=stage)
    took = seconds(workload, memory_bytes_per_s=1e6)
    parameters = 2 * LAYER + 5 * 16 + 100 * 16
    assert parameters == count_parameters(SMALL).params_total
    assert took["optimizer"] == pytest.approx(each * parameters / 1e6)
    casts = 4 * 12 if precision == "bf16_autocast" else 0
    weight = 2 if precision == "bf16" else 4
    added = 3 * (1 if stage == 3 else 3) * weight  # at each of four micro batches but the first
    assert took["gradients"] == pytest.approx(((1 + first) * exchange + casts + added) * parameters / 1e6)


def test_norms_residuals_and_loss_by_hand() -> None:
    gpt = replace(SMALL, norm="layer", position="learned", activation="relu", num_key_value_heads=4)
    took = seconds(replace(ONE, sizes=gpt), memory_bytes_per_s=1e6, peak_flops_per_s={"fp32": FAST})
    unproductive = {part: took[part] for part in ("elementwise", "head")}
    norm, residual, readers = 2 + 3, 2 * 3 + 2 * 3, 3 * 2
    attention = (2 + 2) + (2 + 6 + 2)  # padded and joined; padded, split in three, and zeros
    width = 2 * norm + residual + readers + attention
    numbers = 2 * (16 * width + 48 * (2 + 3)) + 16 * (2 + 2 + 5 + 2)  # layers; lookup and learned positions
    assert unproductive["elementwise"] == pytest.approx(256 * 4 * numbers / 1e6)
    head = 16 * (norm + 2 + 4) + 100 * (2 + 4)
    product = 4 * 3 * 4 * (64 * (16 + 100) + 1600)
    assert unproductive["head"] == pytest.approx((256 * 4 * head + product) / 1e6)


@pytest.mark.parametrize(("stage", "passes"), [(0, 2), (1, 2 + 1), (2, 4 * 2 + 1), (3, 4 * (1 + 1))])
def test_what_zero_exchanges_by_hand(stage: int, passes: int) -> None:
    workload = replace(ONE, zero_stage=stage, ranks=4, global_batch_size=32)
    held = 4 * count_parameters(SMALL).params_total
    on_cpu = replace(MACHINE, device=replace(DEVICE, name="cpu"))
    exchange = passes * 3 / 4 * held / 1e8
    assert seconds(workload, on_cpu)["ZeRO exchange"] == pytest.approx(exchange)
    took = seconds(workload)  # on a GPU stage 3 hides it behind what is computed
    computing = sum(took[part] for part in ("projections", "attention", "head"))
    hidden = computing if stage == 3 else 0
    assert took.get("ZeRO exchange", 0.0) == pytest.approx(max(0.0, exchange - hidden), abs=1e-12)
    assert "ZeRO exchange" not in seconds(replace(workload, ranks=1, global_batch_size=8))


def test_zero_3_gathers_a_large_model_twice() -> None:
    large = replace(SMALL, vocab_size=10_000_000, hidden_size=256)
    workload = replace(ONE, sizes=large, zero_stage=3, ranks=2, global_batch_size=4)
    parameters = count_parameters(large).params_total
    assert parameters > 2.5e9
    on_cpu = replace(MACHINE, device=replace(DEVICE, name="cpu"))
    passes = 2 + (1 - 5e8 / parameters)
    assert seconds(workload, on_cpu)["ZeRO exchange"] == pytest.approx(passes / 2 * 4 * parameters / 1e8)


def test_degrees_share_the_work_and_exchange_for_it() -> None:
    took = seconds(replace(ONE, precision="bf16"))
    micros, rows = 4, 2 * 32
    tensor = seconds(replace(ONE, precision="bf16", ranks=2, tensor=2))
    assert tensor["projections"] == pytest.approx(took["projections"] / 2)
    assert tensor["attention"] == pytest.approx(took["attention"] / 2)
    assert tensor["tensor parallel"] == pytest.approx(micros * 2 * 4 * (2 * 1 / 2 * rows * 16 * 2) / 1e8)
    sequence = seconds(replace(ONE, precision="bf16", ranks=2, sequence=2))
    assert sequence["projections"] == pytest.approx(took["projections"] / 2)
    numbers = rows / 2 * (16 + 8 + 8 + 16)  # queries, keys, values, and what was attended
    assert sequence["sequence parallel"] == pytest.approx(micros * 2 * 2 * (1 / 2 * numbers * 2) / 1e8)


def test_experts_are_sent_for_and_back_both_ways() -> None:
    workload = replace(ONE, sizes=EXPERTS, ranks=4, global_batch_size=32, expert=4)
    took = seconds(workload)
    chosen = 2 * 32 * 2 * 16 * 4
    assert took["expert parallel"] == pytest.approx(4 * 2 * 4 * (3 / 4 * chosen) / 1e8)
    assert took["experts"] == pytest.approx(seconds(replace(ONE, sizes=EXPERTS))["experts"])
    # Two ranks a node: one of the three others is near, and two are far, over the network's tenth of the speed.
    far = seconds(workload, replace(MACHINE, nodes=2))
    assert far["expert parallel"] == pytest.approx(4 * 2 * 4 * (2 / 4 * chosen) / 1e7)


def test_a_pipelines_bubble_is_its_stages_less_one_over_its_micro_batches() -> None:
    whole = seconds(ONE)
    staged = seconds(replace(ONE, ranks=2, pipeline=2))
    assert staged["projections"] == pytest.approx(whole["projections"] / 2)
    passed = 4 * 2 * (16 * 64 * 4) / 1e8  # forward and back, at each of four micro batches
    assert staged["pipeline"] == pytest.approx(passed)
    working = sum(staged[part] for part in ("projections", "attention", "head", "pipeline"))
    assert staged["pipeline bubble"] / working == pytest.approx((2 - 1) / 4)
    assert "pipeline bubble" not in whole


def test_rings_and_the_slower_link() -> None:
    links = Links(per_node=4, node_bytes_per_s=100.0, network_bytes_per_s=10.0, measured={})
    inside, across = Group(4), Group(8)
    assert links.seconds("all_reduce", 1000, inside) == pytest.approx(2 * 3 / 4 * 1000 / 100)
    assert links.seconds("all_gather", 1000, inside) == pytest.approx(3 / 4 * 1000 / 100)
    # Four ranks of each node send over four links: 40 bytes a second are slower than the node's 100.
    assert links.seconds("all_reduce", 1000, across) == pytest.approx(2 * 7 / 8 * 1000 / 40)
    # Every fourth rank: each node holds one, and only the network carries anything.
    assert links.seconds("all_reduce", 1000, Group(2, stride=4)) == pytest.approx(2 * 1 / 2 * 1000 / 10)
    assert links.seconds("all_to_all", 1000, across) == pytest.approx(4 / 8 * 1000 / 10)
    assert links.seconds("all_reduce", 1000, Group(1)) == 0
    measured = replace(links, measured={"all_gather": Exchange(latency_s=0.5, bytes_per_s=300.0)})
    assert measured.seconds("all_gather", 1000, inside, calls=3) == pytest.approx(3 * 0.5 + 3 / 4 * 1000 / 300)


def test_what_is_not_known_is_named_and_the_rest_computed() -> None:
    nothing = predict_step(replace(ONE, ranks=2, global_batch_size=16), HardwareConfig())
    assert nothing.total_s is None
    assert nothing.tokens_per_s is None
    assert nothing.missing == {
        "cluster.device.peak_flops_per_s.fp32": ["attention", "head", "projections"],
        "cluster.device.memory_bytes_per_s": ["elementwise", "gradients", "head", "optimizer"],
        "cluster.node_bytes_per_s": ["ZeRO exchange"],
    }
    apart = replace(MACHINE, nodes=2, network_bytes_per_s=None)
    step = predict_step(replace(ONE, ranks=2, global_batch_size=16), apart)
    assert step.missing == {"cluster.network_bytes_per_s": ["ZeRO exchange"]}
    assert step.seconds["projections"] == pytest.approx(seconds(ONE)["projections"])
    assert predict_step(ONE, apart).missing == {}
    other = replace(MACHINE, device=replace(DEVICE, peak_flops_per_s={}, matmul_flops_per_s={"fp32": 2e9}))
    reached = predict_step(ONE, other)
    assert reached.seconds["projections"] == pytest.approx(seconds(ONE)["projections"] / 2)
    assert reached.mfu is None  # by a data sheet's peak alone


def test_tokens_a_second_and_mfu() -> None:
    step = predict_step(replace(ONE, ranks=2, global_batch_size=16), MACHINE)
    assert step.total_s is not None
    assert step.tokens_per_s == pytest.approx(16 * 32 / step.total_s)
    assert step.mfu == pytest.approx(train_flops(SMALL, 32, 16 * 32) / step.total_s / 2 / 1e9)


RATES = Rates(
    ranks=1,
    matmul_flops_per_s={"fp32": [(1, 2e9)], "bf16": [(1, 8e9)]},
    attention_forward_flops_per_s={"fp32": {4: [(16, 1e8), (64, 4e8)]}},
    attention_backward_flops_per_s={"fp32": {4: [(16, 2e8), (64, 2e8)]}},
    block_attention_flops_per_s={"fp32": 1e8},
    elementwise_bytes_per_s=[(1e6, FAST)],
    in_place_bytes_per_s=[(1e3, 1e9), (1e9, 1e9)],
    operation_s=0.0,
    collectives={kind: Exchange(0.0, 1e9) for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")},
)
MEASURED = Measurements(
    "here", "2026-01-01", "2.13", "cpu", "cpu", 1, [RATES, replace(RATES, ranks=2, operation_s=1e-3)]
)


def test_what_was_measured_takes_the_place_of_what_is_described() -> None:
    on_cpu = replace(MACHINE, device=replace(DEVICE, name="cpu"))
    step = predict_step(replace(ONE, zero_stage=1), on_cpu, MEASURED)
    assert step.seconds["projections"] == pytest.approx(seconds(ONE)["projections"] / 2)
    causal = 256 * 2 * 2 * 2 * 16 * 33 / 2
    assert step.seconds["attention"] == pytest.approx(causal / 2e8 + 2.5 * causal / 2e8)  # 32 lies between 16 and 64
    assert step.seconds["optimizer"] == pytest.approx(128 * count_parameters(SMALL).params_total / 1e9)
    assert "operations" not in step.seconds
    both = predict_step(replace(ONE, ranks=2, global_batch_size=16, zero_stage=1), on_cpu, MEASURED)
    held = 4 * count_parameters(SMALL).params_total
    assert both.seconds["ZeRO exchange"] == pytest.approx((2 + 1) / 2 * held / 1e9)
    assert both.seconds["operations"] == pytest.approx(1e-3 * (4 * 2 * 120 + 2 * 10 * 15))


def test_a_products_rate_goes_by_its_rows() -> None:
    few = replace(RATES, matmul_flops_per_s={"fp32": [(16, 1e9), (64, 2e9)]})
    on_cpu = replace(MACHINE, device=replace(DEVICE, name="cpu"))
    rows = replace(ONE, sizes=EXPERTS, micro_batch_size=1)  # an expert's
    fast, slow = (predict_step(rows, on_cpu, replace(MEASURED, rates=[rates])) for rates in (RATES, few))
    assert slow.seconds["experts"] == pytest.approx(2 * fast.seconds["experts"])
    assert slow.seconds["head"] == pytest.approx(fast.seconds["head"] * 2 / 2**0.5)  # of 32 rows


def test_a_key_of_attention_costs_its_softmax_and_its_width() -> None:
    curves: dict[int, Curve] = {d: [(1, d / (3 + 2 * d))] for d in (32, 64, 128)}  # 3 + 2·d seconds a key
    for width in (32, 48, 96, 128, 192):
        assert attention_s_per_flop(curves, width, 99) == pytest.approx((3 + 2 * width) / width)
    assert attention_s_per_flop(curves, 8, 99) == pytest.approx((3 + 2 * 8) / 8)
    assert attention_s_per_flop({64: [(1, 2.0)]}, 16, 99) == 0.5
    odd: dict[int, Curve] = {32: [(1, 32 / 10)], 64: [(1, 64 / 100)]}  # a line below nothing at width 0
    assert attention_s_per_flop(odd, 16, 99) == pytest.approx(10 / 32)


def test_the_narrower_of_keys_and_values_costs_as_much_as_the_wider() -> None:
    heads = {"attention": "latent", "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2}
    narrow, wide = (replace(SMALL, **heads, v_head_dim=width) for width in (2, 6))
    took, padded = (seconds(replace(ONE, sizes=sizes))["attention"] for sizes in (narrow, wide))
    assert took == pytest.approx(padded)
    assert took == pytest.approx((1 + 2.5) * 8 * 32 * 2 * (2 * 2 * 4 * 6 * 33 / 2) / 1e8)


def test_zero_3_takes_python_at_every_module() -> None:
    on_cpu = replace(MACHINE, device=replace(DEVICE, name="cpu"))
    slow = replace(MEASURED, rates=[replace(RATES, operation_s=1e-3)])
    second, third = (predict_step(replace(ONE, zero_stage=stage), on_cpu, slow).seconds for stage in (2, 3))
    assert third["operations"] - second["operations"] == pytest.approx(1e-3 * 4 * 2 * 430 * (7 + 2))


def test_curves_are_lines_in_logarithms_and_flat_outside() -> None:
    curve = [(1.0, 10.0), (100.0, 1000.0)]
    assert read_curve(curve, 10) == pytest.approx(100)
    assert [read_curve(curve, size) for size in (0.1, 1, 100, 1e9)] == pytest.approx([10, 10, 1000, 1000])


def test_the_nearest_number_of_ranks_counts() -> None:
    three = replace(MEASURED, rates=[replace(RATES, ranks=ranks) for ranks in (1, 8)])
    assert [three.of(ranks).ranks for ranks in (1, 2, 3, 8, 64)] == [1, 1, 8, 8, 8]
    assert replace(MEASURED, rates=[RATES, replace(RATES, ranks=4)]).of(2).ranks == 4  # as near as one alone


def test_measurements_are_kept_and_read_back(tmp_path: Path) -> None:
    assert read_measurements(tmp_path, "ours") is None
    path = write_measurements(MEASURED, tmp_path, "ours")
    assert path == measurements_path(tmp_path, "ours") == tmp_path / "machines" / "ours.json"
    assert read_measurements(tmp_path, "ours") == MEASURED
    assert json.loads(path.read_text())["rates"][0]["collectives"]["all_gather"]["bytes_per_s"] == 1e9
    assert "1 rank: products" in describe(MEASURED)
    broken = asdict(MEASURED)
    del broken["rates"][0]["operation_s"]
    path.write_text(json.dumps(broken))
    with pytest.raises(ConfigError, match="measure again with `omniloom doctor measure=true`"):
        read_measurements(tmp_path, "ours")


DEGREES = st.sampled_from([1, 2, 4])
WORKLOADS = st.builds(
    lambda sizes, degrees, stage, precision, micro, accumulation, checkpointing: Workload(
        sizes,
        seq_len=32,
        global_batch_size=micro * accumulation * degrees[0],
        micro_batch_size=micro,
        ranks=math.prod(degrees),
        tensor=degrees[1],
        pipeline=degrees[2],
        sequence=degrees[3],
        expert=2 if degrees[0] > 1 else 1,
        zero_stage=stage,
        precision=precision,
        activation_checkpointing=checkpointing,
    ),
    st.sampled_from([SMALL, EXPERTS, replace(SMALL, num_nextn_predict_layers=1)]),
    st.tuples(DEGREES, st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.sampled_from([1, 2])),
    st.integers(0, 3),
    st.sampled_from(["fp32", "bf16_autocast", "bf16"]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
)
SPEEDS = st.floats(1e6, 1e12)


def total(workload: Workload, hardware: HardwareConfig) -> float:
    step = predict_step(workload, hardware)
    assert step.total_s is not None
    assert 0 < step.total_s < math.inf
    return step.total_s


@settings(max_examples=150, deadline=None)
@given(WORKLOADS, SPEEDS, SPEEDS, SPEEDS, SPEEDS, st.integers(1, 3), st.floats(1, 10))
def test_more_of_anything_is_never_slower(
    workload: Workload, flops: float, memory: float, node: float, network: float, nodes: int, more: float
) -> None:
    device = DeviceConfig("gpu", peak_flops_per_s={"fp32": flops, "bf16": flops}, memory_bytes_per_s=memory)
    hardware = HardwareConfig(device=device, nodes=nodes, node_bytes_per_s=node, network_bytes_per_s=network)
    took, almost = total(workload, hardware), 1 + 1e-9
    faster = replace(device, peak_flops_per_s={"fp32": more * flops, "bf16": more * flops})
    assert total(workload, replace(hardware, device=faster)) <= took * almost
    assert total(workload, replace(hardware, device=replace(device, memory_bytes_per_s=more * memory))) <= took * almost
    assert total(workload, replace(hardware, node_bytes_per_s=more * node)) <= took * almost
    assert total(workload, replace(hardware, network_bytes_per_s=more * network)) <= took * almost
    longer = replace(workload, global_batch_size=2 * workload.global_batch_size)
    assert total(longer, hardware) > took
    assert total(replace(workload, activation_checkpointing=True), hardware) >= took / almost


@settings(max_examples=50, deadline=None)
@given(WORKLOADS)
def test_one_rank_exchanges_nothing(workload: Workload) -> None:
    alone = replace(workload, ranks=1, tensor=1, pipeline=1, sequence=1, expert=1)
    step = predict_step(alone, replace(MACHINE, node_bytes_per_s=None, network_bytes_per_s=None))
    assert step.missing == {}
    assert not {part for part in step.seconds if "parallel" in part or "exchange" in part or "pipeline" in part}
