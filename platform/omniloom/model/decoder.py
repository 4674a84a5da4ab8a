"""The whole forward pass: embed, attend, feed forward, predict. Read this file to know the architecture.

B batch, T tokens, D model width, V vocabulary, N media tokens of the batch, M positions asked for.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from omniloom.errors import ConfigError
from omniloom.model.attention import GroupedAttention, modality_mass
from omniloom.model.config import ModelConfig
from omniloom.model.embedding import MediaEncoders
from omniloom.model.layers import MLP, LocalConvolution, SwiGLU, initialise, norm
from omniloom.model.mla import LatentAttention
from omniloom.model.moe import MixtureOfExperts, RouterOutput
from omniloom.model.mtp import Junction, tokens_ahead
from omniloom.model.past import DecoderPast, Past
from omniloom.model.position import WHOLE_ROWS, Places, axial_encoding, cut_places, find_places


class Output(NamedTuple):
    """What one forward pass gives."""

    hidden: Tensor  # (B, T, D), after the final norm; where ranks share rows, of this rank's tokens
    logits: Tensor | None  # (M, V) where asked for
    mtp: tuple[Tensor, ...]  # logits (M_k, V) of each multi-token-prediction module that was asked
    router: tuple[RouterOutput, ...]  # one per mixture-of-experts layer, in order, the modules' last
    embedded: Tensor  # (B, T, D), what went in


class Layer(nn.Module):
    """h = h + attention(norm(h)); h = h + feed_forward(norm(h)); the first layers dense, the others sparse.

    Post-norm puts the norms after the sums: h = norm(h + attention(h)); h = norm(h + feed_forward(h)).
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = norm(config)
        self.self_attn = (LatentAttention if config.attention == "latent" else GroupedAttention)(config)
        self.post_attention_layernorm = norm(config)
        self.mlp: SwiGLU | MLP | MixtureOfExperts
        if config.is_sparse(index):
            self.mlp = MixtureOfExperts(config)
        else:
            self.mlp = (SwiGLU if config.activation == "swiglu" else MLP)(config, config.intermediate_size)
        self.dropout, self.norms_first = config.dropout, config.norm_position == "pre"

    def forward(
        self, hidden_BTD: Tensor, places: Places, past: Past | None = None
    ) -> tuple[Tensor, RouterOutput | None]:
        if self.norms_first:
            hidden_BTD = hidden_BTD + self._drop(self.self_attn(self.input_layernorm(hidden_BTD), places, past))
            fed_BTD, router = self._feed_forward(self.post_attention_layernorm(hidden_BTD), places)
            return hidden_BTD + self._drop(fed_BTD), router
        hidden_BTD = self.input_layernorm(hidden_BTD + self._drop(self.self_attn(hidden_BTD, places, past)))
        fed_BTD, router = self._feed_forward(hidden_BTD, places)
        return self.post_attention_layernorm(hidden_BTD + self._drop(fed_BTD)), router

    def _feed_forward(self, x_BTD: Tensor, places: Places) -> tuple[Tensor, RouterOutput | None]:
        return (
            self.mlp(x_BTD, places.is_token_BT) if isinstance(self.mlp, MixtureOfExperts) else (self.mlp(x_BTD), None)
        )

    def _drop(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.dropout) if self.training and self.dropout else x_BTD


class MultiTokenPrediction(nn.Module):
    """One more token ahead: junction, one layer, norm; embedding and head are the decoder's (section 2.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.junction = Junction(config)
        self.layer = Layer(config, index=config.num_hidden_layers)
        self.norm = norm(config)

    def forward(
        self, hidden_BTD: Tensor, ahead_BTD: Tensor, places: Places, past: Past | None = None
    ) -> tuple[Tensor, RouterOutput | None]:
        hidden_BTD, router = self.layer(self.junction(hidden_BTD, ahead_BTD), places, past)
        return self.norm(hidden_BTD), router


class Decoder(nn.Module):
    """A causal transformer over the unified sequence."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.activation_checkpointing = False  # training may keep each layer's input alone
        self.rows = WHOLE_ROWS  # training may share each row's tokens among ranks
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size) if config.position == "learned" else None
        )
        self.media = MediaEncoders(config)
        self.embed_convolution = (
            LocalConvolution(config.hidden_size, config.embedding_conv_tokens) if config.embedding_conv_tokens else None
        )
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = norm(config) if config.norm_position == "pre" else nn.Identity()
        self.mtp = nn.ModuleList(MultiTokenPrediction(config) for _ in range(config.num_nextn_predict_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        initialise(self, config)

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
        past: DecoderPast | None = None,
    ) -> Output:
        """Run the decoder on packed rows.

        input_ids, modality, document (B, T); position (B, T, 3); image and video uint8 (N, patch² · 3), audio float16
        (frames, mels) with audio_frames (clips,), each in order of appearance. Logits are computed only where
        `predict_at`, bool (B, T), is set: (M, V) in row-major order of those positions; `predict_ahead_at` holds one
        such mask for each multi-token-prediction module to run. Where ranks share rows, each is handed whole ones, and
        computes what follows the embeddings for its own tokens. With a `past` each document of one row goes on from
        what is cached of it.
        """
        if len(predict_ahead_at) > len(self.mtp):
            raise ConfigError(
                f"{len(predict_ahead_at)} more tokens are asked for, model.num_nextn_predict_layers={len(self.mtp)}"
            )
        places = find_places(document, modality, position, self.config, past.begins if past else None)
        media = {"image_NP": image, "audio_FM": audio, "audio_frames": audio_frames, "video_NP": video}
        embedded_BTD = self.embed(input_ids, modality, position, places, past, **media)
        hidden_BTD, routers = self.rows.cut(self._add_positions(embedded_BTD, places.index_BT)), []
        places = cut_places(places, self.rows)
        for layer, cached in zip(self.layers, past.layers if past else [None] * len(self.layers), strict=True):
            hidden_BTD, router = self._run(layer, hidden_BTD, places, cached)
            routers.append(router)
        hidden_BTD = self.norm(hidden_BTD)
        logits_MV = None if predict_at is None else self.lm_head(hidden_BTD[self.rows.cut(predict_at)])

        # One way only: a picture's last token already carries the embedding of the text that follows it.
        places = places._replace(spans=[[]] * len(places.lengths))
        ahead_BTD, mtp = hidden_BTD, []
        for depth, at_BT in enumerate(predict_ahead_at, start=1):
            next_BTD = self.rows.cut(tokens_ahead(embedded_BTD, document, depth))
            ahead_BTD, router = self._run(self.mtp[depth - 1], ahead_BTD, next_BTD, places, None)
            mtp.append(self.lm_head(ahead_BTD[self.rows.cut(at_BT)]))
            routers.append(router)
        kept = tuple(router for router in routers if router is not None)
        return Output(hidden_BTD, logits_MV, tuple(mtp), kept, embedded_BTD)

    def embed(
        self,
        input_ids: Tensor,
        modality: Tensor,
        position: Tensor,
        places: Places,
        past: DecoderPast | None = None,
        **media: Tensor,
    ) -> Tensor:
        """Embeddings of text and media, each mixed with those before it where the model does so; (B, T, D)."""
        embedded_BTD = self.embed_tokens(input_ids)
        if past is None or any(len(medium) for medium in media.values()):  # in training they run on nothing too
            embedded_BTD = self.media(embedded_BTD, modality, position, **media)
        if self.embed_convolution is None:
            return embedded_BTD
        if past is None:
            return self.embed_convolution(embedded_BTD, places.index_BT)
        before_BKD = past.before(embedded_BTD, len(self.embed_convolution.weight_KD) - 1)
        return self.embed_convolution.forward_past(embedded_BTD, places.index_BT, places.lengths, before_BKD)

    def _run(self, layer: nn.Module, *inputs: Tensor | Places | Past | None) -> tuple[Tensor, RouterOutput | None]:
        if self.activation_checkpointing and self.training:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def _add_positions(self, embedded_BTD: Tensor, index_BT: Tensor) -> Tensor:
        if self.embed_positions is not None:
            return embedded_BTD + self.embed_positions(index_BT)
        if self.config.position == "sinusoidal":
            width = self.config.hidden_size  # embeddings grow to what the encoding is: Vaswani et al. 2017, section 3.4
            encoding = axial_encoding(index_BT.reshape(-1, 1), width).view_as(embedded_BTD)
            return embedded_BTD * width**0.5 + encoding.to(embedded_BTD.dtype)
        return embedded_BTD


@torch.no_grad()
def attention_mass(decoder: Decoder, fields: dict[str, Tensor]) -> Tensor:
    """Of each layer the mean share of attention from modality i to modality j, float32 (L, 4, 4): a diagnostic."""
    masses: list[Tensor] = []

    def measure(attention: LatentAttention | GroupedAttention, inputs: tuple[Tensor, Places, None]) -> None:
        hidden, places, _ = inputs
        query, key, _ = attention.project(hidden, places)
        masses.append(modality_mass(query, key, fields["modality"], places, attention.scale, decoder.config))

    hooks = [layer.get_submodule("self_attn").register_forward_pre_hook(measure) for layer in decoder.layers]
    try:
        decoder(**fields)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(masses)


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
