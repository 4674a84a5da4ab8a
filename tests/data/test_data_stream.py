"""The same global batches from any number of ranks and loader workers, over kills and resumes that change both."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from handmade import build
from stream_rank import open_rows

from omniloom.data.config import DataConfig, PhaseConfig
from omniloom.data.loader import batch_hash, row_digest
from omniloom.data.samples import write_samples

SOAK = bool(os.environ.get("OMNILOOM_SOAK"))
BATCHES, KILLS = (500, 20) if SOAK else (60, 4)
GLOBAL, SEQ_LEN = 24, 48  # a multiple of 1, 2, 3 and 8 ranks
RANKS, WORKERS = (1, 2, 3, 8), (0, 4)
PHASES = [
    {"from_sample": 120, "weights": {"words": 0.2, "tones": 2.0}},
    {"from_sample": 240, "seq_len": 64},
    {"from_sample": 480, "weights": {"fades": 3.0}, "seq_len": 40},
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words, pictures, clips and videos."""
    folder = tmp_path_factory.mktemp("stream")
    return build(write_samples("smoke", folder / "files"), folder / "corpus").folder


@pytest.fixture(scope="module")
def expected(corpus: Path) -> list[str]:
    """Each global batch's hash, its rows read one by one in this process."""
    data = DataConfig(seq_len=SEQ_LEN, phases=[PhaseConfig(**phase) for phase in PHASES])
    rows = open_rows(corpus, data, BATCHES * GLOBAL)
    digests = [row_digest(rows[index]) for index in range(BATCHES * GLOBAL)]
    return [batch_hash(digests[step * GLOBAL : (step + 1) * GLOBAL]) for step in range(BATCHES)]


class Run:
    """Ranks as processes of their own, which read from step `first` on."""

    def __init__(self, corpus: Path, folder: Path, ranks: int, workers: int, first: int) -> None:
        self.first = first
        self.logs = [folder / f"{first}-{rank}.log" for rank in range(ranks)]
        asked = {
            "corpus": str(corpus),
            "rows": BATCHES * GLOBAL,
            "seq_len": SEQ_LEN,
            "phases": PHASES,
            "batch": GLOBAL,
            "micro": 1 if ranks == 8 else GLOBAL // ranks // 2,
            "ranks": ranks,
            "first": first,
            "steps": BATCHES,
            "workers": workers,
        }
        command = [sys.executable, str(Path(__file__).with_name("stream_rank.py"))]
        self.processes = [
            subprocess.Popen([*command, json.dumps(asked | {"rank": rank, "log": str(log)})])
            for rank, log in enumerate(self.logs)
        ]

    def hashes(self) -> list[str]:
        """The global batches that every rank has read."""
        texts = [log.read_text() if log.is_file() else "" for log in self.logs]
        parts = [[line.split() for line in text.splitlines() if line.endswith(" .")] for text in texts]
        steps = []
        for lines in zip(*parts, strict=False):
            assert {int(line[0]) for line in lines} == {self.first + len(steps)}
            steps.append(batch_hash([bytes.fromhex(line[1]) for line in lines]))
        return steps

    def kill_after(self, steps: int) -> None:
        """Kill -9 all ranks once so many batches are read; they are in the middle of the next ones."""
        while len(self.hashes()) < steps and any(process.poll() is None for process in self.processes):
            time.sleep(0.01)
        helpers = [child for p in self.processes if p.poll() is None for child in psutil.Process(p.pid).children(True)]
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()
        _, alive = psutil.wait_procs(helpers, 30)
        assert not alive, "loader workers go on without their rank"

    def finish(self) -> None:
        assert [process.wait(timeout=240) for process in self.processes] == [0] * len(self.processes)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_kills_and_other_ranks_change_no_batch(corpus: Path, expected: list[str], tmp_path: Path) -> None:
    generator = random.Random(0)
    points = sorted(generator.sample(range(1, BATCHES), KILLS))
    read: list[str] = []
    ranks = generator.choice(RANKS)
    for point in points:
        ranks = generator.choice([other for other in RANKS if other != ranks])
        run = Run(corpus, tmp_path, ranks, generator.choice(WORKERS), first=len(read))
        run.kill_after(max(point - len(read), 1))
        read += run.hashes()
        assert read == expected[: len(read)]
        if len(read) >= BATCHES:
            break
    run = Run(corpus, tmp_path, generator.choice([other for other in RANKS if other != ranks]), 4, first=len(read))
    run.finish()
    assert read + run.hashes() == expected
    assert len(set(expected)) == BATCHES


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("ranks", RANKS if SOAK else (3,))
def test_any_number_of_ranks_and_workers_gives_the_same_batches(
    ranks: int, workers: int, corpus: Path, expected: list[str], tmp_path: Path
) -> None:
    run = Run(corpus, tmp_path, ranks, workers, first=0)
    run.finish()
    assert run.hashes() == expected
