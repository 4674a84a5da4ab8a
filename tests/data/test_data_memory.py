"""A long video and a large jsonl become shards in bounded memory, in every process: soak runs the hour and the 1 GB."""

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
from handmade import make_tokenizer, save_lines
from PIL import Image

from omniloom.data.build import build_corpus
from omniloom.data.config import CorpusConfig
from omniloom.modality.config import ModalityConfig, TokenizerConfig, VideoConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3_600)]
IS_SOAK = "OMNILOOM_SOAK" in os.environ
LIMIT_BYTES = 1_500_000_000
MINUTES = (10, 60) if IS_SOAK else (3, 6)
MEGABYTES = (100, 1_000) if IS_SOAK else (30, 60)
WITH_SOUND = ModalityConfig(video=VideoConfig(audio=True))
FILM_BYTES_A_MINUTE = 60 * 256 * 588  # one frame a second
WRITE_SHARD = """
import json, sys, time
from pathlib import Path
import psutil
from pydantic import TypeAdapter
from omniloom.data.config import DecodeConfig
from omniloom.data.source import Unit
from omniloom.data.write import write_shard
from omniloom.modality.config import ModalityConfig
def peak(pid):
    return 1024 * int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0])
unit, modality = (TypeAdapter(t).validate_json(a) for t, a in zip((Unit, ModalityConfig), sys.argv[2:]))
begun = time.perf_counter()
record = write_shard(unit, Path(sys.argv[1]), modality, DecodeConfig())
children = [peak(child.pid) for child in psutil.Process().children()]
print(json.dumps({"seconds": time.perf_counter() - begun, "own": peak("self"), "child": max(children, default=0),
                  "documents": record.documents, "media": record.media_tokens, "rejects": len(record.rejects)}))
"""


def write_film(path: Path, minutes: int) -> None:
    """720p H.264 at 25 frames a second with sound: ten seconds are encoded, and their packets repeated."""
    clip = path.with_suffix(".clip.mp4")
    rng = np.random.default_rng(0)
    clouds = Image.fromarray(rng.integers(60, 200, (9, 12), np.uint8))
    plane = np.asarray(clouds.resize((1_536, 1_080), Image.Resampling.BICUBIC))
    with av.open(str(clip), "w") as output:
        picture = output.add_stream("libx264", rate=25, options={"preset": "ultrafast", "crf": "30", "g": "50"})
        picture.width, picture.height, picture.pix_fmt = 1_280, 720, "yuv420p"
        sound = output.add_stream("aac", rate=16_000, layout="mono")
        for number in range(250):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(plane[:, number : number + 1_280]), "yuv420p")
            output.mux(picture.encode(frame))
        output.mux(picture.encode(None))
        for at in range(0, 158_000, 1_024):  # a little under ten seconds: the encoder adds some
            tone = np.sin(np.arange(at, at + 1_024) / 20, dtype=np.float32)[None] / 2
            heard = av.AudioFrame.from_ndarray(tone, "fltp", "mono")
            heard.sample_rate, heard.pts, heard.time_base = 16_000, at, Fraction(1, 16_000)
            output.mux(sound.encode(heard))
        output.mux(sound.encode(None))
    with av.open(str(path), "w") as output:
        streams: dict[int, Any] = {}
        for turn in range(6 * minutes):
            with av.open(str(clip)) as given:
                for stream in given.streams:
                    streams.setdefault(stream.index, output.add_stream_from_template(stream) if not turn else None)
                for packet in given.demux():
                    if packet.dts is None:
                        continue
                    shift = int(10 * turn / packet.time_base)
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packet.stream = streams[packet.stream.index]
                    output.mux(packet)


def write_text(path: Path, megabytes: int) -> int:
    """A jsonl of about that size, of blocks of lines that come again in other orders; how many lines."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(1, 9))) for _ in range(5_000)]
    lines = [json.dumps({"text": " ".join(generator.choices(words, k=generator.randint(20, 500)))}) for _ in range(800)]
    size = count = 0
    with path.open("w") as file:
        while size < megabytes * 1_000_000:
            generator.shuffle(lines)
            size += file.write("\n".join(lines) + "\n")
            count += len(lines)
    return count


def shard_alone(folder: Path, format: str, file: Path) -> dict[str, Any]:
    """`write_shard` of one file as one unit, in a fresh process: its peak memory and its decoding child's."""
    make_tokenizer(folder)
    unit = {"name": file.stem, "source": "s", "split": "train", "format": format, "files": [str(file)]}
    modality = json.dumps({"video": {"audio": True}})
    code = [sys.executable, "-c", WRITE_SHARD, str(folder), json.dumps(unit), modality]
    answer = json.loads(subprocess.run(code, capture_output=True, text=True, check=True).stdout)
    for shard in (folder / "shards").iterdir():
        shard.unlink()
    print(f"{file.name}: {answer}")
    assert answer["rejects"] == 0
    return answer


def test_a_long_video_streams_into_its_shard(tmp_path: Path) -> None:
    peaks = []
    for minutes in MINUTES:
        write_film(tmp_path / f"{minutes}.mp4", minutes)
        lines = save_lines(tmp_path / f"{minutes}.jsonl", [{"video": f"{minutes}.mp4"}, {"text": "red"}])
        peaks.append(shard_alone(tmp_path, "interleaved", lines))
        assert peaks[-1]["media"]["video"] == minutes * 60 * 256
    shorter, longer = peaks
    assert max(longer["own"], longer["child"]) < LIMIT_BYTES
    # The film lies in a file that is mapped, and once again nowhere; beside it stand its sound and its tokens.
    assert longer["own"] - shorter["own"] < 1.6 * (MINUTES[1] - MINUTES[0]) * FILM_BYTES_A_MINUTE
    # Decoded pictures wait to be freed, for some minutes; a minute's sound is 1 MB and stands there up to four times.
    assert longer["child"] - shorter["child"] < 120_000_000 + 4_000_000 * (MINUTES[1] - MINUTES[0])


def test_a_large_jsonl_streams_into_its_shard(tmp_path: Path) -> None:
    peaks = []
    for megabytes in MEGABYTES:
        path = tmp_path / f"{megabytes}.jsonl"
        count = write_text(path, megabytes)
        peaks.append(shard_alone(tmp_path, "jsonl", path))
        assert peaks[-1]["documents"] == count
        path.unlink()
    shorter, longer = peaks
    assert longer["own"] < LIMIT_BYTES
    assert longer["own"] - shorter["own"] < 60_000_000


def test_a_document_of_megabytes_is_encoded_in_bounded_memory(tmp_path: Path) -> None:
    """The library holds some 400 bytes a token of what it encodes at once: 0.4 GB for this text."""
    path = tmp_path / "book.jsonl"
    path.write_text(json.dumps({"text": "red green blue which " * 190_000}) + "\n")
    assert shard_alone(tmp_path, "jsonl", path)["own"] < 500_000_000


@contextmanager
def peaks_of_children() -> Iterator[dict[str, int]]:
    """VmHWM of the processes under this one, the largest of each name, looked at while the body runs."""
    found: dict[str, int] = {}
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                try:
                    name = "decoding child" if "serve(" in " ".join(process.cmdline()) else process.name()
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    found[name] = max(found.get(name, 0), 1_024 * int(status.split("VmHWM:")[1].split()[0]))
                except (psutil.Error, OSError, IndexError):
                    continue

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield found
    finally:
        done.set()
        looking.join()


def test_the_tokenize_job_holds_its_limit_in_every_process(tmp_path: Path, ray_cluster: None) -> None:
    write_film(tmp_path / "film.mp4", MINUTES[1])
    save_lines(tmp_path / "film.jsonl", [{"video": "film.mp4"}, {"text": "red"}])
    count = write_text(tmp_path / "text.jsonl", MEGABYTES[1])
    manifest = tmp_path / "manifest.yaml"
    sources = {"film": {"format": "interleaved", "train": ["film.jsonl"]}}
    sources["text"] = {"format": "jsonl", "train": ["text.jsonl"]}
    manifest.write_text(json.dumps({"sources": sources}))
    config = CorpusConfig(
        corpus=str(tmp_path / "corpus"),
        manifest=str(manifest),
        modality=WITH_SOUND,
        tokenizer=TokenizerConfig(vocab_size=1_024),
    )
    with peaks_of_children() as peaks:
        corpus = build_corpus(config)
    shards = {name: held for name, held in peaks.items() if name.startswith(("ray::", "decoding"))}
    print({name: f"{held / 1e6:.0f} MB" for name, held in sorted(shards.items())})
    assert [source.train.documents for source in corpus.index.sources] == [1, count]
    assert "decoding child" in shards
    assert max(shards.values()) < LIMIT_BYTES
