"""Where a token stands: running index in its document, RoPE, and the encodings of places inside a picture, clip, video.

B batch, T tokens, H heads, R rotary width, N media tokens, A axes, D model width.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from omniloom.errors import ConfigError
from omniloom.model.config import ModelConfig

IMAGE, AUDIO, VIDEO = 1, 2, 3  # ids of the modalities in the unified sequence
Span = tuple[int, int]  # first token and one past the last, within a document


class Rows:
    """Which of each row's tokens are computed here: all of them, unless training shares rows among ranks."""

    part, parts = 0, 1

    def cut(self, x_BT: Tensor) -> Tensor:
        """The columns of the tokens that are computed here."""
        return x_BT.chunk(self.parts, dim=1)[self.part]

    def total(self, part_sum: Tensor) -> Tensor:
        """The sum over all parts of what carries no gradient."""
        return part_sum


WHOLE_ROWS = Rows()


class Places(NamedTuple):
    """What every layer must know of the tokens' places in packed rows; of whole rows, or of the tokens computed here
    but for `lengths` and `spans`."""

    index_BT: Tensor  # int64, of each token in its own document; 0 in padding
    lengths: list[int]  # of the documents, row after row; padding counts as one
    spans: list[list[Span]]  # of each document: its pictures and frames, whose tokens see each other both ways
    rope: Tensor | None  # complex64 (B, T, 1, R/2)
    query_scale_BT: Tensor | None  # float32, log-scaled attention
    is_token_BT: Tensor  # padding is none


def cut_places(places: Places, rows: Rows) -> Places:
    """Those of the tokens that are computed here; attention still goes by whole documents."""
    return places._replace(
        index_BT=rows.cut(places.index_BT),
        rope=None if places.rope is None else rows.cut(places.rope),
        query_scale_BT=None if places.query_scale_BT is None else rows.cut(places.query_scale_BT),
        is_token_BT=rows.cut(places.is_token_BT),
    )


def find_places(
    document_BT: Tensor,
    modality_BT: Tensor,
    position_BT3: Tensor,
    config: ModelConfig,
    begins: Sequence[int] | None = None,
) -> Places:
    """Read the places off the fields of packed rows; raises ConfigError where a document is over the context.

    `begins` holds the index of each document's first token here, where those before it lie in a cache.
    """
    index_BT = running_index(document_BT).where(document_BT >= 0, 0)
    if begins is not None:
        number_BT = document_starts(document_BT).flatten().cumsum(0).view_as(index_BT) - 1
        index_BT = index_BT + index_BT.new_tensor(begins)[number_BT]
    longest = int(index_BT.max()) + 1
    if longest > config.max_position_embeddings:
        raise ConfigError(
            f"a document of {longest:,} tokens is over the model's context: model.max_position_embeddings="
            f"{config.max_position_embeddings:,}"
        )
    lengths, scale_tokens = document_lengths(document_BT), config.attention_log_scale_tokens
    return Places(
        index_BT=index_BT,
        lengths=lengths,
        spans=picture_spans(document_BT, modality_BT, position_BT3)
        if config.media_bidirectional
        else [[]] * len(lengths),
        rope=rope_table(index_BT, config) if config.position == "rope" else None,
        query_scale_BT=log_scale(index_BT, scale_tokens) if scale_tokens else None,
        is_token_BT=document_BT >= 0,
    )


def document_starts(document_BT: Tensor) -> Tensor:
    """Where a row begins or its document changes, bool (B, T)."""
    starts_BT = torch.ones_like(document_BT, dtype=torch.bool)
    starts_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    return starts_BT


def document_lengths(document_BT: Tensor) -> list[int]:
    """Tokens of each run of one document, row after row; padding counts as a document. They sum to B · T."""
    starts = document_starts(document_BT).flatten().nonzero().flatten()
    return starts.diff(append=starts.new_tensor([document_BT.numel()])).tolist()


def running_index(document_BT: Tensor) -> Tensor:
    """Index of each token within its own document, int64 (B, T): 0, 1, 2, … and again 0 where the document changes."""
    index_T = torch.arange(document_BT.shape[1], device=document_BT.device)
    start_BT = torch.where(document_starts(document_BT), index_T, 0).cummax(dim=1).values
    return index_T - start_BT


def picture_spans(document_BT: Tensor, modality_BT: Tensor, position_BT3: Tensor) -> list[list[Span]]:
    """Each document's pictures and video frames as spans of its tokens: each begins at row 0, column 0."""
    shown_BT = (modality_BT == IMAGE) | (modality_BT == VIDEO)
    starts_BT = document_starts(document_BT)
    changes_BT = starts_BT | document_starts(modality_BT) | (shown_BT & (position_BT3[..., 1:] == 0).all(-1))
    begins = changes_BT.flatten().nonzero().flatten()
    ends = begins.diff(append=begins.new_tensor([document_BT.numel()])) + begins
    number_N = starts_BT.flatten().cumsum(0) - 1
    first_N = starts_BT.flatten().nonzero().flatten()[number_N]
    kept = shown_BT.flatten()[begins]
    begins, ends = begins[kept], ends[kept]
    spans: list[list[Span]] = [[] for _ in range(int(starts_BT.sum()))]
    rows = torch.stack([number_N[begins], begins - first_N[begins], ends - first_N[begins]], dim=1).tolist()
    for document, begin, end in rows:
        spans[document].append((begin, end))
    return spans


def rope_frequencies(config: ModelConfig) -> Tensor:
    """θ_i = theta^(−2i/R), float64 (R/2,); stretched by YaRN where `yarn_factor` is set.

    YaRN keeps a frequency that turns more than beta_fast times over the original context, divides by the factor one
    that turns less than beta_slow times, and runs linearly in i between. Source: Peng et al. 2023, eqs. 17–23, with
    the ramp's ends rounded outwards as in published code.
    """
    width, theta = config.rotary_width, config.rope_theta
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    if config.yarn_factor is None or config.yarn_original_tokens is None:
        return frequency

    def turns_at(turns: float, tokens: int) -> float:
        return width * math.log(tokens / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(turns_at(config.yarn_beta_fast, config.yarn_original_tokens)), 0)
    high = min(math.ceil(turns_at(config.yarn_beta_slow, config.yarn_original_tokens)), width - 1)
    index = torch.arange(width // 2, dtype=torch.float64)
    ramp = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequency / config.yarn_factor * ramp + frequency * (1 - ramp)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 · mscale · ln(factor) + 1: how much sharper attention over a stretched context is."""
    return 0.1 * mscale * math.log(factor) + 1.0


def rope_table(index_BT: Tensor, config: ModelConfig) -> Tensor:
    """Angles index · θ_i as complex numbers, complex64 (B, T, 1, R/2); Su et al. 2021, eq. 15.

    Their length is 1, or YaRN's attention factor: both queries and keys carry it.
    """
    length = 1.0
    if config.yarn_factor is not None:
        length = yarn_mscale(config.yarn_factor)
        if config.yarn_mscale is not None and config.yarn_mscale_all_dim is not None:
            above = yarn_mscale(config.yarn_factor, config.yarn_mscale)
            length = above / yarn_mscale(config.yarn_factor, config.yarn_mscale_all_dim)
    # In float64: at a million tokens a float32 angle is wrong by a twentieth.
    angle = index_BT[..., None].double() * rope_frequencies(config).to(index_BT.device)
    return torch.polar(torch.full_like(angle, length), angle).to(torch.complex64)[:, :, None, :]


def apply_rope(x_BTHR: Tensor, table: Tensor, interleave: bool = True) -> Tensor:
    """Turn pairs of x by the table's angles, in float32.

    Interleaved pairs are (x₀, x₁), (x₂, x₃), …, as DeepSeek's; otherwise (x₀, x_{R/2}), (x₁, x_{R/2+1}), …, as Llama's
    in Hugging Face folders.
    """
    x = x_BTHR.float()
    pairs = x.unflatten(-1, (-1, 2)) if interleave else x.unflatten(-1, (2, -1)).transpose(-1, -2).contiguous()
    turned = torch.view_as_real(torch.view_as_complex(pairs) * table)
    return (turned if interleave else turned.transpose(-1, -2)).flatten(-2).to(x_BTHR.dtype)


def log_scale(index_BT: Tensor, tokens: int) -> Tensor:
    """max(0.3, ln(t + 1) / ln tokens), float32 (B, T): queries grow with what they look over, so that none blurs.

    Source: Chiang and Cholak 2022, section 5.3; the floor keeps the first tokens' attention from being flat.
    """
    return ((index_BT + 1).float().log() / math.log(tokens)).clamp(min=0.3)


def axial_encoding(place_NA: Tensor, width: int) -> Tensor:
    """Sine and cosine of each axis, an equal part of the width each, float32 (N, D); Vaswani et al. 2017 in A axes.

    One axis is a token's index or time, two are row and column, three are time, row and column. The sines come first,
    then the cosines, which is the paper's order up to a permutation; what does not divide stays zero.
    """
    axes = place_NA.shape[1]
    count = width // (2 * axes)
    frequency = 10_000.0 ** (-torch.arange(count, device=place_NA.device, dtype=torch.float32) / count)
    angle_NAC = place_NA[..., None].float() * frequency
    encoding_ND = torch.cat([angle_NAC.sin(), angle_NAC.cos()], dim=-1).flatten(1)
    return F.pad(encoding_ND, (0, width - encoding_ND.shape[1]))
