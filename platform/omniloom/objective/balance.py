"""Sequence-wise balance loss, DeepSeek-V3 report eqs. 17–20.

B batch, T tokens, E routed experts, S = documents of the batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def same(x: Tensor) -> Tensor:
    """What becomes of a tensor where whole rows are at hand."""
    return x


def sequence_balance(
    scores_BTE: Tensor,
    document_BT: Tensor,
    experts_per_token: int,
    cut: Callable[[Tensor], Tensor] = same,
    total: Callable[[Tensor], Tensor] = same,
) -> Tensor:
    """Σ over documents of Σ_i f_i P_i, a float32 scalar; the caller divides by the global number of documents.

    f_i = N_r/(K·T_s) Σ_t 1[i in the top K of the unbiased s_t] (eq. 18), carries no gradient;
    P_i = mean over t of s_i / Σ_j s_j (eqs. 19–20). Per document, padding excluded. α is the caller's.

    Of rows in parts, scores are one part's columns, which `cut` cuts out of (B, T), `document_BT` is whole, and `total`
    sums what carries no gradient over the parts; the loss is this part's share of the sum.
    """
    experts = scores_BTE.shape[-1]
    whole_N, documents = _number_documents(document_BT)
    segment_N = cut(whole_N.view_as(document_BT)).flatten()
    kept_N, whole_N = segment_N >= 0, whole_N[whole_N >= 0]
    segment_N, scores_NE = segment_N[kept_N], scores_BTE.flatten(0, 1)[kept_N].float()
    chosen_NE = torch.zeros_like(scores_NE).scatter_(-1, scores_NE.topk(experts_per_token, dim=-1).indices, 1.0)
    share_NE = scores_NE / scores_NE.sum(dim=-1, keepdim=True)  # Eq. 19

    empty_SE = torch.zeros(documents, experts, device=scores_NE.device)
    tokens_S1 = whole_N.bincount(minlength=documents)[:, None]
    chosen_SE = total(empty_SE.index_add(0, segment_N, chosen_NE))
    frequency_SE = chosen_SE * experts / (experts_per_token * tokens_S1)  # Eq. 18
    probability_SE = empty_SE.index_add(0, segment_N, share_NE) / tokens_S1  # Eq. 20
    return (frequency_SE * probability_SE).sum()  # Eq. 17


def count_documents(document_BT: Tensor) -> int:
    """How many documents lie in the batch, padding excluded."""
    return _number_documents(document_BT)[1]


def _number_documents(document_BT: Tensor) -> tuple[Tensor, int]:
    """Number the documents of all rows 0 … S−1, int64 (B·T,), padding −1; and S."""
    per_row_B = document_BT.max(dim=1).values + 1
    offset_B = per_row_B.cumsum(0) - per_row_B
    number_BT = torch.where(document_BT >= 0, document_BT + offset_B[:, None], -1)
    return number_BT.flatten().long(), int(per_row_B.sum())
