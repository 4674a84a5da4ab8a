"""A run's totals by hand; disk against a real run's checkpoint and a real corpus."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_params import preset

from omniloom.plan.config import DeviceConfig, HardwareConfig, Workload
from omniloom.plan.cost import checkpoint_bytes, count_cost, shard_bytes_per_token
from omniloom.train.groups import CheckpointConfig

WORKLOAD = Workload(preset("tiny"), 1_024, 32, 4, ranks=8, steps=1_001, save_every=500)
CLUSTER = HardwareConfig(device=DeviceConfig(watts=700.0), usd_per_device_hour=2.0)


def test_days_hours_money_and_energy_follow_from_one_step() -> None:
    cost = count_cost(WORKLOAD, CLUSTER, step_s=7.2)
    assert cost.days == pytest.approx(1_001 * 7.2 / 86_400)
    assert cost.gpu_hours == pytest.approx(1_001 * 7.2 / 3_600 * 8)
    assert cost.cost_usd == pytest.approx(1_001 * 7.2 / 3_600 * 8 * 2)
    assert cost.energy_kwh == pytest.approx(1_001 * 7.2 / 3_600 * 8 * 0.7)
    assert cost.checkpoints == 3
    tokens = 1_001 * 32 * 1_024
    assert cost.disk_bytes == pytest.approx(3 * checkpoint_bytes(WORKLOAD) + 18 * tokens)


def test_a_rule_of_retention_bounds_the_disk() -> None:
    few, many = (count_cost(replace(WORKLOAD, checkpoints_kept=kept), CLUSTER, 7.2) for kept in (2, 9))
    assert (few.checkpoints, many.checkpoints) == (2, 3)
    assert many.disk_bytes is not None
    assert few.disk_bytes == pytest.approx(many.disk_bytes - checkpoint_bytes(WORKLOAD))
    assert CheckpointConfig().most(1_000) == 5
    assert CheckpointConfig(keep_best=None, keep_every=100).most(1_000) == 14
    assert CheckpointConfig(keep_last=None).most(1_000) is None


def test_what_is_not_known_is_left_out_alone() -> None:
    bare = HardwareConfig()
    assert count_cost(WORKLOAD, bare, 7.2).gpu_hours is not None
    assert count_cost(WORKLOAD, bare, 7.2).cost_usd is None
    assert count_cost(WORKLOAD, bare, 7.2).energy_kwh is None
    no_time = count_cost(WORKLOAD, CLUSTER, None)
    assert (no_time.days, no_time.gpu_hours, no_time.cost_usd) == (None, None, None)
    assert no_time.disk_bytes is not None
    assert count_cost(replace(WORKLOAD, steps=None), CLUSTER, 7.2).disk_bytes is None


def test_a_checkpoint_is_as_large_as_predicted(smoke_run: Path) -> None:
    """The smoke run's, on one rank at ZeRO 1; small files and headers make it a little larger."""
    inventory = json.loads(next(smoke_run.glob("checkpoints/*/COMPLETE")).read_text())
    heavy = sum(file["bytes"] for name, file in inventory.items() if name.endswith(".safetensors"))
    predicted = checkpoint_bytes(Workload(preset("smoke"), 64, 8, 8, zero_stage=1))
    assert predicted < heavy < 1.25 * predicted


def test_a_token_of_a_corpus_is_as_large_as_predicted(smoke_run: Path) -> None:
    index = json.loads((smoke_run.parents[1] / "corpora" / "smoke" / "index.json").read_text())
    held = [source[split] for source in index["sources"] for split in ("train", "heldout")]
    tokens = sum(part["tokens"] for part in held)
    media = {name: sum(part["media_tokens"][name] for part in held) for name in ("image", "audio", "video")}
    shares = {name: count / tokens for name, count in media.items()}
    predicted = tokens * shard_bytes_per_token(replace(WORKLOAD, sizes=preset("smoke"), share_by_modality=shares))
    found = sum(part["bytes"] for part in held)
    assert predicted < found < 1.4 * predicted  # each document's name and its offsets come on top
