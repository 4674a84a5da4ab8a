"""What becomes of a job when one of its ranks fails: who failed first and how, and whether they start again.

Ray's controller, beside the driver, is told that ranks have failed (`Supervisor.after_worker_group_poll_status`). It
gathers what each rank wrote of itself (rank.py) and what Ray knows of those that could not, and takes the first by time
that is no aftermath (`first_cause`): when a rank is gone, the others fail in the collective that it left, and Ray may
well hear of them before. One `failure` event says so; the ranks start again from the newest checkpoint, unless they no
longer get on (`Supervisor._allow_restart`).
"""

import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray._private.state import state as ray_state
from ray.core.generated.common_pb2 import ActorDeathCause, ActorDiedErrorContext
from ray.exceptions import RayError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import ReschedulingState
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from omniloom import errors
from omniloom.cluster.rank import (
    TRACEBACK_LINES,
    Kind,
    RankSide,
    Record,
    next_start,
    oom_kills,
    read_record,
    remove_if_empty,
    stacks_file,
)
from omniloom.errors import ClusterError, OmniloomError

GATHER_S, LOOK_S = 60.0, 0.1  # Ray takes up to half a minute to call a node lost
ASK_S = 10.0  # a node for its kernel's count
AFTERMATH = re.compile(
    "Connection closed by peer|Connection reset by peer|Connection refused|Broken pipe|Timed out waiting|Socket Timeout"
    "|Socket closed|remote process exited|communicator was aborted|ncclRemoteError|recvBytes|sendBytes|DistStoreError"
)
# Python's own, of a pipe to a process of the rank's, such as one that reads rows ahead: torch raises none of them.
OF_PIPES = ("BrokenPipeError", "ConnectionAbortedError", "ConnectionRefusedError", "ConnectionResetError")
GUESSES = re.compile(r"\s*(There are some potential root causes|Some common causes include).*", re.DOTALL)  # Ray's


@dataclass(frozen=True)
class Death:
    """What Ray knows of a rank's process that is gone."""

    at: float
    kind: Kind
    cause: str


@dataclass
class Failure:
    """The `failure` event."""

    start: int
    kind: Kind
    cause: str
    rank: int | None = None
    host: str | None = None
    pid: int | None = None
    node: str | None = None
    failed: float | None = None  # seconds since 1970; the event's own time is when it was noticed
    traceback: list[str] = field(default_factory=list)
    step: int = 0  # the last one done
    aftermath: list[int] = field(default_factory=list)  # ranks that failed in its wake
    behind: list[int] = field(default_factory=list)  # in a hang: the ranks that the others wait for
    stacks: str | None = None


class Ended(ClusterError):
    """The ranks are not to start again, as they were asked to end."""


class Supervisor(WorkerGroupCallback, ControllerCallback):
    """Lives in Ray's controller, beside the driver; `side` goes from there to the ranks."""

    def __init__(self, side: RankSide, max_failures: int) -> None:
        self._side, self._hooks, self._max_failures = side, side.hooks, max_failures
        self._workers: list[Any] = []
        self._told = 0  # the start whose failure was told
        self._furthest, self._in_place = -1, 0
        self._leaving: str | None = None
        self._verdict: OmniloomError | None = None
        self._waits_for = ""

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """The ranks are about to be placed; those that were killed have left files without a word."""
        for path in self._hooks.folder.glob("stacks/start_*/rank_*.txt"):
            remove_if_empty(path)
        self._side.start = max(next_start(self._hooks.folder), self._side.start + 1)  # none may have come to write

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        """They are placed, in the order of their ranks, and know of nobody yet."""
        self._workers = workers
        return {}

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Ask the ranks to leave a node that is to go; tell of a failure, once."""
        notice = worker_group_status.get_preemption_info()
        if notice is not None and self._leaving is None:
            ranks = ", ".join(map(str, notice.preempted_ranks))
            self._leaving = f"Ray's notice: node {', '.join(notice.preempted_node_ids)} goes, with rank {ranks}"
            self._hooks.ask_to_stop(self._leaving)
        if worker_group_status.errors:
            self._note(worker_group_status.errors)

    def _note(self, errors_by_rank: dict[int, Exception], otherwise: str = "") -> None:
        if self._told == self._side.start:
            return
        self._told = self._side.start
        failure, error = self._gather(errors_by_rank, otherwise)
        noticed = time.time()
        self._hooks.tell("failure", **asdict(failure))
        self._side.restart = {"failed": min(failure.failed or noticed, noticed), "noticed": noticed}
        self._verdict = self._allow_restart(failure, error)

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Ray would start them again, without end; what is raised here ends the job."""
        if self._leaving is not None:
            raise Ended(self._leaving)
        if self._verdict is not None:
            raise self._verdict

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Ranks could not be placed, or failed before they were a group; Ray tries again."""
        if not isinstance(current_state, ReschedulingState):
            return
        error = getattr(current_state.training_failed_error, "controller_failure", current_state.training_failed_error)
        cause = str(error).strip().splitlines()[-1]
        if not isinstance(error, WorkerGroupStartupTimeoutError):
            self._note({}, cause)
            self.before_controller_execute_failure_decision(None)
        elif cause != self._waits_for:  # which Ray asks for once a minute
            self._waits_for = cause
            self._hooks.tell("waiting", start=self._side.start, cause=cause)

    def _gather(self, errors_by_rank: dict[int, Exception], otherwise: str) -> tuple[Failure, OmniloomError | None]:
        """The first failure, as soon as it can be told; and the error of ours that it was, if it was one."""
        folder, start = self._hooks.folder, self._side.start
        until = time.monotonic() + GATHER_S
        while True:
            records = {rank: read_record(folder, start, rank) for rank in range(len(self._workers))}
            known = {rank: record for rank, record in records.items() if record is not None}
            deaths = {rank: death for rank, worker in enumerate(self._workers) if (death := _death(worker))}
            rank = first_cause(known, deaths)
            if rank is not None or time.monotonic() > until:
                break
            time.sleep(LOOK_S)
        wake = sorted({*errors_by_rank, *deaths, *(r for r, record in known.items() if record.failed)})
        hung = [rank for rank in known if _dumped(stacks_file(folder, start, rank))]
        if rank is None:  # aftermath is all there is
            failed = {rank: record.failed for rank, record in known.items() if record.failed}
            rank = min(failed, key=lambda r: failed[r]) if failed else min(errors_by_rank, default=None)
        behind = _behind(known, hung) if hung else []
        told = {r: str(error) for r, error in errors_by_rank.items()}
        failure = self._describe(behind[0] if behind else rank, known, deaths, told, otherwise)
        failure.aftermath = [other for other in wake if other != failure.rank]
        if hung:
            failure.kind, failure.behind = "hang", behind
            failure.failed = min(stacks_file(folder, start, one).stat().st_mtime for one in hung)
            failure.stacks = str(stacks_file(folder, start, 0).parent)
            failure.cause = (
                f"no step for cluster.hang_s={self._side.hang_s:g} s; rank {', '.join(map(str, behind))} held up"
            )
        record = known.get(rank) if rank is not None else None
        ours = getattr(errors, record.error, None) if record is not None and not hung else None
        is_ours = isinstance(ours, type) and issubclass(ours, OmniloomError)
        return failure, ours(record.message) if record is not None and ours is not None and is_ours else None

    def _describe(
        self,
        rank: int | None,
        records: dict[int, Record],
        deaths: dict[int, Death],
        told: dict[int, str],
        otherwise: str,
    ) -> Failure:
        """What is known of one rank's failure; of a failure of no rank that can be named, `otherwise`."""
        failure = Failure(self._side.start, "exception", otherwise, step=self._hooks.steps_done())
        if rank is None:
            return failure
        place, record, death = self._workers[rank].metadata, records.get(rank), deaths.get(rank)
        failure.rank, failure.host, failure.pid, failure.node = rank, place.hostname, place.pid, place.node_id
        failure.cause = told.get(rank, otherwise)
        if record is not None and record.failed is not None:
            failure.kind, failure.failed = record.kind or "exception", record.failed
            failure.cause, failure.traceback = f"{record.error}: {record.message}", record.traceback
        elif death is not None:
            # Others may have felt it before Ray came to know.
            felt = [other.failed for other in records.values() if other.failed is not None]
            failure.kind, failure.failed, failure.cause = death.kind, min([death.at, *felt]), death.cause
            last_words = _last_words(stacks_file(self._hooks.folder, self._side.start, rank))
            if last_words:
                failure.cause, failure.traceback = last_words[0], last_words[:TRACEBACK_LINES]
            if death.kind == "worker_died" and record is not None and _oom_kills_of(record.node) > record.oom_kills:
                failure.kind, failure.cause = "out_of_memory", "killed by the kernel, for want of memory"
        return failure

    def _allow_restart(self, failure: Failure, error: OmniloomError | None) -> OmniloomError | None:
        """None, or what to end with: what comes again is not tried again, nor what lets no step pass for long."""
        if error is not None and not isinstance(error, ClusterError):
            return error
        if failure.step > self._furthest:
            self._furthest, self._in_place = failure.step, 0
        self._in_place += 1
        comes_again = failure.step == 0 and failure.kind in ("exception", "out_of_memory")  # it never worked
        if self._in_place <= self._max_failures and not comes_again:
            return None
        again = (
            f"; it is failure {self._in_place} after step {failure.step}, and cluster.max_failures={self._max_failures}"
            if self._in_place > 1
            else ""
        )
        who = "the ranks" if failure.rank is None else f"rank {failure.rank}"
        return ClusterError(f"{who} failed: {failure.cause}{again}")


class TryAgain(FailurePolicy):
    """Ray starts the ranks again after whatever can pass, without end: the supervisor ends the job."""

    def make_decision(self, training_failed_error: Any) -> Any:
        """Of an error of the ranks, or of the controller: one that ranks gave it while they became a group."""
        error = getattr(training_failed_error, "controller_failure", None)
        can_pass = (WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError, RayError)
        return FailureDecision.RETRY if error is None or isinstance(error, can_pass) else FailureDecision.RAISE


def first_cause(records: dict[int, Record], deaths: dict[int, Death]) -> int | None:
    """The rank that failed first and not for another's sake; None as long as there is none but those."""
    failed = {rank: record.failed for rank, record in records.items() if record.failed is not None}
    first = {rank: at for rank, at in failed.items() if not _is_aftermath(records[rank])}
    first |= {rank: death.at for rank, death in deaths.items() if rank not in failed}
    return min(first, key=lambda rank: (first[rank], rank)) if first else None


def _is_aftermath(record: Record) -> bool:
    return record.error not in OF_PIPES and AFTERMATH.search(record.message) is not None


def _death(worker: Any) -> Death | None:
    """How a rank's process came to its end, as Ray has it; None while it lives."""
    told = ray_state.actor_table(worker.actor._actor_id.hex())
    if not told or told["State"] != "DEAD":
        return None
    cause: ActorDeathCause = told["DeathCause"]
    context = getattr(cause, cause.WhichOneof("context") or "actor_died_error_context")
    kind: Kind = "worker_died"
    if cause.HasField("oom_context"):
        kind = "out_of_memory"
    elif getattr(context, "reason", None) == ActorDiedErrorContext.Reason.NODE_DIED:
        kind = "node_lost"
    message = GUESSES.sub("", getattr(context, "error_message", "")).strip()
    return Death(told["EndTime"] / 1_000, kind, " ".join(message.split()) or "its process is gone")


def _behind(records: dict[int, Record], hung: list[int]) -> list[int]:
    """Whom the others wait for: those who have begun the fewest collectives; all, where all stand alike."""
    stood = {rank: (records[rank].steps, records[rank].collectives) for rank in records}
    return sorted(rank for rank in stood if stood[rank] == min(stood.values())) or hung


def _dumped(path: Path) -> bool:
    return any(line.startswith("Timeout (") for line in _last_words(path))


def _last_words(path: Path) -> list[str]:
    """What a rank's process wrote, without Python, as it hung or crashed."""
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _oom_kills_of(node: str) -> int:
    """How many processes a node's kernel has killed for want of memory; 0 where it does not answer."""
    if node == ray.get_runtime_context().get_node_id():
        return oom_kills()
    ask = ray.remote(num_cpus=0, max_retries=0)(oom_kills)
    where = NodeAffinitySchedulingStrategy(node, soft=False)
    try:
        return int(ray.get(ask.options(scheduling_strategy=where).remote(), timeout=ASK_S))
    except RayError:
        return 0
