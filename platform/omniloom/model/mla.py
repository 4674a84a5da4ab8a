"""Multi-head latent attention, DeepSeek-V3 report section 2.1.1.

B batch, T tokens, S cached tokens, D model width, H heads, C latent width; nope, rope and v are widths of one head.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from omniloom.model.attention import attend, attend_fresh, scaled
from omniloom.model.config import ModelConfig
from omniloom.model.layers import RMSNorm
from omniloom.model.past import Past, attend_masked, visible
from omniloom.model.position import Places, apply_rope, yarn_mscale


class LatentAttention(nn.Module):
    """Keys and values come from one small latent c_KV; position goes through a separate rotary key k_R.

    c_KV = RMSNorm(W_DKV h); k_C = W_UK c_KV; v_C = W_UV c_KV; k_R = RoPE(W_KR h), shared by the heads; q from
    RMSNorm(W_DQ h), or from h where `q_lora_rank` is None; score (q·k) / √(nope + rope), times YaRN's mscale² where
    `yarn_mscale_all_dim` is set. (B, T, D) → (B, T, D).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.heads, self.nope, self.rope = (
            config.num_attention_heads,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
        )
        self.value, self.latent = config.v_head_dim, config.kv_lora_rank
        width, query_width = config.hidden_size, self.heads * (self.nope + self.rope)
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(width, query_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(width, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=config.norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(width, self.latent + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.latent, eps=config.norm_eps)
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, width, bias=False)
        self.scale = (self.nope + self.rope) ** -0.5
        if config.yarn_factor is not None and config.yarn_mscale_all_dim is not None:
            self.scale *= yarn_mscale(config.yarn_factor, config.yarn_mscale_all_dim) ** 2
        self.attend: Callable[..., Tensor] = attend  # training may gather tokens that ranks share here

    def forward(self, hidden_BTD: Tensor, places: Places, past: Past | None = None) -> Tensor:
        if past is None:  # the training form: keys and values of every head
            attended = self.attend(*self.project(hidden_BTD, places), places, self.scale, self.config)
        else:
            attended = self._attend_past(hidden_BTD, places, past)
        return self.o_proj(attended.flatten(-2))

    def project(self, hidden_BTD: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (B, T, H, nope + rope) and values (B, T, H, v)."""
        query = torch.cat(self._queries(hidden_BTD, places), dim=-1)
        return query, *self.expand(*self.compress(hidden_BTD, places))

    def expand(self, latent_BSC: Tensor, key_rope_BSR: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, S, H, nope + rope) and values (B, S, H, v) of every head."""
        key_value = self.kv_b_proj(latent_BSC).unflatten(-1, (self.heads, self.nope + self.value))
        key_nope, value = key_value.split([self.nope, self.value], dim=-1)  # k_C, v_C
        return torch.cat([key_nope, key_rope_BSR[:, :, None, :].expand(-1, -1, self.heads, -1)], dim=-1), value

    def compress(self, hidden_BTD: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """All that a cache holds of a token: the normalised c_KV (B, T, C) and k_R (B, T, rope)."""
        latent, key_rope = self.kv_a_proj_with_mqa(hidden_BTD).split([self.latent, self.rope], dim=-1)
        key_rope = self._turn(key_rope[:, :, None, :], places)[:, :, 0, :]
        return self.kv_a_layernorm(latent), key_rope

    def _attend_past(self, hidden_1ND: Tensor, places: Places, past: Past) -> Tensor:
        """New tokens, each document's going on from what is cached of it; (1, N, H, v)."""
        latent, key_rope = self.compress(hidden_1ND, places)
        query_nope, query_rope = self._queries(hidden_1ND, places)
        attended = []
        for seen in past.extend(latent, key_rope):
            nope, rope = seen.of(query_nope), seen.of(query_rope)
            if seen.is_fresh:
                key, value = self.expand(seen.of(latent), seen.of(key_rope))
                out_BTHv = attend_fresh(
                    torch.cat([nope, rope], dim=-1), key, value, seen, places, self.scale, self.config
                )
            else:
                cached, mask = [x.to(nope.dtype) for x in seen.kept], visible(seen, places, self.config)
                if seen.tokens > self._most_absorbed:
                    query = torch.cat([nope, rope], dim=-1)
                    out_BTHv = attend_masked(query, *self.expand(cached[0], cached[1]), mask, self.scale)
                else:
                    out_BTHv = self.absorbed(nope, rope, cached[0], cached[1], mask)
            if past.observes:
                past.observe(seen, self.absorb(nope[:, -past.observes :], rope[:, -past.observes :]))
            attended.append(out_BTHv.flatten(0, 1))
        return torch.cat(attended)[None]

    @property
    def _most_absorbed(self) -> float:
        """So many queries at once cost as much absorbed, 2·C + rope a key and head, as by heads: nope + rope + v, and
        C · (nope + v) once for each key."""
        more, once = 2 * self.latent - self.nope - self.value, self.latent * (self.nope + self.value)
        return once / more if more > 0 else math.inf

    def absorb(self, query_nope_BTHn: Tensor, query_rope_BTHR: Tensor) -> Tensor:
        """Queries as they meet the cache itself, (B, T, H, C + rope): q_C·(W_UK c) = (W_UKᵀ q_C)·c."""
        up_key_HnC, _ = self._ups()
        query_latent = torch.einsum("bthn,hnc->bthc", query_nope_BTHn, up_key_HnC.to(query_nope_BTHn.dtype))
        return torch.cat([query_latent, query_rope_BTHR], dim=-1)

    def absorbed(
        self,
        query_nope_BTHn: Tensor,
        query_rope_BTHR: Tensor,
        latent_BSC: Tensor,
        key_rope_BSR: Tensor,
        visible_BTS: Tensor | None,
    ) -> Tensor:
        """The decode form, (B, T, H, v): W_UK is absorbed into the queries, W_UV into the output, Σ p W_UV c =
        W_UV Σ p c: attention with one head of keys, the cache itself."""
        query = self.absorb(query_nope_BTHn, query_rope_BTHR)
        key = torch.cat([latent_BSC, key_rope_BSR], dim=-1)[:, :, None]
        read_BTHC = attend_masked(query, key, latent_BSC[:, :, None], visible_BTS, self.scale)
        _, up_value_HvC = self._ups()
        return torch.einsum("bthc,hvc->bthv", read_BTHC, up_value_HvC.to(read_BTHC.dtype))

    def _ups(self) -> tuple[Tensor, Tensor]:
        """W_UK (H, nope, C) and W_UV (H, v, C)."""
        whole_HxC = self.kv_b_proj.weight.unflatten(0, (self.heads, -1))
        return whole_HxC[:, : self.nope], whole_HxC[:, self.nope :]

    def _queries(self, hidden_BTD: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """q_C (B, T, H, nope) and q_R (B, T, H, rope)."""
        if self.config.q_lora_rank is None:
            query = self.q_proj(hidden_BTD)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_BTD)))
        query = scaled(query.unflatten(-1, (self.heads, -1)), places.query_scale_BT)
        query_nope, query_rope = query.split([self.nope, self.rope], dim=-1)
        return query_nope, self._turn(query_rope, places)

    def _turn(self, x_BTHR: Tensor, places: Places) -> Tensor:
        assert places.rope is not None  # ModelConfig.check: latent attention has a rotary key
        return apply_rope(x_BTHR, places.rope, self.config.rope_interleave)
