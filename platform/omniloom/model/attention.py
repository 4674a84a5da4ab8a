"""Causal attention within each document of packed rows.

B batch, T tokens, H heads, d head width, n tokens of one document.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from omniloom.model.position import document_starts


def document_lengths(document_BT: Tensor) -> list[int]:
    """Tokens of each run of one document, row after row; padding counts as a document. They sum to B · T."""
    starts = document_starts(document_BT).flatten().nonzero().flatten()
    return starts.diff(append=starts.new_tensor([document_BT.numel()])).tolist()


def attend(query_BTHd: Tensor, key_BTHd: Tensor, value_BTHd: Tensor, lengths: list[int], scale: float) -> Tensor:
    """softmax(scale · QKᵀ + M) V, (B, T, H, d_v), by torch's own kernel.

    M lets query i see key j where j ≤ i and both stand in one document: each document attends to itself alone, so that
    a packed row costs what its documents cost. `lengths` are `document_lengths`.
    """
    # The kernel leaves its fast path when the value width differs from the key width: pad, attend, cut.
    rows, key_width, value_width = query_BTHd.shape[0], key_BTHd.shape[-1], value_BTHd.shape[-1]
    if value_width < key_width:
        value_BTHd = F.pad(value_BTHd, (0, key_width - value_width))
    # Split, not sliced: the gradient of a split is one concatenation, that of each slice a tensor of zeros.
    parts = (x.flatten(0, 1).split(lengths) for x in (query_BTHd, key_BTHd, value_BTHd))
    attended = [_attend_causally(query, key, value, scale) for query, key, value in zip(*parts, strict=True)]
    return torch.cat(attended).unflatten(0, (rows, -1))[..., :value_width]


def _attend_causally(query_nHd: Tensor, key_nHd: Tensor, value_nHd: Tensor, scale: float) -> Tensor:
    query, key, value = (x.transpose(0, 1)[None] for x in (query_nHd, key_nHd, value_nHd))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)[0].transpose(0, 1)
