"""Next-token prediction over packed rows.

B batch, T tokens, M targets of the batch, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def shifted_targets(
    input_ids_BT: Tensor, document_BT: Tensor, loss_mask_BT: Tensor, ahead: int = 1
) -> tuple[Tensor, Tensor]:
    """Position t predicts token t + ahead where that token is a target and stands in the same document.

    Returns `predict_at` bool (B, T) and the targets' ids int64 (M,) in the same row-major order.
    """
    predict_at_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
    same_document = document_BT[:, ahead:] == document_BT[:, :-ahead]
    is_token = document_BT[:, ahead:] >= 0
    predict_at_BT[:, :-ahead] = same_document & is_token & (loss_mask_BT[:, ahead:] > 0)
    target_at_BT = predict_at_BT.roll(ahead, dims=1)  # the last columns never predict, so nothing wraps round
    return predict_at_BT, input_ids_BT[target_at_BT].long()


def next_token_nll(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """−log softmax(logits)[target] for each target, in float32 nats (M,)."""
    return F.cross_entropy(logits_MV.float(), targets_M, reduction="none")
