"""Decoders of every kind of attention, prompts for them, and greedy decoding without any cache."""

from typing import Any

import numpy as np
import torch

from omniloom.generate.forward import Piece, chunk_end, forward, glued
from omniloom.generate.kv_cache import KVCache
from omniloom.modality.sequence import Document
from omniloom.model.decoder import Decoder
from tiny_decoders import all_logits, batch_of, document, film, picture, sound, text

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


def read(decoder: Decoder, cache: KVCache, slot: int, start: Document, chunk: int) -> torch.Tensor:
    """Put a prompt into a slot, chunk by chunk: what comes next, (V,)."""
    done, parted = 0, glued(start, decoder.config)
    while done < len(start):
        end = chunk_end(parted, done, chunk)
        passed = forward(decoder, cache, [Piece(slot, start.window(done, end))])
        cache.settle(slot)
        done = end
    return passed.logits[0][0]
