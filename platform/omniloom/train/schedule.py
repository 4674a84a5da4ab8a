"""The learning rate by step: pure arithmetic."""

import math

from omniloom.train.config import ScheduleConfig


def rate_share(step: int, steps: int, config: ScheduleConfig) -> float:
    """Share of the peak rate at optimizer step `step` = 1 … `steps`.

    Warm-up: step / warmup. Cosine: floor + (1 − floor)(1 + cos πp)/2 over the rest. Warmup-stable-decay: 1, then
    linear to the floor over the last `decay_share` of the run.
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.kind == "cosine":
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return config.floor + (1 - config.floor) * (1 + math.cos(math.pi * progress)) / 2
    decay_steps = max(1, round(config.decay_share * steps))
    left = min(1.0, (steps - step) / decay_steps)
    return config.floor + (1 - config.floor) * left
