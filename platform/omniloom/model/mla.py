"""Multi-head latent attention, DeepSeek-V3 report section 2.1.1 (training form).

B batch, T tokens, D model width, H heads; nope, rope and v are widths of one head.
"""

import torch
from torch import Tensor, nn

from omniloom.model.attention import attend
from omniloom.model.config import ModelConfig
from omniloom.model.position import apply_rope


class LatentAttention(nn.Module):
    """Keys and values come from one small latent c_KV; position goes through a separate rotary key k_R.

    c_KV = RMSNorm(W_DKV h); k_C = W_UK c_KV; v_C = W_UV c_KV; k_R = RoPE(W_KR h), shared by the heads; q from
    RMSNorm(W_DQ h), or from h where `q_lora_rank` is None; score (q·k) / √(nope + rope). (B, T, D) → (B, T, D).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.nope, self.rope = (
            config.num_attention_heads,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
        )
        self.value = config.v_head_dim
        self.kv_lora_rank = config.kv_lora_rank
        width, query_width = config.hidden_size, self.heads * (self.nope + self.rope)
        self.q_proj: nn.Module
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(width, query_width, bias=False)
        else:
            self.q_proj = nn.Sequential(
                nn.Linear(width, config.q_lora_rank, bias=False),
                nn.RMSNorm(config.q_lora_rank, eps=config.rms_norm_eps),
                nn.Linear(config.q_lora_rank, query_width, bias=False),
            )
        self.kv_a_proj_with_mqa = nn.Linear(width, config.kv_lora_rank + self.rope, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(config.kv_lora_rank, eps=config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, width, bias=False)

    def forward(
        self, hidden_BTD: Tensor, rope_table: Tensor, lengths: list[int], query_scale_BT: Tensor | None = None
    ) -> Tensor:
        """`lengths`: the documents' in tokens; `query_scale_BT` multiplies the queries (`position.log_scale`)."""
        query = self.q_proj(hidden_BTD).unflatten(-1, (self.heads, self.nope + self.rope))
        query_nope, query_rope = query.split([self.nope, self.rope], dim=-1)  # q_C, q_R

        compressed = self.kv_a_proj_with_mqa(hidden_BTD)
        latent, key_rope = compressed.split([self.kv_lora_rank, self.rope], dim=-1)
        key_value = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.heads, self.nope + self.value))
        key_nope, value = key_value.split([self.nope, self.value], dim=-1)  # k_C, v_C

        query_rope = apply_rope(query_rope, rope_table)
        key_rope = apply_rope(key_rope[:, :, None, :], rope_table).expand(-1, -1, self.heads, -1)  # k_R
        query = torch.cat([query_nope, query_rope], dim=-1)
        if query_scale_BT is not None:
            query = query * query_scale_BT[..., None, None].to(query.dtype)
        attended = attend(
            query,
            torch.cat([key_nope, key_rope], dim=-1),
            value,
            lengths,
            scale=(self.nope + self.rope) ** -0.5,
        )
        return self.o_proj(attended.flatten(-2))
