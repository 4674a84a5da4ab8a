"""Norm, feed-forward and initialisation.

B batch, T tokens, D model width, F feed-forward width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), (…, D) → (…, D); Shazeer 2020, eq. 6."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_BTD)) * self.up_proj(hidden_BTD))


class LocalConvolution(nn.Module):
    """y_t = x_t + Σ_{j<k} w_j ⊙ x_{t−j}, depthwise and causal, over tokens of the same document; (B, T, D) → (B, T, D).

    With it a single attention layer sees which token came before another, what copying out of a context needs.
    """

    def __init__(self, hidden_size: int, tokens: int) -> None:
        super().__init__()
        # Wide from the start, as torch draws convolutions: channels that already tell one neighbour from another are
        # what recall is learned from; from near zero it takes several times as long.
        self.weight_KD = nn.Parameter(torch.empty(tokens, hidden_size).uniform_(-(tokens**-0.5), tokens**-0.5))

    def forward(self, x_BTD: Tensor, index_BT: Tensor) -> Tensor:
        """`index_BT` counts tokens within their document: what lies before its first token is zero."""
        mixed_BTD = x_BTD * (1 + self.weight_KD[0])
        for back in range(1, len(self.weight_KD)):
            shifted_BTD = F.pad(x_BTD, (0, 0, back, 0))[:, : x_BTD.shape[1]]
            mixed_BTD = mixed_BTD + shifted_BTD * self.weight_KD[back] * (index_BT >= back)[..., None]
        return mixed_BTD


RESIDUAL_OUTPUTS = ("o_proj", "down_proj", "down_EFD")


@torch.no_grad()
def initialise(model: nn.Module, std: float, num_hidden_layers: int) -> None:
    """Draw matrices from normal(0, std); those that write into the residual stream from normal(0, std / √(2L)).

    Norm gains stay 1, local convolutions as they drew themselves. Source: GPT-2's residual scaling, two writes a layer.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name.endswith("weight_KD"):
            continue
        writes_residual = any(part in RESIDUAL_OUTPUTS for part in name.split("."))
        parameter.normal_(0.0, std / math.sqrt(2 * num_hidden_layers) if writes_residual else std)
