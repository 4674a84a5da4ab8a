"""Traces and snapshots of chosen steps, whole or not there; collectives that give up in time."""

import gzip
import json
import time
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_ranks import engine_of, on_ranks

from omniloom.errors import ConfigError
from omniloom.track import jsonl
from omniloom.train.config import TrainingRun
from omniloom.train.debugging import Recording
from omniloom.train.groups import DebugConfig, TrainConfig

WAIT_S = 3


def multiply() -> None:
    torch.ones(8, 8) @ torch.ones(8, 8)


def record(config: DebugConfig, folder: Path, steps: range, rank: int = 0) -> None:
    with Recording(config, folder, rank) as recording:
        for step in steps:
            with recording.step(step):
                multiply()


def names_in(path: Path) -> list[str]:
    with gzip.open(path, "rt") as stream:
        return [event.get("name", "") for event in json.load(stream)["traceEvents"]]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "debug").glob("*"))


def test_the_chosen_steps_are_traced_and_told_and_no_others(tmp_path: Path) -> None:
    record(DebugConfig(profile_steps=[3, 4]), tmp_path, range(1, 7))
    assert files(tmp_path) == ["trace_steps_3_4_rank_0.json.gz"]
    names = names_in(tmp_path / "debug" / "trace_steps_3_4_rank_0.json.gz")
    assert [name for name in names if name.startswith("step ")] == ["step 3", "step 4"]
    assert names.count("aten::matmul") == 2
    (event,) = jsonl.read(tmp_path / "events.jsonl")
    assert (event["event"], event["steps"], event["what"]) == ("recorded", [3, 4], "trace")
    assert (tmp_path / event["file"]).is_file()


def test_every_rank_has_its_own_file_and_rank_0_tells(tmp_path: Path) -> None:
    for rank in (0, 1):
        record(DebugConfig(profile_steps=[1, 1]), tmp_path, range(1, 2), rank)
    assert files(tmp_path) == [f"trace_steps_1_1_rank_{rank}.json.gz" for rank in (0, 1)]
    assert len(jsonl.read(tmp_path / "events.jsonl")) == 1


def test_shapes_and_memory_are_in_the_trace_by_key(tmp_path: Path) -> None:
    texts = {}
    for name, config in (
        ("bare", DebugConfig(profile_steps=[1, 1])),
        ("both", DebugConfig(profile_steps=[1, 1], profile_shapes=True, profile_memory=True)),
    ):
        (tmp_path / name).mkdir()
        record(config, tmp_path / name, range(1, 2))
        texts[name] = gzip.decompress((tmp_path / name / "debug" / "trace_steps_1_1_rank_0.json.gz").read_bytes())
    for word in (b"Input Dims", b"[memory]"):
        assert word not in texts["bare"]
        assert word in texts["both"]


def test_a_run_that_resumes_inside_traces_the_rest(tmp_path: Path) -> None:
    record(DebugConfig(profile_steps=[3, 5]), tmp_path, range(4, 7))
    assert files(tmp_path) == ["trace_steps_4_5_rank_0.json.gz"]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_what_ends_in_between_leaves_no_trace_and_says_so(error: type[BaseException] | None, tmp_path: Path) -> None:
    def train() -> None:
        with Recording(DebugConfig(profile_steps=[2, 4]), tmp_path, 0) as recording:
            for step in (1, 2):
                with recording.step(step):
                    multiply()
            if error is not None:
                raise error

    if error is None:
        train()
    else:
        with pytest.raises(error):
            train()
    assert files(tmp_path) == []
    (event,) = jsonl.read(tmp_path / "events.jsonl")
    assert (event["event"], event["reason"]) == ("recording_dropped", "ended before step 4")


def test_a_file_has_its_name_once_it_is_whole_and_a_kills_rest_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def half(self: Any, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise Killed

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", half)
    with pytest.raises(Killed):
        record(DebugConfig(profile_steps=[1, 1]), tmp_path, range(1, 2))
    assert files(tmp_path) == [".trace_steps_1_1_rank_0.json.gz"]
    Recording(DebugConfig(), tmp_path, 1)
    assert files(tmp_path) == [".trace_steps_1_1_rank_0.json.gz"], "another rank's is none of its business"
    Recording(DebugConfig(), tmp_path, 0)
    assert files(tmp_path) == []


class FakeMemory:
    """torch.cuda.memory, as far as it is called here."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def _record_memory_history(self, **settings: Any) -> None:
        self.calls.append(settings)

    def _dump_snapshot(self, path: str) -> None:
        Path(path).write_bytes(b"snapshot")


def test_a_memory_snapshot_is_taken_of_the_chosen_steps_and_where_memory_ran_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = FakeMemory()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory", memory)
    config = DebugConfig(memory_snapshot_steps=[2, 4])
    record(config, tmp_path, range(1, 6))
    assert files(tmp_path) == ["memory_steps_2_4_rank_0.pickle"]
    assert memory.calls == [{"max_entries": 1_000_000}, {"enabled": None}]
    recording = Recording(config, tmp_path, 0)
    with recording.step(2):
        pass
    with pytest.raises(torch.OutOfMemoryError), recording.step(3):
        raise torch.OutOfMemoryError
    assert files(tmp_path) == ["memory_steps_2_3_rank_0.pickle", "memory_steps_2_4_rank_0.pickle"]


def test_a_cpu_rank_is_told_what_it_has_instead_of_a_memory_snapshot(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"memory_snapshot_steps=\[2, 4\].*debug\.profile_memory=true"):
        Recording(DebugConfig(memory_snapshot_steps=[2, 4]), tmp_path, 0)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (DebugConfig(profile_steps=[10]), ["debug.profile_steps=[10]", "[10,12]"]),
        (DebugConfig(profile_steps=[12, 10]), ["debug.profile_steps=[12, 10]"]),
        (DebugConfig(profile_steps=[0, 3]), ["debug.profile_steps=[0, 3]"]),
        (DebugConfig(memory_snapshot_steps=[5, 30]), ["debug.memory_snapshot_steps=[5, 30]", "the run's 20"]),
        (DebugConfig(profile_memory=True), ["debug.profile_memory=true", "debug.profile_steps=[10,12]"]),
        (DebugConfig(collective_timeout_s=0), ["debug.collective_timeout_s=0", "at least 1"]),
    ],
)
def test_what_cannot_be_recorded_is_refused(config: DebugConfig, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.check(20)
    for part in said:
        assert part in str(caught.value)


def test_the_flight_recorders_variables_are_this_torchs(tmp_path: Path) -> None:
    """Those that are read in sources alone are in a library's strings."""
    environment = DebugConfig(flight_recorder=True).environment(tmp_path)
    assert environment["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/debug/flight_recorder_rank_"
    assert DebugConfig().environment(tmp_path) == {}
    headers = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "distributed" / "c10d"
    told = "".join((headers / name).read_text() for name in ("FlightRecorder.hpp", "ProcessGroupNCCL.hpp"))
    with (Path(torch.__file__).parent / "lib" / "libtorch_cpu.so").open("rb") as stream:
        library = mmap(stream.fileno(), 0, access=ACCESS_READ)
    for name in environment:
        assert f'"{name}"' in told or library.find(name.encode()) >= 0, name


def wait_in_vain() -> dict[str, Any]:
    """Rank 1 sleeps instead of the second sum: in the whole world's group, and in DeepSpeed's own."""
    import torch.distributed as dist
    from tiny_rows import TINY

    run = TrainingRun(model=TINY, train=TrainConfig(steps=1, global_batch_size=2, micro_batch_size=1))
    run.debug.collective_timeout_s = WAIT_S
    engine, _ = engine_of(run)
    answer = {}
    for name, group in (("world", None), ("deepspeed", engine._engine.data_parallel_group)):
        dist.all_reduce(torch.ones(1), group=group)
        began = time.monotonic()
        try:
            if engine.rank == 0:
                dist.all_reduce(torch.ones(1), group=group)
        except RuntimeError as error:
            answer[name] = {"error": str(error), "waited_s": time.monotonic() - began}
        if engine.rank == 1:
            time.sleep(1.5 * WAIT_S)
    return answer


def test_a_rank_that_is_waited_for_in_vain_is_an_error_that_names_the_time(tmp_path: Path) -> None:
    answer = on_ranks(2, wait_in_vain, tmp_path)
    for group in ("world", "deepspeed"):
        found = answer[group]
        assert "Timed out waiting 3000ms" in found["error"]
        assert WAIT_S - 0.5 < found["waited_s"] < 4 * WAIT_S
