"""Each way for a rank to fail, on real ranks: one event with the first cause, and they start again or do not."""

from pathlib import Path
from typing import Any

import pytest
from faulty import Job, events, hooks, steps_of

from omniloom.cluster.config import ClusterConfig
from omniloom.cluster.launch import run_on_ranks
from omniloom.errors import ClusterError, DataError

TWO = ClusterConfig(workers=2, max_failures=2, hang_s=None)
SLOW, SOAK = [pytest.mark.slow], [pytest.mark.soak]
ALL_STEPS = [[str(step), "2"] for step in range(1, 7)]


def steps(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "steps").read_text().splitlines()]


@pytest.mark.parametrize(
    ("how", "kind", "cause"),
    [
        ("kill", "worker_died", "Worker unexpectedly exits"),
        pytest.param("exception", "exception", "RuntimeError: surprise", marks=SOAK),
        pytest.param("unpicklable", "exception", "Unpicklable: it holds a lock", marks=SOAK),
        pytest.param("memory", "out_of_memory", "MemoryError: not a byte", marks=SLOW),
        pytest.param("torch_memory", "out_of_memory", "OutOfMemoryError: CUDA out of memory", marks=SOAK),
        pytest.param("exit", "worker_died", "Worker unexpectedly exits", marks=SOAK),
        pytest.param("segfault", "worker_died", "Fatal Python error: Segmentation fault", marks=SLOW),
    ],
)
def test_one_event_says_who_failed_first_and_the_ranks_go_on(
    how: str, kind: str, cause: str, ray_cluster: None, tmp_path: Path
) -> None:
    run_on_ranks(steps_of, Job(str(tmp_path), how), TWO, hooks(tmp_path))
    assert steps(tmp_path) == ALL_STEPS
    (failure,) = events(tmp_path, "failure")
    assert (failure["kind"], failure["rank"], failure["start"], failure["step"]) == (kind, 1, 1, 2)
    assert cause in failure["cause"]
    assert "common causes" not in failure["cause"]
    if kind == "exception" or how == "segfault":
        assert any("in fail" in line for line in failure["traceback"])
    assert (tmp_path / "stacks").exists() == (how == "segfault")  # where there is nothing to read, there is no file
    (restart,) = events(tmp_path, "restart")
    parts = [restart[f"{part}_s"] for part in ("noticed", "placed", "connected", "model", "first_step")]
    assert restart["start"] == 2
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(restart["seconds"])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sleep", pytest.param("hold_python", marks=SOAK)])
def test_a_hang_leaves_every_ranks_stacks_and_names_who_is_behind(how: str, ray_cluster: None, tmp_path: Path) -> None:
    config = ClusterConfig(workers=2, max_failures=2, hang_s=20)
    run_on_ranks(steps_of, Job(str(tmp_path), how), config, hooks(tmp_path))
    assert steps(tmp_path) == ALL_STEPS
    (failure,) = events(tmp_path, "failure")
    assert (failure["kind"], failure["rank"], failure["behind"], failure["start"]) == ("hang", 1, [1], 1)
    waiting, held_up = ((tmp_path / "stacks" / "start_1" / f"rank_{rank}.txt").read_text() for rank in range(2))
    assert "in all_reduce" in waiting
    assert "in fail" in held_up
    assert not (tmp_path / "stacks" / "start_2").exists()


@pytest.mark.soak
def test_a_step_that_took_long_and_went_on_leaves_nothing(ray_cluster: None, tmp_path: Path) -> None:
    config = ClusterConfig(workers=2, max_failures=0, hang_s=20)
    run_on_ranks(steps_of, Job(str(tmp_path), "linger"), config, hooks(tmp_path))
    assert steps(tmp_path) == ALL_STEPS
    assert not (tmp_path / "events.jsonl").exists()
    assert not (tmp_path / "stacks").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "max_failures", "error", "message", "failures"),
    [
        ("ours", 5, DataError, "the disk is full", 1),  # comes again: not tried again
        ("exception", 0, ClusterError, "rank 1 failed: RuntimeError: surprise$", 1),
        pytest.param(
            *("exception", 1, ClusterError, "surprise; it is failure 2 after step 2, and cluster.max_failures=1", 2),
            marks=SOAK,
        ),
    ],
)
def test_ranks_that_get_no_further_end_the_job(
    how: str, max_failures: int, error: type, message: str, failures: int, ray_cluster: None, tmp_path: Path
) -> None:
    config = ClusterConfig(workers=2, max_failures=max_failures)
    with pytest.raises(error, match=message):
        run_on_ranks(steps_of, Job(str(tmp_path), how, always=True), config, hooks(tmp_path))
    assert [event["step"] for event in events(tmp_path, "failure")] == [2] * failures


@pytest.mark.slow
def test_a_signal_to_a_rank_has_all_save_or_leave_and_is_no_failure(ray_cluster: None, tmp_path: Path) -> None:
    run_on_ranks(steps_of, Job(str(tmp_path), "asked_to_save"), TWO, hooks(tmp_path))
    assert steps(tmp_path) == ALL_STEPS
    assert (tmp_path / "save").is_file()
    (tmp_path / "steps").unlink()
    (tmp_path / "failed").unlink()
    run_on_ranks(steps_of, Job(str(tmp_path), "terminated"), TWO, hooks(tmp_path))
    assert steps(tmp_path) == ALL_STEPS[:3]
    record: Any = (tmp_path / "stop").read_text()
    assert record.startswith("SIGTERM to rank 1 (host ")
    assert not (tmp_path / "events.jsonl").exists()
