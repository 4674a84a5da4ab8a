"""The one place that translates a run into DeepSpeed's JSON, and refuses what DeepSpeed does not do.

Imports nothing heavy: what is refused is refused before anything starts.
"""

from typing import TYPE_CHECKING, Any

from omniloom.errors import ConfigError, refuse_unless_one_of

if TYPE_CHECKING:
    from omniloom.train.config import TrainingRun
    from omniloom.train.groups import OffloadConfig, OptimizerConfig

OPTIMIZERS = ("adamw", "sgd", "muon")
FP32_PARAMETERS = ("fp32", "bf16_autocast")
OFFLOADS = ("none", "cpu", "nvme")


def deepspeed_config(run: "TrainingRun", ranks: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a run whose model has so many parameters."""
    train = run.train
    return {
        # It takes ranks that share rows for ranks with rows of their own: each has its tokens' gradients.
        "train_batch_size": train.global_batch_size * run.parallel.sequence,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps(ranks // run.parallel.sequence),
        "gradient_clipping": 0.0 if clips_here(run) else train.gradient_clipping,
        "zero_optimization": _zero(run, parameters),
        **_precision(train.precision),
        "optimizer": _optimizer(run.optimizer),
        "zero_allow_untested_optimizer": run.optimizer.kind == "sgd",  # tested here: tests/train/test_engine.py
        "steps_per_print": 1 << 62,  # our own tracker reports
    }


def clips_here(run: "TrainingRun") -> bool:
    """DeepSpeed keeps no norm of these gradients, and clips those of shared experts by a mean of the ranks' norms."""
    return run.parallel.zero_stage == 0 and run.train.precision in FP32_PARAMETERS


def _zero(run: "TrainingRun", parameters: int) -> dict[str, Any]:
    parallel = run.parallel
    bucket = min(parallel.bucket_numbers, parameters + parameters % 2)  # DeepSpeed allocates whole ones, even ones
    # Muon multiplies whole matrices: at stage 3 DeepSpeed takes it only with gradients reduced whole.
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "reduce_scatter": run.optimizer.kind != "muon",
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if parallel.offload_optimizer.device != "none":
        zero["offload_optimizer"] = _offload(parallel.offload_optimizer)
    if parallel.offload_parameters.device != "none":
        size = {"buffer_size": parallel.offload_parameters.buffer_size}
        zero["offload_param"] = _offload(parallel.offload_parameters) | size
    return zero


def _offload(config: "OffloadConfig") -> dict[str, Any]:
    section = {"device": config.device, "pin_memory": config.pin_memory, "buffer_count": config.buffer_count}
    return section | ({"nvme_path": config.nvme_path} if config.device == "nvme" else {})


def _precision(precision: str) -> dict[str, Any]:
    return {
        "bf16": {"enabled": precision in ("bf16", "fp8")},
        "fp16": {"enabled": precision == "fp16"},  # the scale begins at 2¹⁶; by default it is dynamic
        "torch_autocast": {
            "enabled": precision == "bf16_autocast",
            "dtype": "bfloat16",
            # Modules named here exchange weights and gradients in bf16. Ours exchange fp32: every ZeRO stage then
            # learns the same.
            "lower_precision_safe_modules": [],
        },
    }


def _optimizer(config: "OptimizerConfig") -> dict[str, Any]:
    """Torch's own optimizers, which need no compiled extension; DeepSpeed's Muon with one of them.

    DeepSpeed gives Muon every parameter of two or more dimensions outside `embedding` and `lm_head`.
    """
    if config.kind == "sgd":
        # Torch's u = βu + g is v / (1 − β) for v = βv + (1 − β)g from v = 0, so the rate carries the factor. Torch's
        # dampening would be v = g at the first step, and 0 there once DeepSpeed has made the state.
        rate = config.lr * (1 - config.momentum)
        return {"type": "SGD", "params": {"lr": rate, "momentum": config.momentum}}
    params = {
        "lr": config.lr,
        "betas": [config.beta1, config.beta2],
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "torch_adam": True,
    }
    if config.kind == "muon":
        return {"type": "Muon", "params": params | {"muon_lr": config.muon_lr, "momentum": config.muon_momentum}}
    if config.l2:
        return {"type": "Adam", "params": params | {"adam_w_mode": False}}
    return {"type": "AdamW", "params": params}


def refuse_contradictions(run: "TrainingRun") -> None:
    """Raise ConfigError for what DeepSpeed does not do, with the rule, the figures and the key to change."""
    refuse_unless_one_of("optimizer.kind", run.optimizer.kind, OPTIMIZERS)
    if run.train.precision == "fp16" and run.parallel.zero_stage == 0:
        raise ConfigError(
            "at ZeRO 0 DeepSpeed divides the gradients by a loss scale that it never multiplied by: "
            "train.precision=fp16 needs parallel.zero_stage=1, 2 or 3 (it is 0)"
        )
    clipping = run.train.gradient_clipping
    if run.optimizer.kind == "muon" and run.parallel.zero_stage and clipping:
        raise ConfigError(
            "from ZeRO 1 on DeepSpeed clips Muon's orthogonal updates instead of the gradients, and nothing is "
            f"learned: set train.gradient_clipping=0 (it is {clipping}), or parallel.zero_stage=0"
        )
    _refuse_decay(run.optimizer)
    _refuse_offload(run)


def _refuse_decay(config: "OptimizerConfig") -> None:
    decay, l2 = config.weight_decay, config.l2
    if decay and l2:
        raise ConfigError(
            f"weights decay once: set optimizer.weight_decay=0 (it is {decay}), or optimizer.l2=0 (it is {l2})"
        )
    if config.kind == "sgd" and decay:
        raise ConfigError(
            f"optimizer.kind=sgd decays through the loss alone: set optimizer.weight_decay=0 (it is {decay}), and "
            "optimizer.l2 where weights shall decay"
        )
    if config.kind == "muon" and l2:
        raise ConfigError(
            f"optimizer.kind=muon decays apart from the gradient alone: set optimizer.l2=0 (it is {l2}), and "
            "optimizer.weight_decay where weights shall decay"
        )


def _refuse_offload(run: "TrainingRun") -> None:
    stage = run.parallel.zero_stage
    for name, least in (("offload_optimizer", 1), ("offload_parameters", 3)):
        key, config = f"parallel.{name}", getattr(run.parallel, name)
        refuse_unless_one_of(f"{key}.device", config.device, OFFLOADS)
        if config.device != "none" and stage < least:
            raise ConfigError(
                f"{key}.device={config.device} needs parallel.zero_stage={least} or more (it is {stage}): set that, or "
                f"{key}.device=none"
            )
        if config.device == "nvme" and stage < 3:
            raise ConfigError(
                f"below ZeRO 3 DeepSpeed keeps in memory what is meant for a disk: {key}.device=nvme needs "
                f"parallel.zero_stage=3 (it is {stage}), or set {key}.device=cpu"
            )
        if (config.device == "nvme") != (config.nvme_path is not None):
            raise ConfigError(
                f"a folder is needed for nvme, and for nvme alone: {key}.device={config.device} with "
                f"{key}.nvme_path={config.nvme_path or 'null'}"
            )
        for number in ("buffer_count", "buffer_size"):
            if getattr(config, number) < 1:
                raise ConfigError(f"{key}.{number}={getattr(config, number)} must be at least 1")
