"""What a Saver and a resume ask of an engine, without DeepSpeed: ranks are threads, or processes of one rank."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from omniloom.model.config import ModelConfig
from omniloom.train.checkpoint import State
from omniloom.train.config import TrainingRun
from omniloom.train.fragments import BUFFER, MASTER, Fragment, Whole
from omniloom.train.groups import CheckpointConfig

ROWS, COLUMNS = 6, 4
CORPUS: Any = SimpleNamespace(write_reading_rules=lambda folder: (folder / "tokenizer.json").write_text("{}"))


class FakeRanks:
    """A matrix that ranks share in parts, with a moment of it; a bias that all of them hold whole."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._barrier = threading.Barrier(ranks)
        self._said: list[Any] = [None] * ranks

    def gather(self, rank: int, mine: Any) -> list[Any]:
        self._said[rank] = mine
        self._barrier.wait(30)
        said = list(self._said)
        self._barrier.wait(30)
        return said

    def engine(self, rank: int) -> "FakeEngine":
        return FakeEngine(self, rank)

    def run(self, function: Callable[["FakeEngine"], None]) -> list[BaseException]:
        """Call it on every rank; returns what they raised."""
        raised: list[BaseException] = []

        def call(rank: int) -> None:
            try:
                function(self.engine(rank))
            except BaseException as error:
                raised.append(error)

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return raised


class FakeEngine:
    """One rank."""

    optimizer, zero_stage = "adamw", 1

    def __init__(self, ranks: FakeRanks, rank: int) -> None:
        self._ranks, self.rank, self.ranks = ranks, rank, ranks.ranks
        size = ROWS * COLUMNS
        self.start, self.stop = size * rank // ranks.ranks, size * (rank + 1) // ranks.ranks
        self.state = {
            name: torch.zeros(self.stop - self.start) for name in (MASTER, "exp_avg")
        }  # of the weight, this rank's part
        self.bias = torch.zeros(5)
        self.step = 0

    def train(self, step: int) -> None:
        """Have everything be a function of the step."""
        self.step = step
        for factor, values in enumerate(self.state.values(), start=1):
            values.copy_(torch.arange(self.start, self.stop) + 100 * factor * step)
        self.bias.copy_(torch.arange(5) - step)

    def fragments(self) -> list[Fragment]:
        parts = [Fragment("weight", name, self.start, values) for name, values in self.state.items()]
        return [Fragment("bias", BUFFER, 0, self.bias), *parts]

    def wholes(self) -> dict[str, Whole]:
        return {"weight": Whole((ROWS, COLUMNS), torch.bfloat16), "bias": Whole((5,), torch.float32)}

    def counts(self) -> tuple[dict[str, int], dict[str, float]]:
        return {"weight": self.step}, {"global_steps": self.step}

    def restore(self, states: Any, steps: Any, counters: Any, read: Callable[[list[Fragment]], None]) -> None:
        read(self.fragments())
        self.step = counters["global_steps"]
        assert steps == {"weight": self.step}
        assert set(states["weight"]) == {MASTER, "exp_avg"}

    def gather(self, mine: Any) -> list[Any]:
        return self._ranks.gather(self.rank, mine)

    def max_over_ranks(self, values: list[float]) -> list[float]:
        return [max(each) for each in zip(*self.gather(values), strict=True)]


class Told:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def event(self, kind: str, **facts: Any) -> None:
        self.events.append((kind, facts))

    def checkpoint(self, folder: Any) -> None:
        self.events.append(("known", {"folder": folder.name}))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [facts for name, facts in self.events if name == kind]


def run_in(folder: Path, **rule: Any) -> TrainingRun:
    run = TrainingRun(runs_dir=str(folder), run="run", checkpoint=CheckpointConfig(**rule))
    run.folder.mkdir(parents=True, exist_ok=True)
    return run


def saver(engine: FakeEngine, run: TrainingRun, told: Any = None) -> Any:
    from omniloom.train.saver import Saver

    return Saver(engine, ModelConfig(), CORPUS, run, told)  # type: ignore[arg-type]


def state(engine: FakeEngine) -> State:
    return State(engine.step, engine.step, engine.step, engine.ranks, engine.zero_stage, [], "")


def expected(step: int, factor: int) -> Tensor:
    return torch.arange(ROWS * COLUMNS) + 100.0 * factor * step
