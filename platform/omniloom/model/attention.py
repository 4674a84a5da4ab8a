"""Which token may see which, and the attention over it.

B batch, T tokens, H heads, d head width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

QUERY_BLOCK = 128


def causal_document_mask(document_BT: Tensor) -> Tensor:
    """Query i sees key j when j ≤ i and both stand in one document; bool (B, 1, T, T).

    Padding counts as one document of its own, so that no row of the softmax is empty.
    """
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return same_BTT.tril()[:, None]


def attend(query_BTHd: Tensor, key_BTHd: Tensor, value_BTHd: Tensor, visible_B1TT: Tensor, scale: float) -> Tensor:
    """softmax(scale · QKᵀ + M) V over the visible keys, (B, T, H, d_v), by torch's own kernel.

    Causal: no key after its query is visible. The kernel works through whatever it is given, hidden or not, so each
    block of queries is given the keys up to its end only.
    """
    # The kernel leaves its fast path when the value width differs from the key width: pad, attend, cut.
    key_width, value_width = key_BTHd.shape[-1], value_BTHd.shape[-1]
    if value_width < key_width:
        value_BTHd = F.pad(value_BTHd, (0, key_width - value_width))
    query_BHTd, key_BHTd, value_BHTd = (x.transpose(1, 2) for x in (query_BTHd, key_BTHd, value_BTHd))
    blocks = [
        F.scaled_dot_product_attention(
            query_BHTd[:, :, start : start + QUERY_BLOCK],
            key_BHTd[:, :, : start + QUERY_BLOCK],
            value_BHTd[:, :, : start + QUERY_BLOCK],
            attn_mask=visible_B1TT[:, :, start : start + QUERY_BLOCK, : start + QUERY_BLOCK],
            scale=scale,
        )
        for start in range(0, query_BHTd.shape[2], QUERY_BLOCK)
    ]
    return torch.cat(blocks, dim=2).transpose(1, 2)[..., :value_width]
