"""Text ids and media become one sequence of embeddings; one encoder per modality.

B batch, T tokens, N patches of the whole batch, P values of a patch, D model width.
"""

from torch import Tensor, nn

from omniloom.model.config import ModelConfig
from omniloom.model.position import encoding_2d

IMAGE = 1  # id of the modality in the unified sequence


class ImageEncoder(nn.Module):
    """norm(W patch) + 2-D encoding of (row, column), scaled to the size of a text embedding; (N, P) → (N, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch_proj = nn.Linear(config.image_patch_values, config.hidden_size, bias=False)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # Text embeddings start at initializer_range; pictures that start fifty times larger drown them.
        self.scale = config.initializer_range

    def forward(self, image_NP: Tensor, position_N3: Tensor) -> Tensor:
        weight = self.patch_proj.weight
        patch_NP = image_NP.to(weight.dtype) / 127.5 - 1.0
        encoding_ND = encoding_2d(position_N3[:, 1], position_N3[:, 2], weight.shape[0]).to(weight.dtype)
        return (self.norm(self.patch_proj(patch_NP)) + encoding_ND) * self.scale


class Embedding(nn.Module):
    """Embeds text ids, then writes each picture's patches over its placeholders."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.image = ImageEncoder(config)

    def forward(self, input_ids_BT: Tensor, modality_BT: Tensor, position_BT3: Tensor, image_NP: Tensor) -> Tensor:
        embedded_BTD = self.tokens(input_ids_BT)
        # Runs on zero patches too: every rank must use every parameter, or ranks without a picture wait for ever.
        is_image_BT = modality_BT == IMAGE
        image_ND = self.image(image_NP, position_BT3[is_image_BT])
        return embedded_BTD.masked_scatter(is_image_BT[..., None], image_ND.to(embedded_BTD.dtype))
