"""How the next token is drawn: the distributions, and the numbers that decide.

B sequences, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from omniloom.generate.config import SamplingConfig


def distributions(logits_BV: Tensor, configs: Sequence[SamplingConfig], occurred: Sequence[Tensor]) -> Tensor:
    """What each sequence's next token is drawn from, float32 (B, V); each row sums to 1.

    Penalty, temperature, top-k, top-p and min-p in this order (`SamplingConfig`); at temperature 0 all mass is on the
    likeliest. `occurred` are each sequence's ids up to here, of which the penalty knows. Sources: Keskar et al. 2019
    (penalty), Fan et al. 2018 (top-k), Holtzman et al. 2020 (nucleus: the smallest set whose mass reaches p, the
    likeliest always in it), Nguyen et al. 2024 (min-p, relative to the likeliest).
    """
    rows = [
        _distribution(logits_V.float(), config, ids)
        for logits_V, config, ids in zip(logits_BV, configs, occurred, strict=True)
    ]
    return torch.stack(rows)


def _distribution(logits_V: Tensor, config: SamplingConfig, occurred: Tensor) -> Tensor:
    if config.repetition_penalty != 1.0:
        logits_V = penalised(logits_V, occurred, config.repetition_penalty)
    if config.temperature == 0.0:
        return torch.zeros_like(logits_V).index_fill_(0, logits_V.argmax(), 1.0)
    # Divided in float64: a tiny temperature must not make infinities.
    share_V = ((logits_V.double() - logits_V.max()) / config.temperature).softmax(-1)
    if config.top_k is not None and config.top_k < len(share_V):
        share_V = share_V.where(share_V >= share_V.topk(config.top_k).values[-1], 0.0)
        share_V = share_V / share_V.sum()
    if config.top_p < 1.0:
        share_V = nucleus(share_V, config.top_p)
    if config.min_p > 0.0:
        share_V = share_V.where(share_V >= config.min_p * share_V.max(), 0.0)
    return (share_V / share_V.sum()).float()


def penalised(logits_V: Tensor, occurred: Tensor, penalty: float) -> Tensor:
    """Logits of tokens that occurred, divided by the penalty where positive and multiplied where negative."""
    ids = occurred.unique()
    logits = logits_V[ids]
    return logits_V.index_copy(0, ids, torch.where(logits > 0, logits / penalty, logits * penalty))


def nucleus(share_V: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest tokens whose mass reaches `top_p`, renormalised; the others 0."""
    ordered = share_V.sort(descending=True, stable=True)
    before = ordered.values.cumsum(-1) - ordered.values
    kept = torch.zeros_like(share_V, dtype=torch.bool).index_copy(0, ordered.indices, before < top_p)
    kept[ordered.indices[0]] = True
    share_V = share_V.where(kept, 0.0)
    return share_V / share_V.sum()


def uniform(seed: int, index: int, use: int = 0) -> float:
    """The number in [0, 1) that decides a request's token at `index`: a function of these alone.

    So a request draws the same whatever shares its batch and wherever it was taken up again; `use` tells several draws
    for one token apart. Philox, keyed by the seed.
    """
    bits = np.random.Philox(key=seed % 2**64, counter=[0, use, index, 0])
    return float(np.random.Generator(bits).random())


def draw(share_V: Tensor, number: float) -> int:
    """The token at whose share of [0, 1) `number` lies; none with share 0."""
    summed_V = share_V.double().cumsum(-1)
    at = int(torch.searchsorted(summed_V, summed_V[-1] * number, right=True))
    return min(at, int(share_V.nonzero()[-1]))


def log_shares(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax(logits), float32 (B, V), and its entropies in nats (B,): the model's own, before anything is cut."""
    log_BV = logits_BV.float().log_softmax(-1)
    return log_BV, -(log_BV.exp() * log_BV).sum(-1)
