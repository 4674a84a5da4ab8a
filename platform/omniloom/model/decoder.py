"""The whole forward pass: embed, attend, feed forward, predict. Read this file to know the architecture.

B batch, T tokens, D model width, V vocabulary, N media tokens of the batch, M positions asked for.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniloom.model.attention import document_lengths
from omniloom.model.config import ModelConfig
from omniloom.model.embedding import MediaEncoders
from omniloom.model.layers import LocalConvolution, SwiGLU, initialise
from omniloom.model.mla import LatentAttention
from omniloom.model.moe import MixtureOfExperts, RouterOutput
from omniloom.model.mtp import Junction, tokens_ahead
from omniloom.model.position import log_scale, rope_table, running_index


class Output(NamedTuple):
    """What one forward pass gives."""

    hidden: Tensor  # (B, T, D), after the final norm
    logits: Tensor | None  # (M, V) where asked for
    mtp: tuple[Tensor, ...]  # logits (M_k, V) of each multi-token-prediction module that was asked
    router: tuple[RouterOutput, ...]  # one per mixture-of-experts layer, in order, the modules' last


class Where(NamedTuple):
    """What every layer must know of the tokens' places."""

    rope: Tensor  # (B, T, 1, R/2)
    lengths: list[int]  # of the documents, row after row
    query_scale_BT: Tensor | None
    is_token_BT: Tensor  # padding is none


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

    def forward(self, hidden_BTD: Tensor, where: Where) -> tuple[Tensor, RouterOutput | None]:
        attended = self.self_attn(self.input_layernorm(hidden_BTD), where.rope, where.lengths, where.query_scale_BT)
        hidden_BTD = hidden_BTD + F.dropout(attended, self.dropout, self.training)
        normed = self.post_attention_layernorm(hidden_BTD)
        router = None
        if isinstance(self.mlp, MixtureOfExperts):
            fed, router = self.mlp(normed, where.is_token_BT)
        else:
            fed = self.mlp(normed)
        return hidden_BTD + F.dropout(fed, self.dropout, self.training), router


class MultiTokenPrediction(nn.Module):
    """One more token ahead: junction, one layer, norm; embedding and head are the decoder's (section 2.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.junction = Junction(config)
        self.layer = Layer(config, index=config.num_hidden_layers)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_BTD: Tensor, ahead_BTD: Tensor, where: Where) -> tuple[Tensor, RouterOutput | None]:
        hidden_BTD, router = self.layer(self.junction(hidden_BTD, ahead_BTD), where)
        return self.norm(hidden_BTD), router


class Decoder(nn.Module):
    """A causal transformer over the unified sequence."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.media = MediaEncoders(config)
        self.embed_convolution = (
            LocalConvolution(config.hidden_size, config.embedding_conv_tokens) if config.embedding_conv_tokens else None
        )
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mtp = nn.ModuleList(MultiTokenPrediction(config) for _ in range(config.num_nextn_predict_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        initialise(self, config.initializer_range, config.num_hidden_layers)

    def forward(
        self,
        input_ids: Tensor,
        modality: Tensor,
        position: Tensor,
        document: Tensor,
        image: Tensor,
        video: Tensor,
        audio: Tensor,
        audio_frames: Tensor,
        predict_at: Tensor | None = None,
        predict_ahead_at: Sequence[Tensor] = (),
    ) -> Output:
        """Run the decoder on packed rows.

        input_ids, modality, document (B, T); position (B, T, 3); image and video uint8 (N, patch² · 3), audio float16
        (frames, mels) with audio_frames (clips,), each in order of appearance. Logits are computed only where
        `predict_at`, bool (B, T), is set: (M, V) in row-major order of those positions; `predict_ahead_at` holds one
        such mask for each multi-token-prediction module to run.
        """
        index_BT = running_index(document)
        embedded_BTD = self.embed_tokens(input_ids)
        embedded_BTD = self.media(embedded_BTD, modality, position, image, audio, audio_frames, video)
        if self.embed_convolution is not None:
            embedded_BTD = self.embed_convolution(embedded_BTD, index_BT)
        scale_tokens = self.config.attention_log_scale_tokens
        where = Where(
            rope=rope_table(index_BT, self.config.qk_rope_head_dim, self.config.rope_theta),
            lengths=document_lengths(document),
            query_scale_BT=log_scale(index_BT, scale_tokens) if scale_tokens else None,
            is_token_BT=document >= 0,
        )
        hidden_BTD, routers = embedded_BTD, []
        for layer in self.layers:
            hidden_BTD, router = layer(hidden_BTD, where)
            routers.append(router)
        hidden_BTD = self.norm(hidden_BTD)
        logits_MV = None if predict_at is None else self.lm_head(hidden_BTD[predict_at])

        ahead_BTD, mtp = hidden_BTD, []
        for depth, (module, at_BT) in enumerate(zip(self.mtp, predict_ahead_at), start=1):  # noqa: B905 (asked ones)
            ahead_BTD, router = module(ahead_BTD, tokens_ahead(embedded_BTD, document, depth), where)
            mtp.append(self.lm_head(ahead_BTD[at_BT]))
            routers.append(router)
        return Output(hidden_BTD, logits_MV, tuple(mtp), tuple(router for router in routers if router is not None))


def text_fields(input_ids: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """The fields of unpacked rows of plain text, each row one document: what `model(input_ids)` runs on."""
    zeros = torch.zeros_like(input_ids)
    image, audio, video = config.widths
    device = input_ids.device
    return {
        "input_ids": input_ids,
        "modality": zeros,
        "position": zeros[..., None].expand(-1, -1, 3),
        "document": zeros,
        "image": torch.zeros(0, image, dtype=torch.uint8, device=device),
        "video": torch.zeros(0, video, dtype=torch.uint8, device=device),
        "audio": torch.zeros(0, audio, dtype=torch.float16, device=device),
        "audio_frames": torch.zeros(0, dtype=torch.int32, device=device),
    }
