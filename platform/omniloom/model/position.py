"""Where a token stands: running index in its document, RoPE, and the 2-D encoding of a picture's patches.

B batch, T tokens, H heads, R rotary width, N patches, D model width.
"""

import torch
from torch import Tensor


def running_index(document_BT: Tensor) -> Tensor:
    """Index of each token within its own document, int64 (B, T): 0, 1, 2, … and again 0 where the document changes."""
    index_T = torch.arange(document_BT.shape[1], device=document_BT.device)
    starts_BT = torch.ones_like(document_BT, dtype=torch.bool)
    starts_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    start_BT = torch.where(starts_BT, index_T, 0).cummax(dim=1).values
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


def encoding_2d(row_N: Tensor, column_N: Tensor, width: int) -> Tensor:
    """Sine and cosine of row and of column, a quarter of the width each, float32 (N, D); Vaswani 2017 in two axes."""
    quarter = width // 4
    frequency = 10_000.0 ** (-torch.arange(quarter, device=row_N.device, dtype=torch.float32) / quarter)
    row, column = row_N[:, None].float() * frequency, column_N[:, None].float() * frequency
    return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=-1)
