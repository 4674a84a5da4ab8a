"""Each tiny preset takes training steps, on rows of the media that it has encoders for."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from test_step import OneRank
from tiny_rows import MEDIA, WIDTHS, segment, text

from conftest import REPOSITORY
from omniloom.data.loader import Batch
from omniloom.modality.sequence import Row, lay_row, weave
from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder
from omniloom.train.groups import TrainConfig
from omniloom.train.step import training_step

torch.set_num_threads(1)

TINY = sorted((REPOSITORY / "conf" / "model").glob("tiny*.yaml"))
TOKENS = 96
READ = {"image": ("image_patch_pixels", 2), "video": ("video_patch_pixels", 2), "audio": ("audio_mels", 4)}


class OneRankThatLearns(OneRank):
    def __init__(self, model: Decoder) -> None:
        super().__init__(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)

    def step(self, rate_share: float, norm_limit: float) -> float:
        grad_norm = super().step(rate_share, norm_limit)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return grad_norm


def row(kinds: tuple[str, ...], seed: int) -> Row:
    """A document of all of `kinds` with text before and after them, then one of text."""
    rng = np.random.default_rng(seed)
    media = [segment(kind, rng) for kind in kinds]
    pieces = [weave([text(rng, 30, True), *media, text(rng, 20, True)], 1, 0, (0, 2, 3, 4), WIDTHS)]
    pieces.append(weave([text(rng, 10, True)], 1, 0, (0, 2, 3, 4), WIDTHS))
    return lay_row([(piece, 0) for piece in pieces], TOKENS, 0, WIDTHS)


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_a_tiny_preset_learns_a_batch_with_every_parameter(path: Path) -> None:
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(path)))
    assert isinstance(config, ModelConfig)
    kinds = tuple(medium for medium in MEDIA if getattr(config, READ[medium][0]))
    config = replace(config, audio_frames_per_token=2, **dict(READ[medium] for medium in kinds))
    assert config.attention_pattern == "full" or config.window_tokens < TOKENS
    torch.manual_seed(0)
    engine = OneRankThatLearns(Decoder(config))
    before = {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}
    batch = Batch([row(kinds, seed) for seed in range(4)])

    results = [
        training_step(engine, engine.model, [batch], torch.ones(1), TrainConfig(balance_loss_weight=1e-2), 1.0)
        for _ in range(12)
    ]
    unmoved = [name for name, parameter in engine.model.named_parameters() if torch.equal(parameter, before[name])]
    assert unmoved == []
    assert results[-1].next_token < 0.7 * results[0].next_token
    if config.num_nextn_predict_layers:
        assert results[-1].mtp < 0.7 * results[0].mtp
