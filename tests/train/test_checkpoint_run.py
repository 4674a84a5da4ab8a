"""Real runs: other ranks and another ZeRO stage after each checkpoint, a damaged one, retention, the best."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import train_smoke
from omniloom.track.checkpoints import Checkpoints, find_damage
from omniloom.track.run_directory import locate

COMPARED = ("loss/next_token", "loss/mtp", "loss/balance", "grad_norm")


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in lines(run, "events.jsonl") if event["event"] == kind]


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_as_it_did(smoke_run: Path, workspace: Path) -> None:
    """The newest of three is damaged: the run goes on from the one before, and its metrics are cut back to that."""
    words = ("damaged", "train.steps=12", "train.save_every=4", "checkpoint.keep_last=2")
    run = train_smoke(workspace, *words)
    before = lines(run, "metrics.jsonl")
    assert Checkpoints(run).complete() == [8, 12]
    assert [event["step"] for event in events(run, "checkpoint")] == [4, 8, 12]
    for event in events(run, "checkpoint"):
        assert min(event["bytes"], event["stall_s"], event["write_s"]) > 0
    assert [event["steps"] for event in events(run, "checkpoints_removed")] == [[4]]
    assert [line["step"] for line in before if "checkpoint_s" in line] == [4, 8, 12]
    file = run / "checkpoints" / "step_00000012" / "engine" / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "running"}))
    train_smoke(workspace, *words)
    assert [event["step"] for event in events(run, "start")] == [0, 8]
    (corrupt,) = events(run, "corrupt_checkpoint")
    assert (corrupt["step"], corrupt["file"]) == (12, "engine/rank_00000.safetensors")
    assert corrupt["sha256"] != corrupt["expected_sha256"]
    after = lines(run, "metrics.jsonl")
    for key in ("step", "batch_hash", *COMPARED):
        assert [line[key] for line in after] == [line[key] for line in before], key
    assert find_damage(Checkpoints(run).at(12)) is None


def test_checkpoints_go_where_the_url_says_and_the_best_is_found(smoke_run: Path, workspace: Path) -> None:
    place = workspace / "elsewhere"
    run = train_smoke(
        workspace, "placed", "train.steps=8", "train.save_every=2", "train.val_every=2", f"checkpoint.url={place}"
    )
    assert (place / "placed" / "step_00000008" / "COMPLETE").is_file()
    measured = {line["step"]: line["val/loss"] for line in lines(run, "metrics.jsonl") if "val/loss" in line}
    best = min(measured, key=lambda step: measured[step])
    assert set(Checkpoints(run).complete()) == {4, 6, 8, best}
    assert locate("placed@best", str(workspace / "runs")).path.name == f"step_{best:08d}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_ranks_then_one_then_four_at_other_stages(smoke_run: Path, workspace: Path) -> None:
    """ZeRO 1 → 3 → 2: the batches of the unbroken run, and its losses within a ten-thousandth."""
    for steps, ranks, stage in ((6, 2, 1), (12, 1, 3), (20, 4, 2)):
        words = (f"train.steps={steps}", f"cluster.workers={ranks}", f"parallel=zero{stage}")
        run = train_smoke(workspace, "moved", *words, "schedule.floor=1")  # the rate is one whatever the steps
    unbroken = train_smoke(workspace, "stayed", "schedule.floor=1")
    mine, theirs = lines(run, "metrics.jsonl"), lines(unbroken, "metrics.jsonl")
    starts = [(event["step"], len(event["ranks"])) for event in events(run, "start")]
    assert starts == [(0, 2), (6, 1), (12, 4)]
    assert [line["step"] for line in mine] == list(range(1, 21))
    assert [line["batch_hash"] for line in mine] == [line["batch_hash"] for line in theirs]
    for ours, other in zip(mine, theirs, strict=True):
        for key in COMPARED:
            torch.testing.assert_close(ours[key], other[key], rtol=1e-4, atol=1e-6)
