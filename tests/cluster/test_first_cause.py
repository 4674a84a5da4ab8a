"""Of what ranks wrote and what Ray knows: who failed first, and whether it may start again. No process is started."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ray.core.generated.common_pb2 import ActorDeathCause, ActorDiedErrorContext, OomContext
from ray.exceptions import GetTimeoutError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller.state import ReschedulingState
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from omniloom.cluster import faults
from omniloom.cluster.config import ClusterConfig
from omniloom.cluster.elastic import ROOM, Sizes
from omniloom.cluster.faults import Death, Ended, Failure, Supervisor, TryAgain, first_cause
from omniloom.cluster.rank import Hooks, RankSide, Record, kind_of, next_start, record_file
from omniloom.errors import ClusterError, ConfigError, DataError

GONE = "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:25612"


def record(rank: int, failed: float | None = None, message: str = "") -> Record:
    return Record(rank, "host", 100 + rank, "node", 0.0, 0, failed=failed, message=message)


def test_the_earliest_error_counts_whichever_ray_hears_of_first() -> None:
    records = {0: record(0, 5.0, "surprise"), 1: record(1, 4.0, "before it"), 2: record(2)}
    assert first_cause(records, {}) == 1


def test_what_follows_from_another_ranks_end_is_no_cause() -> None:
    records = {0: record(0, 4.0, GONE), 1: record(1), 2: record(2, 4.1, GONE)}
    assert first_cause(records, {}) is None  # not yet: somebody must be gone
    assert first_cause(records, {1: Death(4.2, "worker_died", "gone")}) == 1  # Ray hears of it after the others failed
    assert first_cause(records | {1: record(1, 4.3, "surprise")}, {}) == 1


def test_a_broken_pipe_to_a_ranks_own_process_is_a_cause() -> None:
    """Such as one that reads rows ahead and was killed: no other rank has to be waited for."""
    lost = record(1, 4.0, "[Errno 104] Connection reset by peer")
    lost.error = "ConnectionResetError"
    assert first_cause({0: record(0, 4.1, GONE), 1: lost}, {}) == 1


def test_a_rank_that_wrote_its_error_has_not_vanished() -> None:
    """Its process may be gone by the time that anybody looks: by its error it failed later than the other."""
    records = {0: record(0, 3.0, "first"), 1: record(1, 4.0, "second")}
    assert first_cause(records, {1: Death(2.0, "worker_died", "gone")}) == 0


@given(st.permutations(range(4)), st.sampled_from(range(4)), st.booleans())
def test_among_any_aftermath_the_one_cause_is_found(order: list[int], cause: int, vanished: bool) -> None:
    records = {rank: record(rank, float(at), GONE) for at, rank in enumerate(order)}
    records[cause] = record(cause) if vanished else record(cause, 9.0, "surprise")
    deaths = {cause: Death(9.0, "node_lost", "gone")} if vanished else {}
    assert first_cause(records, deaths) == cause


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "out_of_memory"),
        (OSError(12, "Cannot allocate memory"), "out_of_memory"),
        (RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv"), "hang"),
        (ValueError("no memory of it"), "exception"),
    ],
)
def test_an_errors_kind(error: BaseException, kind: str) -> None:
    assert kind_of(error) == kind


def listening(folder: Path, said: list[Any], steps: int = 7) -> Hooks:
    """Hooks that note what is told and asked."""
    return Hooks(
        folder=folder,
        tell=lambda kind, /, **facts: said.append((kind, facts)),
        steps_done=lambda: steps,
        ask_to_stop=said.append,
        ask_to_save=partial(said.append, "save"),
        go_on=lambda: False,
        hear=lambda rank: None,
    )


def supervisor(folder: Path, max_failures: int, said: list[Any] | None = None) -> Supervisor:
    side = RankSide(listening(folder, [] if said is None else said), hang_s=30.0)
    return Supervisor(side, max_failures)


def failure(step: int) -> Failure:
    return Failure(1, "worker_died", "it died", rank=1, step=step)


def ends_at(tmp_path: Path, max_failures: int, steps: list[int]) -> int | None:
    """The number of the failure that ends the run, of failures after these steps."""
    policy = supervisor(tmp_path, max_failures)
    answers = [policy._allow_restart(failure(step), None) for step in steps]
    return next((number for number, answer in enumerate(answers, 1) if answer is not None), None)


def test_failures_at_one_step_end_the_run_and_each_new_step_makes_them_good(tmp_path: Path) -> None:
    assert ends_at(tmp_path, 2, [7, 7, 7]) == 3
    assert ends_at(tmp_path, 2, [7, 7, 8, 8, 9, 9, 10, 10]) is None
    assert ends_at(tmp_path, 2, [7, 5, 6, 7]) == 3  # steps that had been done before a restart are none further
    assert ends_at(tmp_path, 0, [100]) == 1


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(0, 3))
def test_a_run_that_gets_no_further_ends_after_so_many(steps: list[int], max_failures: int) -> None:
    end = ends_at(Path(), max_failures, steps)
    seen = steps if end is None else steps[:end]
    records = [step for at, step in enumerate(seen) if step > max(seen[:at], default=-1)]
    assert len(seen) <= len(records) * max_failures + (end is not None)


def test_what_ends_it_names_rank_cause_and_key(tmp_path: Path) -> None:
    policy = supervisor(tmp_path, 1)
    assert policy._allow_restart(failure(7), None) is None
    ended = policy._allow_restart(failure(7), None)
    assert str(ended) == "rank 1 failed: it died; it is failure 2 after step 7, and cluster.max_failures=1"


def test_an_error_meant_for_the_user_comes_again_and_is_not_tried_again(tmp_path: Path) -> None:
    wrong = DataError("the disk is full")
    assert supervisor(tmp_path, 5)._allow_restart(failure(7), wrong) is wrong
    assert supervisor(tmp_path, 5)._allow_restart(failure(7), ClusterError("no word from S3")) is None


@pytest.mark.parametrize(
    ("kind", "step", "ends"),
    [
        ("exception", 0, True),
        ("out_of_memory", 0, True),
        ("exception", 1, False),
        ("worker_died", 0, False),
        ("node_lost", 0, False),
    ],
)
def test_what_never_worked_is_not_tried_again(kind: Any, step: int, ends: bool, tmp_path: Path) -> None:
    found = Failure(1, kind, "it died", rank=1, step=step)
    answer = supervisor(tmp_path, 5)._allow_restart(found, None)
    assert (str(answer) == "rank 1 failed: it died") == ends


def test_starts_are_counted_over_all_commands(tmp_path: Path) -> None:
    assert next_start(tmp_path) == 1
    for start in (9, 10):
        record_file(tmp_path, start, 0).parent.mkdir(parents=True)
    assert next_start(tmp_path) == 11


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hang_s": 0.0}, "cluster.hang_s=0.0 must be a number of seconds above 0, or null"),
        ({"hang_s": float("nan")}, "cluster.hang_s=nan must be"),
        ({"max_failures": -1}, "cluster.max_failures=-1 must not be negative"),
    ],
)
def test_what_cannot_be_waited_for_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        ClusterConfig(**values).check_workers()


def died(reason: str) -> ActorDeathCause:
    context = ActorDiedErrorContext(
        reason=ActorDiedErrorContext.Reason.Value(reason),
        error_message="Worker exit detail: End of file. Some common causes include: (1) the OOM killer",
    )
    return ActorDeathCause(actor_died_error_context=context)


@pytest.mark.parametrize(
    ("cause", "kind", "said"),
    [
        (died("NODE_DIED"), "node_lost", "Worker exit detail: End of file."),
        (died("WORKER_DIED"), "worker_died", "Worker exit detail: End of file."),
        (ActorDeathCause(oom_context=OomContext(error_message="low on\n memory")), "out_of_memory", "low on memory"),
        (ActorDeathCause(), "worker_died", "its process is gone"),
    ],
)
def test_rays_word_for_a_death(cause: Any, kind: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"State": "DEAD", "EndTime": 1_500, "DeathCause": cause}
    monkeypatch.setattr(faults, "ray_state", SimpleNamespace(actor_table=lambda identity: told))
    assert faults._death(worker(1)) == Death(1.5, kind, said)  # type: ignore[arg-type]
    told["State"] = "ALIVE"
    assert faults._death(worker(1)) is None


def worker(rank: int) -> Any:
    place = SimpleNamespace(hostname=f"host{rank}", pid=100 + rank, node_id=f"node{rank}")
    return SimpleNamespace(actor=SimpleNamespace(_actor_id=b"%d" % rank), metadata=place)


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A supervisor of two ranks at their first start, the deaths that Ray knows of, and what was said."""
    said: list[Any] = []
    policy, deaths = supervisor(tmp_path, 1, said), dict[int, Death]()
    monkeypatch.setattr(faults, "_death", lambda one: deaths.get(one.metadata.pid - 100))
    monkeypatch.setattr(faults, "GATHER_S", 0.3)
    policy.before_worker_group_start(None)
    assert policy.before_init_train_context([worker(0), worker(1)]) == {}
    for rank in range(2):
        path = record_file(tmp_path, 1, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(record(rank))))
    return SimpleNamespace(policy=policy, deaths=deaths, said=said, folder=tmp_path)


def status(errors: dict[int, Exception], notice: PreemptionInfo | None = None) -> Any:
    return SimpleNamespace(errors=errors, get_preemption_info=lambda: notice)


def test_a_failure_is_told_once_however_often_ray_repeats_it(watched: Any) -> None:
    watched.deaths[1] = Death(9.0, "node_lost", "the node is gone")
    record_file(watched.folder, 1, 0).write_text(json.dumps(asdict(record(0, 4.0, GONE))))  # felt it at once
    for _ in range(3):
        watched.policy.after_worker_group_poll_status(status({0: RuntimeError(GONE)}))
    ((kind, facts),) = watched.said
    assert (kind, facts["kind"], facts["rank"], facts["host"]) == ("failure", "node_lost", 1, "host1")
    assert (facts["pid"], facts["node"], facts["failed"], facts["step"]) == (101, "node1", 4.0, 7)
    assert (facts["cause"], facts["aftermath"]) == ("the node is gone", [0])
    watched.policy.before_controller_execute_failure_decision(None)  # lets them start again
    watched.policy.before_worker_group_start(None)
    watched.policy.after_worker_group_poll_status(status({0: RuntimeError(GONE)}))
    assert [facts["start"] for _, facts in watched.said] == [1, 2]
    with pytest.raises(ClusterError, match=r"rank 1 failed: .* failure 2 after step 7"):
        watched.policy.before_controller_execute_failure_decision(None)


def test_where_there_is_nothing_but_aftermath_the_earliest_is_told(watched: Any) -> None:
    watched.policy.after_worker_group_poll_status(status({0: RuntimeError(GONE)}))
    ((_, facts),) = watched.said
    assert (facts["rank"], facts["kind"], facts["cause"]) == (0, "exception", GONE)


@pytest.mark.parametrize(("kills_since", "kind"), [(0, "worker_died"), (1, "out_of_memory")])
def test_the_kernels_killer_is_told_from_others(
    kills_since: int, kind: str, watched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "_oom_kills_of", lambda node: kills_since)
    watched.deaths[1] = Death(4.0, "worker_died", "End of file.")
    watched.policy.after_worker_group_poll_status(status({1: RuntimeError("died")}))
    assert watched.said[0][1]["kind"] == kind


def test_a_hang_is_the_ranks_that_hold_the_others_up(watched: Any) -> None:
    for rank, collectives in ((0, 8), (1, 7)):
        stood = asdict(record(rank)) | {"steps": 3, "collectives": collectives}
        record_file(watched.folder, 1, rank).write_text(json.dumps(stood))
        stacks = faults.stacks_file(watched.folder, 1, rank)
        stacks.parent.mkdir(parents=True, exist_ok=True)
        stacks.write_text("Timeout (0:00:30)!\nThread 0x7f (most recent call first):\n")
    watched.deaths[0] = Death(4.0, "worker_died", "Alarm clock")
    watched.policy.after_worker_group_poll_status(status({0: RuntimeError("died")}))
    facts = watched.said[0][1]
    assert (facts["kind"], facts["rank"], facts["behind"], facts["aftermath"]) == ("hang", 1, [1], [0])
    assert facts["cause"] == "no step for cluster.hang_s=30 s; rank 1 held up"
    assert facts["stacks"] == str(watched.folder / "stacks" / "start_1")


def test_a_node_that_is_to_go_is_left_with_a_checkpoint_and_for_good(watched: Any) -> None:
    notice = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"node1": [1]})
    for _ in range(2):
        watched.policy.after_worker_group_poll_status(status({}, notice))
    assert watched.said == ["Ray's notice: node node1 goes, with rank 1"]
    with pytest.raises(Ended, match="node node1 goes"):  # it went before the ranks had saved
        watched.policy.before_controller_execute_failure_decision(None)


def test_only_numbers_that_share_the_batch_are_taken_and_ranks_that_run_save_first() -> None:
    from ray.train import ScalingConfig

    said: list[str] = []
    scaling = ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 2}, elastic_resize_monitor_interval_s=0)
    sizes: Any = Sizes(scaling, [1, 2, 4], said.append)
    room = {"a": {"CPU": 4.0}, "b": {"CPU": 3.0}}  # for two and one
    assert sizes._count_possible_workers(room) == 2
    assert sizes._count_possible_workers({"a": {"CPU": 9.0}}) == 4
    assert sizes._count_possible_workers({"a": {"CPU": 1.0}}) == 0
    sizes._get_reserved_resources, sizes._maybe_send_resource_request = lambda: room, lambda: None
    for running in (2, 4, 1):
        state = SimpleNamespace(start_time=0.0, num_workers=running)
        decision = sizes.make_decision_for_running_worker_group(state, None)
        assert type(decision).__name__ == "NoopDecision"
    assert said == [f"{ROOM}: 1 run, 2 could"]


def test_a_start_of_which_no_rank_came_to_write_is_counted_all_the_same(tmp_path: Path) -> None:
    policy = supervisor(tmp_path, 1)
    for start in (1, 2, 3):
        policy.before_worker_group_start(None)
        assert policy._side.start == start


def rescheduling(error: Exception) -> ReschedulingState:
    return ReschedulingState(training_failed_error=ControllerError(error))


def test_ranks_that_fail_before_they_are_a_group_are_counted_too(watched: Any) -> None:
    update = watched.policy.after_controller_state_update
    failed = rescheduling(WorkerGroupStartupFailedError("At least one of the worker actors failed to initialize."))
    watched.deaths[1] = Death(4.0, "node_lost", "the node is gone")
    update(None, failed)
    watched.policy.before_worker_group_start(None)
    watched.deaths.clear()
    with pytest.raises(ClusterError, match=r"the ranks failed: At least one .*; it is failure 2 after step 7"):
        update(None, failed)
    told = [(kind, facts["kind"], facts["rank"]) for kind, facts in watched.said]
    assert told == [("failure", "node_lost", 1), ("failure", "exception", None)]


def test_a_wait_for_room_is_told_once_and_goes_on(watched: Any) -> None:
    for _ in range(3):
        watched.policy.after_controller_state_update(None, rescheduling(WorkerGroupStartupTimeoutError(2)))
    ((kind, facts),) = watched.said
    assert kind == "waiting"
    assert "waiting for 2 workers" in facts["cause"]


@pytest.mark.parametrize(
    ("error", "decision"),
    [
        (WorkerGroupError("", {}), "RETRY"),
        (ControllerError(WorkerGroupStartupTimeoutError(2)), "RETRY"),
        (ControllerError(GetTimeoutError()), "RETRY"),
        (ControllerError(Ended("asked to")), "RAISE"),
        (ControllerError(TypeError("a mistake of ours")), "RAISE"),
    ],
)
def test_what_can_pass_is_tried_again(error: Exception, decision: str) -> None:
    assert TryAgain(None).make_decision(error).name == decision
