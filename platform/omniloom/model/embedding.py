"""Media become embeddings in the sequence of text embeddings; one encoder per modality.

Media are read, not written: a model predicts text only, and discrete codes of pictures or sound as targets are out of
scope.

B batch, T tokens, N media tokens of the whole batch, P values of a patch, F frames, M mel bands, D model width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniloom.model.config import ModelConfig
from omniloom.model.layers import RMSNorm
from omniloom.model.position import AUDIO, IMAGE, VIDEO, axial_encoding

# Of what the encoders give, whose norm leaves it at 1: text embeddings start at 0.02, and media fifty times larger
# drown them; as small as those, media are learned from several times more slowly.
MEDIA_SCALE = 0.1


class PatchEncoder(nn.Module):
    """norm(W patch) + encoding of its place, scaled by MEDIA_SCALE; (N, P) → (N, D).

    A picture's place is (row, column), a video's (frame, row, column).
    """

    def __init__(self, config: ModelConfig, patch_pixels: int, axes: int) -> None:
        super().__init__()
        self.axes = axes
        self.patch_proj = nn.Linear(patch_pixels**2 * 3, config.hidden_size, bias=False)
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.scale = MEDIA_SCALE

    def forward(self, patch_NP: Tensor, position_N3: Tensor) -> Tensor:
        centred_NP = patch_NP.to(self.patch_proj.weight.dtype) / 127.5 - 1.0
        projected_ND = self.norm(self.patch_proj(centred_NP))
        encoding_ND = axial_encoding(position_N3[:, -self.axes :], projected_ND.shape[1])
        return (projected_ND + encoding_ND.to(projected_ND.dtype)) * self.scale


class StridedConvolution(nn.Module):
    """Convolution of kernel 3 and stride 2 over the frames of each clip, padded with one zero frame at both ends.

    Clips lie one after the other, (F, C) → (Σ ⌈f/2⌉, D): each output gathers its own three frames, so that clips of any
    length never mix and none is an ordinary case.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(3 * channels, width, bias=False)

    def forward(self, frames_FC: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs and each clip's count of them."""
        out_lengths = (lengths + 1) // 2
        clip_N = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), out_lengths)
        index_N = torch.arange(len(clip_N), device=lengths.device) - (out_lengths.cumsum(0) - out_lengths)[clip_N]
        frame_N3 = 2 * index_N[:, None] + torch.tensor([-1, 0, 1], device=lengths.device)
        inside_N3 = (frame_N3 >= 0) & (frame_N3 < lengths[clip_N, None])
        start_N1 = (lengths.cumsum(0) - lengths)[clip_N, None]
        padded = F.pad(frames_FC, (0, 0, 0, 1))  # the zero frame, last
        gathered = padded[torch.where(inside_N3, start_N1 + frame_N3, len(frames_FC))]
        return self.proj(gathered.flatten(1)), out_lengths


class AudioEncoder(nn.Module):
    """norm(conv(gelu(norm(conv … log-mel)))) + encoding of time, scaled by MEDIA_SCALE; (F, M) → (N, D).

    log₂(frames_per_token) convolutions, each of stride 2; a clip of f frames gives ⌈f / frames_per_token⌉ tokens.
    """

    def __init__(self, config: ModelConfig, mels: int) -> None:
        super().__init__()
        width, layers = config.hidden_size, int(math.log2(config.audio_frames_per_token))
        channels = [mels, *[width] * (layers - 1)]
        self.convolutions = nn.ModuleList(StridedConvolution(c, width) for c in channels)
        self.norms = nn.ModuleList(RMSNorm(width, eps=config.norm_eps) for _ in channels)
        self.scale = MEDIA_SCALE

    def forward(self, frames_FM: Tensor, lengths: Tensor, position_N3: Tensor) -> Tensor:
        hidden = (frames_FM.to(next(self.parameters()).dtype) + 4.0) / 4.0  # log10 of power: −10 … 2
        lengths = lengths.long()
        for index, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            hidden, lengths = convolution(F.gelu(hidden) if index else hidden, lengths)
            hidden = norm(hidden)
        return (hidden + axial_encoding(position_N3[:, :1], hidden.shape[-1]).to(hidden.dtype)) * self.scale


class MediaEncoders(nn.Module):
    """One encoder per medium; each writes its tokens over its placeholders."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.image = PatchEncoder(config, config.image_patch_pixels, axes=2) if config.image_patch_pixels else None
        self.audio = AudioEncoder(config, config.audio_mels) if config.audio_mels else None
        self.video = PatchEncoder(config, config.video_patch_pixels, axes=3) if config.video_patch_pixels else None

    def forward(
        self,
        embedded_BTD: Tensor,
        modality_BT: Tensor,
        position_BT3: Tensor,
        image_NP: Tensor,
        audio_FM: Tensor,
        audio_frames: Tensor,
        video_NP: Tensor,
    ) -> Tensor:
        # Encoders run on nothing too: every rank must use every parameter, or ranks without a medium wait for ever.
        if self.image is not None:
            is_image_BT = modality_BT == IMAGE
            embedded_BTD = _write(embedded_BTD, is_image_BT, self.image(image_NP, position_BT3[is_image_BT]))
        if self.audio is not None:
            is_audio_BT = modality_BT == AUDIO
            tokens_ND = self.audio(audio_FM, audio_frames, position_BT3[is_audio_BT])
            embedded_BTD = _write(embedded_BTD, is_audio_BT, tokens_ND)
        if self.video is not None:
            is_video_BT = modality_BT == VIDEO
            embedded_BTD = _write(embedded_BTD, is_video_BT, self.video(video_NP, position_BT3[is_video_BT]))
        return embedded_BTD


def _write(embedded_BTD: Tensor, where_BT: Tensor, tokens_ND: Tensor) -> Tensor:
    return embedded_BTD.masked_scatter(where_BT[..., None], tokens_ND.to(embedded_BTD.dtype))
