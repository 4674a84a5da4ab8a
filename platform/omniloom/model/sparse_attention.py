"""Sparse attention over one document: a local window and every so many positions of all that lies before it.

n tokens of one document, H heads, K heads of keys and values, d and v their widths, C blocks of queries at a time,
W tokens of a block (the window), S keys that a block may see.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from omniloom.model.position import Span

MASK_NUMBERS = 1 << 24  # at a time, so that what is gathered stays bounded whatever the length


def strides_at(index_n: Tensor, global_stride: int, max_global_tokens: int) -> Tensor:
    """The stride of the globals that a query at each index sees, int64: `global_stride` · 2^k, the smallest by which
    at most `max_global_tokens` positions of 0 … index are multiples."""
    over_n = index_n // (global_stride * max_global_tokens)
    doublings_n = torch.frexp(over_n.double()).exponent  # the bits of an integer
    return global_stride * (1 << doublings_n.long())


def visible_keys(
    query_BT: Tensor, key_BS: Tensor, window_tokens: int, global_stride: int, max_global_tokens: int
) -> Tensor:
    """Which query index sees which key index not after it, of one document a row, bool (B, T, S): the whole rule, for
    decoding."""
    query_BT1, stride_BT1 = query_BT[..., None], strides_at(query_BT, global_stride, max_global_tokens)[..., None]
    key_B1S = key_BS[..., None, :]
    return (key_B1S > query_BT1 - window_tokens) | (key_B1S % stride_BT1 == 0)


def attend_sparsely(
    query_nHd: Tensor,
    key_nKd: Tensor,
    value_nKv: Tensor,
    spans: list[Span],
    scale: float,
    window_tokens: int,
    global_stride: int,
    max_global_tokens: int,
) -> Tensor:
    """softmax over the last `window_tokens` keys ∪ every stride-th key before them, (n, H, v).

    Query t sees j where t − window < j ≤ t (≤ the end of t's span, a picture or frame), or j ≤ t − window and j is a
    multiple of the stride at t (`strides_at`): the rule is causal and the same in training, prefill and decoding, and
    costs n · (window + max_global_tokens). Blocks of a window's queries gather the keys that any of them sees, again in
    the backward pass; no n × n mask exists. Ours: the cap counts multiples from 0 to t, those inside the window too.
    """
    tokens, window = len(query_nHd), window_tokens
    reach_n = torch.arange(tokens, device=query_nHd.device)
    for begin, end in spans:
        reach_n[begin:end] = end - 1
    ahead = max((end - begin - 1 for begin, end in spans), default=0)
    width = value_nKv.shape[-1]
    value_nKv = F.pad(value_nKv, (0, max(0, key_nKd.shape[-1] - width)))  # as in attend_fully

    blocks = -(-tokens // window)
    at_once = max(1, MASK_NUMBERS // (window * (2 * window + ahead + max_global_tokens)))

    def attend_blocks(
        block_C: Tensor, globals_seen: int, query_nHd: Tensor, key_nKd: Tensor, value_nKv: Tensor
    ) -> Tensor:
        # Past the end the last query is asked again, and its answers are cut off.
        query_CW = (block_C[:, None] * window + torch.arange(window, device=block_C.device)).clamp(max=tokens - 1)
        key_CS, visible_CWS = _keys_of(query_CW, reach_n, ahead, globals_seen, window, global_stride, max_global_tokens)
        query, key, value = (x.transpose(1, 2) for x in (query_nHd[query_CW], key_nKd[key_CS], value_nKv[key_CS]))
        grouped = query.shape[1] != key.shape[1]
        seen = F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible_CWS[:, None], scale=scale, enable_gqa=grouped
        )
        return seen.transpose(1, 2).flatten(0, 1)

    out = []
    for first in range(0, blocks, at_once):
        number = range(first, min(first + at_once, blocks))
        most = max(_globals_before(b * window, global_stride, max_global_tokens) for b in number)
        block_C = torch.tensor(number, device=query_nHd.device)
        inputs = (block_C, most, query_nHd, key_nKd, value_nKv)
        out.append(checkpoint(attend_blocks, *inputs, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(out)[:tokens, :, :width]


def _globals_before(index: int, global_stride: int, max_global_tokens: int) -> int:
    """How many multiples of the stride at `index` lie before it."""
    stride = global_stride << (index // (global_stride * max_global_tokens)).bit_length()
    return -(-index // stride)


def _keys_of(
    query_CW: Tensor, reach_n: Tensor, ahead: int, globals_seen: int, window: int, global_stride: int, most: int
) -> tuple[Tensor, Tensor]:
    """Indices of the keys that each block gathers (C, S), and which query sees which of them (C, W, S)."""
    begin_C1 = query_CW[:, :1]
    device, tokens = query_CW.device, len(reach_n)
    local_CS = begin_C1 - window + 1 + torch.arange(2 * window - 1 + ahead, device=device)
    # The finest stride of the block's queries is its first one's: the others see multiples of it.
    finest_C1 = strides_at(begin_C1, global_stride, most)
    global_CS = torch.arange(globals_seen, device=device) * finest_C1

    query_CW1 = query_CW[..., None]
    local_C1S, global_C1S = local_CS[:, None], global_CS[:, None]
    near = (local_C1S > query_CW1 - window) & (local_C1S <= reach_n[query_CW1]) & (local_C1S >= 0)
    far = (global_C1S <= query_CW1 - window) & (global_C1S % strides_at(query_CW1, global_stride, most) == 0)
    return torch.cat([local_CS, global_CS], dim=1).clamp(0, tokens - 1), torch.cat([near, far], dim=2)
