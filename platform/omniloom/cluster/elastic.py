"""A number of ranks that follows the cluster: as many as it has room for, of those numbers that share the batch."""

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision

from omniloom.cluster.faults import TryAgain

ROOM = "room for more ranks"  # why they are asked to stop: to start again
ASK_S = 10.0


class Sizes(ElasticScalingPolicy):
    """Ray's own policy, which would take any number in between, and end ranks for more of them without a checkpoint."""

    def __init__(
        self, scaling_config: ScalingConfig, numbers: Sequence[int], ask_to_stop: Callable[[str], None]
    ) -> None:
        super().__init__(scaling_config)
        self._numbers, self._ask_to_stop = numbers, ask_to_stop

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return max((number for number in self._numbers if number <= room), default=0)

    def _get_reserved_resources(self) -> Any:
        """Of the cluster as it is now: Ray's own view of it is up to 20 s old, and has nodes that were just lost."""
        reserved = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
        return ray.get(reserved, timeout=ASK_S)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Never end ranks that run; where more could, have them save first."""
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision) and decision.num_workers > worker_group_state.num_workers:
            self._ask_to_stop(f"{ROOM}: {worker_group_state.num_workers} run, {decision.num_workers} could")
        return NoopDecision()


class ElasticTrainer(TorchTrainer):
    """Ray's trainer with our numbers of ranks, and our answer to failures."""

    def __init__(self, *args: Any, numbers: Sequence[int], ask_to_stop: Callable[[str], None], **named: Any) -> None:
        super().__init__(*args, **named)
        self._numbers, self._ask_to_stop = numbers, ask_to_stop

    def _initialize_and_run_controller(self, **named: Any) -> Any:
        named["failure_policy"] = TryAgain(self.run_config.failure_config)
        if len(self._numbers) > 1:
            named["scaling_policy"] = Sizes(self.scaling_config, self._numbers, self._ask_to_stop)
        return super()._initialize_and_run_controller(**named)
