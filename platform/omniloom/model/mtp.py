"""Multi-token prediction, DeepSeek-V3 report section 2.2.

B batch, T tokens, D model width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniloom.model.config import ModelConfig
from omniloom.model.layers import norm


class Junction(nn.Module):
    """h′ = M [norm(Emb(next token)); norm(h)], what a module's own layer reads (eq. 21); (B, T, D) → (B, T, D).

    h is the state one module earlier, after its norm, and the embedding comes first, where the report has it second:
    so were the published weights trained.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.enorm = norm(config)
        self.hnorm = norm(config)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_BTD: Tensor, ahead_BTD: Tensor) -> Tensor:
        return self.eh_proj(torch.cat([self.enorm(ahead_BTD), self.hnorm(hidden_BTD)], dim=-1))


def tokens_ahead(embedded_BTD: Tensor, document_BT: Tensor, ahead: int) -> Tensor:
    """The embedding `ahead` tokens on in the same document, zero where there is none; (B, T, D)."""
    ahead = min(ahead, embedded_BTD.shape[1])
    shifted_BTD = F.pad(embedded_BTD[:, ahead:], (0, 0, 0, ahead))
    same_BT = F.pad(document_BT[:, ahead:] == document_BT[:, :-ahead], (0, ahead))
    return shifted_BTD * same_BT[..., None]
