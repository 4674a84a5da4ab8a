"""Run a function on every rank of a training job (Ray Train), or over many items (Ray tasks)."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from omniloom.cluster.config import ClusterConfig
from omniloom.errors import ClusterError, OmniloomError

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def run_on_ranks(function: Callable[[Argument], None], argument: Argument, config: ClusterConfig) -> None:
    """Call `function(argument)` on `config.workers` ranks that share a torch process group; raise what failed first."""
    has_gpu = ray.cluster_resources().get("GPU", 0) >= config.workers
    with tempfile.TemporaryDirectory(prefix="omniloom-train-") as scratch:
        trainer = TorchTrainer(
            lambda: function(argument),
            torch_config=TorchConfig(backend="nccl" if has_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=config.workers,
                use_gpu=has_gpu,
                resources_per_worker={"CPU": config.cpus_per_worker},
            ),
            # Ray's own record of the run; ours is the run directory.
            run_config=RunConfig(
                name="ranks", storage_path=scratch, failure_config=FailureConfig(max_failures=config.max_failures)
            ),
        )
        try:
            trainer.fit()
        except SystemExit as stop:  # how Ray Train ends on Ctrl-C, once the ranks are gone
            raise KeyboardInterrupt from stop
        except WorkerGroupError as error:
            raise _first_cause(error) from error
        except (TrainingFailedError, RayError) as error:
            raise ClusterError(f"the training job failed before its ranks ran: {error}") from error


def _first_cause(error: WorkerGroupError) -> OmniloomError:
    """Our own errors come through as they are; anything else names its rank.

    When one rank fails, the others fail in the collective it left: the rank whose error is no such aftermath goes
    first.
    """
    failures = sorted(error.worker_failures.items())
    for _, failure in failures:
        if isinstance(failure, OmniloomError):
            return failure
    aftermath = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting")
    rank, first = min(failures, key=lambda item: (any(word in str(item[1]) for word in aftermath), item[0]))
    return ClusterError(f"rank {rank} failed: {type(first).__name__}: {first}")


def run_each(function: Callable[[Argument], Result], items: Iterable[Argument], cpus: int = 1) -> Iterator[Result]:
    """Call `function` on each item as a Ray task; results come in the items' order. The first failure is raised."""
    task = ray.remote(function).options(num_cpus=cpus)
    pending = [task.remote(item) for item in items]
    for reference in pending:
        try:
            yield ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, OmniloomError):
                raise error.cause from error
            raise ClusterError(f"a task failed: {error.cause!r}") from error
        except RayError as error:
            raise ClusterError(f"a task was lost: {error}") from error
