"""SIGKILL of the tokenize job and its workers: finished shards are kept, the corpus is that of an unbroken job."""

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
from handmade import save_clip, save_lines, save_picture, save_video

from omniloom.data.corpus import Corpus

OMNILOOM = str(Path(sys.executable).parent / "omniloom")
KILLS = 8 if os.environ.get("OMNILOOM_SOAK") else 2
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Twelve units of text and twelve of media, with a few documents that cannot be used."""
    generator = random.Random(0)
    words = ["".join(generator.choices("aeioklmnrst", k=generator.randint(2, 8))) for _ in range(2_000)]
    (tmp_path / "text").mkdir()
    for number in range(12):
        with (tmp_path / "text" / f"{number:02}.jsonl").open("w") as lines:
            for _ in range(6_000):
                lines.write(json.dumps({"text": " ".join(generator.choices(words, k=30))}) + "\n")
            lines.write("{\n")
    for number in range(12):
        folder = tmp_path / "media" / f"{number:02}"
        save_picture(folder / "a.png", number)
        save_clip(folder / "a.wav", number)
        save_video(folder / "a.mp4", number)
        document = [{"image": "a.png"}, {"audio": "a.wav"}, {"video": "a.mp4"}, {"text": "of all kinds"}]
        save_lines(folder / "lines.jsonl", *[document] * 40, [{"image": "nowhere.png"}])
    sources = {
        "text": {"format": "jsonl", "train": ["text/*.jsonl"]},
        "media": {"format": "interleaved", "train": ["media/*/lines.jsonl"]},
    }
    path = tmp_path / "manifest.yaml"
    path.write_text(json.dumps({"sources": sources}))
    return path


class Job:
    """The command, again and again on one folder."""

    def __init__(self, manifest: Path, corpus: Path) -> None:
        self.corpus, self.log = corpus, corpus.with_suffix(".log")
        sizes = ["modality.image.size_pixels=4", "modality.image.patch_pixels=2"]
        sizes += ["modality.video.size_pixels=4", "modality.video.patch_pixels=2"]
        words = [f"manifest={manifest}", f"corpus={corpus}", "tokenizer.vocab_size=600", "cluster.workers=2", *sizes]
        self.command = [OMNILOOM, "tokenize", *words]

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)

    def finished(self) -> dict[str, int]:
        """Shards that stand, with when they were written."""
        return {path.name: path.stat().st_mtime_ns for path in (self.corpus / "shards").glob("*.json")}

    def wait_for(self, shards: int) -> None:
        deadline = time.monotonic() + 180
        while len(self.finished()) < shards:
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            assert time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.01)

    def a_worker(self, generator: random.Random) -> int:
        """One of Ray's processes that work on a shard just now."""
        while True:
            at_work = [
                child.pid
                for child in psutil.Process(self.process.pid).children(recursive=True)
                if "ray::" in "".join(child.cmdline()[:1]) and "Map" in "".join(child.cmdline()[:1])
            ]
            if at_work:
                return generator.choice(sorted(at_work))
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            time.sleep(0.01)


def test_a_job_that_is_killed_goes_on_and_ends_with_the_same_corpus(manifest: Path, tmp_path: Path) -> None:
    unbroken, storm = Job(manifest, tmp_path / "unbroken"), Job(manifest, tmp_path / "storm")
    unbroken.start()
    assert unbroken.process.wait(timeout=400) == 0, unbroken.log.read_text()[-2000:]
    shards = len(unbroken.finished())
    assert shards >= 12

    generator = random.Random(1)
    kept: dict[str, int] = {}
    storm.start()
    for number in range(KILLS):
        storm.wait_for(generator.randint(len(kept) + 1, max(len(kept) + 1, shards * (number + 1) // (KILLS + 1))))
        victim = "job" if number % 2 == 0 else "worker"
        os.kill(storm.process.pid if victim == "job" else storm.a_worker(generator), signal.SIGKILL)
        if victim == "job":
            storm.process.wait(timeout=60)
            assert not (storm.corpus / "index.json").exists(), "the job ended before it was killed"
            kept = storm.finished()
            storm.start()
    while storm.process.wait(timeout=400) != 0:
        storm.start()
    assert {name: storm.finished()[name] for name in kept} == kept, "a finished shard was written again"
    assert Corpus(storm.corpus).sha256 == Corpus(unbroken.corpus).sha256
    rejects = list(Corpus(storm.corpus).rejects())
    assert len(rejects) == 12 + 12
    Corpus(storm.corpus).verify()
