"""Contrastive alignment of two modalities: what belongs together lies together, and apart from everything else.

N pairs of a batch, D model width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def symmetric_contrastive(left_ND: Tensor, right_ND: Tensor, alike_NN: Tensor, temperature: float) -> Tensor:
    """−log P(right_n given left_n) − log P(left_n given right_n) of each pair, float32 nats (N,).

    P(right_n given left_n) = exp(cos(left_n, right_n) / τ) / Σ_m exp(cos(left_n, right_m) / τ), the other way alike;
    m runs over n itself and over the pairs that are not alike, bool (N, N), symmetric: a second picture of the same
    caption is no wrong answer. A pair without others costs nothing.

    Source: Radford et al. 2021 (CLIP), figure 3, which takes half of the sum, as many papers do; ours is the sum. τ is
    fixed, as in contrastive training of decoders (Wang et al. 2024, E5-Mistral; Jiang et al. 2025, VLM2Vec): CLIP's
    learned one would be a parameter that no other model has. Alike pairs are left out as in Khosla et al. 2020.
    """
    scores_NN = similarity(left_ND, right_ND) / temperature
    itself_NN = torch.eye(len(scores_NN), dtype=torch.bool, device=scores_NN.device)
    scores_NN = scores_NN.masked_fill(alike_NN & ~itself_NN, -torch.inf)
    return -(scores_NN.log_softmax(dim=1) + scores_NN.log_softmax(dim=0)).diagonal()


def similarity(left_ND: Tensor, right_ND: Tensor) -> Tensor:
    """cos(left_n, right_m), float32 (N, N)."""
    return F.normalize(left_ND.float(), dim=-1) @ F.normalize(right_ND.float(), dim=-1).T


def alike(left_hash_N: Tensor, right_hash_N: Tensor) -> Tensor:
    """Which pairs have the same left or the same right side, by a hash of each: bool (N, N)."""
    return (left_hash_N[:, None] == left_hash_N) | (right_hash_N[:, None] == right_hash_N)


def retrieval_at_1(left_ND: Tensor, right_ND: Tensor, alike_NN: Tensor) -> tuple[float, float, float]:
    """How often a left side's nearest right side is its own, a right side's nearest left one, and by chance; 0 … 1.

    Its own are those of all pairs that are alike. Chance is the mean share of them, 1 / N where no two pairs are.
    """
    scores_NN = similarity(left_ND, right_ND)

    def found(nearest_N: Tensor) -> float:
        return float(alike_NN.gather(1, nearest_N[:, None]).float().mean())

    return found(scores_NN.argmax(dim=1)), found(scores_NN.argmax(dim=0)), float(alike_NN.float().mean())
