"""Run a function on every rank of a training job (Ray Train), or over many items (Ray tasks)."""

import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

from omniloom.cluster.config import ClusterConfig
from omniloom.cluster.elastic import ElasticTrainer
from omniloom.cluster.faults import Ended, Supervisor
from omniloom.cluster.rank import Hooks, Rank, RankSide, run_as_rank
from omniloom.errors import ClusterError, OmniloomError

Argument = TypeVar("Argument")
Result = TypeVar("Result")
ROOM_S = 60.0  # between two looks for room for more ranks


def run_on_ranks(
    function: Callable[[Argument], None],
    argument: Argument,
    config: ClusterConfig,
    hooks: Hooks | None = None,
    numbers: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
) -> None:
    """Call `function(argument)` on `config.workers` ranks that share a torch process group; raise what failed first.

    With `numbers`, smallest first, on as many of them as the cluster has room for; the process group tells how many.
    Each failure is one event and, where there are hooks, the ranks start again as `config.max_failures` says. Ctrl-C,
    SIGTERM, a signal to a rank or Ray's notice that a node goes call `hooks.ask_to_stop`, upon which the ranks are
    expected to come to an end of themselves; a second signal, or the first where there are no hooks, raises
    KeyboardInterrupt. SIGUSR1 calls `hooks.ask_to_save`. `environment` is set in the ranks before anything is loaded.
    """
    numbers = numbers or (config.workers,)
    has_gpu = ray.cluster_resources().get("GPU", 0) >= numbers[0]
    with tempfile.TemporaryDirectory(prefix="omniloom-train-") as scratch, _signals(hooks) as stop:
        side = RankSide(hooks or _deaf(Path(scratch)), config.hang_s)
        trainer = ElasticTrainer(
            partial(run_as_rank, function, argument),
            numbers=numbers,
            ask_to_stop=side.hooks.ask_to_stop,
            torch_config=TorchConfig(backend="nccl" if has_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=numbers[0] if len(numbers) == 1 else (numbers[0], numbers[-1]),
                use_gpu=has_gpu,
                resources_per_worker={"CPU": config.cpus_per_worker},
                elastic_resize_monitor_interval_s=ROOM_S,
            ),
            # Ray's own record of the run; ours is the run directory.
            run_config=RunConfig(
                name="ranks",
                storage_path=scratch,
                worker_runtime_env={"env_vars": dict(environment)} if environment else None,
                callbacks=[Supervisor(side, config.max_failures if hooks else 0), side],
            ),
        )
        while _fit(trainer, stop) and side.hooks.go_on() and stop.name is None:
            pass


def _fit(trainer: ElasticTrainer, stop: "_Stop") -> bool:
    """Whether the ranks have come to an end of themselves, and not been lost once they were to go."""
    outcome: list[BaseException] = []
    # Outside of the main thread Ray leaves the signals to us.
    fit = threading.Thread(target=_keep_error, args=(trainer.fit, outcome), daemon=True)
    fit.start()
    while fit.is_alive():
        fit.join(0.2)
        if stop.at_once:
            raise KeyboardInterrupt(stop.name)
    if not outcome:
        return True
    error = outcome[0]
    cause = error.controller_failure if isinstance(error, ControllerError) else error
    if isinstance(cause, Ended):
        return False
    if isinstance(cause, OmniloomError):
        raise cause from None
    if isinstance(error, TrainingFailedError | RayError):
        raise ClusterError(f"the training job failed outside of its ranks: {error}") from error
    raise error


def _keep_error(call: Callable[[], Any], outcome: list[BaseException]) -> None:
    try:
        call()
    except BaseException as error:
        outcome.append(error)


def _deaf(folder: Path) -> Hooks:
    return Hooks(folder, _tell_nobody, _no_steps, _ask_nobody, _ask_nobody, _never, _hear_nothing)


def _tell_nobody(kind: str, /, **facts: Any) -> None:
    pass


def _no_steps() -> int:
    return 0


def _never() -> bool:
    return False


def _ask_nobody(why: str = "") -> None:
    pass


def _hear_nothing(rank: Rank) -> None:
    pass


class _Stop:
    """What signals have asked for so far."""

    name: str | None = None
    at_once = False


@contextmanager
def _signals(hooks: Hooks | None) -> Iterator[_Stop]:
    stop = _Stop()

    def handle(number: int, frame: object) -> None:
        stop.at_once = stop.name is not None or hooks is None
        stop.name = stop.name or signal.Signals(number).name
        if hooks is not None and not stop.at_once:
            hooks.ask_to_stop(stop.name)

    def save(number: int, frame: object) -> None:
        if hooks is not None:
            hooks.ask_to_save()

    if threading.current_thread() is not threading.main_thread():  # a trial of a sweep: its process gets none
        yield stop
        return
    handlers = {signal.SIGINT: handle, signal.SIGTERM: handle, signal.SIGUSR1: save}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
