"""What a step leaves behind: its line of metrics, by the contract's keys, and its events; and what ends a run."""

from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

from omniloom.model.decoder import Decoder
from omniloom.plan.flops import train_flops
from omniloom.track.report.metrics import whole_lines
from omniloom.track.tracker import Tracker
from omniloom.train.checkpoint import State
from omniloom.train.config import TrainingRun
from omniloom.train.engine import Engine
from omniloom.train.guard import Guard
from omniloom.train.health import Health
from omniloom.train.step import MODALITIES, StepResult


class Recorder:
    """One rank's view of how its run goes; rank 0's has the tracker and writes it down.

    What it knows from before is read off the run's own metrics, so that it goes on over restarts.
    """

    def __init__(self, run: TrainingRun, model: Decoder, engine: Engine, tracker: Tracker | None) -> None:
        self._run, self._engine, self._tracker = run, engine, tracker
        self._health = Health(run.health, run.train, model)
        self._flops_per_token = cache(lambda row_tokens: train_flops(run.model, row_tokens, 1))
        self._tokens = dict.fromkeys((f"tokens/{name}" for name in MODALITIES), 0)
        guard = Guard(run.guard, scales_loss=engine.loss_scale is not None)
        if tracker is not None:
            self._resume(guard, run.folder / "metrics.jsonl")
        self._guard = engine.gather(guard)[0]

    def _resume(self, guard: Guard, metrics: Path) -> None:
        recent: deque[dict[str, Any]] = deque(maxlen=self._run.health.alarm_steps)
        for line in whole_lines(metrics):
            guard.observe(line["grad_norm"])
            recent.append(line)
        for line in recent:
            self._health.alarms(line)
        if recent:
            guard.skipped_steps = recent[-1]["skipped_steps"]  # a forked run's may have had another guard
            self._tokens = {key: recent[-1][key] for key in self._tokens}

    @property
    def norm_limit(self) -> float:
        """The largest gradient norm with which the next step is taken."""
        return self._guard.limit

    def line(self, state: State, result: StepResult, lr: float, waited_s: float) -> dict[str, Any]:
        """The metrics of the step that was just done; what is out of the ordinary about it becomes events."""
        limit, reason = self._guard.limit, self._guard.observe(result.grad_norm)
        line: dict[str, Any] = {
            "step": state.step,
            "loss/next_token": result.next_token,
            "loss/balance": result.balance,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "skipped_steps": self._guard.skipped_steps,
            "tokens": state.tokens,
        }
        if result.mtp is not None:
            line["loss/mtp"] = result.mtp
        if self._engine.loss_scale is not None:
            line["loss_scale"] = self._engine.loss_scale  # of the next step
        for key, count in zip(self._tokens, result.tokens_by_modality, strict=True):
            self._tokens[key] += count
        line |= result.alignment | self._tokens | self._health.figures(result.routing) | self._times(result, waited_s)
        if self._tracker is not None:
            for alarm in self._health.alarms(line):
                self._tracker.event("router_alarm", **alarm)
            if reason is not None:
                figures = {"norm": result.grad_norm, "limit": limit, "loss_scale": self._engine.loss_scale}
                self._tracker.event("skipped_step", step=state.step, reason=reason, **figures)
        return line

    def refuse_unsound(self, step: int, result: StepResult) -> None:
        """Raise DataError where going on is of no use; asked once the step's line is written."""
        self._guard.refuse_too_many(step)
        if not result.skipped:
            self._health.refuse_bias_at_rest(step, result.routing)

    def _times(self, result: StepResult, waited_s: float) -> dict[str, float]:
        """Of rank 0's step; `mfu` where the device's peak is known, by the planner's FLOPs of the tokens it held."""
        by_part = self._engine.clock.seconds()
        step_s = by_part.pop("step") + waited_s
        tokens_per_s, peak = result.tokens / step_s, self._run.peak_flops_per_s
        times = {
            "tokens_per_s": tokens_per_s,
            "tokens_per_s_per_rank": tokens_per_s / self._engine.ranks,
            "step_s": step_s,
            "data_wait_s": waited_s,
        }
        times |= {f"{part}_s": seconds for part, seconds in by_part.items()}
        if peak is not None:
            times["mfu"] = self._flops_per_token(result.row_tokens) * tokens_per_s / self._engine.ranks / peak
        return times
