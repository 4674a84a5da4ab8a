"""Two real ranks: one has no medium of a kind, and nobody waits for ever."""

import faulthandler
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_rows
import torch
from ray import cloudpickle
from tiny_rows import MEDIA, TINY, row

from omniloom.cluster.config import ClusterConfig
from omniloom.cluster.launch import run_on_ranks
from omniloom.cluster.local import WORKER_ENVIRONMENT
from omniloom.data.loader import Batch
from omniloom.errors import ClusterError, DataError
from omniloom.model.decoder import Decoder
from omniloom.train.config import TrainingRun
from omniloom.train.groups import OptimizerConfig, TrainConfig

for module in (sys.modules[__name__], tiny_rows):
    cloudpickle.register_pickle_by_value(module)  # workers cannot import a test

PATIENCE_S = 150  # of one rank for all its steps, on a machine that does other things too
# Which media each of the two rows holds, by step: each missing on one rank, on the other, on both; with the others or
# alone; all at once, and none.
STEPS = [
    *[(missing, MEDIA) for missing in [tuple(m for m in MEDIA if m != out) for out in MEDIA]],
    *[(MEDIA, missing) for missing in [tuple(m for m in MEDIA if m != out) for out in MEDIA]],
    *[(missing, missing) for missing in [tuple(m for m in MEDIA if m != out) for out in MEDIA]],
    *[((medium,), ()) for medium in MEDIA],
    *[((), (medium,)) for medium in MEDIA],
    (MEDIA, MEDIA),
    ((), ()),
    ((), MEDIA),
    (MEDIA, ()),
]


@dataclass
class Job:
    """What each rank is told."""

    folder: str
    zero_stage: int
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-2, eps=1e-4))
    steps: list[tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=lambda: STEPS)
    clipping: float = 1.0


def train_on_rows(job: Job) -> None:
    """Runs on every rank: a step for each global batch of two rows; the ranks write what they ended with."""
    import omniloom.train.engine as engines
    from omniloom.train.step import training_step

    # A collective waits half an hour, and pytest's own timeout cannot reach a worker: one that hangs ends itself.
    faulthandler.dump_traceback_later(PATIENCE_S, exit=True, file=sys.__stderr__)
    ours = engines.deepspeed_config

    def partitioned(run: TrainingRun, ranks: int, parameters: int) -> dict[str, Any]:
        # By default ZeRO 3 keeps small parameters whole on every rank: all of a tiny model's.
        answer = ours(run, ranks, parameters)
        if job.zero_stage == 3:
            answer["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return answer

    engines.deepspeed_config = partitioned
    train = TrainConfig(steps=len(job.steps), global_batch_size=2, micro_batch_size=1, gradient_clipping=job.clipping)
    run = TrainingRun(model=TINY, train=train, optimizer=job.optimizer)
    run.parallel.zero_stage = job.zero_stage
    torch.manual_seed(0)
    model = Decoder(TINY)
    engine = engines.Engine(model, run)
    held = [
        p.ds_tensor.numel() < p.ds_numel for p in model.parameters() if hasattr(p, "ds_tensor") and not p.ds_persist
    ]
    losses, rates = [], []
    for step, kinds in enumerate(job.steps):
        rows = [row(kinds[i], 10 * step + i) for i in range(2)]
        share = len(rows) // engine.ranks
        mine = [Batch([row]) for row in rows[engine.rank * share : (engine.rank + 1) * share]]
        rate = (step + 1) / len(job.steps)
        result = training_step(engine, model, mine, torch.tensor([1.0, 0.5]), run.train, rate)
        losses.append([result.next_token, result.mtp, result.balance, result.grad_norm])
        rates.append([group["lr"] for group in engine._engine.optimizer.param_groups])
    weights = {name: tensor.float().tolist() for name, tensor in engine.weights().items()}
    if engine.rank == 0:
        answer = {"losses": losses, "rates": rates, "weights": weights, "parameters_in_parts": sum(held)}
        Path(job.folder, f"{engine.ranks}.json").write_text(json.dumps(answer))
    engines.shut_down()
    faulthandler.cancel_dump_traceback_later()


def on_ranks(ranks: int, job: Job) -> dict[str, Any]:
    run_on_ranks(train_on_rows, job, ClusterConfig(workers=ranks))
    return json.loads(Path(job.folder, f"{ranks}.json").read_text())


@pytest.fixture(scope="module")
def alone(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one rank learns from all rows."""
    return on_ranks(1, Job(str(tmp_path_factory.mktemp("alone")), 1))


def test_each_medium_is_missing_in_turn() -> None:
    """On rank 0, on rank 1 and on both, with others present and without; and clips never have one length."""
    for medium in MEDIA:
        seen = {(medium in left, medium in right) for left, right in STEPS}
        assert seen == {(True, True), (True, False), (False, True), (False, False)}
        assert ((medium,), ()) in STEPS
        assert tuple((tuple(m for m in MEDIA if m != medium),) * 2) in STEPS
    several = row(MEDIA, 0)
    assert {len(several.image), len(several.video), len(several.audio_frames)} == {4, 8, 1}
    assert len({int(row(MEDIA, seed).audio_frames[0]) for seed in range(12)}) > 3


@pytest.mark.timeout(300)
@pytest.mark.parametrize("zero_stage", [pytest.param(1, marks=pytest.mark.soak), 3])
def test_a_rank_without_a_medium_does_not_hang_the_other(
    zero_stage: int, alone: dict[str, Any], tmp_path: Path
) -> None:
    """Two ranks agree with one rank alone, whichever medium is missing on which."""
    together = on_ranks(2, Job(str(tmp_path), zero_stage))
    np.testing.assert_allclose(alone["losses"], together["losses"], rtol=1e-4, atol=1e-7)
    assert together["weights"].keys() == alone["weights"].keys()
    for name, weights in alone["weights"].items():
        np.testing.assert_allclose(weights, together["weights"][name], rtol=1e-3, atol=1e-5, err_msg=name)
    if zero_stage == 3:
        assert together["parameters_in_parts"] > 20, "nothing was partitioned: the test shows nothing"


def test_every_encoder_and_the_mtp_module_learned(alone: dict[str, Any]) -> None:
    torch.manual_seed(0)
    drawn = {name: tensor.numpy() for name, tensor in Decoder(TINY).state_dict().items()}
    moved = {name: np.abs(np.array(alone["weights"][name]) - drawn[name]).max() for name in drawn}
    for part in ("media.image.", "media.audio.", "media.video.", "embed_convolution.", "mtp.0."):
        mine = [moved[name] for name in moved if name.startswith(part) and not name.endswith("bias_E")]
        assert mine
        assert min(mine) > 2e-4, f"some of {part} learned nothing"


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("zero_stage", "clipping"), [(0, 1.0), pytest.param(3, 0.0, marks=pytest.mark.soak)])
def test_muon_learns_alike_on_one_rank_and_two_and_both_groups_follow_the_schedule(
    ray_cluster: None, tmp_path: Path, zero_stage: int, clipping: float
) -> None:
    optimizer = OptimizerConfig(kind="muon", lr=1e-2, muon_lr=5e-2, eps=1e-4)
    one, two = (
        on_ranks(ranks, Job(str(tmp_path), stage, optimizer, STEPS[:4] * 5, clipping))
        for ranks, stage in ((1, 0), (2, zero_stage))
    )
    told = 4 if zero_stage == 0 else 3  # with shards the last one, the norm, is that of Muon's updates
    ours, theirs = (np.array(each["losses"])[:, :told] for each in (one, two))
    np.testing.assert_allclose(ours, theirs, rtol=2e-2, atol=1e-4)  # Newton-Schulz rounds to bf16
    for step, rates in enumerate(one["rates"]):
        share = (step + 1) / 20
        assert set(np.round(rates, 12)) == {round(1e-2 * share, 12), round(5e-2 * share, 12)}, step
    losses = [loss for loss, *_ in one["losses"]]
    assert all(np.isfinite(losses))


def platform_version(folder: str) -> None:
    import platform
    import uuid

    assert uuid.uuid4()
    Path(folder, "version").write_text(platform.python_version())


def test_platform_is_the_standard_librarys_in_a_ray_worker(ray_cluster: None, tmp_path: Path) -> None:
    run_on_ranks(platform_version, str(tmp_path), ClusterConfig(workers=1))
    assert (tmp_path / "version").read_text() == sys.version.split()[0]


def libraries(folder: str) -> None:
    Path(folder, "maps").write_text(Path("/proc/self/maps").read_text())
    Path(folder, "environment").write_text(
        json.dumps({name: os.environ.get(name) for name in (*WORKER_ENVIRONMENT, "ASKED")})
    )


def test_a_ranks_memory_comes_from_the_allocator_that_plans_count_on(ray_cluster: None, tmp_path: Path) -> None:
    run_on_ranks(libraries, str(tmp_path), ClusterConfig(workers=1), environment={"ASKED": "for"})
    assert "libjemalloc" in (tmp_path / "maps").read_text()
    assert json.loads((tmp_path / "environment").read_text()) == WORKER_ENVIRONMENT | {"ASKED": "for"}


def fail_on_rank_one(kind: str) -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise DataError("the disk is full") if kind == "ours" else RuntimeError("surprise")
    dist.barrier()


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        pytest.param("ours", DataError, "the disk is full", marks=pytest.mark.soak),
        ("theirs", ClusterError, "rank 1 failed: RuntimeError: surprise"),
    ],
)
def test_the_first_cause_is_named(kind: str, error: type, message: str, ray_cluster: None) -> None:
    with pytest.raises(error, match=message):
        run_on_ranks(fail_on_rank_one, kind, ClusterConfig(workers=2))
