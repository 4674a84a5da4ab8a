"""Which steps are left out: those whose gradient norm is not finite, or out of line with the ones before."""

import math
from collections import deque
from statistics import median

from omniloom.errors import DataError
from omniloom.train.groups import GuardConfig

NOT_FINITE, SPIKE, OVERFLOW = "not finite", "spike", "loss scale overflow"


class Guard:
    """Every rank has one, and as all see the same norms all say the same; what it knows is read
    back off the norms of the steps done."""

    def __init__(self, config: GuardConfig, scales_loss: bool) -> None:
        self._config, self._scales_loss = config, scales_loss
        self._norms: deque[float] = deque(maxlen=config.window)
        self._in_a_row = 0
        self.skipped_steps = 0

    @property
    def limit(self) -> float:
        """The largest norm of a step that is taken: spike_factor · median of the last `window` finite ones."""
        factor, norms = self._config.spike_factor, self._norms
        if factor is None or len(norms) < self._config.window:
            return math.inf
        return factor * median(norms) or math.inf  # a run of steps without a target has norm 0

    def observe(self, norm: float) -> str | None:
        """Take a step's norm; returns why it was left out, or None.

        A finite norm joins the window whether the step was taken or not: what was a spike may be the new level.
        """
        reason = SPIKE if norm > self.limit else None
        if math.isfinite(norm):
            self._norms.append(norm)
        else:
            reason = OVERFLOW if self._scales_loss else NOT_FINITE
        self.skipped_steps += reason is not None
        if reason != OVERFLOW:  # fp16's scale comes down until the gradients fit: no spike, and no end of one
            self._in_a_row = self._in_a_row + 1 if reason else 0
        return reason

    def refuse_too_many(self, step: int) -> None:
        """Raise DataError where `max_skipped` steps in a row were left out: waiting helps no more."""
        if self._in_a_row >= self._config.max_skipped:
            last = f"{self._norms[-1]:.3g}" if self._norms else "none"
            raise DataError(
                f"the last {self._in_a_row} steps up to {step} were left out (guard.max_skipped="
                f"{self._config.max_skipped}): their gradients were not finite or over guard.spike_factor="
                f"{self._config.spike_factor} × the median norm; the last finite norm is {last}. Begin again before "
                "them, fork=<run>@<step>, with a lower optimizer.lr, other data or another guard.spike_factor"
            )
