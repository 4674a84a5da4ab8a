"""Which parameters decay."""

from typing import Any

from torch import nn

from omniloom.train.groups import OptimizerConfig


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases and embeddings do not, unless all is to; the experts that not every rank holds are
    a third group."""
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    decay: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    shared: list[nn.Parameter] = []
    for parameter in model.parameters():
        if hasattr(parameter, "group_name"):
            shared.append(parameter)
        else:
            (spared if parameter.dim() < 2 or id(parameter) in embeddings else decay).append(parameter)
    rate = config.weight_decay + config.l2  # one of them is 0
    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": rate},
        {"params": spared, "weight_decay": rate if config.decay_all else 0.0},
    ]
    if shared:  # DeepSpeed finds the ranks that hold the same ones by this name
        marks = {"moe": True, "name": shared[0].group_name}  # type: ignore[attr-defined]
        groups.append({"params": shared, "weight_decay": rate, **marks})
    return groups
