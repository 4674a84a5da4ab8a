"""What the planner is handed: each number that cannot hold is refused by key, rule and number."""

from dataclasses import replace
from math import inf, nan

import pytest

from omniloom.errors import ConfigError
from omniloom.model.config import ModelConfig
from omniloom.plan.config import MOST_DEVICES, DeviceConfig, HardwareConfig, Workload

WHOLE = HardwareConfig(
    name="eight",
    device=DeviceConfig(
        name="some",
        memory_bytes=80_000_000_000,
        peak_flops_per_s={"bf16": 989e12, "fp8": 1979e12},
        matmul_flops_per_s={"bf16": 794.5e12},
        attention_flops_per_s={"bf16": 600e12},
        memory_bytes_per_s=3.35e12,
        watts=700,
    ),
    nodes=2,
    devices_per_node=8,
    node_bytes_per_s=450e9,
    network_bytes_per_s=50e9,
    usd_per_device_hour=2.5,
)


def with_number(key: str, number: float | None) -> HardwareConfig:
    """WHOLE with one number changed, a precision's by device.<kind>_flops_per_s.<precision>."""
    if not key.startswith("device."):
        return replace(WHOLE, **{key: number})
    field, _, precision = key.removeprefix("device.").partition(".")
    value = {**getattr(WHOLE.device, field), precision: number} if precision else number
    return replace(WHOLE, device=replace(WHOLE.device, **{field: value}))


KEYS = (
    "device.memory_bytes",
    "device.memory_bytes_per_s",
    "device.watts",
    "device.peak_flops_per_s.fp8",
    "device.matmul_flops_per_s.bf16",
    "device.attention_flops_per_s.bf16",
    "node_bytes_per_s",
    "network_bytes_per_s",
    "usd_per_device_hour",
)


def test_what_is_known_and_what_is_left_out_both_pass() -> None:
    WHOLE.check_hardware()
    HardwareConfig().check_hardware()
    for key in KEYS:
        if "flops" not in key:
            with_number(key, None).check_hardware()


@pytest.mark.parametrize("number", [nan, inf, -inf, -1.0, 1e25])
@pytest.mark.parametrize("key", KEYS)
def test_a_number_that_cannot_hold_is_refused_by_key_rule_and_number(key: str, number: float) -> None:
    with pytest.raises(ConfigError) as refused:
        with_number(key, number).check_hardware()
    assert str(refused.value).startswith(f"cluster.{key}={number:g} must lie between ")
    assert "null where it is not known" in str(refused.value)


@pytest.mark.parametrize("key", [key for key in KEYS if key != "usd_per_device_hour"])
def test_zero_is_for_a_price_only(key: str) -> None:
    with_number("usd_per_device_hour", 0).check_hardware()
    with pytest.raises(ConfigError, match=f"{key}=0 must lie between"):
        with_number(key, 0).check_hardware()


@pytest.mark.parametrize(
    ("key", "number"),
    [
        ("device.memory_bytes", 80),  # GB
        ("device.peak_flops_per_s.bf16", 989),  # TFLOP/s
        ("device.memory_bytes_per_s", 3350),  # GB/s
        ("node_bytes_per_s", 450),  # GB/s
        ("network_bytes_per_s", 400),  # Gb/s
    ],
)
def test_a_number_in_another_unit_is_refused(key: str, number: float) -> None:
    with pytest.raises(
        ConfigError, match=rf"cluster\.{key}={number} must lie between .*in the unit that its name says"
    ):
        with_number(key, number).check_hardware()


@pytest.mark.parametrize("key", ["nodes", "devices_per_node"])
@pytest.mark.parametrize("count", [0, -1, MOST_DEVICES + 1])
def test_a_count_of_none_or_far_too_many_is_refused(key: str, count: int) -> None:
    with_number(key, MOST_DEVICES).check_hardware()
    with pytest.raises(ConfigError, match=rf"cluster\.{key}={count} must lie between 1 and 10,000,000"):
        with_number(key, count).check_hardware()


def test_a_workloads_ranks_are_divided_among_its_degrees() -> None:
    """2,048 ranks: 8 share each matrix, 4 the layers, 2 each row; 32 are left, 5 micro batches of 3 each a step."""
    workload = Workload(
        sizes=ModelConfig(),
        seq_len=4_096,
        global_batch_size=480,
        micro_batch_size=3,
        ranks=2_048,
        tensor=8,
        pipeline=4,
        sequence=2,
    )
    assert workload.data_parallel == 32
    assert workload.accumulation == 5
    assert workload.tokens_per_step == 1_966_080
