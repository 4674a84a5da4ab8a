"""A machine's rates, measured for real but briefly, on ranks of a job."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from omniloom.cluster.config import ClusterConfig
from omniloom.plan.collectives import RING_PASSES
from omniloom.plan.config import Measurements, Rates
from omniloom.plan.measured import measurements_path, read_measurements, write_measurements
from omniloom.train import machine
from omniloom.train.machine import Task, measure

BRIEF = partial(Task, seconds_each=1e-3, products=64, documents=(32, 64), tensors_mib=(0.01, 0.1), exchanged_mib=0.1)


def numbers(rates: Rates) -> list[float]:
    """Every rate, in no order."""
    found: list[float] = [rates.operation_s, *rates.block_attention_flops_per_s.values()]
    curves = [rates.elementwise_bytes_per_s, rates.in_place_bytes_per_s, *rates.matmul_flops_per_s.values()]
    for attention in (rates.attention_forward_flops_per_s, rates.attention_backward_flops_per_s):
        curves += [curve for widths in attention.values() for curve in widths.values()]
    found += [rate for curve in curves for _, rate in curve]
    return found + [x for one in rates.collectives.values() for x in (one.latency_s, one.bytes_per_s)]


def measured_on(workers: int, folder: Path) -> Measurements:
    from omniloom.cluster.launch import run_on_ranks

    task = BRIEF(str(folder), "brief", "cpu")
    task.progress.parent.mkdir()
    run_on_ranks(measure, task, ClusterConfig(workers=workers))
    assert len(task.progress.read_text().splitlines()) > 15
    found = read_measurements(folder, "brief")
    assert found is not None
    return found


@pytest.mark.soak
def test_one_rank_is_measured_alone(ray_cluster: None, tmp_path: Path) -> None:
    found = measured_on(1, tmp_path)
    assert [rates.ranks for rates in found.rates] == [1]
    (rates,) = found.rates
    assert all(0 < number < math.inf for number in numbers(rates))
    assert rates.collectives == {}
    assert [size for size, _ in rates.elementwise_bytes_per_s] == [0.01 * (1 << 20), 0.1 * (1 << 20)]
    assert [tokens for tokens, _ in rates.attention_backward_flops_per_s["bf16"][64]] == [32, 64]
    for attention in (rates.attention_forward_flops_per_s, rates.attention_backward_flops_per_s):
        assert [sorted(widths) for widths in attention.values()] == [[32, 64, 128]] * 2
    assert [rows for rows, _ in rates.matmul_flops_per_s["fp32"]] == [4, 16, 64, 256]
    assert found.threads == 1  # as many as cluster.cpus_per_worker gives each rank
    again = write_measurements(replace(found, host="another"), tmp_path, "again")
    assert replace(found, host="another") == read_measurements(tmp_path, "again")
    assert again == measurements_path(tmp_path, "again")


def test_two_ranks_are_measured_alone_and_at_once(ray_cluster: None, tmp_path: Path) -> None:
    found = measured_on(2, tmp_path)
    assert [rates.ranks for rates in found.rates] == [1, 2]
    alone, both = found.rates
    assert alone.collectives == {}
    assert both.collectives.keys() == RING_PASSES.keys()
    assert all(0 < number < math.inf for number in [*numbers(alone), *numbers(both)])


def test_the_doctor_tells_what_it_measured_and_where_it_lies(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from omniloom.cli import run_verb

    monkeypatch.setattr(machine, "Task", BRIEF)
    with pytest.raises(SystemExit) as ended:
        run_verb("doctor", ["--json", "measure=true", f"runs_dir={tmp_path}", "cluster.name=brief"])
    assert ended.value.code == 0
    answer = json.loads(capsys.readouterr().out)
    found = {finding["name"]: finding for finding in answer["findings"]}
    path = measurements_path(tmp_path, "brief")
    assert answer["measured"] == json.loads(path.read_text())
    assert str(path) in found["measurements"]["what"]
    assert found["1 rank: products"]["what"].startswith("GFLOP/s each: fp32 ")
    assert found["load"]["state"] in ("ok", "warn")
    assert not path.with_suffix(".progress").exists()
