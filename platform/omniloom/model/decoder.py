"""The whole forward pass: embed, attend, feed forward, predict. Read this file to know the architecture.

B batch, T tokens, D model width, V vocabulary, N media tokens of the batch, M positions asked for.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniloom.model.attention import causal_document_mask
from omniloom.model.config import ModelConfig
from omniloom.model.embedding import Embedding
from omniloom.model.layers import SwiGLU, initialise
from omniloom.model.mla import LatentAttention
from omniloom.model.moe import MixtureOfExperts, RouterOutput
from omniloom.model.position import rope_table, running_index


class Output(NamedTuple):
    """What one forward pass gives; `mtp` holds one hidden state per multi-token-prediction module (none yet)."""

    hidden: Tensor  # (B, T, D), after the final norm
    logits: Tensor | None  # (M, V) where asked for
    mtp: tuple[Tensor, ...]
    router: tuple[RouterOutput, ...]  # one per mixture-of-experts layer, in order


class Layer(nn.Module):
    """h = h + attention(norm(h)); h = h + feed_forward(norm(h)); the first layers dense, the others sparse."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = LatentAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: SwiGLU | MixtureOfExperts
        if index < config.first_k_dense_replace:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = MixtureOfExperts(config)
        self.dropout = config.dropout

    def forward(
        self, hidden_BTD: Tensor, rope: Tensor, visible_B1TT: Tensor, is_token_BT: Tensor
    ) -> tuple[Tensor, RouterOutput | None]:
        attended = self.self_attn(self.input_layernorm(hidden_BTD), rope, visible_B1TT)
        hidden_BTD = hidden_BTD + F.dropout(attended, self.dropout, self.training)
        normed = self.post_attention_layernorm(hidden_BTD)
        router = None
        if isinstance(self.mlp, MixtureOfExperts):
            fed, router = self.mlp(normed, is_token_BT)
        else:
            fed = self.mlp(normed)
        return hidden_BTD + F.dropout(fed, self.dropout, self.training), router


class Decoder(nn.Module):
    """A causal transformer over the unified sequence."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.embedding = Embedding(config)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embedding.tokens.weight
        initialise(self, config.initializer_range, config.num_hidden_layers)

    def forward(
        self,
        input_ids: Tensor,
        modality: Tensor,
        position: Tensor,
        document: Tensor,
        image: Tensor,
        predict_at: Tensor | None = None,
    ) -> Output:
        """Run the decoder on packed rows.

        input_ids, modality, document (B, T); position (B, T, 3); image uint8 (N, patch² · 3) in order of appearance.
        Logits are computed only where `predict_at`, bool (B, T), is set: (M, V) in row-major order of those positions.
        """
        hidden_BTD = self.embedding(input_ids, modality, position, image)
        rope = rope_table(running_index(document), self.config.qk_rope_head_dim, self.config.rope_theta)
        visible_B1TT = causal_document_mask(document)
        is_token_BT = document >= 0
        routers = []
        for layer in self.layers:
            hidden_BTD, router = layer(hidden_BTD, rope, visible_B1TT, is_token_BT)
            if router is not None:
                routers.append(router)
        hidden_BTD = self.norm(hidden_BTD)
        logits_MV = None if predict_at is None else self.lm_head(hidden_BTD[predict_at])
        return Output(hidden_BTD, logits_MV, (), tuple(routers))


def text_fields(input_ids: Tensor, patch_values: int) -> dict[str, Tensor]:
    """The fields of unpacked rows of plain text, each row one document: what `model(input_ids)` runs on."""
    zeros = torch.zeros_like(input_ids)
    return {
        "input_ids": input_ids,
        "modality": zeros,
        "position": zeros[..., None].expand(-1, -1, 3),
        "document": zeros,
        "image": torch.zeros(0, patch_values, dtype=torch.uint8, device=input_ids.device),
    }
