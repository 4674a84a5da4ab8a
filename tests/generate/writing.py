"""Decoders of every kind of attention, prompts for them, and greedy decoding without any cache."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omniloom.modality.config import AudioConfig, ImageConfig, ModalityConfig, VideoConfig
from omniloom.modality.sequence import Document
from omniloom.modality.text import train_tokenizer
from omniloom.model.decoder import Decoder
from omniloom.model.load import save_model
from tiny_decoders import (
    FRAMES_PER_TOKEN,
    MELS,
    PATCH_PIXELS,
    all_logits,
    batch_of,
    document,
    film,
    picture,
    sound,
    text,
    tiny_decoder,
)

SPARSE = {"attention_pattern": "sparse", "window_tokens": 5, "global_stride": 2, "max_global_tokens": 3}
YARN = {"yarn_factor": 4.0, "yarn_original_tokens": 16}
KINDS: dict[str, dict[str, Any]] = {
    "multi-head": {"attention": "grouped"},
    "grouped": {"attention": "grouped", "num_attention_heads": 4, "num_key_value_heads": 2, "rope_interleave": False},
    "multi-query": {"attention": "grouped", "num_key_value_heads": 1, "partial_rotary_factor": 0.5},
    "latent": {"q_lora_rank": 10},
    "latent with yarn and log scale": {**YARN, "yarn_mscale_all_dim": 1.0, "attention_log_scale_tokens": 16},
    "sparse grouped": {"attention": "grouped", **SPARSE},
    "sparse latent": SPARSE,
    "both ways": {"media_bidirectional": True},
    "sparse both ways": {"media_bidirectional": True, **SPARSE},
    "convolution": {"embedding_conv_tokens": 4},
    "learned": {"attention": "grouped", "position": "learned"},
    "sinusoidal, post-norm": {"attention": "grouped", "position": "sinusoidal", "norm_position": "post"},
}


def prompt(*segments: Any) -> Document:
    """bos and the segments; no eos."""
    whole = document(*segments)
    return whole.window(0, len(whole) - 1)


def words(count: int, seed: int) -> Any:
    """Text of random ids."""
    return text(np.random.default_rng(seed).integers(6, 61, count).tolist(), is_target=False)


def mixed_prompts() -> list[Document]:
    """Prompts of unequal length, with every modality."""
    return [
        prompt(words(4, 1), picture(2, 3, 1), words(3, 2), sound(9, 1), words(2, 3)),
        prompt(words(17, 4)),
        prompt(film(2, 2, 2, 1), words(1, 5), picture(3, 3, 2), words(6, 6)),
        prompt(),
    ]


@torch.no_grad()
def uncached(decoder: Decoder, start: Document, steps: int) -> tuple[list[int], torch.Tensor]:
    """Greedy ids, and the logits that each was chosen from, by a whole forward pass for each."""
    ids: list[int] = []
    rows = []
    for _ in range(steps):
        fields = batch_of([[start]], len(start))
        logits = all_logits(decoder, _followed(fields, ids))[0, -1]
        rows.append(logits)
        ids.append(int(logits.argmax()))
    return ids, torch.stack(rows)


def _followed(fields: dict[str, torch.Tensor], ids: list[int]) -> dict[str, torch.Tensor]:
    """A row of one document with text behind it."""
    more = len(ids)
    grown = dict(fields)
    grown["input_ids"] = torch.cat([fields["input_ids"], torch.tensor([ids], dtype=torch.int32)], dim=1)
    for name in ("modality", "document"):
        grown[name] = torch.nn.functional.pad(fields[name], (0, more))
    grown["position"] = torch.nn.functional.pad(fields["position"], (0, 0, 0, more))
    return grown


VOCABULARY = 300
RULES = ModalityConfig(
    ImageConfig(size_pixels=4, patch_pixels=PATCH_PIXELS),
    AudioConfig(mels=MELS, frames_per_token=FRAMES_PER_TOKEN),
    VideoConfig(size_pixels=4, patch_pixels=PATCH_PIXELS),
)


def save_writer(folder: Path, kind: str = "latent", seed: int = 0, **changes: Any) -> Path:
    """A model folder of one of KINDS, that reads text, pictures, sound and video."""
    decoder = tiny_decoder(seed, **KINDS[kind] | {"vocab_size": VOCABULARY} | changes)
    save_model(folder, decoder.config, decoder.state_dict())
    train_tokenizer(iter(["the cat sat on the mat and the dog sat on the log " * 4]), VOCABULARY).save(
        folder / "tokenizer.json"
    )
    (folder / "modality.json").write_text(json.dumps(asdict(RULES)))
    return folder
