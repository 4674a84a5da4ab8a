"""Packed rows of all four modalities, and a model for them, as small as they come."""

from typing import Any

import numpy as np

from omniloom.modality.config import Widths
from omniloom.modality.sequence import AUDIO, IMAGE, TEXT, VIDEO, Document, Segment, lay_row, weave
from omniloom.model.config import ModelConfig

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
    video_patch_pixels=2,
    audio_mels=4,
    audio_frames_per_token=2,
    num_nextn_predict_layers=1,
    embedding_conv_tokens=2,
)
SEQ_LEN, WIDTHS = 48, Widths(12, 4, 12)
MEDIA = ("image", "audio", "video")


def segment(kind: str, rng: np.random.Generator) -> Segment:
    if kind == "image":
        return Segment(IMAGE, patches(rng, 4), np.array([(0, r, c) for r in range(2) for c in range(2)], np.int32))
    if kind == "video":
        place = [(t, r, c) for t in range(2) for r in range(2) for c in range(2)]
        return Segment(VIDEO, patches(rng, 8), np.array(place, np.int32))
    frames = int(rng.integers(1, 8))
    tokens = np.arange(-(-frames // TINY.audio_frames_per_token), dtype=np.int32)
    place = np.stack([tokens, 0 * tokens, 0 * tokens], axis=1)
    return Segment(AUDIO, rng.normal(-4, 2, (frames, 4)).astype(np.float16), place)


def patches(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, 256, (count, 12)).astype(np.uint8)


def text(rng: np.random.Generator, tokens: int, is_target: bool) -> Segment:
    ids = rng.integers(5, 32, tokens).astype(np.int32)
    return Segment(TEXT, ids, np.zeros((tokens, 3), np.int32), is_target)


def document(kinds: tuple[str, ...], rng: np.random.Generator) -> Document:
    """All of `kinds` in one document, text between and after them."""
    media = [part for kind in kinds for part in (segment(kind, rng), text(rng, 2, False))]
    return weave([text(rng, 2, True), *media, text(rng, 4, True)], 1, 0, (0, 2, 3, 4), WIDTHS)


def row(kinds: tuple[str, ...], seed: int) -> Any:
    """A packed row: one document of all of `kinds`, and one of text."""
    rng = np.random.default_rng(seed)
    return lay_row([(document(kinds, rng), 0), (document((), rng), 1)], SEQ_LEN, 0, WIDTHS)
