"""Norm, feed-forward and initialisation.

B batch, T tokens, D model width, F feed-forward width.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniloom.model.config import ModelConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class RMSNorm(nn.RMSNorm):
    """g · x / √(mean x² + ε) (Zhang and Sennrich 2019, eq. 4); float32 gains, as under autocast, read x in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def norm(config: ModelConfig) -> nn.Module:
    """RMSNorm, or LayerNorm, g · (x − mean) / √(var + ε) + b (Ba et al. 2016, eq. 4), over the model's width."""
    kind = RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.norm_eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), (…, D) → (…, D); Shazeer 2020, eq. 6."""

    def __init__(self, config: ModelConfig, intermediate_size: int) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(width, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, width, bias=bias)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_BTD)) * self.up_proj(hidden_BTD))


class MLP(nn.Module):
    """down(act(up(x))), (…, D) → (…, D), act ReLU (Vaswani et al. 2017, eq. 2), GELU, or GELU by tanh as in GPT-2."""

    def __init__(self, config: ModelConfig, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(hidden_BTD)))


class LocalConvolution(nn.Module):
    """y_t = x_t + Σ_{j<k} w_j ⊙ x_{t−j}, depthwise and causal, over tokens of the same document; (B, T, D) → (B, T, D).

    With it a single attention layer sees which token came before another, what copying out of a context needs.
    """

    def __init__(self, hidden_size: int, tokens: int) -> None:
        super().__init__()
        # Wide from the start, as torch draws convolutions: channels that already tell one neighbour from another are
        # what recall is learned from; from near zero it takes several times as long.
        self.weight_KD = nn.Parameter(torch.empty(tokens, hidden_size).uniform_(-(tokens**-0.5), tokens**-0.5))

    def forward_past(self, x_1ND: Tensor, index_1N: Tensor, lengths: list[int], before_BKD: Tensor) -> Tensor:
        """`forward` for documents of `lengths` that go on from the K − 1 embeddings before each."""
        back = before_BKD.shape[1]
        parts = zip(before_BKD, x_1ND[0].split(lengths), index_1N[0].split(lengths), strict=True)
        mixed = [self(torch.cat([b, x])[None], F.pad(index, (back, 0))[None])[:, back:] for b, x, index in parts]
        return torch.cat(mixed, dim=1)

    def forward(self, x_BTD: Tensor, index_BT: Tensor) -> Tensor:
        """`index_BT` counts tokens within their document: what lies before its first token is zero."""
        mixed_BTD = x_BTD * (1 + self.weight_KD[0])
        for back in range(1, len(self.weight_KD)):
            shifted_BTD = F.pad(x_BTD, (0, 0, back, 0))[:, : x_BTD.shape[1]]
            mixed_BTD = mixed_BTD + shifted_BTD * self.weight_KD[back] * (index_BT >= back)[..., None]
        return mixed_BTD


RESIDUAL_OUTPUTS = ("o_proj", "down_proj", "down_EFD")


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig) -> None:
    """Draw matrices from normal(0, σ); biases 0, norm gains 1, local convolutions as they drew themselves.

    σ is `initializer_range`; with `residual` matrices that write into the residual stream have σ / √(2L) (GPT-2: two
    writes a layer); with `he` every matrix but an embedding has √(2 / inputs) (He et al. 2015, eq. 10).
    """
    for name, parameter in model.named_parameters():
        *_, module, last = name.split(".")
        if last in ("bias", "logit_bias_E"):
            parameter.zero_()
        if parameter.dim() < 2 or last == "weight_KD":
            continue
        std = config.initializer_range
        if config.initializer == "he" and not module.startswith("embed"):
            std = math.sqrt(2 / parameter.shape[1])  # (out, in), and (E, in, out) of the experts
        elif config.initializer == "residual" and {module, last} & set(RESIDUAL_OUTPUTS):
            std /= math.sqrt(2 * config.num_hidden_layers)
        parameter.normal_(0.0, std)
