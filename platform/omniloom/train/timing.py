"""Where a step's time goes: forward, backward, the optimizer, and what ranks exchange.

Parts nest, and what an inner one takes is not the outer one's: a reduction inside the backward pass is communication.
That is what the training waits for in collectives, until the slowest rank has come to them too. On a GPU the parts are
read off events on the stream that computes, once the step's loss has been read, so that nothing waits for the clock;
work on other streams, what ZeRO hides behind the computing, is in nobody's part.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed import ProcessGroup, Work

COMMUNICATION = "communication"
PARTS = ("forward", "backward", "optimizer", COMMUNICATION)
# Whatever asks for a collective, DeepSpeed or we, comes by here; what was asked for at once is waited for in Work.wait.
COLLECTIVES = {
    (kind, name): vars(kind)[name]
    for kind, names in {
        Work: ("wait",),
        ProcessGroup: (
            "allgather", "_allgather_base", "allgather_coalesced", "allgather_into_tensor_coalesced",
            "allreduce", "allreduce_coalesced", "alltoall", "alltoall_base", "barrier", "broadcast", "gather",
            "recv", "reduce", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced",
            "scatter", "send",
        ),
    }.items()
    for name in names
}  # fmt: skip


class Clock:
    """Measures the parts of one rank's steps; of several in a process the newest sees the collectives."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._open: list[str] = []
        self._spans: list[tuple[str, str | None, Any, Any]] = []  # part, the one around it, its begin and end
        self._spare: list[torch.cuda.Event] = []
        for (kind, name), collective in COLLECTIVES.items():
            setattr(kind, name, self._timed(collective))
        self.start()

    def start(self) -> None:
        """Begin a step: what went before belongs to none."""
        self._forget()
        self._owner, self._started = threading.get_ident(), time.monotonic()

    def seconds(self) -> dict[str, float]:
        """By part, and `step` in all, of the step so far; where a result of it has been read, nothing waits for it."""
        took = dict.fromkeys(PARTS, 0.0)
        if self._spans and self._stream is not None:
            self._spans[-1][-1].synchronize()
        for name, around, begin, end in self._spans:
            seconds = end - begin if self._stream is None else begin.elapsed_time(end) / 1000
            took[name] += seconds
            if around is not None:
                took[around] -= seconds
        return took | {"step": time.monotonic() - self._started}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Everything in the body belongs to a part, but for what belongs to an inner one."""
        begin, around = self._now(), self._open[-1] if self._open else None
        self._open.append(name)
        try:
            yield
        finally:
            self._open.pop()
            self._spans.append((name, around, begin, self._now()))

    def _timed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._counts():
                return collective(*args, **kwargs)
            with self.part(COMMUNICATION):
                return collective(*args, **kwargs)

        return timed

    def _counts(self) -> bool:
        """Whether the computing waits for what this thread asks for, and it is not counted already."""
        if self._open and self._open[-1] == COMMUNICATION:
            return False
        # On a GPU the backward pass runs in threads that Python has not started. Others, a checkpoint's, do not count.
        if threading.get_ident() != self._owner and not isinstance(threading.current_thread(), threading._DummyThread):
            return False
        return self._stream is None or bool(torch.cuda.current_stream() == self._stream)

    def _now(self) -> Any:
        if self._stream is None:
            return time.perf_counter()
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def _forget(self) -> None:
        if self._stream is not None:
            self._spare += (event for _, _, begin, end in self._spans for event in (begin, end))
        self._spans.clear()
