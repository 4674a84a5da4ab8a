"""Multi-head latent attention, DeepSeek-V3 report section 2.1.1.

B batch, T tokens, S cached tokens, D model width, H heads, C latent width; nope, rope and v are widths of one head.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniloom.errors import ConfigError
from omniloom.model.attention import attend, scaled
from omniloom.model.config import ModelConfig
from omniloom.model.layers import RMSNorm
from omniloom.model.position import Places, apply_rope, yarn_mscale
from omniloom.model.sparse_attention import visible_keys


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

    def forward(self, hidden_BTD: Tensor, places: Places) -> Tensor:
        """The training form: keys and values of every head."""
        attended = self.attend(*self.project(hidden_BTD, places), places, self.scale, self.config)
        return self.o_proj(attended.flatten(-2))

    def project(self, hidden_BTD: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (B, T, H, nope + rope) and values (B, T, H, v)."""
        query = torch.cat(self._queries(hidden_BTD, places), dim=-1)
        latent_BTC, key_rope = self.compress(hidden_BTD, places)
        key_value = self.kv_b_proj(latent_BTC).unflatten(-1, (self.heads, self.nope + self.value))
        key_nope, value = key_value.split([self.nope, self.value], dim=-1)  # k_C, v_C
        key = torch.cat([key_nope, key_rope[:, :, None, :].expand(-1, -1, self.heads, -1)], dim=-1)
        return query, key, value

    def compress(self, hidden_BTD: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """All that a cache holds of a token: the normalised c_KV (B, T, C) and k_R (B, T, rope)."""
        latent, key_rope = self.kv_a_proj_with_mqa(hidden_BTD).split([self.latent, self.rope], dim=-1)
        key_rope = self._turn(key_rope[:, :, None, :], places)[:, :, 0, :]
        return self.kv_a_layernorm(latent), key_rope

    def absorbed(self, hidden_BTD: Tensor, latent_BSC: Tensor, key_rope_BSR: Tensor, places: Places) -> Tensor:
        """The decode form: the last T of S cached tokens ask; W_UK is absorbed into the queries, W_UV into the output.

        q_C·(W_UK c) = (W_UKᵀ q_C)·c and Σ p W_UV c = W_UV Σ p c: attention with one head of keys, the cache itself.
        Each row is one document; `places` are the T tokens'. Full or sparse; raises ConfigError for linear attention,
        which keeps a state instead of a cache. (B, T, D) → (B, T, D).
        """
        config = self.config
        if config.attention_pattern == "linear":
            raise ConfigError("model.attention_pattern=linear has no absorbed form: it is full or sparse attention's")
        up_key_HnC, up_value_HvC = self.kv_b_proj.weight.unflatten(0, (self.heads, -1)).split(
            [self.nope, self.value], dim=1
        )
        query_nope, query_rope = self._queries(hidden_BTD, places)
        query_latent = torch.einsum("bthn,hnc->bthc", query_nope, up_key_HnC.to(query_nope.dtype))
        query = torch.cat([query_latent, query_rope], dim=-1).transpose(1, 2)
        key = torch.cat([latent_BSC, key_rope_BSR], dim=-1)[:, None]
        value = F.pad(latent_BSC, (0, self.rope))[:, None]  # as wide as the keys, for the kernel
        asking, cached = hidden_BTD.shape[1], latent_BSC.shape[1]
        key_S = torch.arange(cached, device=key.device)
        window = config.window_tokens if config.attention_pattern == "sparse" else cached
        visible_TS = visible_keys(
            key_S[cached - asking :], key_S, window, config.global_stride, config.max_global_tokens
        )
        read = F.scaled_dot_product_attention(query, key, value, visible_TS, scale=self.scale, enable_gqa=True)
        read_BTHC = read[..., : self.latent].transpose(1, 2)
        return self.o_proj(torch.einsum("bthc,hvc->bthv", read_BTHC, up_value_HvC.to(read.dtype)).flatten(-2))

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
