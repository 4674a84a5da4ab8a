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


RESIDUAL_OUTPUTS = ("o_proj", "down_proj", "down_EFD")


@torch.no_grad()
def initialise(model: nn.Module, std: float, num_hidden_layers: int) -> None:
    """Draw matrices from normal(0, std); those that write into the residual stream from normal(0, std / √(2L)).

    Norm gains stay 1. Source: GPT-2's residual scaling, two writes a layer.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        writes_residual = any(part in RESIDUAL_OUTPUTS for part in name.split("."))
        parameter.normal_(0.0, std / math.sqrt(2 * num_hidden_layers) if writes_residual else std)
