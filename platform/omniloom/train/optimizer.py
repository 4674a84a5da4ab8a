"""Which parameters decay."""

from typing import Any

from torch import nn

from omniloom.train.config import OptimizerConfig


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Two groups: matrices decay; norms, biases and embeddings do not, unless all is to."""
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    decay: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for parameter in model.parameters():
        (spared if parameter.dim() < 2 or id(parameter) in embeddings else decay).append(parameter)
    rate = config.weight_decay + config.l2  # one of them is 0
    return [
        {"params": decay, "weight_decay": rate},
        {"params": spared, "weight_decay": rate if config.decay_all else 0.0},
    ]
