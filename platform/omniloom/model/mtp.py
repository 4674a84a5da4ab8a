"""Multi-token prediction, DeepSeek-V3 report section 2.2.

B batch, T tokens, D model width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniloom.model.config import ModelConfig


class Junction(nn.Module):
    """h′ = M [RMSNorm(h); RMSNorm(Emb(next token))], what a module's own layer reads (eq. 21); (B, T, D) → (B, T, D).

    h is the state one module earlier, after its norm, which is what published weights were trained on.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.hnorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.enorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_BTD: Tensor, ahead_BTD: Tensor) -> Tensor:
        return self.eh_proj(torch.cat([self.hnorm(hidden_BTD), self.enorm(ahead_BTD)], dim=-1))


def tokens_ahead(embedded_BTD: Tensor, document_BT: Tensor, ahead: int) -> Tensor:
    """The embedding `ahead` tokens on in the same document, zero where there is none; (B, T, D)."""
    shifted_BTD = F.pad(embedded_BTD[:, ahead:], (0, 0, 0, ahead))
    same_BT = F.pad(document_BT[:, ahead:] == document_BT[:, :-ahead], (0, ahead))
    return shifted_BTD * same_BT[..., None]
