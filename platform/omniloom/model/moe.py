"""Mixture of experts with sigmoid gates and auxiliary-loss-free balancing, DeepSeek-V3 report section 2.1.2.

B batch, T tokens, N = B·T, D model width, E routed experts, K experts per token, F expert width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniloom.model.config import ModelConfig
from omniloom.model.layers import SwiGLU


class RouterOutput(NamedTuple):
    """What one layer's router did: the raw material of balancing and of the router's health."""

    scores_BTE: Tensor  # float32, sigmoid affinities without the bias
    tokens_per_expert_E: Tensor  # int64, choices that landed on each expert, padding excluded


class Router(nn.Module):
    """s = sigmoid(u·e_i); choose the K largest of s + b; gates = chosen s / their sum × scaling (eqs. 12–16).

    The bias b steers the choice only and gets no gradient: the training step moves it by `update_expert_bias`.
    """

    bias_E: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.experts_per_token = config.num_experts_per_tok
        self.scaling = config.routed_scaling_factor
        self.weight_ED = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("bias_E", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Engines cast whole modules to bf16, where a bias near 0.5 cannot move by 0.001: the bias stays float32.
        before: Any = self.bias_E
        super()._apply(fn, recurse)
        if self.bias_E.dtype != torch.float32:
            self.bias_E = before.to(self.bias_E.device)
        return self

    def forward(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Affinities (N, E), gates (N, K) and chosen experts (N, K), all computed in float32."""
        scores_NE = F.linear(hidden_ND.float(), self.weight_ED.float()).sigmoid()  # Eq. 15
        chosen_NK = (scores_NE + self.bias_E).topk(self.experts_per_token, dim=-1).indices  # Eq. 16
        gates_NK = scores_NE.gather(-1, chosen_NK)
        gates_NK = gates_NK / gates_NK.sum(dim=-1, keepdim=True) * self.scaling  # Eq. 13
        return scores_NE, gates_NK, chosen_NK


class Experts(nn.Module):
    """E SwiGLU networks as two grouped matrix products over tokens sorted by expert; no token is dropped."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_EDF = nn.Parameter(torch.empty(experts, width, 2 * inner))
        self.down_EFD = nn.Parameter(torch.empty(experts, inner, width))

    def forward(self, hidden_ND: Tensor, gates_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        experts, choices = self.gate_up_EDF.shape[0], chosen_NK.shape[1]
        order = chosen_NK.flatten().argsort(stable=True)  # choices sorted by expert
        token = order // choices
        ends_E = chosen_NK.flatten().bincount(minlength=experts).cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(hidden_ND[token], self.gate_up_EDF, offs=ends_E).chunk(2, dim=-1)
        expert_out = F.grouped_mm(F.silu(gate) * up, self.down_EFD, offs=ends_E)
        weighted = expert_out * gates_NK.flatten()[order, None].to(expert_out.dtype)
        return torch.zeros_like(hidden_ND).index_add(0, token, weighted.to(hidden_ND.dtype))


class MixtureOfExperts(nn.Module):
    """h' = shared(h) + Σ gate_i · expert_i(h) over the K chosen (eq. 12); (B, T, D) → (B, T, D) and the router's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SwiGLU(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, hidden_BTD: Tensor, is_token_BT: Tensor) -> tuple[Tensor, RouterOutput]:
        batch, tokens, width = hidden_BTD.shape
        hidden_ND = hidden_BTD.reshape(-1, width)
        scores_NE, gates_NK, chosen_NK = self.router(hidden_ND)
        routed_ND = self.experts(hidden_ND, gates_NK, chosen_NK)
        counts_E = chosen_NK[is_token_BT.flatten()].flatten().bincount(minlength=scores_NE.shape[-1])
        output_BTD = self.shared_experts(hidden_BTD) + routed_ND.view_as(hidden_BTD)
        return output_BTD, RouterOutput(scores_NE.view(batch, tokens, -1), counts_E)


def update_expert_bias(bias_E: Tensor, tokens_per_expert_E: Tensor, rate: float, tolerance: float = 0.0) -> Tensor:
    """b − rate where load > (1 + tolerance)·mean, b + rate where load < (1 − tolerance)·mean; float32 (E,).

    The load is over the global batch: reduce the counts first. Source: DeepSeek-V3 section 2.1.2 (γ = 0.001);
    tolerance 0 is the paper's sign rule.
    """
    load_E = tokens_per_expert_E.to(torch.float32)
    mean = load_E.mean()
    over, under = load_E > (1 + tolerance) * mean, load_E < (1 - tolerance) * mean
    return bias_E + rate * (under.to(bias_E.dtype) - over.to(bias_E.dtype))
