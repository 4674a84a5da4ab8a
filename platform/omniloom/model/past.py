"""What a cache is to attention: where it puts what it keeps of new tokens, and what it reads back of all.

B sequences, T new tokens of each, N = Σ T over all sequences, S cached tokens with the new ones, H heads, K heads of
keys and values, d and v their widths.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor
from torch.nn import functional as F

from omniloom.model.config import ModelConfig
from omniloom.model.position import Places, Span
from omniloom.model.sparse_attention import visible_keys


class Seen(NamedTuple):
    """Sequences side by side in the packed row of new tokens, as many of each, and what is cached of them."""

    documents: range  # which of the row's
    begin: int  # their first token in the row
    tokens: int  # T
    index_BS: Tensor  # int64, of each cached token in its sequence; −1 where there is none
    kept: tuple[Tensor, ...]  # (B, S, …)
    is_fresh: bool  # nothing was cached before
    is_even: bool  # as much is cached of each

    def of(self, x_1N: Tensor) -> Tensor:
        """Their part of something a token of the row, (B, T, …)."""
        count = len(self.documents)
        return x_1N[0, self.begin : self.begin + count * self.tokens].unflatten(0, (count, self.tokens))


class Past(Protocol):
    """One layer's cache of the sequences whose new tokens stand in the packed row, in order."""

    observes: int  # how many of the last queries it wants to see

    def extend(self, *kept_1N: Tensor) -> Iterator[Seen]:
        """Keep this of each new token, (1, N, …); what is cached then, sequences alike together."""

    def observe(self, seen: Seen, query_BTHd: Tensor) -> None:
        """Take the last queries, as they meet the keys."""


class DecoderPast(Protocol):
    """A decoder's cache."""

    @property
    def begins(self) -> Sequence[int]:
        """Of each sequence, the index of its first new token."""

    @property
    def layers(self) -> Sequence[Past]:
        """One a layer."""

    def before(self, embedded_1ND: Tensor, tokens: int) -> Tensor:
        """The embeddings of the `tokens` before each sequence's new ones, (B, tokens, D), zero where there is none; it
        keeps the newest for the next time."""


def visible(seen: Seen, places: Places, config: ModelConfig) -> Tensor | None:
    """Which new token sees which cached one, bool (B, T, S); None where each sees all."""
    is_sparse, key_BS = config.attention_pattern == "sparse", seen.index_BS
    spans = [places.spans[document] for document in seen.documents]
    if seen.tokens == 1 and seen.is_even and not is_sparse:
        return None
    query_BT = seen.of(places.index_BT)
    reach_BT = _reach(query_BT, spans) if any(spans) else query_BT
    seen_BTS = (key_BS[:, None] >= 0) & (key_BS[:, None] <= reach_BT[..., None])
    if is_sparse:
        seen_BTS &= visible_keys(query_BT, key_BS, config.window_tokens, config.global_stride, config.max_global_tokens)
    return seen_BTS


def _reach(query_BT: Tensor, spans: list[list[Span]]) -> Tensor:
    """The last index that each token sees: its own, or its picture's last."""
    reach_BT = query_BT.clone()
    for row, own in enumerate(spans):
        for begin, end in own:
            reach_BT[row, begin:end] = query_BT[row, end - 1]
    return reach_BT


def attend_masked(
    query_BTHd: Tensor, key_BSKd: Tensor, value_BSKv: Tensor, visible_BTS: Tensor | None, scale: float
) -> Tensor:
    """softmax(scale · QKᵀ + M) V, (B, T, H, v).

    Heads that share a key are as many more queries: one product instead of one for each.
    """
    width, tokens = value_BSKv.shape[-1], query_BTHd.shape[1]
    if width < key_BSKd.shape[-1]:  # as in attend_fully
        value_BSKv = F.pad(value_BSKv, (0, key_BSKd.shape[-1] - width))
    query_BTKGd = query_BTHd.unflatten(2, (key_BSKd.shape[2], -1))
    sharing = query_BTKGd.shape[3]
    query = query_BTKGd.permute(0, 2, 1, 3, 4).flatten(2, 3)  # (B, K, T · G, d)
    mask = None if visible_BTS is None else visible_BTS.repeat_interleave(sharing, dim=1)[:, None]
    out = F.scaled_dot_product_attention(query, key_BSKd.transpose(1, 2), value_BSKv.transpose(1, 2), mask, scale=scale)
    return out.unflatten(2, (tokens, sharing)).permute(0, 2, 1, 3, 4).flatten(2, 3)[..., :width]
