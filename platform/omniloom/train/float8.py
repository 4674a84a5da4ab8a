"""The layers' matrix products in float8, through torchao; imported where `train.precision=fp8` asks for it.

Parameters keep their names, types and places: a checkpoint is that of a bf16 run. torchao's own way for experts, a
tensor subclass in place of the parameter, would not outlive DeepSpeed, which gives every parameter new storage.

N rows of all experts, sorted; E experts, I inputs, O outputs.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear
from torchao.float8.float8_linear_utils import swap_linear_layers
from torchao.prototype.moe_training import _to_fp8_rowwise_then_scaled_grouped_mm

from omniloom.errors import ConfigError
from omniloom.model.moe import Experts

MULTIPLE = 16  # sides of a float8 product, in numbers
PARTS = ("self_attn", "mlp")  # of a layer: not the head, the embeddings, the encoders, the junctions


def convert(module: nn.Module, emulate: bool = False) -> list[str]:
    """Let attention's and feed-forward's matrices, both sides multiples of 16, multiply in float8; the router's does
    not. One scale a tensor; for experts one a row and a column, as torch has them. Returns the modules' names.

    `emulate` rounds the matrices' operands on any machine; experts have no such thing. Raises ConfigError where no
    matrix has such sides.
    """
    names = [name for name, part in module.named_modules() if _fits(name, part)]
    if not names:
        raise ConfigError(
            f"float8 products have sides that are multiples of {MULTIPLE}, and no matrix of this model's layers has: "
            "change model.hidden_size, or set train.precision=bf16"
        )
    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)  # the batch's tokens, summed over in backward
    swap_linear_layers(
        module, partial(_Float8Linear.from_float, config=config), module_filter_fn=lambda _, name: name in names
    )
    for name in names:
        part = module.get_submodule(name)
        if isinstance(part, Experts):
            part.product = grouped_product
    return names


def _fits(name: str, part: nn.Module) -> bool:
    if not set(PARTS) & set(name.split(".")) or not isinstance(part, nn.Linear | Experts):
        return False
    matrices = [parameter for parameter in part.parameters(recurse=False) if parameter.dim() > 1]
    return all(side % MULTIPLE == 0 for matrix in matrices for side in matrix.shape[-2:])


class _Float8Linear(Float8Linear):
    """torchao's, which alone would hold on to the weights that ZeRO 3 gathered for the forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        with _made_again(self.weight.t(), lambda: self.weight.t()):
            return super().forward(x)


def grouped_product(x_NI: Tensor, weight_EIO: Tensor, offs: Tensor) -> Tensor:
    """y = x W_e for the rows of each expert e, which end at `offs` (E,), as `F.grouped_mm` has it; (N, O)."""
    # The kernels read an expert's rows in sixteens: each expert's last ones are filled up with zeros.
    count_E = offs.diff(prepend=offs.new_zeros(1))
    padded_E = (count_E + MULTIPLE - 1) // MULTIPLE * MULTIPLE
    padded_ends_E = padded_E.cumsum(0).to(offs.dtype)
    row_N = torch.arange(len(x_NI), device=x_NI.device)
    moved_E = (padded_ends_E - padded_E) - (offs - count_E)
    place_N = row_N + moved_E[torch.bucketize(row_N, offs, right=True)]
    rows = -(-len(x_NI) // MULTIPLE) * MULTIPLE + MULTIPLE * len(offs)  # enough without asking the device how many
    padded = x_NI.new_zeros(rows, x_NI.shape[1]).index_copy(0, place_N, x_NI)

    def by_columns() -> Tensor:
        return weight_EIO.mT.contiguous().mT

    weight = by_columns()
    with _made_again(weight, by_columns):
        return _to_fp8_rowwise_then_scaled_grouped_mm(
            padded, weight, padded_ends_E, pad_token_groups_for_grouped_mm=False
        )[place_N]


def _made_again(tensor: Tensor, make: Callable[[], Tensor]) -> saved_tensors_hooks:
    """Within it autograd saves how `tensor` is made of a parameter, not its numbers."""

    def save(saved: Tensor) -> Tensor | Callable[[], Tensor]:
        same = saved.data_ptr() == tensor.data_ptr() and saved.shape == tensor.shape
        return make if same else saved

    def read(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    return saved_tensors_hooks(save, read)
