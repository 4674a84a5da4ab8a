"""Run a function on every rank of a training job (Ray Train), or over many items (Ray tasks)."""

import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from omniloom.cluster.config import ClusterConfig
from omniloom.cluster.session import die_with_parent
from omniloom.errors import ClusterError, OmniloomError

Argument = TypeVar("Argument")
Result = TypeVar("Result")
Failure = Callable[[int, str], None]


def run_on_ranks(
    function: Callable[[Argument], None],
    argument: Argument,
    config: ClusterConfig,
    ask_to_stop: Callable[[], None] | None = None,
    on_failure: Failure | None = None,
) -> str | None:
    """Call `function(argument)` on `config.workers` ranks that share a torch process group; raise what failed first.

    Ctrl-C or SIGTERM calls `ask_to_stop`, upon which the ranks are expected to come to an end of themselves, and the
    signal's name is returned; a second one, or the first where nobody can be asked, raises KeyboardInterrupt.
    `on_failure(rank, cause)` is told of the rank that failed first, each time that ranks fail, restarted or not; it
    runs in another process.
    """
    has_gpu = ray.cluster_resources().get("GPU", 0) >= config.workers
    with tempfile.TemporaryDirectory(prefix="omniloom-train-") as scratch, _stop_signals(ask_to_stop) as stop:
        trainer = TorchTrainer(
            partial(_rank, function, argument),
            torch_config=TorchConfig(backend="nccl" if has_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=config.workers,
                use_gpu=has_gpu,
                resources_per_worker={"CPU": config.cpus_per_worker},
            ),
            # Ray's own record of the run; ours is the run directory.
            run_config=RunConfig(
                name="ranks",
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=config.max_failures),
                callbacks=[_TellFailure(on_failure)] if on_failure else None,
            ),
        )
        outcome: list[BaseException] = []
        # Outside of the main thread Ray leaves the signals to us.
        fit = threading.Thread(target=_keep_error, args=(trainer.fit, outcome), daemon=True)
        fit.start()
        while fit.is_alive():
            fit.join(0.2)
            if stop.at_once:
                raise KeyboardInterrupt(stop.name)
    if not outcome:
        return stop.name
    error = outcome[0]
    if isinstance(error, WorkerGroupError):
        raise _as_ours(*_first_cause(error.worker_failures)) from error
    if isinstance(error, TrainingFailedError | RayError):
        raise ClusterError(f"the training job failed outside of its ranks: {error}") from error
    raise error


def _rank(function: Callable[[Argument], None], argument: Argument) -> None:
    die_with_parent()
    function(argument)


def _keep_error(call: Callable[[], Any], outcome: list[BaseException]) -> None:
    try:
        call()
    except BaseException as error:
        outcome.append(error)


class _Stop:
    """What signals have asked for so far."""

    name: str | None = None
    at_once = False


@contextmanager
def _stop_signals(ask_to_stop: Callable[[], None] | None) -> Iterator[_Stop]:
    stop = _Stop()

    def handle(number: int, frame: object) -> None:
        stop.at_once = stop.name is not None or ask_to_stop is None
        stop.name = signal.Signals(number).name
        if ask_to_stop is not None and not stop.at_once:
            ask_to_stop()

    if threading.current_thread() is not threading.main_thread():  # a trial of a sweep: its process gets none
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _TellFailure(UserCallback):
    """Lives in Ray Train's controller, beside the driver."""

    def __init__(self, on_failure: Failure) -> None:
        self._on_failure = on_failure

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        rank, error = _first_cause(worker_exceptions)
        self._on_failure(rank, f"{type(error).__name__}: {error}")


def _first_cause(failures: dict[int, Exception]) -> tuple[int, Exception]:
    """The rank that failed first, and how.

    When one rank fails, the others fail in the collective it left: our own errors go before anything else, then those
    that are no such aftermath.
    """
    aftermath = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting")

    def order(item: tuple[int, Exception]) -> tuple[bool, bool, int]:
        rank, error = item
        return not isinstance(error, OmniloomError), any(word in str(error) for word in aftermath), rank

    return min(failures.items(), key=order)


def _as_ours(rank: int, error: Exception) -> OmniloomError:
    """Our own errors come through as they are; anything else names its rank."""
    if isinstance(error, OmniloomError):
        return error
    return ClusterError(f"rank {rank} failed: {type(error).__name__}: {error}")


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
