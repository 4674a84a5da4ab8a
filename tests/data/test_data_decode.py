"""Media decoded in a child: whatever native code does costs its own file, and no other."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from subprocess import PIPE

import native_faults
import numpy as np
import psutil
import pytest
from handmade import TINY, save_clip, save_picture, save_video
from PIL import Image

from omniloom.data.config import DecodeConfig
from omniloom.data.decode import Decoders, close_shared, shared_decoders
from omniloom.errors import ClusterError, ConfigError, DataError
from omniloom.modality.files import Media
from omniloom.modality.media import read_media
from omniloom.modality.sequence import Segment

# What a fault that should be immediate may take on a busy machine; only hangs wait for it.
LIMITS = DecodeConfig(seconds=20, seconds_per_megabyte=0, memory_bytes=256 << 20)
HASTY = DecodeConfig(seconds=1.0, seconds_per_megabyte=0.0)

REASONS = {
    "segfault": "decoder crashed (SIGSEGV)",
    "abort": "decoder crashed (SIGABRT)",
    "exit": "decoder crashed (exit status 3)",
    "killed": "decoder crashed (SIGKILL)",
    "leave": "decoder crashed (exit status 4)",
    "grow": "decoder needed over decode.memory_bytes=268435456",
    "grow in a reader": "decoder needed over decode.memory_bytes=268435456",
    "mistake": "the decoder failed: Unsendable",
    "end of file": "the decoder failed: EOFError",
    "no answer": "the decoder failed: TypeError",
    "reject": "not a readable picture",
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decoders]:
    with Decoders(TINY, LIMITS, tmp_path_factory.mktemp("spool"), decode=native_faults.decode) as decoders:
        yield decoders


def outcome(decoders: Decoders, name: str) -> str:
    """'good', or the reason of the reject."""
    try:
        (segment,) = decoders.submit("image", Media(name, b"1234567")).result()
    except DataError as error:
        return str(error)
    assert segment.content.tolist() == [[7] * 12]
    return "good"


def spooled(decoders: Decoders) -> list[Path]:
    return [path for path in decoders.settings[2].rglob("*") if path.is_file()]


@pytest.mark.parametrize("fault", REASONS)
def test_a_fault_rejects_its_own_file_and_no_other(faulty: Decoders, fault: str) -> None:
    media = [Media(name, b"1234567") for name in ("good", "good", fault, "good", "good")]
    futures = [faulty.submit("image", medium) for medium in media]
    for future in futures[:2] + futures[3:]:
        assert future.result()[0].content.tolist() == [[7] * 12]
    with pytest.raises(DataError) as error:
        futures[2].result()
    assert str(error.value) == REASONS[fault]
    assert spooled(faulty) == []


@pytest.mark.slow
def test_each_files_outcome_is_its_own_whatever_the_order(tmp_path: Path) -> None:
    expected = REASONS | {
        "good": "good",
        "keep 150 MB": "good",
        "hang": "decoding took over 1 s (decode.seconds=1.0, decode.seconds_per_megabyte=0.0)",
    }
    limits = DecodeConfig(HASTY.seconds, HASTY.seconds_per_megabyte, LIMITS.memory_bytes)
    order = random.Random(0)
    with (
        Decoders(TINY, limits, tmp_path, workers=2, decode=native_faults.decode) as decoders,
        ThreadPoolExecutor(4) as callers,
    ):
        names = order.choices([*expected, *["good"] * len(expected)], k=1_000 if "OMNILOOM_SOAK" in os.environ else 100)
        for name, said in zip(names, callers.map(partial(outcome, decoders), names), strict=True):
            assert said == expected[name]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["hang", "hang in C"])
def test_a_hang_ends_at_its_limit(tmp_path: Path, fault: str) -> None:
    with Decoders(TINY, HASTY, tmp_path, decode=native_faults.decode) as decoders:
        names = ["good", fault, "good"]
        futures = [decoders.submit("image", Media(name, b"1")) for name in names]
        with pytest.raises(DataError) as error:
            futures[1].result()
        assert str(error.value) == "decoding took over 1 s (decode.seconds=1.0, decode.seconds_per_megabyte=0.0)"
        assert [len(future.result()) for future in (futures[0], futures[2])] == [1, 1]
        assert spooled(decoders) == []


def test_the_limit_counts_from_the_start_of_a_file(tmp_path: Path) -> None:
    with Decoders(TINY, HASTY, tmp_path, decode=native_faults.decode) as decoders:
        futures = [decoders.submit("image", Media("wait", b"1")) for _ in range(6)]  # 1.5 s, one after the other
        assert [len(future.result()) for future in futures] == [1] * 6


def test_the_limit_grows_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100_000))
    limits = DecodeConfig(seconds=0.05, seconds_per_megabyte=100)
    with Decoders(TINY, limits, tmp_path, decode=native_faults.decode) as decoders:
        assert len(decoders.submit("image", Media("wait", bytes(100_000))).result()) == 1
        assert len(decoders.submit("image", Media("wait", tmp_path / "file")).result()) == 1
        with pytest.raises(DataError, match=r"over 0\.05 s .*per_megabyte=100"):
            decoders.submit("image", Media("wait", b"")).result()


def test_one_child_serves_file_after_file(faulty: Decoders) -> None:
    processes = {int(faulty.submit("image", Media("good", b"1")).result()[0].position[0, 2]) for _ in range(5)}
    assert len(processes) == 1


def test_two_children_work_at_once(tmp_path: Path) -> None:
    with Decoders(TINY, LIMITS, tmp_path, workers=2, decode=native_faults.decode) as decoders:
        futures = [decoders.submit("image", Media("wait", bytes(number))) for number in range(8)]
        segments = [future.result()[0] for future in futures]
    assert [segment.content[0, 0] for segment in segments] == list(range(8))
    assert len({int(segment.position[0, 2]) for segment in segments}) == 2


def test_what_an_earlier_file_left_behind_rejects_no_later_one(tmp_path: Path) -> None:
    with Decoders(TINY, LIMITS, tmp_path, decode=native_faults.corrupting_decode) as decoders:
        assert [outcome(decoders, name) for name in ("poison", "good", "good")] == ["good"] * 3
    with Decoders(TINY, LIMITS, tmp_path, decode=native_faults.decode) as decoders:
        # Each keeps 150 MB, and at 256 the child is replaced.
        futures = [decoders.submit("image", Media("keep 150 MB", b"1")) for _ in range(6)]
        assert len({int(future.result()[0].position[0, 2]) for future in futures}) == 3


def test_a_child_that_dies_between_two_files_costs_none(faulty: Decoders) -> None:
    process = psutil.Process(int(faulty.submit("image", Media("good", b"1")).result()[0].position[0, 2]))
    process.kill()
    gone_within(process, 5)
    assert outcome(faulty, "good") == "good"


def test_a_child_is_bare(faulty: Decoders) -> None:
    core, standard_input, modules = faulty.submit("image", Media("limits", b"")).result()
    assert core == (0, 0)
    assert standard_input == ""
    assert not {"ray", "torch", "pytest"} & set(modules)  # neither the parent's main module nor a heavy library


def test_closing_ends_children_in_the_middle_of_a_file(tmp_path: Path) -> None:
    decoders = Decoders(TINY, LIMITS, tmp_path, decode=native_faults.decode)
    process = psutil.Process(int(decoders.submit("image", Media("good", b"1")).result()[0].position[0, 2]))
    running, waiting = (decoders.submit("image", Media("hang in C", b"1")) for _ in range(2))
    while not spooled(decoders):
        time.sleep(0.01)
    decoders.close()
    assert not process.is_running()
    assert waiting.cancelled()
    with pytest.raises(DataError, match="decoding was stopped"):
        running.result()
    assert list(tmp_path.iterdir()) == []


def gone_within(process: psutil.Process, seconds: float) -> None:
    until = time.monotonic() + seconds
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, f"{process} lives on"
        time.sleep(0.02)


@pytest.mark.parametrize("state", ["good", "hang", "hang in C"])
def test_children_end_with_a_killed_parent(tmp_path: Path, state: str) -> None:
    with parent_of_a_child(tmp_path, state) as (parent, child):
        parent.kill()
        gone_within(child, 5)


@contextmanager
def parent_of_a_child(spool: Path, fault: str) -> Iterator[tuple[subprocess.Popen[bytes], psutil.Process]]:
    """A program that waits for a child, which is in the middle of `fault`."""
    code = f"""
import sys
from pathlib import Path
import native_faults
from omniloom.data.config import DecodeConfig
from omniloom.data.decode import Decoders
from omniloom.modality.config import ModalityConfig
from omniloom.modality.files import Media
with Decoders(ModalityConfig(), DecodeConfig(), Path({str(spool)!r}), decode=native_faults.decode) as decoders:
    print(decoders.submit("image", Media("good", b"1")).result()[0].position[0, 2], flush=True)
    decoders.submit("image", Media({fault!r}, b"1")).result()
    sys.stdin.read()
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.3)
        assert child.is_running()
        yield parent, child


@pytest.mark.parametrize("fault", ["hang", "hang in C"])
def test_ctrl_c_does_not_wait_for_a_hang(tmp_path: Path, fault: str) -> None:
    with parent_of_a_child(tmp_path, fault) as (parent, child):
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.wait(5) != 0
        gone_within(child, 5)
        assert parent.stderr is not None
        words = parent.stderr.read()
        assert words.splitlines()[-1] == b"KeyboardInterrupt"
        assert b"in serve" not in words  # the child does not hear of it
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_does_not_start_is_no_files_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniloom.data.decode.__name__", "omniloom.data.nowhere")
    with (
        Decoders(TINY, LIMITS, tmp_path) as decoders,
        pytest.raises(ClusterError, match=r"did not start \(exit status 1\)"),
    ):
        decoders.submit("image", Media("good", b"1")).result()


def test_a_full_disk_is_no_files_fault(faulty: Decoders) -> None:
    with pytest.raises(ClusterError, match="no space left under"):
        faulty.submit("image", Media("full disk", b"1")).result()


def test_large_content_takes_no_room_from_decoding(tmp_path: Path) -> None:
    content = bytes(300 << 20)  # more than the child may allocate
    with Decoders(TINY, LIMITS, tmp_path, decode=native_faults.decode) as decoders:
        (segment,) = decoders.submit("image", Media("by file", content)).result()
        assert segment.position[0, 1] == len(content)
        assert spooled(decoders) == []


def test_a_film_lives_on_without_its_file(tmp_path: Path) -> None:
    video = save_video(tmp_path / "film.mp4", 0, frames=40)
    spool = tmp_path / "spool"
    spool.mkdir()
    with Decoders(TINY, DecodeConfig(), spool) as decoders:
        (segment,) = decoders.submit("video", Media("film", video)).result()
        assert isinstance(segment.content, np.memmap)
        assert spooled(decoders) == []
    assert list(spool.iterdir()) == []
    (expected,) = read_media("video", Media("film", video), TINY)
    assert np.array_equal(segment.content, expected.content)


def test_the_shared_child_outlives_a_shard(tmp_path: Path) -> None:
    first = shared_decoders(TINY, LIMITS, tmp_path)
    try:
        assert shared_decoders(TINY, DecodeConfig(20, 0, 256 << 20), tmp_path) is first
        assert shared_decoders(TINY, HASTY, tmp_path) is not first
    finally:
        close_shared()
    assert list(tmp_path.iterdir()) == []


def digest(read: Callable[[], list[Segment]]) -> list[tuple[int, bytes, bytes]] | str:
    """What came out, or why nothing did."""
    try:
        return [(segment.modality, segment.content.tobytes(), segment.position.tobytes()) for segment in read()]
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_good_files_among_bad_ones_come_out_as_they_do_in_this_process(tmp_path: Path, kind: str) -> None:
    save = {"image": save_picture, "audio": save_clip, "video": save_video}[kind]
    good = [save(tmp_path / f"{seed}", seed) for seed in range(3)]
    bomb, cut, empty = tmp_path / "bomb.png", tmp_path / "cut", tmp_path / "empty"
    Image.new("1", (20_000, 20_000)).save(bomb)  # 50 kB for 400 million pixels
    cut.write_bytes(good[0].read_bytes()[:100])
    empty.touch()
    missing = tmp_path / "missing"
    paths = [good[0], bomb, good[1], cut, empty, missing, good[2]]
    spool = tmp_path / "spool"
    spool.mkdir()
    with Decoders(TINY, DecodeConfig(), spool) as decoders:
        futures = [decoders.submit(kind, Media(path.name, path)) for path in paths]
        for path, future in zip(paths, futures, strict=True):
            assert digest(future.result) == digest(partial(read_media, kind, Media(path.name, path), TINY))
        assert spooled(decoders) == []


@pytest.mark.parametrize(
    ("limits", "key"),
    [
        (DecodeConfig(seconds=0), "decode.seconds=0"),
        (DecodeConfig(seconds_per_megabyte=-1), "decode.seconds_per_megabyte=-1"),
        (DecodeConfig(memory_bytes=0), "decode.memory_bytes=0"),
    ],
)
def test_a_limit_that_lets_nothing_through_is_refused(limits: DecodeConfig, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        limits.check()
