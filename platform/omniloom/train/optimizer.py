"""Which parameters decay, and the optimizer's section of DeepSpeed's configuration."""

from typing import Any

from torch import nn

from omniloom.train.config import OptimizerConfig


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases and embeddings do not; a third group has the experts that not every rank holds."""
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    decay: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    shared: list[nn.Parameter] = []
    for parameter in model.parameters():
        if hasattr(parameter, "group_name"):
            shared.append(parameter)
        else:
            (spared if parameter.dim() < 2 or id(parameter) in embeddings else decay).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    if shared:  # DeepSpeed finds the ranks that hold the same ones by this name
        marks = {"moe": True, "name": shared[0].group_name}  # type: ignore[attr-defined]
        groups.append({"params": shared, "weight_decay": config.weight_decay, **marks})
    return groups


def deepspeed_section(config: OptimizerConfig) -> dict[str, Any]:
    """DeepSpeed's `optimizer` entry: torch's own AdamW, which needs no compiled extension; Muon with it.

    DeepSpeed gives Muon every parameter of two or more dimensions outside `embedding` and `lm_head`.
    """
    params = {
        "lr": config.lr,
        "betas": [config.beta1, config.beta2],
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "torch_adam": True,
    }
    if config.kind == "adamw":
        return {"type": "AdamW", "params": params}
    return {"type": "Muon", "params": params | {"muon_lr": config.muon_lr, "momentum": config.muon_momentum}}
