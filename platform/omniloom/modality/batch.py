"""Rows become tensors: what the decoder's forward pass takes."""

import numpy as np
import torch
from torch import Tensor

from omniloom.modality.sequence import MEDIA_FIELDS, TOKEN_FIELDS, Row

MODEL_INPUTS = ("input_ids", "modality", "position", "document", *MEDIA_FIELDS)


def stack_rows(rows: list[Row]) -> dict[str, Tensor]:
    """Rows as tensors: one entry a token stacked to (B, T), media joined in order of appearance."""
    stacked = {name: np.stack([getattr(row, name) for row in rows]) for name in TOKEN_FIELDS}
    joined = {name: np.concatenate([getattr(row, name) for row in rows]) for name in MEDIA_FIELDS}
    return {name: torch.from_numpy(array) for name, array in (stacked | joined).items()}
