"""The learning rate by step: its keys, and pure arithmetic."""

import math
from dataclasses import dataclass
from itertools import pairwise

from omniloom.errors import ConfigError, refuse_unless_one_of


@dataclass
class ScheduleConfig:
    """Linear warm-up, then: cosine to the floor, in `cycles` of which each begins at the peak again and is
    `cycle_length_multiplier` times as long as the one before; a polynomial, (1 − progress)^`power`, to the floor; or a
    plateau with a linear decay over the last `decay_share`."""

    kind: str = "cosine"  # or polynomial, warmup_stable_decay
    warmup_steps: int = 100
    cycles: int = 1  # of cosine
    cycle_length_multiplier: float = 1.0
    power: float = 1.0  # of polynomial
    decay_share: float = 0.3
    floor: float = 0.1  # last rate over peak rate

    def check(self, steps: int) -> None:
        """Raise ConfigError where a number cannot hold in a run of so many steps."""
        refuse_unless_one_of("schedule.kind", self.kind, ("cosine", "polynomial", "warmup_stable_decay"))
        if not 0 <= self.warmup_steps < steps:
            raise ConfigError(
                f"warm-up must end before the run does: schedule.warmup_steps={self.warmup_steps} is not under "
                f"train.steps={steps}, or it is negative"
            )
        for key in ("decay_share", "floor"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"schedule.{key}={getattr(self, key)} must lie between 0 and 1")
        for key in ("cycle_length_multiplier", "power"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(f"schedule.{key}={getattr(self, key)} must be a number above 0")
        for key, value, kind in (("cycles", self.cycles, "cosine"), ("power", self.power, "polynomial")):
            if value != 1 and self.kind != kind:
                raise ConfigError(
                    f"schedule.{key}={value} is for schedule.kind={kind} alone (it is {self.kind}): set "
                    f"schedule.{key}=1, or that kind"
                )
        self._check_cycles(steps)
        decays = round(self.decay_share * steps)
        if self.kind == "warmup_stable_decay" and self.warmup_steps + decays > steps:
            raise ConfigError(
                f"the decay would begin before warm-up ends: schedule.warmup_steps={self.warmup_steps} and {decays} "
                f"steps by schedule.decay_share={self.decay_share} are over train.steps={steps}"
            )

    def _check_cycles(self, steps: int) -> None:
        if self.cycles < 1:
            raise ConfigError(f"schedule.cycles={self.cycles} must be at least 1")
        if self.cycles > steps - self.warmup_steps:
            raise ConfigError(
                f"schedule.cycles={self.cycles} are more than the {steps - self.warmup_steps} steps after warm-up"
            )
        if self.cycles > 1 and min(b - a for a, b in pairwise(self.cycle_ends(steps))) < 1:
            raise ConfigError(
                f"schedule.cycles={self.cycles} with schedule.cycle_length_multiplier={self.cycle_length_multiplier} "
                f"leave a cycle without a step in the {steps - self.warmup_steps} after warm-up: lower either"
            )

    def cycle_ends(self, steps: int) -> list[int]:
        """The steps at which warm-up and each cycle after it end: of n cycles the i-th ends a share
        (1 + m + … + mⁱ⁻¹) / (1 + m + … + mⁿ⁻¹) of the way, rounded to a step."""
        lengths = [self.cycle_length_multiplier**i for i in range(self.cycles)]
        after = steps - self.warmup_steps
        return [self.warmup_steps + round(after * sum(lengths[:i]) / sum(lengths)) for i in range(self.cycles + 1)]


def rate_share(step: int, steps: int, config: ScheduleConfig) -> float:
    """Share of the peak rate at optimizer step `step` = 1 … `steps`.

    Warm-up: step / warmup. Then, p being the share of the way that is behind: cosine, floor + (1 − floor)(1 + cos πp)/2
    over each cycle, whose last step is on the floor; polynomial, floor + (1 − floor)(1 − p)^power. Warmup-stable-decay:
    1, then linear to the floor over the last `decay_share` of the run.
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.kind == "cosine":
        begin, end = next((begin, end) for begin, end in pairwise(config.cycle_ends(steps)) if step <= end)
        left = (1 + math.cos(math.pi * (step - begin) / (end - begin))) / 2
    elif config.kind == "polynomial":
        left = (1 - (step - config.warmup_steps) / (steps - config.warmup_steps)) ** config.power
    else:
        left = min(1.0, (steps - step) / max(1, round(config.decay_share * steps)))
    return config.floor + (1 - config.floor) * left
