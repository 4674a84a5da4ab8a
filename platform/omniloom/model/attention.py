"""Causal attention within each document of packed rows: multi-head, multi-query, grouped-query; full, sparse, linear.

B batch, T tokens, H heads, K heads of keys and values, d head width, v value width, n tokens of one document, D model
width, R rotary width, C tokens of a chunk.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniloom.model.config import ModelConfig
from omniloom.model.past import Past, Seen, attend_masked, visible
from omniloom.model.position import Places, Span, apply_rope
from omniloom.model.sparse_attention import attend_sparsely

CHUNK_TOKENS = 64


class GroupedAttention(nn.Module):
    """softmax(QKᵀ/√d + M)V with K heads of keys and values, each serving H/K heads of queries; (B, T, D) → (B, T, D).

    K = H is multi-head attention (Vaswani et al. 2017, eq. 1), K = 1 multi-query, between them grouped-query (Ainslie
    et al. 2023). RoPE turns the first R of each head's d numbers.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.heads, self.key_value_heads, self.width = (
            config.num_attention_heads,
            config.key_value_heads,
            config.head_width,
        )
        model, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(model, self.heads * self.width, bias=bias)
        self.k_proj = nn.Linear(model, self.key_value_heads * self.width, bias=bias)
        self.v_proj = nn.Linear(model, self.key_value_heads * self.width, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.width, model, bias=bias)
        self.scale = self.width**-0.5
        self.attend: Callable[..., Tensor] = attend  # training may gather tokens that ranks share here

    def project(self, hidden_BTD: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, d), keys and values (B, T, K, d), turned to their places."""
        query = self.q_proj(hidden_BTD).unflatten(-1, (self.heads, self.width))
        key = self.k_proj(hidden_BTD).unflatten(-1, (self.key_value_heads, self.width))
        value = self.v_proj(hidden_BTD).unflatten(-1, (self.key_value_heads, self.width))
        if places.rope is not None:
            query, key = (self._turn(x, places.rope) for x in (query, key))
        return scaled(query, places.query_scale_BT), key, value

    def forward(self, hidden_BTD: Tensor, places: Places, past: Past | None = None) -> Tensor:
        query, key, value = self.project(hidden_BTD, places)
        if past is None:
            attended = self.attend(query, key, value, places, self.scale, self.config)
        else:
            attended = attend_past(query, key, value, places, past, self.scale, self.config)
        return self.o_proj(attended.flatten(-2))

    def _turn(self, x_BTHd: Tensor, table: Tensor) -> Tensor:
        if self.config.rotary_width == self.width:
            return apply_rope(x_BTHd, table, self.config.rope_interleave)
        rotary, rest = x_BTHd.split([self.config.rotary_width, self.width - self.config.rotary_width], dim=-1)
        return torch.cat([apply_rope(rotary, table, self.config.rope_interleave), rest], dim=-1)


def scaled(query_BTHd: Tensor, query_scale_BT: Tensor | None) -> Tensor:
    """Queries times their place's scale (`position.log_scale`)."""
    return query_BTHd if query_scale_BT is None else query_BTHd * query_scale_BT[..., None, None].to(query_BTHd.dtype)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a program for every packing otherwise
def attend(
    query_BTHd: Tensor, key_BTKd: Tensor, value_BTKv: Tensor, places: Places, scale: float, config: ModelConfig
) -> Tensor:
    """softmax(scale · QKᵀ + M) V in the configured pattern, (B, T, H, v).

    M lets query i see key j where j ≤ i and both stand in one document: each document attends to itself alone, so that
    a packed row costs what its documents cost.
    """
    rows = query_BTHd.shape[0]
    # Split, not sliced: the gradient of a split is one concatenation, that of each slice a tensor of zeros.
    parts = (x.flatten(0, 1).split(places.lengths) for x in (query_BTHd, key_BTKd, value_BTKv))
    attended = [
        attend_document(query, key, value, spans, scale, config)
        for query, key, value, spans in zip(*parts, places.spans, strict=True)
    ]
    return torch.cat(attended).unflatten(0, (rows, -1))


def attend_document(
    query_nHd: Tensor, key_nKd: Tensor, value_nKv: Tensor, spans: list[Span], scale: float, config: ModelConfig
) -> Tensor:
    """One document's tokens in the configured pattern, (n, H, v)."""
    if config.attention_pattern == "linear":
        return attend_linearly(query_nHd, key_nKd, value_nKv)
    if config.attention_pattern == "sparse" and len(query_nHd) > config.window_tokens:
        limits = (config.window_tokens, config.global_stride, config.max_global_tokens)
        return attend_sparsely(query_nHd, key_nKd, value_nKv, spans, scale, *limits)
    return attend_fully(query_nHd, key_nKd, value_nKv, spans, scale)


def attend_past(
    query_1NHd: Tensor,
    key_1NKd: Tensor,
    value_1NKv: Tensor,
    places: Places,
    past: Past,
    scale: float,
    config: ModelConfig,
) -> Tensor:
    """`attend` for new tokens, each document's going on from what is cached of it; (1, N, H, v)."""
    attended = []
    for seen in past.extend(key_1NKd, value_1NKv):
        query_BTHd = seen.of(query_1NHd)
        if seen.is_fresh:
            out_BTHv = attend_fresh(query_BTHd, seen.of(key_1NKd), seen.of(value_1NKv), seen, places, scale, config)
        else:
            key_BSKd, value_BSKv = (x.to(query_BTHd.dtype) for x in seen.kept)
            out_BTHv = attend_masked(query_BTHd, key_BSKd, value_BSKv, visible(seen, places, config), scale)
        past.observe(seen, query_BTHd)
        attended.append(out_BTHv.flatten(0, 1))
    return torch.cat(attended)[None]


def attend_fresh(
    query_BTHd: Tensor,
    key_BTKd: Tensor,
    value_BTKv: Tensor,
    seen: Seen,
    places: Places,
    scale: float,
    config: ModelConfig,
) -> Tensor:
    """Documents of which nothing was cached, as training attends to them; (B, T, H, v)."""
    spans = [places.spans[document] for document in seen.documents]
    each = zip(query_BTHd, key_BTKd, value_BTKv, spans, strict=True)
    return torch.stack([attend_document(*one, scale, config) for one in each])


def attend_fully(query_nHd: Tensor, key_nKd: Tensor, value_nKv: Tensor, spans: list[Span], scale: float) -> Tensor:
    """Every token sees all before it in its document, and all of its own span (a picture, a frame); (n, H, v)."""
    # The kernel leaves its fast path when the value width differs from the key width: pad, attend, cut.
    width = value_nKv.shape[-1]
    if width < key_nKd.shape[-1]:
        value_nKv = F.pad(value_nKv, (0, key_nKd.shape[-1] - width))
    query, key, value = (x.transpose(0, 1)[None] for x in (query_nHd, key_nKd, value_nKv))
    grouped = query_nHd.shape[1] != key_nKd.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    if spans:
        pieces, done = [], 0
        for begin, end in spans:
            seen = (query[:, :, begin:end], key[:, :, :end], value[:, :, :end])
            both_ways = F.scaled_dot_product_attention(*seen, scale=scale, enable_gqa=grouped)
            pieces += [out[:, :, done:begin], both_ways]
            done = end
        out = torch.cat([*pieces, out[:, :, done:]], dim=2)
    return out[0].transpose(0, 1)[..., :width]


def attend_linearly(query_nHd: Tensor, key_nKd: Tensor, value_nKv: Tensor) -> Tensor:
    """out_t = φ(q_t) Σ_{s≤t} φ(k_s)ᵀ v_s / φ(q_t) Σ_{s≤t} φ(k_s)ᵀ with φ = elu + 1; (n, H, v), linear in n.

    Chunk by chunk: what lies before a chunk is one d × v state, what lies in it a C × C product. In float32, as the
    states are long sums. Source: Katharopoulos et al. 2020, eqs. 7 and 9; scores are not scaled. A research option.
    """
    tokens, heads = query_nHd.shape[:2]
    pad = -tokens % CHUNK_TOKENS

    def chunks(x: Tensor) -> Tensor:  # (chunks, C, H, …)
        x = x.repeat_interleave(heads // x.shape[1], dim=1)
        return F.pad(x, (0, 0, 0, 0, 0, pad)).unflatten(0, (-1, CHUNK_TOKENS))

    with torch.autocast(query_nHd.device.type, enabled=False):
        query, key = (chunks(F.elu(x.float()) + 1) for x in (query_nHd, key_nKd))
        value = chunks(F.pad(value_nKv.float(), (0, 1), value=1.0))  # the last column sums the weights
        states = torch.einsum("cshd,cshv->chdv", key, value)
        before = states.cumsum(0) - states
        weights = torch.einsum("cthd,cshd->chts", query, key).tril()
        out = torch.einsum("chts,cshv->cthv", weights, value) + torch.einsum("cthd,chdv->cthv", query, before)
    out = out.flatten(0, 1)[:tokens]  # before dividing: what was padded has no weights
    least = torch.finfo(torch.float32).tiny  # φ is above 0, until it underflows
    return (out[..., :-1] / out[..., -1:].clamp(min=least)).to(value_nKv.dtype)


def modality_mass(
    query_BTHd: Tensor, key_BTKd: Tensor, modality_BT: Tensor, places: Places, scale: float, config: ModelConfig
) -> Tensor:
    """Mean share of attention that queries of modality i give to keys of modality j, float32 (4, 4); rows sum to 1.

    Attention over values that name the key's modality; a modality without a query has a row of zeros.
    """
    kind_BT4 = F.one_hot(modality_BT.long(), 4).to(query_BTHd.dtype)
    value = kind_BT4[:, :, None, :].expand(-1, -1, key_BTKd.shape[2], -1)
    mass_BT4 = attend(query_BTHd, key_BTKd, value, places, scale, config).float().mean(dim=2)
    asked_BT4 = kind_BT4.float() * places.is_token_BT[..., None]
    return torch.einsum("bti,btj->ij", asked_BT4, mass_BT4) / asked_BT4.sum(dim=(0, 1)).clamp(min=1)[:, None]
