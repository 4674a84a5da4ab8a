"""Tiny models in folders, as a checkpoint's model/ is, and media that they can read."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from omniloom.data.samples.files import write_mp4, write_wav
from omniloom.modality.config import AudioConfig, ImageConfig, ModalityConfig, VideoConfig
from omniloom.modality.text import TextTokenizer, train_tokenizer
from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder
from omniloom.model.load import save_model

torch.set_num_threads(1)

CONTEXT_TOKENS = 32
PICTURE_TOKENS, CLIP_TOKENS, VIDEO_TOKENS = 4, 3, 8
TINY = ModalityConfig(
    ImageConfig(size_pixels=4, patch_pixels=2),
    AudioConfig(mels=4, frames_per_token=2),
    VideoConfig(size_pixels=4, patch_pixels=2, frames_per_second=2),
)
LETTERS = "the cat sat on the mat and the dog sat on the log; what is shown here? red green blue "


def tokenizer() -> TextTokenizer:
    return train_tokenizer(iter([LETTERS * 4]), 300)


def save_tiny(folder: Path, kind: str = "random", seed: int = 0, **changes: Any) -> Path:
    """A model folder: `random`; `uniform`, whose head is zero; `bigram`, whose layers add nothing."""
    text = tokenizer()
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=text.vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=0.7,  # large, so that every input shows in the scores
        tie_word_embeddings=False,
        num_attention_heads=2,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        intermediate_size=16,
        n_routed_experts=4,
        moe_intermediate_size=8,
        image_patch_pixels=2,
        video_patch_pixels=2,
        audio_mels=4,
        audio_frames_per_token=2,
    )
    config = replace(config, **changes)
    decoder = Decoder(config)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            silent = {"uniform": ("lm_head",), "bigram": ("o_proj", "down_proj", "down_EFD"), "random": ()}[kind]
            if any(part in name for part in silent):
                parameter.zero_()
    save_model(folder, config, decoder.state_dict())
    text.save(folder / "tokenizer.json")
    (folder / "modality.json").write_text(json.dumps(asdict(TINY)))
    return folder


def colourful(folder: Path, count: int) -> list[Path]:
    """Pictures that differ in every pixel."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


def audible(folder: Path, count: int) -> list[Path]:
    """Clips of noise, each of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.wav" for number in range(count)]
    for number, path in enumerate(paths):
        write_wav(path, np.random.default_rng(number).integers(-8_000, 8_000, 800), 16_000)
    return paths


def moving(folder: Path, count: int) -> list[Path]:
    """Videos of noise, each of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.mp4" for number in range(count)]
    for number, path in enumerate(paths):
        write_mp4(path, np.random.default_rng(number).integers(0, 256, (4, 16, 16, 3), np.uint8), 4)
    return paths
