"""Mixture of experts: DeepSeek-V3's routing (report, section 2.1.2) and softmax routing; balancing by a bias.

B batch, T tokens, N = B·T, D model width, E routed experts, K experts per token, F expert width, G groups.
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

    scores_BTE: Tensor  # float32, affinities without the bias: sigmoids, or a softmax
    tokens_per_expert_E: Tensor  # int64, choices that landed on each expert, padding excluded


class Router(nn.Module):
    """s = sigmoid(u·e_i), choose the K largest of s + b, or s = softmax(u·e_i + b_r), choose the K largest of s.

    Of G groups the `topk_group` whose two best s + b sum highest are asked. gates = chosen s, over their sum where
    `norm_topk_prob`, × scaling (eqs. 12–16). b steers the choice only and gets no gradient: the training step moves it
    by `update_expert_bias`. b_r is trained. Sources: DeepSeek-V3; Shazeer et al. 2017 with one softmax.
    """

    bias_E: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight_ED = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.logit_bias_E = nn.Parameter(torch.zeros(config.n_routed_experts)) if config.router_bias else None
        steered = config.scoring_func == "sigmoid"
        self.register_buffer("bias_E", torch.zeros(config.n_routed_experts, dtype=torch.float32) if steered else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Engines cast whole modules to bf16, where a bias near 0.5 cannot move by 0.001: the bias stays float32.
        before: Any = self.bias_E
        super()._apply(fn, recurse)
        if self.bias_E is not None and self.bias_E.dtype != torch.float32:
            self.bias_E = before.to(self.bias_E.device)
        return self

    def forward(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Affinities (N, E), gates (N, K) and chosen experts (N, K), all computed in float32."""
        config = self.config
        with torch.autocast(hidden_ND.device.type, enabled=False):  # a choice must not hang on bf16's three digits
            trained = None if self.logit_bias_E is None else self.logit_bias_E.float()
            logits_NE = F.linear(hidden_ND.float(), self.weight_ED.float(), trained)
        scores_NE = logits_NE.sigmoid() if config.scoring_func == "sigmoid" else logits_NE.softmax(-1)  # Eq. 15
        steered_NE = scores_NE if self.bias_E is None else scores_NE + self.bias_E
        if config.n_group > 1:
            steered_NE = best_groups_only(steered_NE, config.n_group, config.topk_group)
        chosen_NK = steered_NE.topk(config.num_experts_per_tok, dim=-1).indices  # Eq. 16
        gates_NK = scores_NE.gather(-1, chosen_NK)
        if config.norm_topk_prob:
            gates_NK = gates_NK / (gates_NK.sum(dim=-1, keepdim=True) + 1e-20)  # Eq. 13
        return scores_NE, gates_NK * config.routed_scaling_factor, chosen_NK


def best_groups_only(steered_NE: Tensor, groups: int, kept: int) -> Tensor:
    """−∞ for the experts outside each token's `kept` best groups, a group's score being the sum of its two best."""
    grouped_NGE = steered_NE.unflatten(-1, (groups, -1))
    score_NG = grouped_NGE.topk(2, dim=-1).values.sum(dim=-1)
    best_NG = torch.zeros_like(score_NG, dtype=torch.bool).scatter_(1, score_NG.topk(kept, dim=-1).indices, True)
    return grouped_NGE.masked_fill(~best_NG[..., None], -torch.inf).flatten(1)


def apply_here(networks: Callable[[Tensor, Tensor], Tensor], sorted_ND: Tensor, rows_E: Tensor) -> Tensor:
    """What a rank does that holds all experts: apply them to rows sorted by expert, `rows_E` of each."""
    return networks(sorted_ND, rows_E)


class Experts(nn.Module):
    """E SwiGLU networks as two grouped matrix products over tokens sorted by expert; no token is dropped."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.moe_intermediate_size
        self.number = config.n_routed_experts  # of all ranks together
        self.gate_up_EDF = nn.Parameter(torch.empty(self.number, width, 2 * inner))
        self.down_EFD = nn.Parameter(torch.empty(self.number, inner, width))
        self.product: Callable[..., Tensor] = F.grouped_mm  # training may put one in float8 here
        self.dispatch: Callable[..., Tensor] = apply_here  # training may send the rows to other ranks here, and back

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it knows grouped products in bf16 alone
    def forward(self, hidden_ND: Tensor, gates_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        choices = chosen_NK.shape[1]
        order = chosen_NK.flatten().argsort(stable=True)  # choices sorted by expert
        token = order // choices
        rows_E = chosen_NK.flatten().bincount(minlength=self.number)
        # Autocast does not know grouped products.
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
        expert_out = self.dispatch(self.networks, hidden_ND[token].to(dtype), rows_E)
        weighted = expert_out * gates_NK.flatten()[order, None].to(expert_out.dtype)
        return torch.zeros_like(hidden_ND).index_add(0, token, weighted.to(hidden_ND.dtype))

    def networks(self, sorted_ND: Tensor, rows_E: Tensor) -> Tensor:
        """SwiGLU of each row by the expert whose rows it stands among; (N, D), sorted by expert."""
        ends_E, dtype = rows_E.cumsum(0).to(torch.int32), sorted_ND.dtype
        gate, up = self.product(sorted_ND, self.gate_up_EDF.to(dtype), offs=ends_E).chunk(2, dim=-1)
        return self.product(F.silu(gate) * up, self.down_EFD.to(dtype), offs=ends_E)


class MixtureOfExperts(nn.Module):
    """h' = shared(h) + Σ gate_i · expert_i(h) over the K chosen (eq. 12); (B, T, D) → (B, T, D) and the router's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        shared = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = SwiGLU(config, shared) if shared else None

    def forward(self, hidden_BTD: Tensor, is_token_BT: Tensor) -> tuple[Tensor, RouterOutput]:
        batch, tokens, width = hidden_BTD.shape
        hidden_ND = hidden_BTD.reshape(-1, width)
        scores_NE, gates_NK, chosen_NK = self.router(hidden_ND)
        routed_ND = self.experts(hidden_ND, gates_NK, chosen_NK)
        counts_E = chosen_NK[is_token_BT.flatten()].flatten().bincount(minlength=scores_NE.shape[-1])
        output_BTD = routed_ND.view_as(hidden_BTD)
        if self.shared_experts is not None:
            output_BTD = output_BTD + self.shared_experts(hidden_BTD)
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
