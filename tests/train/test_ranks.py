"""Two real ranks: one has no picture, and nobody waits for ever."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ray import cloudpickle

from omniloom.cluster.config import ClusterConfig
from omniloom.cluster.launch import run_on_ranks
from omniloom.data.loader import Batch
from omniloom.errors import ClusterError, DataError
from omniloom.modality.sequence import IMAGE, TEXT, Document, lay_row
from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder
from omniloom.train.config import TrainConfig, TrainingRun

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

TINY = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=8,
    intermediate_size=32,
    n_routed_experts=4,
    moe_intermediate_size=16,
    image_patch_pixels=2,
)
SEQ_LEN, PATCH = 12, 12


def document(seed: int, with_picture: bool) -> Document:
    rng = np.random.default_rng(seed)
    media = 4 if with_picture else 0
    modality = np.array([TEXT] * 3 + [IMAGE] * media + [TEXT] * (SEQ_LEN - 3 - media), np.uint8)
    position = np.zeros((SEQ_LEN, 3), np.int32)
    position[3 : 3 + media] = [(0, r, c) for r in range(2) for c in range(2)] if with_picture else 0
    return Document(
        input_ids=rng.integers(5, 32, SEQ_LEN).astype(np.int32),
        modality=modality,
        position=position,
        loss_mask=(modality == TEXT).astype(np.uint8),
        image=rng.integers(0, 256, (media, PATCH)).astype(np.uint8),
    )


def steps(arguments: tuple[str, int, list[list[bool]]]) -> None:
    """Runs on every rank: three steps over one global batch of two rows; each rank writes what it ended with."""
    from omniloom.train.engine import Engine, shut_down
    from omniloom.train.step import training_step

    folder, zero_stage, pictures_by_step = arguments
    run = TrainingRun(model=TINY, train=TrainConfig(steps=3, global_batch_size=2, micro_batch_size=1))
    run.parallel.zero_stage = zero_stage
    torch.manual_seed(0)
    model = Decoder(TINY)
    engine = Engine(model, run)
    losses = []
    for step, pictures in enumerate(pictures_by_step):
        rows = [lay_row([(document(10 * step + i, p), 0)], SEQ_LEN, 0, PATCH) for i, p in enumerate(pictures)]
        share = len(rows) // engine.ranks
        mine = [Batch([row]) for row in rows[engine.rank * share : (engine.rank + 1) * share]]
        result = training_step(engine, model, mine, torch.ones(1), run.train, lr=1e-2)
        losses.append([result.next_token, result.balance, result.grad_norm])
    weights = {name: tensor.float().tolist() for name, tensor in engine.weights().items()}
    if weights:
        answer = {"losses": losses, "weights": weights}
        Path(folder, f"{engine.ranks}_{engine.rank}.json").write_text(json.dumps(answer))
    shut_down()


@pytest.mark.timeout(200)
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_rank_without_a_picture_does_not_hang_the_other(zero_stage: int, ray_cluster: None, tmp_path: Path) -> None:
    """First only rank 0 has a picture, then only rank 1, then nobody; both ranks agree with one rank alone."""
    pictures = [[True, False], [False, True], [False, False]]
    for ranks in (1, 2):
        run_on_ranks(steps, (str(tmp_path), zero_stage, pictures), ClusterConfig(workers=ranks))
    alone = json.loads((tmp_path / "1_0.json").read_text())
    together = json.loads((tmp_path / "2_0.json").read_text())
    np.testing.assert_allclose(alone["losses"], together["losses"], rtol=1e-4)
    for name, weights in alone["weights"].items():
        np.testing.assert_allclose(weights, together["weights"][name], rtol=1e-3, atol=1e-5, err_msg=name)
    torch.manual_seed(0)
    drawn = Decoder(TINY).embedding.image.patch_proj.weight.tolist()
    learned = np.abs(np.array(together["weights"]["embedding.image.patch_proj.weight"]) - np.array(drawn))
    assert learned.max() > 1e-3, "the encoder learned nothing from the pictures that one rank had"


def platform_version(folder: str) -> None:
    import platform
    import uuid

    assert uuid.uuid4()
    Path(folder, "version").write_text(platform.python_version())


def test_platform_is_the_standard_librarys_in_a_ray_worker(ray_cluster: None, tmp_path: Path) -> None:
    run_on_ranks(platform_version, str(tmp_path), ClusterConfig(workers=1))
    assert (tmp_path / "version").read_text() == sys.version.split()[0]


def fail_on_rank_one(kind: str) -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise DataError("the disk is full") if kind == "ours" else RuntimeError("surprise")
    dist.barrier()


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [("ours", DataError, "the disk is full"), ("theirs", ClusterError, "rank 1 failed: RuntimeError: surprise")],
)
def test_the_first_cause_is_named(kind: str, error: type, message: str, ray_cluster: None) -> None:
    with pytest.raises(error, match=message):
        run_on_ranks(fail_on_rank_one, kind, ClusterConfig(workers=2))
