"""The clock of a step's parts, by the machine's time and by a pretended GPU's."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import Work

from omniloom.train.timing import COLLECTIVES, COMMUNICATION, PARTS, Clock


@pytest.fixture(autouse=True)
def without_a_clock_afterwards() -> Iterator[None]:
    yield
    for (kind, name), collective in COLLECTIVES.items():
        setattr(kind, name, collective)


def test_an_inner_parts_time_is_not_the_outer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(torch.device("cpu"))
    clock.start()

    def spend(part: str, before: float, *inner: tuple[str, float], after: float = 0.0) -> None:
        with clock.part(part):
            now[0] += before
            for name, seconds in inner:
                spend(name, seconds)
            now[0] += after

    spend("forward", 1.0, (COMMUNICATION, 0.25), after=2.0)
    now[0] += 100.0  # nobody's
    spend("backward", 3.0, (COMMUNICATION, 0.5), (COMMUNICATION, 0.25))
    spend("forward", 0.5)
    told = clock.seconds()
    assert told.pop("step") >= 0
    assert told == {"forward": 3.5, "backward": 3.0, "optimizer": 0.0, COMMUNICATION: 1.0}
    clock.start()
    assert {part: seconds for part, seconds in clock.seconds().items() if part != "step"} == dict.fromkeys(PARTS, 0.0)


def test_a_part_ends_where_its_body_fails() -> None:
    clock = Clock(torch.device("cpu"))
    clock.start()
    with pytest.raises(ValueError, match="x"), clock.part("forward"):
        raise ValueError("x")
    with clock.part("backward"):
        time.sleep(0.01)
    told = clock.seconds()
    assert told["backward"] >= 0.01
    assert 0 <= told["forward"] < 0.01


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_whoever_asks_for_a_collective_its_time_is_communication(gloo: None) -> None:
    clock = Clock(torch.device("cpu"))
    values = torch.ones(3)
    asks = {
        "all_reduce": lambda: torch.distributed.all_reduce(values),
        "later": lambda: torch.distributed.all_reduce(values, async_op=True).wait(),
        "barrier": torch.distributed.barrier,
        "all_gather": lambda: torch.distributed.all_gather([torch.empty(3)], values),
        "into_tensor": lambda: torch.distributed.all_gather_single(torch.empty(3), values),
        "scattered": lambda: torch.distributed.reduce_scatter_single(torch.empty(3), values),
        "all_to_all": lambda: torch.distributed.all_to_all_single(torch.empty(3), values),
        "object": lambda: torch.distributed.all_gather_object([None], 7),
        "broadcast": lambda: torch.distributed.broadcast(values, 0),
    }
    for name, ask in asks.items():
        clock.start()
        ask()
        assert clock.seconds()[COMMUNICATION] > 0, name
    assert torch.equal(values, torch.ones(3))


def test_what_another_thread_waits_for_holds_up_nothing(gloo: None) -> None:
    """A checkpoint's, say."""
    clock = Clock(torch.device("cpu"))
    clock.start()
    thread = threading.Thread(target=lambda: torch.distributed.all_reduce(torch.ones(3)))
    with clock.part("forward"):
        thread.start()
        thread.join()
    assert clock.seconds()[COMMUNICATION] == 0


def test_the_newest_clock_sees_the_collectives_once(gloo: None) -> None:
    old, new = Clock(torch.device("cpu")), Clock(torch.device("cpu"))
    old.start()
    new.start()
    torch.distributed.all_reduce(torch.ones(3))
    assert old.seconds()[COMMUNICATION] == 0
    assert 0 < new.seconds()[COMMUNICATION] <= new.seconds()["step"]


class Gpu:
    """Streams and events of a GPU that is a while behind: an event is there once somebody has waited for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock_ms, self.waits, self.made, gpu = 0.0, 0, 0, self
        self.stream: str = "computing"

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                gpu.made += 1

            def record(self, stream: str) -> None:
                assert stream == "computing"
                self.at, self.done = gpu.clock_ms, False

            def synchronize(self) -> None:
                gpu.waits += 1
                gpu.done_until = self.at

            def elapsed_time(self, other: Any) -> float:
                assert other.at <= gpu.done_until, "the GPU is not there yet"
                return other.at - self.at

        def wait(work: None) -> None:
            self.clock_ms += 500

        self.wait = wait
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)


def test_on_a_gpu_events_are_read_at_the_end_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    monkeypatch.setitem(COLLECTIVES, (Work, "wait"), gpu.wait)
    clock = Clock(torch.device("cuda"))
    for _ in range(3):
        clock.start()
        with clock.part("forward"):
            gpu.clock_ms += 1000
        with clock.part("backward"):
            gpu.clock_ms += 2000
            Work.wait(None)
            gpu.stream = "another"  # where ZeRO hides it
            Work.wait(None)
            gpu.stream = "computing"
        assert gpu.waits == 0
        told = clock.seconds()
        assert {part: told[part] for part in PARTS} == {
            "forward": 1.0, "backward": 2.5, "optimizer": 0.0, COMMUNICATION: 0.5,
        }  # fmt: skip
        assert gpu.waits == 1
        gpu.waits = 0
    assert gpu.made == 6, "two a part, made in the first step"
