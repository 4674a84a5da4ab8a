"""Where a token stands: running index in its document, RoPE, and the encodings of places inside a picture, clip, video.

B batch, T tokens, H heads, R rotary width, N media tokens, A axes, D model width.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def document_starts(document_BT: Tensor) -> Tensor:
    """Where a row begins or its document changes, bool (B, T)."""
    starts_BT = torch.ones_like(document_BT, dtype=torch.bool)
    starts_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    return starts_BT


def running_index(document_BT: Tensor) -> Tensor:
    """Index of each token within its own document, int64 (B, T): 0, 1, 2, … and again 0 where the document changes."""
    index_T = torch.arange(document_BT.shape[1], device=document_BT.device)
    start_BT = torch.where(document_starts(document_BT), index_T, 0).cummax(dim=1).values
    return index_T - start_BT


def rope_table(index_BT: Tensor, width: int, theta: float) -> Tensor:
    """Angles index / theta^(2i/R) as unit complex numbers, complex64 (B, T, 1, R/2); Su et al. 2021, eq. 15."""
    frequency = theta ** (-torch.arange(0, width, 2, device=index_BT.device, dtype=torch.float32) / width)
    angle = index_BT[..., None].float() * frequency
    return torch.polar(torch.ones_like(angle), angle)[:, :, None, :]


def apply_rope(x_BTHR: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs (x₀, x₁), (x₂, x₃), … by the table's angles, in float32; DeepSeek's interleaved layout."""
    pairs = torch.view_as_complex(x_BTHR.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x_BTHR.dtype)


def log_scale(index_BT: Tensor, tokens: int) -> Tensor:
    """max(0.3, ln(t + 1) / ln tokens), float32 (B, T): queries grow with what they look over, so that none blurs.

    Source: Chiang and Cholak 2022, section 5.3; the floor keeps the first tokens' attention from being flat.
    """
    return ((index_BT + 1).float().log() / math.log(tokens)).clamp(min=0.3)


def axial_encoding(place_NA: Tensor, width: int) -> Tensor:
    """Sine and cosine of each axis, an equal part of the width each, float32 (N, D); Vaswani 2017 in A axes.

    One axis is time, two are row and column, three are time, row and column. What does not divide stays zero.
    """
    axes = place_NA.shape[1]
    count = width // (2 * axes)
    frequency = 10_000.0 ** (-torch.arange(count, device=place_NA.device, dtype=torch.float32) / count)
    angle_NAC = place_NA[..., None].float() * frequency
    encoding_ND = torch.cat([angle_NAC.sin(), angle_NAC.cos()], dim=-1).flatten(1)
    return F.pad(encoding_ND, (0, width - encoding_ND.shape[1]))
