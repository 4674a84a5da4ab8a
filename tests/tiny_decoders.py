"""Tiny decoders with lively weights, and packed rows for them."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omniloom.modality.batch import MODEL_INPUTS, stack_rows
from omniloom.modality.config import Widths
from omniloom.modality.sequence import AUDIO, IMAGE, VIDEO, Document, Segment, lay_row, weave
from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder
from omniloom.model.position import Places, find_places

torch.set_num_threads(1)

BOS, EOS, PLACEHOLDERS = 1, 2, (2, 3, 4, 5)
PATCH_PIXELS, MELS, FRAMES_PER_TOKEN = 2, 5, 4
WIDTHS = Widths(PATCH_PIXELS**2 * 3, MELS, PATCH_PIXELS**2 * 3)


def tiny_config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "num_attention_heads": 2,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "rope_theta": 100.0,
        "first_k_dense_replace": 1,
        "intermediate_size": 24,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "routed_scaling_factor": 1.7,
        "image_patch_pixels": PATCH_PIXELS,
        "video_patch_pixels": PATCH_PIXELS,
        "audio_mels": MELS,
        "audio_frames_per_token": FRAMES_PER_TOKEN,
    }
    return ModelConfig(**sizes | changes)


@torch.no_grad()
def enliven(module: nn.Module, seed: int = 0) -> None:
    """Draw every weight so large that a wrong one shows: matrices 1/√fan-in, gains and biases far from 1 and 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float32)

    for name, parameter in module.named_parameters():
        if name.endswith(("bias", "logit_bias_E")):
            parameter.copy_(0.3 * normal(parameter))
        elif parameter.dim() == 1:
            parameter.copy_(1.0 + 0.3 * normal(parameter))
        elif "embed_" in name:
            parameter.copy_(normal(parameter))
        else:
            inputs = parameter.shape[1]  # (out, in), and (E, in, out) of the experts
            parameter.copy_(1.5 * normal(parameter) / math.sqrt(inputs))
    for name, buffer in module.named_buffers():
        if name.endswith("bias_E"):
            buffer.copy_(0.3 * normal(buffer))


def text_places(documents: Tensor, config: ModelConfig) -> Places:
    """The places of packed rows of plain text."""
    return find_places(documents, torch.zeros_like(documents), torch.zeros(*documents.shape, 3), config)


def tiny_decoder(seed: int = 0, **changes: Any) -> Decoder:
    decoder = Decoder(tiny_config(**changes))
    enliven(decoder, seed)
    return decoder.eval()


def text(ids: list[int], is_target: bool = True) -> Segment:
    return Segment(0, np.array(ids, np.int32), np.zeros((len(ids), 3), np.int32), is_target)


def picture(rows: int, columns: int, seed: int) -> Segment:
    return _patches(IMAGE, 1, rows, columns, seed)


def film(frames: int, rows: int, columns: int, seed: int) -> Segment:
    return _patches(VIDEO, frames, rows, columns, seed)


def _patches(modality: int, frames: int, rows: int, columns: int, seed: int) -> Segment:
    place = np.indices((frames, rows, columns), np.int32).reshape(3, -1).T
    pixels = np.random.default_rng(seed).integers(0, 256, (len(place), WIDTHS.image), dtype=np.uint8)
    return Segment(modality, pixels, place)


def sound(frames: int, seed: int) -> Segment:
    """A clip of random log-mel frames."""
    content = np.random.default_rng(seed).normal(-4, 3, (frames, MELS)).astype(np.float16)
    token = np.arange(-(-frames // FRAMES_PER_TOKEN), dtype=np.int32)
    return Segment(AUDIO, content, np.stack([token, 0 * token, 0 * token], axis=1))


def document(*segments: Segment) -> Document:
    return weave(list(segments), BOS, EOS, PLACEHOLDERS, WIDTHS)


def batch_of(rows: list[list[Document]], tokens: int) -> dict[str, Tensor]:
    """The decoder's inputs for packed rows of `tokens`."""
    fields = stack_rows([lay_row([(piece, 0) for piece in row], tokens, EOS, WIDTHS) for row in rows])
    return {name: fields[name] for name in MODEL_INPUTS}


def all_logits(decoder: Decoder, fields: dict[str, Tensor]) -> Tensor:
    """Logits of every position, (B, T, V)."""
    everywhere = torch.ones_like(fields["document"], dtype=torch.bool)
    logits = decoder(**fields, predict_at=everywhere).logits
    assert logits is not None
    return logits.unflatten(0, everywhere.shape)
