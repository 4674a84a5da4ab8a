"""How the next token is drawn: the distributions, and the numbers that decide.

B sequences, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from omniloom.generate.config import SamplingConfig


def distributions(logits_BV: Tensor, configs: Sequence[SamplingConfig], occurred: Sequence[Tensor | None]) -> Tensor:
    """What each sequence's next token is drawn from, float32 (B, V); each row sums to 1.

    Penalty, temperature, top-k, top-p and min-p in this order (`SamplingConfig`); at temperature 0 all mass is on the
    likeliest; ties with the k-th stay. `occurred` says which ids each sequence has up to here, bool (V,), where it has
    a penalty. Sources: Keskar et al. 2019 (penalty), Fan et al. 2018 (top-k), Holtzman et al. 2020 (nucleus: the
    smallest set whose mass reaches p, the likeliest always in it), Nguyen et al. 2024 (min-p, relative to the
    likeliest).
    """
    logits_BV = logits_BV.float()
    if any(config.repetition_penalty != 1.0 for config in configs):
        each = zip(logits_BV, configs, occurred, strict=True)
        logits_BV = torch.stack([penalised(row, ids, config.repetition_penalty) for row, config, ids in each])
    numbers = [(c.temperature or 1.0, c.top_k or logits_BV.shape[1], c.top_p, c.min_p) for c in configs]
    temperature, top_k, top_p, min_p = torch.tensor(numbers, dtype=torch.float64, device=logits_BV.device).T[..., None]
    # In float64: a tiny temperature must not make infinities.
    share_BV = ((logits_BV.double() - logits_BV.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if any(c.top_k is not None or c.top_p < 1.0 for c in configs):
        share_BV = _likeliest(share_BV, top_k.long(), top_p)
    share_BV = share_BV.where(share_BV >= min_p * share_BV.amax(-1, keepdim=True), 0.0)
    greedy_B1 = torch.tensor([[c.temperature == 0.0] for c in configs], device=logits_BV.device)
    best_BV = torch.zeros_like(share_BV).scatter_(1, logits_BV.argmax(-1, keepdim=True), 1.0)
    return torch.where(greedy_B1, best_BV, share_BV / share_BV.sum(-1, keepdim=True)).float()


def _likeliest(share_BV: Tensor, top_k_B1: Tensor, top_p_B1: Tensor) -> Tensor:
    """The top k, and of them the smallest set whose mass reaches p; 0 elsewhere."""
    ordered = share_BV.sort(dim=-1, descending=True, stable=True)
    least_B1 = ordered.values.gather(-1, (top_k_B1 - 1).clamp(max=share_BV.shape[1] - 1))
    top_BV = ordered.values.where(ordered.values >= least_B1, 0.0)
    top_BV = top_BV / top_BV.sum(-1, keepdim=True)
    before_BV = top_BV.cumsum(-1) - top_BV
    before_BV[:, 0] = 0.0
    kept_BV = (top_BV > 0) & (before_BV < top_p_B1)
    return torch.zeros_like(share_BV).scatter_(1, ordered.indices, top_BV.where(kept_BV, 0.0))


def penalised(logits_V: Tensor, occurred_V: Tensor | None, penalty: float) -> Tensor:
    """Logits of tokens that occurred, divided by the penalty where positive and multiplied where negative."""
    if occurred_V is None:
        return logits_V
    return logits_V.where(~occurred_V, torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty))


def uniform(seed: int, index: int, use: int = 0) -> float:
    """The number in [0, 1) that decides a request's token at `index`: a function of these alone.

    So a request draws the same whatever shares its batch and wherever it was taken up again; `use` tells several draws
    for one token apart. Philox, keyed by the seed.
    """
    bits = np.random.Philox(key=seed % 2**64, counter=[0, use, index, 0])
    return float(np.random.Generator(bits).random())


def draw(share_BV: Tensor, numbers: Sequence[float]) -> list[int]:
    """The token of each row at whose share of [0, 1) its number lies; none with share 0."""
    summed_BV = share_BV.double().cumsum(-1)
    at_B1 = torch.searchsorted(summed_BV, summed_BV[:, -1:] * summed_BV.new_tensor(numbers)[:, None], right=True)
    # Past what is drawn from, where rounding leads there.
    last_B1 = summed_BV.shape[1] - 1 - (share_BV > 0).flip(-1).byte().argmax(-1, keepdim=True)
    return torch.minimum(at_B1, last_B1)[:, 0].tolist()


def log_shares(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax(logits), float32 (B, V), and its entropies in nats (B,): the model's own, before anything is cut."""
    log_BV = logits_BV.float().log_softmax(-1)
    return log_BV, -(log_BV.exp() * log_BV).sum(-1)
