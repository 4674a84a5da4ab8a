"""Many trials of one command over a space of values: Ray Tune chooses, starts, compares, ends and takes up again.

A trial is the command itself, `omniloom train …`, in a process beside a small actor that reads what it measures.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher

from omniloom.cluster.config import Choice, ClusterConfig, Interval, Space, SweepConfig
from omniloom.cluster.session import IN_A_JOB, die_with_parent
from omniloom.cluster.whole_files import whole_files
from omniloom.errors import ClusterError

Status = Literal["waiting", "running", "finished", "pruned", "failed"]
COMMAND_BYTES = 512 << 20  # of the process beside the actor: a driver, without model or data
STOP_S = 600.0  # for the checkpoint of a trial that is ended
POLL_S = 0.2
WORST = 1e300  # what Tune is told for a loss that is not finite: it would compare nothing with that
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the signals are ours
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # what a crash may cost of the search's own state
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class Program(Protocol):
    """What a sweep runs; it travels to every node."""

    def command(self, run: str, values: dict[str, Any], fork: str | None) -> list[str]:
        """The words after `omniloom` that begin or resume a trial's run; `fork`, a checkpoint, is where it begins."""

    def output(self, run: str) -> Path:
        """The file for what a run prints."""

    def measured(self, run: str, offset: int) -> tuple[list[tuple[int, list[float]]], int]:
        """Each step at which all objectives were measured, with their values, and the offset to ask for more from."""

    def checkpoint(self, run: str, step: int) -> str | None:
        """The run's checkpoint of this step, as `fork` takes it, once it is complete."""

    def cause(self, run: str) -> str:
        """Why a run's command has failed."""

    def wait_until_free(self, run: str) -> None:
        """Return when no command works on the run any more."""

    def stop(self) -> None:
        """Have all runs save a checkpoint and end, and wait until they have."""


@dataclass
class Outcome:
    """A trial and how it stands: run, step and objectives are those it told last."""

    trial: str
    run: str
    values: dict[str, Any]
    status: Status
    step: int = 0
    objectives: list[float] | None = None
    cause: str | None = None


@dataclass
class Search:
    """What is asked for: trials of `program` over `space`, each of so many steps; `folder` is Tune's own memory."""

    program: Program
    space: Space
    config: SweepConfig
    cluster: ClusterConfig
    steps: int
    folder: Path


def search(asked: Search, watch: Callable[[list[Outcome]], None]) -> str | None:
    """Run the trials, or go on with those that its folder remembers; `watch` is told how all stand, at every change.

    Ctrl-C or SIGTERM has the trials save a checkpoint and end, and the signal's name is returned.
    """
    os.environ |= TUNE_ENVIRONMENT
    # The folder that came with a job is unpacked anew where two nodes share a machine, and Tune asks where it is.
    os.chdir(asked.folder.parent)
    tuner = _tuner(asked, _Watcher(watch))
    with _stop_signals(asked.program.stop) as received:
        tuner.fit()
    return received[0] if received else None


def _tuner(asked: Search, watcher: "_Watcher") -> tune.Tuner:
    """A new search, or the one that its folder remembers."""
    space, config, folder = asked.space, asked.config, asked.folder
    trainable = tune.with_resources(
        tune.with_parameters(
            _Trial,
            program=asked.program,
            steps=asked.steps,
            worst=[-WORST if mode == "max" else WORST for _, mode in config.objectives],
            environment=_of_a_driver(),
        ),
        tune.PlacementGroupFactory([{"memory": COMMAND_BYTES}]),  # no CPU: those are its ranks'
    )
    domains = {key: _domain(values, config.search == "grid") for key, values in space.items()}
    if _remembers_trials(folder):
        tuner = tune.Tuner.restore(
            str(folder), trainable, param_space=domains, resume_errored=True, storage_filesystem=whole_files()
        )
        # Everything else it was made with has been restored.
        tuner._local_tuner.get_run_config().callbacks = [watcher]
        return tuner
    room = _room(asked.cluster)
    if config.scheduler == "pbt" and room < config.trials:
        raise ClusterError(
            f"a population trains side by side: sweep.trials={config.trials} is over the {room} for which the cluster "
            f"has room: set sweep.trials={room}, or use a larger cluster"
        )
    concurrent = config.trials if config.scheduler == "pbt" else config.concurrent or room
    return tune.Tuner(
        trainable,
        param_space=domains,
        tune_config=tune.TuneConfig(
            search_alg=_search_algorithm(config, concurrent),
            scheduler=_scheduler(config, space, asked.steps),
            num_samples=1 if config.search == "grid" else config.trials,
            max_concurrent_trials=concurrent if config.search == "tpe" else None,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            storage_filesystem=whole_files(),  # Tune's own copies may be half written when it is killed
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a pruned trial need not have one
            callbacks=[watcher],
            verbose=0,
        ),
    )


def _remembers_trials(folder: Path) -> bool:
    """Whether there is something to go on with; what a start left that came to nothing is removed."""
    states = sorted(folder.glob("experiment_state-*.json"))
    try:
        if states and tune.Tuner.can_restore(folder) and json.loads(states[-1].read_text())["trial_data"]:
            return True
    except ValueError:
        pass  # a disk lost it: the trials, whose runs are all there, are gone through again
    shutil.rmtree(folder, ignore_errors=True)
    return False


@contextmanager
def _stop_signals(stop_trials: Callable[[], None]) -> Iterator[list[str]]:
    """Have the first Ctrl-C or SIGTERM stop the trials and then Tune's loop in order; a second one at once.

    SIGUSR1 is what Tune takes for that. Its own end of the trials would wait ten seconds for each.
    """
    received: list[str] = []

    def stop(number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if received:
            raise KeyboardInterrupt(name)
        received.append(name)
        stop_trials()
        signal.raise_signal(signal.SIGUSR1)

    def too_early(number: int, frame: object) -> None:
        raise KeyboardInterrupt(received[0] if received else "SIGUSR1")

    handlers = {signal.SIGUSR1: too_early, signal.SIGINT: stop, signal.SIGTERM: stop}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _of_a_driver() -> dict[str, str]:
    """What a driver beside an actor needs: this cluster, the job, if any, whose folder it runs in, the code's name."""
    own = {name: value for name, value in os.environ.items() if name == IN_A_JOB or name.startswith("OMNILOOM_")}
    return own | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


def _domain(values: Choice | Interval, grid: bool) -> Any:
    if isinstance(values, Choice):
        return tune.grid_search(list(values.values)) if grid else tune.choice(list(values.values))
    if values.whole:  # Tune's upper end is not one of its numbers
        low, high = int(values.low), int(values.high) + 1
        return tune.lograndint(low, high) if values.log else tune.randint(low, high)
    return (tune.loguniform if values.log else tune.uniform)(values.low, values.high)


def _objective(index: int) -> str:
    """The name Tune knows a metric by: it reads a slash as a path."""
    return f"objective_{index}"


def _search_algorithm(config: SweepConfig, concurrent: int) -> Searcher | SearchAlgorithm:
    if config.search != "tpe":
        return BasicVariantGenerator(random_state=config.seed, max_concurrent=concurrent)
    from ray.tune.search.optuna import OptunaSearch  # seconds, which each trial's actor would spend too

    modes = [mode for _, mode in config.objectives]
    names = [_objective(index) for index in range(len(modes))]
    one = len(names) == 1
    return OptunaSearch(metric=names[0] if one else names, mode=modes[0] if one else modes, seed=config.seed)


def _scheduler(config: SweepConfig, space: Space, steps: int) -> TrialScheduler | None:
    if config.scheduler is None:
        return None
    by: dict[str, Any] = {"time_attr": "step", "metric": _objective(0), "mode": config.objectives[0][1]}
    if config.scheduler == "pbt":
        return PopulationBasedTraining(
            **by,
            perturbation_interval=config.perturb_steps or max(1, steps // 5),
            hyperparam_mutations={
                key: list(values.values) if isinstance(values, Choice) else _domain(values, grid=False)
                for key, values in space.items()
            },
            custom_explore_fn=partial(_within, space),
        )
    return ASHAScheduler(
        **by,
        max_t=steps + 1,  # never reached: a trial comes to its end of itself
        grace_period=config.grace_steps or max(1, steps // config.reduction_factor**2),
        reduction_factor=config.reduction_factor,
    )


def _within(space: Space, values: dict[str, Any]) -> dict[str, Any]:
    """Values after a change, back within their intervals."""
    return values | {
        key: min(max(values[key], interval.low), interval.high)
        for key, interval in space.items()
        if isinstance(interval, Interval)
    }


def _room(cluster: ClusterConfig) -> int:
    """How many trials the cluster's devices hold at a time."""
    resources = ray.cluster_resources()
    kind, each = ("GPU", 1) if resources.get("GPU", 0) >= cluster.workers else ("CPU", cluster.cpus_per_worker)
    room = int(resources.get(kind, 0)) // (cluster.workers * each)
    if room < 1:
        raise ClusterError(
            f"the cluster has {resources.get(kind, 0):g} {kind}, a trial takes cluster.workers={cluster.workers} × "
            f"{each}: lower one of them"
        )
    return room


def _name(trial: Any) -> str:
    """A trial's run: its number in the sweep, or the id that a search algorithm gave it, never to be read as one."""
    _, underscore, number = trial.trial_id.rpartition("_")
    return f"{int(number):03d}" if underscore else f"t{number}"


class _Trial(tune.Trainable):
    """The actor beside one trial's command."""

    def setup(
        self, config: dict[str, Any], program: Program, steps: int, worst: list[float], environment: dict[str, str]
    ) -> None:
        die_with_parent()  # with its node; and its command with it
        self._program, self._environment, self._config = program, environment, config
        self._steps, self._worst = steps, worst
        self._run, self._fork = _name(self), None
        self._offset, self._untold, self._last = 0, deque[tuple[int, list[float]]](), (0, list[float]())
        self._command: subprocess.Popen[bytes] | None = None

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if name not in _OF_THIS_WORKER}
        words = self._program.command(self._run, self._config, self._fork)
        self._program.wait_until_free(self._run)  # what was paused may still be saving
        with self._program.output(self._run).open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "omniloom", *words, f"cluster.address={self._environment['RAY_ADDRESS']}"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment | self._environment,
                preexec_fn=die_with_parent,  # two commands must not run one trial
            )

    def step(self) -> dict[str, Any]:
        """The next measurement, or the end."""
        self._command = self._command or self._start()
        while True:
            code = self._command.poll()
            measured, self._offset = self._program.measured(self._run, self._offset)
            self._untold += [one for one in measured if one[0] > self._last[0]]  # a resumed run repeats some
            # The last step is told when the command has ended, so that nothing prunes a run that is all trained.
            if self._untold and (code == 0 or self._untold[0][0] < self._steps):
                self._last = self._untold.popleft()
                if code != 0 or self._untold:
                    return self._result()
            if code == 0 and self._last[0]:
                return self._result() | {"done": True, "ended": True}
            if code is not None:
                raise ClusterError(self._program.cause(self._run))
            time.sleep(POLL_S)

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Where another trial can go on from: the run's own checkpoint of the step told last, once it is complete."""
        while (fork := self._program.checkpoint(self._run, self._last[0])) is None:
            if self._command is not None and self._command.poll() is not None:
                raise ClusterError(self._program.cause(self._run))
            time.sleep(POLL_S)
        return {"trial": _name(self), "run": self._run, "fork": fork, "last": self._last, "values": self._config}

    def load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on as the run that this trial saved; with another one's, as a run that begins at that checkpoint."""
        self._last = tuple(checkpoint["last"])
        if (checkpoint["trial"], checkpoint["values"]) == (_name(self), self._config):
            self._run = checkpoint["run"]
        else:
            self._run, self._fork = f"{_name(self)}-from-{checkpoint['run']}-{self._last[0]}", checkpoint["fork"]

    def _result(self) -> dict[str, Any]:
        step, objectives = self._last
        told = (value if math.isfinite(value) else bad for value, bad in zip(objectives, self._worst, strict=True))
        return {"step": step, "run": self._run} | {_objective(index): value for index, value in enumerate(told)}

    def cleanup(self) -> None:
        """End the command: it saves a checkpoint first."""
        if self._command is None:
            return
        self._command.terminate()
        try:
            self._command.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._command.kill()


# Which a driver beside an actor must not take for its own.
_OF_THIS_WORKER = ("RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_NODE_ID")


class _Watcher(tune.Callback):
    """Lives beside Tune's controller, in the command's own process."""

    def __init__(self, watch: Callable[[list[Outcome]], None]) -> None:
        self._watch = watch

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune saves its callbacks; what this one tells lives and dies with its process."""
        return _Watcher, (_tell_nobody,)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called after everything that happens to any trial."""
        self._watch([_outcome(trial) for trial in trials])


def _tell_nobody(outcomes: list[Outcome]) -> None:
    pass


def _outcome(trial: Any) -> Outcome:
    last = trial.last_result or {}
    told = [last[name] for name in map(_objective, range(len(last))) if name in last]
    objectives = [value if abs(value) < WORST else math.nan for value in told]
    statuses: dict[str, Status] = {"RUNNING": "running", "ERROR": "failed", "TERMINATED": "pruned"}
    status = "finished" if last.get("ended") else statuses.get(trial.status, "waiting")
    cause = None
    if status == "failed" and trial.error_file:
        cause = _cause(str(trial.get_error() or ""))
    run = last.get("run", _name(trial))
    return Outcome(_name(trial), run, dict(trial.config), status, last.get("step", 0), objectives or None, cause)


def _cause(text: str) -> str:
    """The last failure of a trial, of Tune's text with all of them and their tracebacks."""
    last = text.rpartition("Failure # ")[2]
    _, ours, said = last.rpartition(f"{ClusterError.__name__}: ")
    return (said if ours else " ".join(last.split("\n", 1)[-1].split())).strip()
